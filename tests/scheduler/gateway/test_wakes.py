"""Direct wakes: a lone request is dispatched to the frozen instance and wakes it, in one trip instead of three."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent.core.dispatch.events import WakeAnswered
from agent.core.types import MILLISECOND_NS, InstanceState
from tests.fakes.agent_node import WAKE_MS, hold, refuse, refuse_before_body, vanish, vanish_waiting
from tests.scheduler.gateway.rig import GatewayRig, gateway_rig

GET = b"GET /fn/ocr/read HTTP/1.1\r\nhost: gateway\r\n\r\n"
FROZEN = InstanceState.FROZEN


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[GatewayRig]:
    """One instance is frozen on n1. The ingresses wake any instance."""
    async with gateway_rig(str(tmp_path), "n1", "n2") as made:
        await made.deploy(instance_concurrency=1)
        made.instance("i1", FROZEN)
        for ingress in made.ingresses.values():
            ingress.asleep = lambda uid: True
            ingress.wake = _woken
        yield made


async def _woken(uid: str) -> None:
    pass


async def test_a_direct_wake_is_served_by_its_instance_and_reports_the_wake_time(rig: GatewayRig) -> None:
    status, headers, body = await rig.ask(GET)
    assert (status, body) == (200, b"served by i1")
    assert headers[b"x-hibernode-wake-ms"] == WAKE_MS
    assert float(headers[b"x-hibernode-queue-ms"]) >= float(WAKE_MS), "the whole wait, the wake included"
    assert rig.wakes == [], "no wake call came first"
    assert rig.dispatcher.queue_state("ocr").awake_slots == 1, "known from the answer, before any report"
    assert rig.dispatcher.leased("i1") == 0


async def test_the_next_request_is_dispatched_when_the_direct_wake_answers(rig: GatewayRig) -> None:
    go = asyncio.Event()
    rig.ingresses["n1"].script.append(hold(go))
    first = asyncio.create_task(rig.ask(GET))
    await rig.ingresses["n1"].until_received(1)
    second = asyncio.create_task(rig.ask(GET))
    await rig.until(rig.queued, "the second is queued")
    go.set()
    assert [(await first)[0], (await second)[0]] == [200, 200]


async def test_a_refused_direct_wake_wakes_another_instance(rig: GatewayRig) -> None:
    rig.instance("i2", FROZEN, node="n2")
    for ingress in rig.ingresses.values():
        ingress.script.append(refuse("RESTORE_FAILED"))
    asked = asyncio.create_task(rig.ask(b"POST /fn/ocr/ HTTP/1.1\r\nhost: g\r\ncontent-length: 4\r\n\r\nbody"))
    await rig.until(lambda: rig.wakes, "the other one is asked to wake")
    (first,) = [one for one in rig.ingresses.values() if one.received]
    (wake,) = rig.wakes
    assert {first.received[0].uid, wake.uid} == {"i1", "i2"}
    rig.ingresses[wake.node].script.clear()
    rig.apply(WakeAnswered(wake.uid))
    status, headers, body = await asked
    assert (status, body, headers[b"x-fc-instance-id"]) == (200, b"body", wake.uid.encode())


async def test_a_large_body_stays_with_the_client_until_it_is_awake(rig: GatewayRig) -> None:
    rig.ingresses["n1"].script.append(refuse_before_body("RESTORE_FAILED"))
    body = bytes(range(256)) * 1024
    wire = await rig.wire()
    await wire.send(
        b"POST /fn/ocr/ HTTP/1.1\r\nhost: g\r\nexpect: 100-continue\r\ncontent-length: %d\r\n\r\n" % len(body)
    )
    await rig.until(rig.queued, "refused and queued again")
    rig.instance("i2", FROZEN, node="n2")
    await rig.until(lambda: rig.wakes, "i2 is asked to wake")
    rig.apply(WakeAnswered("i2"))
    assert (await wire.head())[0] == 100
    await wire.send(body)
    status, _, answer = await wire.message()
    assert (status, answer) == (200, body)


async def test_a_client_that_leaves_takes_its_wake_with_it(rig: GatewayRig) -> None:
    ingress = rig.ingresses["n1"]
    ingress.script.append(hold(asyncio.Event()))
    wire = await rig.wire()
    await wire.send(GET)
    await ingress.until_received(1)
    wire.close()
    await rig.until(lambda: not rig.dispatcher.leased("i1"), "the lease is back")
    async with asyncio.timeout(10):
        await ingress.left.wait()
    assert rig.dispatcher.queue_state("ocr").waking == 0
    assert (await rig.ask(GET))[0] == 200


async def test_a_direct_wake_past_its_queue_timeout_is_504_without_another_wake(rig: GatewayRig) -> None:
    """The agent gives up at the deadline in its headers, which is that of the gateway."""
    await rig.deploy(queue_timeout_ns=30 * MILLISECOND_NS)
    rig.instance("i2", FROZEN, node="n2")

    async def never(uid: str) -> None:
        await asyncio.Event().wait()

    for ingress in rig.ingresses.values():
        ingress.wake = never
    status, _, body = await rig.ask(GET)
    assert (status, json.loads(body)["Code"]) == (504, "QueueTimeout")
    assert rig.wakes == []


async def test_a_request_waiting_at_a_dying_agent_is_dispatched_again(rig: GatewayRig) -> None:
    """Without a start notice (102) no byte has reached the instance, so the request goes elsewhere."""
    rig.ingresses["n1"].default = vanish_waiting
    asked = asyncio.create_task(rig.ask(GET))
    await rig.until(lambda: rig.suspects, "the node is suspect")
    rig.instance("i2", node="n2")
    status, headers, _ = await asked
    assert (status, headers[b"x-fc-instance-id"]) == (200, b"i2")
    assert len(rig.ingresses["n1"].received) == 1


async def test_an_agent_that_dies_after_the_start_notice_is_502(rig: GatewayRig) -> None:
    """How much of it the instance has received is unknown."""
    rig.instance("i2", FROZEN, node="n2")
    for ingress in rig.ingresses.values():
        ingress.default = vanish
    assert (await rig.ask(GET))[0] == 502
    assert sum(len(ingress.received) for ingress in rig.ingresses.values()) == 1
    assert rig.dispatcher.queue_state("ocr").waking == 0


async def test_a_direct_wake_at_an_unreachable_node_is_dispatched_again(rig: GatewayRig) -> None:
    await rig.ingresses["n1"].kill()
    asked = asyncio.create_task(rig.ask(GET))
    await rig.until(lambda: rig.suspects, "the node is suspect")
    rig.instance("i2", node="n2")
    assert (await asked)[1][b"x-fc-instance-id"] == b"i2"
