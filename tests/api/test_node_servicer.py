"""NodeService: the node, GPU holders and waiters, and the node's part of the ledger."""

from __future__ import annotations

import asyncio

import pytest

from agent.api import node_ledger
from agent.api.node_ledger import NodeLedger
from agent.api.node_servicer import NodeServicer
from agent.core.errors import ExhaustedError, UnavailableError
from agent.core.types import SECOND_NS
from agent.v1 import node_service_pb2 as pb
from agent.v1.types_pb2 import Node
from tests.api.test_instance_servicer import observer_of
from tests.host.rig import NodeRig, enter, eventually, node_rig


def servicer_of(world: NodeRig) -> NodeServicer:
    return NodeServicer(observer_of(world), NodeLedger(world.store, world.billing.unwritten))


async def test_the_node_shows_holders_and_waiters() -> None:
    async with node_rig(per_gpu=2) as world:
        world.gpus.gpus = world.gpus.gpus[:1]
        await world.boot()
        busy = await world.running()
        await enter(busy)
        waiter = await world.create()
        await eventually(lambda: bool(world.node.broker.allocator.queue))
        node = (await servicer_of(world).GetNode(pb.GetNodeRequest(), None)).node
        (gpu,) = node.gpus
        assert (list(gpu.holder_uids), list(gpu.waiter_uids)) == ([busy.uid], [waiter.uid])
        assert node.state == Node.STATE_READY


async def test_open_and_sealed_windows_appear_once_and_are_paged() -> None:
    async with node_rig() as world:
        actor = await world.frozen()
        world.clock.advance(SECOND_NS)
        await world.billing.flush()
        servicer = servicer_of(world)
        sealed = await servicer.ListUsageWindows(pb.ListUsageWindowsRequest(instance_uid=actor.uid), None)
        both = await servicer.ListUsageWindows(pb.ListUsageWindowsRequest(include_open=True), None)
        keys = [(window.instance_uid, window.seq) for window in both.windows]
        assert len(keys) == len(set(keys)) == len(sealed.windows) + 1
        seen, token = 0, ""
        while True:
            request = pb.ListUsageWindowsRequest(include_open=True, page_size=1, page_token=token)
            answer = await servicer.ListUsageWindows(request, None)
            seen, token = seen + len(answer.windows), answer.next_page_token
            if not token:
                break
        assert seen == len(keys)


async def test_too_long_ledger_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_ledger, "MAX_WINDOWS", 2)
    async with node_rig() as world:
        await world.frozen()
        await world.billing.flush()
        with pytest.raises(ExhaustedError, match="LEDGER_TOO_LONG"):
            await servicer_of(world).ListUsageWindows(pb.ListUsageWindowsRequest(), None)


async def test_failing_store_raises() -> None:
    async with node_rig() as world:
        world.store.failing = True
        with pytest.raises(UnavailableError, match="STORE_FAILED"):
            await asyncio.wait_for(servicer_of(world).ListUsageWindows(pb.ListUsageWindowsRequest(), None), 5)
        world.store.failing = False
