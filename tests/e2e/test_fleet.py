"""Three agents on their own hosts, with kills, partitions and restarts under load.

Only requests inside a killed process are lost, none is executed twice, every function has its instances again, and the
usage lies between the instances' and the clients' records.
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
from tests.e2e.fleet_load import (
    COMPRESSED,
    Clients,
    Execution,
    RequestRecord,
    chat,
    executions,
    jobs,
    milliseconds,
    ocr,
)
from tests.e2e.fleet_world import Fleet, partitioned, running_fleet, why_not
from tests.e2e.stack import until

NODES = ("gpu-1", "gpu-2", "gpu-3")
TARGETS = {"ocr": 4, "chat": 3}
WORTH_S = 600
"""Ten minutes after compression."""
DOWN_S = 1.0
PARTITION_S = 5.0
"""Long enough to make a node suspect (3 s), too short to make it lost (10 s)."""
LONG_PARTITION_S = 13.0
BACK_S = 2.0
"""How long a restarted scheduler may take to have its fleet again."""
SEED = 5

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.alone]

Record = Callable[[str, object], None]


@pytest.fixture(autouse=True)
def _namespaces() -> None:
    if reason := why_not():
        pytest.skip(reason)


async def deployed(fleet: Fleet) -> Path:
    """Deploy both functions and wait for their targets; returns the folder of the instances' request logs."""
    log = fleet.hub.folder / "requests.log"
    log.touch()
    log.chmod(0o666)
    await fleet.deploy(ocr(log), TARGETS["ocr"])
    await fleet.deploy(chat(log), TARGETS["chat"])
    await fleet.wait_until_complete(TARGETS)
    return log


async def busy(fleet: Fleet, node: str) -> None:
    """Wait until requests are running on the node."""

    async def inside() -> bool:
        return any(one.in_flight for one in await fleet.nodes[node].instances())

    await until(f"a request is inside {node}", inside)


def failed(clients: Clients) -> list[RequestRecord]:
    return [one for one in clients.records if not one.served]


@pytest.mark.timeout(240)
async def test_fleet_serves_through_kill_partition_and_restart(record_property: Record) -> None:
    async with running_fleet(*NODES) as fleet:
        log = await deployed(fleet)
        before = await fleet.owners()
        assert set(before.values()) == set(NODES), "instances are spread over the nodes"
        clients, kills = Clients(fleet), Kills()
        traffic = jobs(tuple(TARGETS), SEED)
        await clients.run(traffic, WORTH_S / COMPRESSED)
        assert not failed(clients), failed(clients)[:3]
        calm = len(clients.records)

        load = asyncio.create_task(clients.run(traffic))
        try:
            await an_agent_is_killed(fleet, "gpu-2", kills)
            await partition_node(fleet, "gpu-3")
            restart = await kill_scheduler(fleet, clients, kills)
        finally:
            load.cancel()
        await clients.finish()
        await asyncio.gather(load, return_exceptions=True)

        await fleet.wait_until_complete(TARGETS)
        assert await fleet.owners() == before, "the same instances: none lost, none made twice"
        wakes = sum(one.wake_count for mine in (await fleet.instances()).values() for one in mine)
        assert wakes > 2 * len(before), f"{wakes} wakes are hardly traffic with pauses"
        await fleet.remove_functions(list(TARGETS))
        await wait_for_uploads(fleet)
        runs = executions(log)
        lost = check_answers(clients.records, runs, before, kills)
        bill = check_bill(await fleet.usage(), clients.records, runs, kills)
        assert not any(node.leftovers() for node in fleet.nodes.values())
        figures: dict[str, object] = {"requests": len(clients.records), "requests_calm": calm, "wakes": wakes}
        figures |= {"lost_in_agent": lost[0], "lost_in_scheduler": lost[1]}
        figures |= {**check_restart(restart, clients.records, runs), **bill}
        for name, value in figures.items():
            record_property(name, value)


async def an_agent_is_killed(fleet: Fleet, name: str, kills: Kills) -> None:
    node = fleet.nodes[name]
    await busy(fleet, name)
    kills.agent(name, node.kill("agent"))
    await asyncio.sleep(DOWN_S)  # the restart is delayed
    await node.start_agent()
    await fleet.wait_until_complete(TARGETS)
    await busy(fleet, name)


async def partition_node(fleet: Fleet, name: str) -> None:
    """Cut a node off for a while; its running requests wait and do not fail."""
    await busy(fleet, name)
    with partitioned(fleet, name):
        await asyncio.sleep(PARTITION_S)  # the duration
        assert (await fleet.node_states())[name] == types_pb2.Node.STATE_SUSPECT
    await fleet.wait_until_complete(TARGETS)
    await busy(fleet, name)


@dataclass(frozen=True, slots=True)
class Restart:
    """Times in CLOCK_MONOTONIC ns."""

    killed_ns: int
    ready_ns: int
    settled_ns: int


async def kill_scheduler(fleet: Fleet, clients: Clients, kills: Kills) -> Restart:
    """Kill the scheduler and restart it a second later; ready = listens, settled = has its fleet again."""
    at_ns = fleet.hub.kill("scheduler")
    kills.scheduler.append(at_ns)
    await asyncio.sleep(DOWN_S)  # the restart is delayed
    fleet.hub.respawn_scheduler()
    await fleet.hub.wait_for_endpoints("scheduler")
    ready_ns = time.monotonic_ns()
    await fleet.wait_until_complete(TARGETS)
    settled_ns = time.monotonic_ns()

    async def served() -> bool:
        return sum(one.served and one.ended_ns > settled_ns for one in clients.records) >= 5

    await until("requests are served by the new scheduler", served)
    return Restart(at_ns, ready_ns, settled_ns)


def check_restart(
    restart: Restart, records: list[RequestRecord], runs: Mapping[str, list[Execution]]
) -> dict[str, object]:
    """The time until the new scheduler had its fleet, and until an instance got a request."""
    began = [runs[one.request_id][0].start_ns for one in records if one.served]
    first_ns = min(start_ns for start_ns in began if start_ns > restart.killed_ns)
    figures = {
        "ready_after_kill_ms": milliseconds(restart.ready_ns - restart.killed_ns),
        "settled_after_ready_ms": milliseconds(restart.settled_ns - restart.ready_ns),
        "dispatched_after_ready_ms": milliseconds(first_ns - restart.ready_ns),
    }
    assert figures["settled_after_ready_ms"] < BACK_S * 1000, figures
    assert figures["dispatched_after_ready_ms"] < BACK_S * 1000, figures
    return dict(figures)


async def wait_for_uploads(fleet: Fleet) -> None:
    """Wait until the scheduler's database contains the nodes' ledgers."""

    async def same() -> bool:
        ledgers: dict[str, int] = {}
        for node in fleet.nodes.values():
            for window in await node.windows():
                assert window.sealed, "its instance has ended"
                ledgers[window.instance_uid] = ledgers.get(window.instance_uid, 0) + window.active_ns
        return {uid: row.active_ns for uid, row in (await fleet.usage()).items()} == ledgers

    await until("usage is uploaded", same)


@pytest.mark.timeout(180)
async def test_lost_node_is_replaced_and_its_surplus_removed_on_return(record_property: Record) -> None:
    """A request inside the lost node fails after the 10 s of TCP_USER_TIMEOUT and is not sent again."""
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
        await fleet.remove_functions(list(TARGETS))  # an instance writes its log line after its answer
        runs = executions(log)
        gone = failed(clients)
        assert gone, "requests were inside"
        for one in gone:
            waited_s = (one.ended_ns - one.began_ns) / SECOND_NS
            assert (one.status, one.during(cut_ns) or one.began_ns > cut_ns) == (502, True), one
            assert one.ended_ns < mended_ns + 2 * SECOND_NS, one
            assert waited_s > 9, one
            assert len(runs.get(one.request_id, [])) <= 1, one
        for one in clients.records:
            if one.served:
                assert [run.instance for run in runs[one.request_id]] == [one.instance], one
        assert not [found for found in runs.values() if len(found) > 1], "none was executed twice"
        figures = {"requests": len(clients.records), "given_up": len(gone), "lost_after_s": round(lost_s, 2)}
        figures |= {"replaced_after_s": round(replaced_s, 2), "complete_after_mend_s": round(complete_s, 2)}
        for key, value in figures.items():
            record_property(key, value)


async def is_lost(fleet: Fleet, name: str) -> bool:
    return (await fleet.node_states())[name] == types_pb2.Node.STATE_LOST


async def current_is(fleet: Fleet, targets: dict[str, int]) -> bool:
    return {name: (await fleet.function(name)).current for name in targets} == targets
