"""The bill of a fleet through a clock step, a killed agent, a lost and returning node, and a killed scheduler.

The watcher's log says which instance lived when (life_log.py). All hosts here share one CLOCK_MONOTONIC, so that the
windows can be compared with it, and with when each node was given up.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace

import pytest

from agent.core.types import MILLISECOND_NS, SECOND_NS
from agent.v1 import types_pb2
from agent.v1 import usage_service_pb2 as usage_pb
from tests.e2e.fleet_world import Fleet, partitioned, running_fleet, why_not
from tests.e2e.ledger import by_instance, check_contiguous
from tests.e2e.life_log import Life, LifeLog, watching
from tests.e2e.stack import CALL_S, echo, until
from tests.e2e.stepped_clock import SteppedClock
from tests.e2e.test_drain import hibernode

NODES = ("gpu-1", "gpu-2", "gpu-3")
TARGETS = {"ocr": 3}
REPORT = {"suspect": "1500ms", "lost": "4s"}
AWAY_S = 5.0
"""How long a node stays lost, at least."""
START_NS = 3 * SECOND_NS
"""An instance's start is not billed before it has its GPU: so much may be missing from the bill of a life."""
EDGE_NS = 300 * MILLISECOND_NS
"""The watcher sees the ends of lives, losses and returns late by up to this much."""
LOST = types_pb2.Node.STATE_LOST

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.alone]


@pytest.fixture(autouse=True)
def _namespaces() -> None:
    if reason := why_not():
        pytest.skip(reason)


@dataclass
class Outages:
    """By node, in CLOCK_MONOTONIC ns: from when it was seen to be lost until it was let back (`surely`), and until the
    fleet was complete again (`at_most`)."""

    surely: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    at_most: dict[str, list[tuple[int, int]]] = field(default_factory=dict)

    async def while_lost(self, fleet: Fleet, name: str, meanwhile: Callable[[], object] = lambda: None) -> int:
        """Wait until the node is lost and its instances are replaced; returns when it was seen to be lost."""

        async def lost() -> bool:
            return (await fleet.node_states()).get(name) == LOST

        async def replaced() -> bool:
            return (await fleet.function("ocr")).current == TARGETS["ocr"]

        await until(f"{name} is lost", lost)
        lost_ns = time.monotonic_ns()
        await until("its instances are replaced", replaced)
        meanwhile()
        await asyncio.sleep(AWAY_S)  # the duration
        return lost_ns

    def let_back(self, name: str, lost_ns: int) -> None:
        self.surely.setdefault(name, []).append((lost_ns, time.monotonic_ns()))

    def complete(self, name: str, lost_ns: int) -> None:
        self.at_most.setdefault(name, []).append((lost_ns - EDGE_NS, time.monotonic_ns()))


@pytest.mark.timeout(240)
async def test_no_second_of_an_outage_is_billed_twice(record_property: Callable[[str, object], None]) -> None:
    async with AsyncExitStack() as stack:
        fleet = await stack.enter_async_context(running_fleet(*NODES, scheduler={"report": REPORT}))
        outages, log = Outages(), await stack.enter_async_context(watching(fleet))
        clock = SteppedClock(fleet.hub.folder)
        await restart_agent_with(fleet, "gpu-1", clock)
        spec = echo("ocr")
        await fleet.deploy(replace(spec, idle=replace(spec.idle, freeze_after_ns=SECOND_NS)), TARGETS["ocr"])
        await fleet.wait_until_complete(TARGETS)
        load = asyncio.create_task(traffic(fleet))
        try:
            for step_s in (3600, -7200):
                clock.step(step_s)
                await asyncio.sleep(2)  # windows begin and end on either side of the step
            await an_agent_is_killed_for_a_moment(fleet, "gpu-2")
            await a_node_is_cut_off(fleet, "gpu-3", outages)
            await an_agent_and_the_scheduler_are_killed(fleet, "gpu-2", outages)
        finally:
            load.cancel()
            await asyncio.gather(load, return_exceptions=True)
        await fleet.remove_functions(list(TARGETS))
        await until("the watcher has seen the ends", lambda: all_gone(log))
        windows = await uploaded(fleet)
        code, text = await hibernode(fleet, "usage", "reconcile")
        assert code == 0, text
        figures = check_bill(windows, log, outages)
        for name, value in figures.items():
            record_property(name, value)


async def restart_agent_with(fleet: Fleet, name: str, clock: SteppedClock) -> None:
    """The agent's wall clock can be stepped from now on."""
    node = fleet.nodes[name]
    assert node.terminate("agent") == 0
    (node.folder / "agent" / "endpoints.json").unlink(missing_ok=True)
    node.environment.update(clock.environment)
    await node.start_agent()
    await fleet.wait_until_complete({})


async def traffic(fleet: Fleet) -> None:
    """A request at a time; those inside an outage fail."""
    assert fleet.http is not None
    while True:
        try:
            async with fleet.http.post(f"{fleet.gateway}/fn/ocr/sleep?ms=200") as answer:
                await answer.read()
        except Exception:  # the scheduler is killed
            await asyncio.sleep(0.1)
        await asyncio.sleep(0.3)


async def an_agent_is_killed_for_a_moment(fleet: Fleet, name: str) -> None:
    """Too short to be lost: the time without an agent is idle."""
    fleet.nodes[name].kill("agent")
    await fleet.nodes[name].start_agent()
    await fleet.wait_until_complete(TARGETS)


async def a_node_is_cut_off(fleet: Fleet, name: str, outages: Outages) -> None:
    """Its agent and instances go on, unheard, and meter."""
    with partitioned(fleet, name):
        lost_ns = await outages.while_lost(fleet, name)
        outages.let_back(name, lost_ns)
    await fleet.wait_until_complete(TARGETS)
    outages.complete(name, lost_ns)


async def an_agent_and_the_scheduler_are_killed(fleet: Fleet, name: str, outages: Outages) -> None:
    """The instances outlive their agent, and the scheduler that gave the node up is not the one it comes back to."""
    fleet.nodes[name].kill("agent")
    lost_ns = await outages.while_lost(fleet, name, lambda: fleet.hub.kill("scheduler"))
    outages.let_back(name, lost_ns)
    fleet.hub.respawn_scheduler()
    await fleet.hub.wait_for_endpoints("scheduler")
    await fleet.nodes[name].start_agent()
    await fleet.wait_until_complete(TARGETS)
    outages.complete(name, lost_ns)


async def all_gone(log: LifeLog) -> bool:
    return all(life.gone_ns for life in log.lives.values())


async def uploaded(fleet: Fleet) -> list[types_pb2.UsageWindow]:
    """The scheduler's windows, once it has all that the nodes have."""
    found: list[types_pb2.UsageWindow] = []

    async def complete() -> bool:
        found[:] = await stored(fleet)
        keys = {(one.instance_uid, one.seq) for one in found}
        metered = [one for node in fleet.nodes.values() for one in await node.windows()]
        return all((one.instance_uid, one.seq) in keys for one in metered)

    await until("usage is uploaded", complete)
    return found


async def stored(fleet: Fleet) -> list[types_pb2.UsageWindow]:
    found: list[types_pb2.UsageWindow] = []
    token = ""
    async with fleet.hub.channel("scheduler") as channel:
        while True:
            request = usage_pb.ListUsageRequest(include_windows=True, page_size=1000, page_token=token)
            answer = await channel.call(channel.usage.ListUsage, request, CALL_S)
            found.extend(answer.windows)
            token = answer.next_page_token
            if not token:
                return found


def billed(window: types_pb2.UsageWindow) -> int:
    return window.active_ns + window.idle_ns


def length(window: types_pb2.UsageWindow) -> int:
    return window.end_mono_ns - window.start_mono_ns


def overlap(start: int, end: int, spans: Iterable[tuple[int, int]]) -> int:
    """How much of [start, end) lies in the spans."""
    return sum(max(0, min(end, last) - max(start, first)) for first, last in spans)


def check_bill(windows: list[types_pb2.UsageWindow], log: LifeLog, outages: Outages) -> dict[str, object]:
    """Compare the bill with the watcher's log. Returns the figures, in seconds."""
    check_contiguous(windows)
    bills = by_instance(windows)
    assert bills.keys() == log.lives.keys(), "what ran is billed, and nothing else"
    for uid, mine in bills.items():
        check_life(uid, mine, log.lives[uid], outages)
    offsets = {(w.start_wall_ns - w.start_mono_ns) // (1000 * SECOND_NS) for w in windows if w.node == "gpu-1"}
    assert len(offsets) >= 2, "its wall clock was stepped"
    metered_away = 0
    for name, spans in outages.surely.items():
        for start, end in spans:
            on_node = [w for w in windows if w.node == name and overlap(w.start_mono_ns, w.end_mono_ns, [(start, end)])]
            metered_away += sum(overlap(w.start_mono_ns, w.end_mono_ns, [(start, end)]) for w in on_node)
            check_no_second_twice(windows, start, end)
    assert metered_away > AWAY_S * SECOND_NS * sum(map(len, outages.surely.values())), "instances outlived the losses"
    lived = sum(life.gone_ns - life.born_ns for life in log.lives.values())
    sums = {"lived_s": lived, "billed_s": sum(map(billed, windows)), "unbilled_while_lost_s": metered_away}
    return {"instances": len(bills), **{name: round(ns / SECOND_NS, 1) for name, ns in sums.items()}}


def check_life(uid: str, mine: list[types_pb2.UsageWindow], life: Life, outages: Outages) -> None:
    """Billed is what it lived, less its start and the time in which its node was given up."""
    total = sum(map(billed, mine))
    surely, at_most = outages.surely.get(life.node, []), outages.at_most.get(life.node, [])
    most = life.gone_ns - life.born_ns - overlap(life.born_ns, life.seen_ns, surely)
    least = life.seen_ns - life.born_ns - overlap(life.born_ns, life.seen_ns, at_most) - START_NS
    assert least <= total <= most + SECOND_NS, f"{uid} on {life.node}: {least} <= {total} <= {most} + 1 s"
    for window in mine:
        away = overlap(window.start_mono_ns, window.end_mono_ns, surely)
        assert billed(window) <= length(window) - away + EDGE_NS, f"{uid}: billed while given up: {window}"


def check_no_second_twice(windows: list[types_pb2.UsageWindow], start: int, end: int) -> None:
    """Until a node is let back, the bill is that of as many instances as there should be, and of none more.

    Of a window that is partly outside, only what must lie inside counts."""
    total = 0
    for window in windows:
        inside = overlap(window.start_mono_ns, window.end_mono_ns, [(start, end)])
        total += max(0, billed(window) - (length(window) - inside))
    most = TARGETS["ocr"] * (end - start + EDGE_NS)
    assert total <= most, f"{total} ns billed, and {TARGETS['ocr']} instances in {end - start} ns are {most} at most"
