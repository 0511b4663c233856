"""The gateway's counters of each function: every request ends in exactly one of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent.core.dispatch.events import InstanceReported, NodeReported
from agent.core.traffic import Traffic
from agent.core.types import MILLISECOND_NS, InstanceState
from tests.fakes.agent_node import die_in_the_middle, hold, vanish
from tests.scheduler.gateway.rig import GatewayRig, gateway_rig

GET = b"GET /fn/ocr/ HTTP/1.1\r\nhost: g\r\n\r\n"


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[GatewayRig]:
    async with gateway_rig(str(tmp_path), "n1") as made:
        await made.deploy(queue_length=1)
        yield made


def traffic(rig: GatewayRig) -> Traffic:
    return rig.gateway.traffic.of("ocr")


def places(rig: GatewayRig) -> dict[str, int]:
    """Where requests have ended, without the empty ones. They add up."""
    counts = traffic(rig)
    ended = {f"{number}xx": counts.responses[number] for number in range(1, 6)}
    ended |= {"left": counts.left, "cut": counts.cut}
    assert sum(ended.values()) == counts.invocations
    return {name: count for name, count in ended.items() if count}


async def test_an_answer_is_counted_with_its_class_and_its_time(rig: GatewayRig) -> None:
    rig.instance("i1")
    assert (await rig.ask(GET))[0] == 200
    assert places(rig) == {"2xx": 1}
    assert 0 < traffic(rig).duration.sum_ns < 10_000 * MILLISECOND_NS
    assert traffic(rig).queue.sum_ns == 0, "it did not wait"
    assert sum(traffic(rig).wake.counts) == 0


async def test_a_wait_is_counted_apart(rig: GatewayRig) -> None:
    asking = asyncio.create_task(rig.ask(GET))
    await rig.until(rig.queued, "it waits")
    rig.apply(InstanceReported("i1", "ocr", "n1", InstanceState.RUNNING))
    assert (await asking)[0] == 200
    assert 0 < traffic(rig).queue.sum_ns <= traffic(rig).duration.sum_ns


async def test_a_full_queue_is_a_throttle_of_concurrency(rig: GatewayRig) -> None:
    waiting = asyncio.create_task(rig.ask(GET))
    await rig.until(rig.queued, "one waits")
    assert (await rig.ask(GET))[0] == 429
    assert (traffic(rig).queue_full, traffic(rig).client_errors) == (1, 0)
    rig.instance("i1")
    assert (await waiting)[0] == 200
    assert places(rig) == {"2xx": 1, "4xx": 1}


async def test_no_instances_is_a_throttle_of_resources(rig: GatewayRig) -> None:
    await rig.deploy(target=0)
    assert (await rig.ask(GET))[0] == 503
    assert (traffic(rig).no_capacity, traffic(rig).server_errors) == (1, 0)
    assert places(rig) == {"5xx": 1}


async def test_a_client_that_leaves_is_neither_an_answer_nor_an_error(rig: GatewayRig) -> None:
    for waits_at in ("queue", "instance"):
        wire = await rig.wire()
        await wire.send(GET)
        if waits_at == "queue":
            await rig.until(rig.queued, "it waits")
        else:
            rig.ingresses["n1"].default = hold(asyncio.Event())
            rig.instance("i1")
            await rig.ingresses["n1"].until_received(1)
        left = traffic(rig).left
        wire.close()
        async with asyncio.timeout(10):
            while traffic(rig).left == left:  # noqa: ASYNC110 - what is waited for has no event
                await asyncio.sleep(0.001)
    assert places(rig) == {"left": 2}


async def test_a_crash_counts_as_server_error_and_a_cut_answer_as_cut(rig: GatewayRig) -> None:
    rig.instance("i1")
    seen = asyncio.Event()
    rig.ingresses["n1"].script += [die_in_the_middle(seen), vanish]
    wire = await rig.wire()
    await wire.send(GET)
    assert (await wire.head())[0] == 200
    seen.set()
    await wire.rest()
    await rig.until(lambda: not rig.dispatcher.leased("i1"), "the lease is back")
    assert places(rig) == {"cut": 1}
    assert rig.gateway.counts.cut == 1
    rig.apply(NodeReported("n1"))
    assert (await rig.ask(GET))[0] == 502
    assert traffic(rig).server_errors == 1
    assert places(rig) == {"cut": 1, "5xx": 1}


async def test_a_wrong_method_counts_for_the_function_an_unknown_function_does_not(rig: GatewayRig) -> None:
    await rig.deploy(methods=("POST",))
    assert (await rig.ask(GET))[0] == 405
    assert (await rig.ask(GET.replace(b"ocr", b"other")))[0] == 404
    assert traffic(rig).client_errors == 1
    assert set(rig.gateway.traffic.all()) == {"ocr"}, "unknown names are not counted"


async def test_a_deleted_function_takes_its_counters_with_it(rig: GatewayRig) -> None:
    rig.instance("i1")
    await rig.ask(GET)
    await rig.catalog.delete("ocr")
    await rig.catalog.forget("ocr")
    assert rig.gateway.traffic.all() == {}
    await rig.deploy()
    assert traffic(rig).invocations == 0
