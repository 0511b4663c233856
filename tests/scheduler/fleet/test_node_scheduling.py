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
from tests.scheduler.functions.provisioner_story import RUNNING, Story, raises

CORDONED, DRAINED, EMPTIED, NORMAL = Scheduling.CORDONED, Scheduling.DRAINED, Scheduling.EMPTIED, Scheduling.NORMAL
NEVER = {"idle_policy": IdlePolicy(mode=IdlePolicy.MODE_NEVER)}


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    made = Store(f"sqlite:///{tmp_path}/scheduler.db")
    await made.open()
    yield made
    await made.close()


@pytest.fixture
def story(store: Store) -> Story:
    return Story(store)


async def up(story: Story, target: int = 1, **spec: object) -> None:
    """Deployed, and all of it reported."""
    await story.deploy(target, **spec)
    await story.rounds(3)
    assert story.reason() == ""


# ---- cordon ---------------------------------------------------------------------------------------------------


async def test_a_cordoned_node_gets_nothing_new_and_keeps_what_it_has(story: Story) -> None:
    await up(story)
    story.join("n2", gpus=1)
    await story.scheduling.put("n1", CORDONED)
    await story.deploy(3)
    await story.rounds(3)
    assert (story.places, story.stops) == (["n1", "n2"], [])
    problem = story.catalog.problem("ocr")
    assert problem is not None
    assert problem.reason == "NO_FREE_GPU"
    assert "2 nodes: 1 has no free GPU, 1 is cordoned" in problem.message
    await story.scheduling.put("n1", NORMAL)
    await story.rounds(3)
    assert story.places == ["n1", "n2", "n1"]
    assert story.reason() == ""


async def test_a_create_without_an_answer_is_not_repeated_on_a_cordoned_node(story: Story) -> None:
    story.answer = raises(UnavailableError("UNREACHABLE", "no answer"))
    await story.deploy()
    await story.round()
    story.join("n2")
    await story.scheduling.put("n1", CORDONED)
    story.answer = story.running
    await story.rounds(2, seconds=3)
    assert list(zip(story.creates, story.places, strict=True)) == [("ocr/1/0/1", "n1"), ("ocr/1/0/1", "n2")]
    load = story.agents["n2"].loads["i2"]
    story.loads["late"] = type(load)(uid="late", function="ocr", request_id="ocr/1/0/1", state=RUNNING, healthy=True)
    await story.rounds(2)
    assert story.stops == ["late"], "two of one request_id: the one on the cordoned node is of less use"


# ---- drain ----------------------------------------------------------------------------------------------------


async def test_instances_of_a_drained_node_go_once_replaced_elsewhere(story: Story) -> None:
    await up(story, 2)
    story.join("n2")
    story.comes_up = False
    await story.scheduling.put("n1", DRAINED)
    await story.rounds(3)
    assert (story.places, story.stops) == (["n1", "n1", "n2", "n2"], []), "the new ones are not up yet"
    story.come_up()
    await story.rounds(2)
    assert sorted(story.stops) == ["i1", "i2"]
    assert {InstanceRetired("i1"), InstanceRetired("i2")} <= set(story.told)
    assert (story.uids("n1"), story.uids("n2")) == (set(), {"i3", "i4"})
    await story.rounds(3)
    assert len(story.creates) == 4


async def test_without_room_elsewhere_an_instance_stays_on_the_drained_node(story: Story) -> None:
    await up(story)
    await story.scheduling.put("n1", DRAINED)
    await story.rounds(3)
    assert (story.stops, story.reason()) == ([], "NO_NODE")
    story.join("n2", gpus=0)
    await story.rounds(3)
    assert (story.stops, story.reason()) == ([], "NO_NODE"), "n1 would fit, were it not drained"
    story.join("n3")
    await story.rounds(3)
    assert (story.stops, story.places[-1], story.reason()) == (["i1"], "n3", "")


async def test_instances_of_an_emptied_node_go_without_replacement(story: Story) -> None:
    await up(story)
    await story.scheduling.put("n1", EMPTIED)
    await story.rounds(3)
    assert (story.stops, story.uids(), story.reason()) == (["i1"], set(), "NO_NODE")
    await story.scheduling.put("n1", NORMAL)
    await story.rounds(3)
    assert (story.uids(), story.reason()) == ({"i2"}, "")


async def test_a_drain_taken_back_in_the_middle_leaves_the_target(story: Story) -> None:
    await up(story, 2)
    story.join("n2")
    story.comes_up = False
    await story.scheduling.put("n1", DRAINED)
    await story.rounds(2)
    await story.scheduling.put("n1", NORMAL)
    await story.rounds(2)
    assert sorted(story.stops) == ["i3", "i4"], "those that are not up"
    assert story.uids("n1") == {"i1", "i2"}


async def test_an_update_does_not_stop_instances_on_a_drained_node(story: Story) -> None:
    await up(story, 2)
    await story.scheduling.put("n1", DRAINED)
    await story.deploy(2, command=["--new"])
    await story.rounds(4)
    assert (story.stops, story.reason()) == ([], "NO_NODE")


async def test_a_drain_is_stored_before_it_takes_effect(story: Story, store: Store, tmp_path: Path) -> None:
    await story.scheduling.put("n1", DRAINED)
    again = Story(store)
    scheduling = NodeScheduling(store, again.fleet)
    await scheduling.load()
    assert again.fleet.scheduling("n1") is DRAINED
    await scheduling.put("n1", NORMAL)
    assert await store.node_scheduling() == {}
    with closing(sqlite3.connect(tmp_path / "scheduler.db")) as broken:
        broken.execute("drop table node_scheduling")
    with pytest.raises(UnavailableError, match="database"):
        await scheduling.put("n1", CORDONED)
    assert again.fleet.scheduling("n1") is NORMAL


async def test_an_unknown_node_cannot_be_drained(story: Story, store: Store) -> None:
    with pytest.raises(NotFoundError, match="hibernode node --fleet"):
        await story.scheduling.put("n7", DRAINED)
    assert await store.node_scheduling() == {}


# ---- scale-in and restarts ------------------------------------------------------------------------------------


async def test_scale_in_spares_instances_with_requests(story: Story) -> None:
    await up(story, 2)
    story.loads["i2"].in_flight = 1
    await story.deploy(1)
    await story.round()
    assert story.stops == ["i1"]


async def test_scale_in_takes_the_longest_idle(story: Story) -> None:
    story.join("n2")
    await up(story, 3)
    for uid, seconds in (("i1", 10), ("i2", 30), ("i3", 20)):
        load = next(agent.loads[uid] for agent in story.agents.values() if uid in agent.loads)
        load.state, load.idle_for_ns = Instance.STATE_FROZEN, seconds * 10**9
    await story.deploy(2)
    await story.round()
    assert story.stops == ["i2"]


async def test_a_target_that_rises_again_during_a_drain_gets_a_new_instance(story: Story) -> None:
    await up(story, 2)
    story.drains = True
    await story.deploy(1)
    await story.round()
    assert story.stops == ["i2"]
    await story.deploy(2)
    await story.rounds(2)
    assert story.reason() == "NO_FREE_GPU", "its GPU is taken until its last request has ended"
    story.ended("i2")
    await story.rounds(2)
    assert (story.creates[-1], story.stops, story.reason()) == ("ocr/1/1/2", ["i2"], "")


async def test_after_a_restart_nothing_is_stopped_before_every_node_reported(story: Story) -> None:
    await up(story, 2)
    story.fleet.expect("n2")
    await story.deploy(1)
    await story.rounds(3)
    assert story.stops == []
    for _ in range(4):
        await story.round(3)
        story.fleet.check_silence()
    await story.round()
    assert story.stops == ["i2"], "n2 is lost"


# ---- updates where GPUs are short -----------------------------------------------------------------------------


async def test_an_update_with_a_free_gpu_creates_first(story: Story) -> None:
    await up(story)
    story.comes_up = False
    await story.deploy(1, **NEVER)
    await story.rounds(3)
    assert (story.creates, story.stops, story.reason()) == (["ocr/1/0/1", "ocr/2/0/1"], [], "")
    story.come_up()
    await story.rounds(2)
    assert (story.stops, story.uids()) == (["i1"], {"i2"})


async def test_switching_the_idle_mode_on_one_gpu_drains_the_old_one_first(story: Story) -> None:
    story.agents["n1"].gpus = 1
    await up(story)
    story.drains = True
    await story.deploy(1, **NEVER)
    await story.rounds(3)
    assert (story.creates, story.stops, story.reason()) == (["ocr/1/0/1"], ["i1"], ""), "it waits for the drain"
    story.ended("i1")
    await story.rounds(2)
    assert (story.creates, story.uids(), story.reason()) == (["ocr/1/0/1", "ocr/2/0/1"], {"i2"}, "")


async def test_an_update_that_needs_two_gpus_stops_two_and_no_more(story: Story) -> None:
    await up(story, 2)
    need = FunctionSpec()
    need.gpu.count = 2
    await story.deploy(1, gpu=need.gpu)
    await story.rounds(3)
    assert sorted(story.stops) == ["i1", "i2"]
    assert story.creates[-1] == "ocr/2/0/1"


async def test_an_update_no_node_could_take_costs_no_instance(story: Story) -> None:
    await up(story, 2)
    await story.deploy(2, node_labels={"rack": "b"})
    await story.rounds(4)
    assert (story.stops, story.reason()) == ([], "NO_MATCHING_NODE")
    story.join("n2", rack="b")
    await story.rounds(3)
    assert story.places[2:] == ["n2", "n2"]
    assert sorted(story.stops) == ["i1", "i2"]


async def test_an_update_that_lacks_memory_costs_one_instance(story: Story) -> None:
    story.join("n2", gpus=4)
    await up(story, 3)
    story.memory = HostMemory(total_bytes=8 * GIB, available_bytes=GIB // 4)
    await story.deploy(3, memory_bytes=GIB)
    await story.rounds(6)
    assert (len(story.stops), story.reason()) == (1, "HOST_MEMORY_SHORT")
