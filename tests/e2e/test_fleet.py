"""Three agents on hosts of their own, and whatever may happen to a fleet, under load.

Only what was inside a process when it was killed is lost, nothing is executed twice, everybody has its instances
again, and the bill stays between what the instances and what their clients say.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent.core.types import SECOND_NS
from agent.v1 import types_pb2
from tests.e2e.fleet_checks import Kills, check_answers, check_bill
from tests.e2e.fleet_load import COMPRESSED, Clients, Run, Told, chat, executions, jobs, milliseconds, ocr
from tests.e2e.fleet_world import Fleet, partitioned, running_fleet, why_not
from tests.e2e.stack import until

NODES = ("gpu-1", "gpu-2", "gpu-3")
TARGETS = {"ocr": 4, "chat": 3}
WORTH_S = 600
"""Ten minutes, compressed."""
DOWN_S = 1.0
PARTITION_S = 5.0
"""Longer than until a node is suspect (3 s), shorter than until it is given up (10 s)."""
LONG_PARTITION_S = 13.0
BACK_S = 2.0
"""A restarted scheduler has its fleet again within so long."""
SEED = 5

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.alone]

Record = Callable[[str, object], None]


@pytest.fixture(autouse=True)
def _namespaces() -> None:
    if reason := why_not():
        pytest.skip(reason)


async def deployed(fleet: Fleet) -> Path:
    """Both functions with their targets; where their instances write what they did."""
    log = fleet.hub.folder / "requests.log"
    log.touch()
    log.chmod(0o666)
    await fleet.deploy(ocr(log), TARGETS["ocr"])
    await fleet.deploy(chat(log), TARGETS["chat"])
    await fleet.wait_until_complete(TARGETS)
    return log


async def busy(fleet: Fleet, node: str) -> None:
    """Requests are inside the node."""

    async def inside() -> bool:
        return any(one.in_flight for one in await fleet.nodes[node].instances())

    await until(f"a request is inside {node}", inside)


def failed(clients: Clients) -> list[Told]:
    return [one for one in clients.told if not one.served]


@pytest.mark.timeout(240)
async def test_a_fleet_serves_through_a_kill_a_partition_and_a_restart(record_property: Record) -> None:
    async with running_fleet(*NODES) as fleet:
        log = await deployed(fleet)
        before = await fleet.owners()
        assert set(before.values()) == set(NODES), "instances are spread over the nodes"
        clients, kills = Clients(fleet), Kills()
        traffic = jobs(tuple(TARGETS), SEED)
        await clients.run(traffic, WORTH_S / COMPRESSED)
        assert not failed(clients), failed(clients)[:3]
        calm = len(clients.told)

        load = asyncio.create_task(clients.run(traffic))
        try:
            await an_agent_is_killed(fleet, "gpu-2", kills)
            await a_node_is_cut_off(fleet, "gpu-3")
            restart = await the_scheduler_is_killed(fleet, clients, kills)
        finally:
            load.cancel()
        await clients.finish()
        await asyncio.gather(load, return_exceptions=True)

        await fleet.wait_until_complete(TARGETS)
        assert await fleet.owners() == before, "the same instances: none lost, none made twice"
        wakes = sum(one.wake_count for mine in (await fleet.instances()).values() for one in mine)
        assert wakes > 2 * len(before), f"{wakes} wakes are hardly traffic with pauses"
        await fleet.remove_functions(list(TARGETS))
        await everything_is_uploaded(fleet)
        runs = executions(log)
        lost = check_answers(clients.told, runs, before, kills)
        bill = check_bill(await fleet.usage(), clients.told, runs, kills)
        assert not any(node.leftovers() for node in fleet.nodes.values())
        figures: dict[str, object] = {"requests": len(clients.told), "requests_calm": calm, "wakes": wakes}
        figures |= {"lost_in_agent": lost[0], "lost_in_scheduler": lost[1]}
        figures |= {**check_restart(restart, clients.told, runs), **bill}
        for name, value in figures.items():
            record_property(name, value)


async def an_agent_is_killed(fleet: Fleet, name: str, kills: Kills) -> None:
    node = fleet.nodes[name]
    await busy(fleet, name)
    kills.agent(name, node.kill("agent"))
    await asyncio.sleep(DOWN_S)  # nobody restarts it at once
    await node.start_agent()
    await fleet.wait_until_complete(TARGETS)
    await busy(fleet, name)


async def a_node_is_cut_off(fleet: Fleet, name: str) -> None:
    """Requests inside wait until it is over: no failure."""
    await busy(fleet, name)
    with partitioned(fleet, name):
        await asyncio.sleep(PARTITION_S)  # how long it lasts
        assert (await fleet.node_states())[name] == types_pb2.Node.STATE_SUSPECT
    await fleet.wait_until_complete(TARGETS)
    await busy(fleet, name)


@dataclass(frozen=True, slots=True)
class Restart:
    """CLOCK_MONOTONIC ns."""

    killed_ns: int
    ready_ns: int
    settled_ns: int


async def the_scheduler_is_killed(fleet: Fleet, clients: Clients, kills: Kills) -> Restart:
    """And is started again a second later; ready = listens, settled = has its fleet again."""
    at_ns = fleet.hub.kill("scheduler")
    kills.scheduler.append(at_ns)
    await asyncio.sleep(DOWN_S)  # nobody restarts it at once
    fleet.hub.respawn_scheduler()
    await fleet.hub.wait_for_endpoints("scheduler")
    ready_ns = time.monotonic_ns()
    await fleet.wait_until_complete(TARGETS)
    settled_ns = time.monotonic_ns()

    async def served() -> bool:
        return sum(one.served and one.ended_ns > settled_ns for one in clients.told) >= 5

    await until("requests are served by the new scheduler", served)
    return Restart(at_ns, ready_ns, settled_ns)


def check_restart(restart: Restart, told: list[Told], runs: Mapping[str, list[Run]]) -> dict[str, object]:
    """How long the new scheduler took until it had its fleet, and until an instance had a request."""
    began = [runs[one.request_id][0].start_ns for one in told if one.served]
    first_ns = min(start_ns for start_ns in began if start_ns > restart.killed_ns)
    figures = {
        "ready_after_kill_ms": milliseconds(restart.ready_ns - restart.killed_ns),
        "settled_after_ready_ms": milliseconds(restart.settled_ns - restart.ready_ns),
        "dispatched_after_ready_ms": milliseconds(first_ns - restart.ready_ns),
    }
    assert figures["settled_after_ready_ms"] < BACK_S * 1000, figures
    assert figures["dispatched_after_ready_ms"] < BACK_S * 1000, figures
    return dict(figures)


async def everything_is_uploaded(fleet: Fleet) -> None:
    """The scheduler's database has what the nodes' ledgers have."""

    async def same() -> bool:
        ledgers: dict[str, int] = {}
        for node in fleet.nodes.values():
            for window in await node.windows():
                assert window.sealed, "its instance has ended"
                ledgers[window.instance_uid] = ledgers.get(window.instance_uid, 0) + window.active_ns
        return {uid: row.active_ns for uid, row in (await fleet.usage()).items()} == ledgers

    await until("usage is uploaded", same)


@pytest.mark.timeout(180)
async def test_a_node_that_is_lost_is_replaced_and_its_surplus_goes_when_it_is_back(record_property: Record) -> None:
    """A request inside the lost node is given up after the 10 s of TCP_USER_TIMEOUT, and is not sent again."""
    async with running_fleet(*NODES) as fleet:
        log = await deployed(fleet)
        clients, name = Clients(fleet), "gpu-3"
        load = asyncio.create_task(clients.run(jobs(tuple(TARGETS), SEED)))
        try:
            await busy(fleet, name)
            cut_ns = time.monotonic_ns()
            with partitioned(fleet, name):
                await until("the node is lost", lambda: is_lost(fleet, name), 12)
                lost_s = (time.monotonic_ns() - cut_ns) / SECOND_NS
                await until("its instances are replaced", lambda: current_is(fleet, TARGETS))
                replaced_s = (time.monotonic_ns() - cut_ns) / SECOND_NS
                await asyncio.sleep(max(0.0, LONG_PARTITION_S - replaced_s))
            mended_ns = time.monotonic_ns()
            await fleet.wait_until_complete(TARGETS)
            complete_s = (time.monotonic_ns() - mended_ns) / SECOND_NS
        finally:
            load.cancel()
        await clients.finish()
        await asyncio.gather(load, return_exceptions=True)
        runs = executions(log)
        gone = failed(clients)
        assert gone, "requests were inside"
        for one in gone:
            waited_s = (one.ended_ns - one.began_ns) / SECOND_NS
            assert (one.status, one.during(cut_ns) or one.began_ns > cut_ns) == (502, True), one
            assert one.ended_ns < mended_ns + 2 * SECOND_NS, one
            assert waited_s > 9, one
            assert len(runs.get(one.request_id, [])) <= 1, one
        for one in clients.told:
            if one.served:
                assert [run.instance for run in runs[one.request_id]] == [one.instance], one
        assert not [found for found in runs.values() if len(found) > 1], "none was executed twice"
        await fleet.remove_functions(list(TARGETS))
        figures = {"requests": len(clients.told), "given_up": len(gone), "lost_after_s": round(lost_s, 2)}
        figures |= {"replaced_after_s": round(replaced_s, 2), "complete_after_mend_s": round(complete_s, 2)}
        for key, value in figures.items():
            record_property(key, value)


async def is_lost(fleet: Fleet, name: str) -> bool:
    return (await fleet.node_states())[name] == types_pb2.Node.STATE_LOST


async def current_is(fleet: Fleet, targets: dict[str, int]) -> bool:
    return {name: (await fleet.function(name)).current for name in targets} == targets
