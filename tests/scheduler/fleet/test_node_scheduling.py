"""Cordon and drain over two nodes, placement between them, and updates where GPUs are short."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest

from agent.core.dispatch.events import InstanceRetired
from agent.core.errors import NotFoundError, UnavailableError
from agent.core.provisioning.model import Scheduling
from agent.core.types import GIB
from agent.scheduler.database.store import Store
from agent.scheduler.fleet.node_scheduling import NodeScheduling
from agent.v1.types_pb2 import FunctionSpec, HostMemory, IdlePolicy, Instance
from tests.scheduler.functions.provisioner_rig import RUNNING, ProvisionerRig, raises

CORDONED, DRAINED, EMPTIED, NORMAL = Scheduling.CORDONED, Scheduling.DRAINED, Scheduling.EMPTIED, Scheduling.NORMAL
NEVER = {"idle_policy": IdlePolicy(mode=IdlePolicy.MODE_NEVER)}


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    made = Store(f"sqlite:///{tmp_path}/scheduler.db")
    await made.open()
    yield made
    await made.close()


@pytest.fixture
def rig(store: Store) -> ProvisionerRig:
    return ProvisionerRig(store)


async def up(rig: ProvisionerRig, target: int = 1, **spec: object) -> None:
    """Deployed, and all of it reported."""
    await rig.deploy(target, **spec)
    await rig.rounds(3)
    assert rig.reason() == ""


# ---- cordon ---------------------------------------------------------------------------------------------------


async def test_a_cordoned_node_gets_nothing_new_and_keeps_what_it_has(rig: ProvisionerRig) -> None:
    await up(rig)
    rig.join("n2", gpus=1)
    await rig.scheduling.put("n1", CORDONED)
    await rig.deploy(3)
    await rig.rounds(3)
    assert (rig.places, rig.stops) == (["n1", "n2"], [])
    problem = rig.catalog.problem("ocr")
    assert problem is not None
    assert problem.reason == "NO_FREE_GPU"
    assert "2 nodes: 1 has no free GPU, 1 is cordoned" in problem.message
    await rig.scheduling.put("n1", NORMAL)
    await rig.rounds(3)
    assert rig.places == ["n1", "n2", "n1"]
    assert rig.reason() == ""


async def test_a_create_without_an_answer_is_not_repeated_on_a_cordoned_node(rig: ProvisionerRig) -> None:
    rig.answer = raises(UnavailableError("UNREACHABLE", "no answer"))
    await rig.deploy()
    await rig.round()
    rig.join("n2")
    await rig.scheduling.put("n1", CORDONED)
    rig.answer = rig.running
    await rig.rounds(2, seconds=3)
    assert list(zip(rig.creates, rig.places, strict=True)) == [("ocr/1/0/1", "n1"), ("ocr/1/0/1", "n2")]
    load = rig.agents["n2"].loads["i2"]
    rig.loads["late"] = type(load)(uid="late", function="ocr", request_id="ocr/1/0/1", state=RUNNING, healthy=True)
    await rig.rounds(2)
    assert rig.stops == ["late"], "two of one request_id: the one on the cordoned node is of less use"


# ---- drain ----------------------------------------------------------------------------------------------------


async def test_instances_of_a_drained_node_go_once_replaced_elsewhere(rig: ProvisionerRig) -> None:
    await up(rig, 2)
    rig.join("n2")
    rig.comes_up = False
    await rig.scheduling.put("n1", DRAINED)
    await rig.rounds(3)
    assert (rig.places, rig.stops) == (["n1", "n1", "n2", "n2"], []), "the new ones are not up yet"
    rig.come_up()
    await rig.rounds(2)
    assert sorted(rig.stops) == ["i1", "i2"]
    assert {InstanceRetired("i1"), InstanceRetired("i2")} <= set(rig.events)
    assert (rig.uids("n1"), rig.uids("n2")) == (set(), {"i3", "i4"})
    await rig.rounds(3)
    assert len(rig.creates) == 4


async def test_without_room_elsewhere_an_instance_stays_on_the_drained_node(rig: ProvisionerRig) -> None:
    await up(rig)
    await rig.scheduling.put("n1", DRAINED)
    await rig.rounds(3)
    assert (rig.stops, rig.reason()) == ([], "NO_NODE")
    rig.join("n2", gpus=0)
    await rig.rounds(3)
    assert (rig.stops, rig.reason()) == ([], "NO_NODE"), "n1 would fit, were it not drained"
    rig.join("n3")
    await rig.rounds(3)
    assert (rig.stops, rig.places[-1], rig.reason()) == (["i1"], "n3", "")


async def test_instances_of_an_emptied_node_go_without_replacement(rig: ProvisionerRig) -> None:
    await up(rig)
    await rig.scheduling.put("n1", EMPTIED)
    await rig.rounds(3)
    assert (rig.stops, rig.uids(), rig.reason()) == (["i1"], set(), "NO_NODE")
    await rig.scheduling.put("n1", NORMAL)
    await rig.rounds(3)
    assert (rig.uids(), rig.reason()) == ({"i2"}, "")


async def test_a_drain_taken_back_in_the_middle_leaves_the_target(rig: ProvisionerRig) -> None:
    await up(rig, 2)
    rig.join("n2")
    rig.comes_up = False
    await rig.scheduling.put("n1", DRAINED)
    await rig.rounds(2)
    await rig.scheduling.put("n1", NORMAL)
    await rig.rounds(2)
    assert sorted(rig.stops) == ["i3", "i4"], "those that are not up"
    assert rig.uids("n1") == {"i1", "i2"}


async def test_an_update_does_not_stop_instances_on_a_drained_node(rig: ProvisionerRig) -> None:
    await up(rig, 2)
    await rig.scheduling.put("n1", DRAINED)
    await rig.deploy(2, command=["--new"])
    await rig.rounds(4)
    assert (rig.stops, rig.reason()) == ([], "NO_NODE")


async def test_a_drain_is_stored_before_it_takes_effect(rig: ProvisionerRig, store: Store, tmp_path: Path) -> None:
    await rig.scheduling.put("n1", DRAINED)
    again = ProvisionerRig(store)
    scheduling = NodeScheduling(store, again.fleet, again.event_log)
    await scheduling.load()
    assert again.fleet.scheduling("n1") is DRAINED
    await scheduling.put("n1", NORMAL)
    assert await store.node_scheduling() == {}
    with closing(sqlite3.connect(tmp_path / "scheduler.db")) as broken:
        broken.execute("drop table node_scheduling")
    with pytest.raises(UnavailableError, match="database"):
        await scheduling.put("n1", CORDONED)
    assert again.fleet.scheduling("n1") is NORMAL


async def test_an_unknown_node_cannot_be_drained(rig: ProvisionerRig, store: Store) -> None:
    with pytest.raises(NotFoundError, match="hibernode node --fleet"):
        await rig.scheduling.put("n7", DRAINED)
    assert await store.node_scheduling() == {}


# ---- scale-in and restarts ------------------------------------------------------------------------------------


async def test_scale_in_spares_instances_with_requests(rig: ProvisionerRig) -> None:
    await up(rig, 2)
    rig.loads["i2"].in_flight = 1
    await rig.deploy(1)
    await rig.round()
    assert rig.stops == ["i1"]


async def test_scale_in_takes_the_longest_idle(rig: ProvisionerRig) -> None:
    rig.join("n2")
    await up(rig, 3)
    for uid, seconds in (("i1", 10), ("i2", 30), ("i3", 20)):
        load = next(agent.loads[uid] for agent in rig.agents.values() if uid in agent.loads)
        load.state, load.idle_for_ns = Instance.STATE_FROZEN, seconds * 10**9
    await rig.deploy(2)
    await rig.round()
    assert rig.stops == ["i2"]


async def test_a_target_that_rises_again_during_a_drain_gets_a_new_instance(rig: ProvisionerRig) -> None:
    await up(rig, 2)
    rig.drains = True
    await rig.deploy(1)
    await rig.round()
    assert rig.stops == ["i2"]
    await rig.deploy(2)
    await rig.rounds(2)
    assert rig.reason() == "NO_FREE_GPU", "its GPU is taken until its last request has ended"
    rig.ended("i2")
    await rig.rounds(2)
    assert (rig.creates[-1], rig.stops, rig.reason()) == ("ocr/1/1/2", ["i2"], "")


async def test_after_a_restart_nothing_is_stopped_before_every_node_reported(rig: ProvisionerRig) -> None:
    await up(rig, 2)
    rig.fleet.expect("n2")
    await rig.deploy(1)
    await rig.rounds(3)
    assert rig.stops == []
    for _ in range(4):
        await rig.round(3)
        rig.fleet.check_silence()
    await rig.round()
    assert rig.stops == ["i2"], "n2 is lost"


# ---- updates where GPUs are short -----------------------------------------------------------------------------


async def test_an_update_with_a_free_gpu_creates_first(rig: ProvisionerRig) -> None:
    await up(rig)
    rig.comes_up = False
    await rig.deploy(1, **NEVER)
    await rig.rounds(3)
    assert (rig.creates, rig.stops, rig.reason()) == (["ocr/1/0/1", "ocr/2/0/1"], [], "")
    rig.come_up()
    await rig.rounds(2)
    assert (rig.stops, rig.uids()) == (["i1"], {"i2"})


async def test_switching_the_idle_mode_on_one_gpu_drains_the_old_one_first(rig: ProvisionerRig) -> None:
    rig.agents["n1"].gpus = 1
    await up(rig)
    rig.drains = True
    await rig.deploy(1, **NEVER)
    await rig.rounds(3)
    assert (rig.creates, rig.stops, rig.reason()) == (["ocr/1/0/1"], ["i1"], ""), "it waits for the drain"
    rig.ended("i1")
    await rig.rounds(2)
    assert (rig.creates, rig.uids(), rig.reason()) == (["ocr/1/0/1", "ocr/2/0/1"], {"i2"}, "")


async def test_an_update_that_needs_two_gpus_stops_two_and_no_more(rig: ProvisionerRig) -> None:
    await up(rig, 2)
    need = FunctionSpec()
    need.gpu.count = 2
    await rig.deploy(1, gpu=need.gpu)
    await rig.rounds(3)
    assert sorted(rig.stops) == ["i1", "i2"]
    assert rig.creates[-1] == "ocr/2/0/1"


async def test_an_update_no_node_could_take_costs_no_instance(rig: ProvisionerRig) -> None:
    await up(rig, 2)
    await rig.deploy(2, node_labels={"rack": "b"})
    await rig.rounds(4)
    assert (rig.stops, rig.reason()) == ([], "NO_MATCHING_NODE")
    rig.join("n2", rack="b")
    await rig.rounds(3)
    assert rig.places[2:] == ["n2", "n2"]
    assert sorted(rig.stops) == ["i1", "i2"]


async def test_an_update_that_lacks_memory_costs_one_instance(rig: ProvisionerRig) -> None:
    rig.join("n2", gpus=4)
    await up(rig, 3)
    rig.memory = HostMemory(total_bytes=8 * GIB, available_bytes=GIB // 4)
    await rig.deploy(3, memory_bytes=GIB)
    await rig.rounds(6)
    assert (len(rig.stops), rig.reason()) == (1, "HOST_MEMORY_SHORT")


async def test_a_request_of_a_newer_version_keeps_new_instances_away(rig: ProvisionerRig, store: Store) -> None:
    """It is not normal use, whatever it is; nothing is stopped for it."""
    await up(rig)
    await store.put_node_scheduling("n1", "HIBERNATED")
    await rig.scheduling.load()
    assert rig.fleet.scheduling("n1") is Scheduling.CORDONED
    await rig.rounds(3, 5)
    assert (len(rig.uids()), rig.stops) == (1, [])
    assert await store.node_scheduling() == {"n1": "HIBERNATED"}
