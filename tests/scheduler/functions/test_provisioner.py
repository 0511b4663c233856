"""The provisioner against an agent that fails, on a clock that moves only when told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent.core.dispatch.events import InstanceRetired
from agent.core.errors import (
    ConflictError,
    DeadlineError,
    ExhaustedError,
    HibernodeError,
    PreconditionError,
    UnavailableError,
)
from agent.core.provisioning.reconcile import MAX_ATTEMPTS
from agent.core.types import SECOND_NS
from agent.scheduler.database.store import Store
from agent.v1.function_service_pb2 import DeployFunctionRequest
from agent.v1.scheduler_service_pb2 import InstanceLoad
from agent.v1.types_pb2 import FunctionSpec, Instance
from tests.scheduler.functions.provisioner_story import FAILED, RUNNING, Story, fails, raises


@pytest.fixture
async def story(tmp_path: Path) -> AsyncIterator[Story]:
    store = Store(f"sqlite:///{tmp_path}/scheduler.db")
    await store.open()
    yield Story(store)
    await store.close()


async def test_a_start_that_always_fails_is_given_up_until_a_deploy(story: Story) -> None:
    story.answer = fails(story, "INITIALIZATION_ERROR")
    await story.deploy()
    for _ in range(40):
        await story.round(1)
    assert story.creates == [f"ocr/1/0/{attempt}" for attempt in range(1, MAX_ATTEMPTS + 1)]
    problem = story.catalog.problem("ocr")
    assert problem is not None
    assert (problem.reason, problem.no_capacity_expected) == ("INITIALIZATION_ERROR", True)
    story.answer = story.running
    await story.deploy()
    await story.round()
    await story.round()
    assert story.creates[-1] == f"ocr/1/0/{MAX_ATTEMPTS + 1}"
    assert story.catalog.problem("ocr") is None


async def test_a_create_without_an_answer_is_repeated_with_its_request_id(story: Story) -> None:
    story.answer = raises(UnavailableError("UNREACHABLE", "no answer"))
    await story.deploy()
    await story.round()
    story.answer = story.running
    await story.round(1)
    assert len(story.creates) == 1, "it waits before it asks again"
    await story.round(2)
    assert story.creates == ["ocr/1/0/1", "ocr/1/0/1"]


@pytest.mark.parametrize(
    "full", [ExhaustedError("GPU_CAPACITY", "full"), PreconditionError("HOST_MEMORY_SHORT", "too little memory")]
)
async def test_a_full_agent_is_asked_again_and_never_given_up(story: Story, full: HibernodeError) -> None:
    story.answer = raises(full)
    await story.deploy()
    for _ in range(MAX_ATTEMPTS * 3):
        await story.round(3)
    assert len(story.creates) > MAX_ATTEMPTS
    assert set(story.creates) == {"ocr/1/0/1"}


async def test_a_request_id_that_is_taken_is_skipped(story: Story) -> None:
    story.answer = raises(ConflictError("REQUEST_ID_REUSED", "another spec"))
    await story.deploy()
    await story.round()
    story.answer = story.running
    await story.round(2)
    assert story.creates == ["ocr/1/0/1", "ocr/1/0/2"]


async def test_instances_of_an_earlier_run_are_skipped_without_a_failure(story: Story) -> None:
    """The scheduler restarted: the agent still remembers more ended attempts than may fail."""
    story.answer = fails(story, "INSTANCE_CRASHED", age_s=3600)
    await story.deploy()
    for _ in range(MAX_ATTEMPTS + 3):
        await story.round(0.2)
    story.answer = story.running
    await story.round(0.2)
    await story.round()
    assert story.creates[-1] == f"ocr/1/0/{MAX_ATTEMPTS + 4}"
    assert story.catalog.problem("ocr") is None


async def test_an_instance_that_vanishes_unreported_is_replaced(story: Story) -> None:
    await story.deploy()
    await story.round()
    await story.round()
    story.loads.clear()
    await story.round(1)
    await story.round(2)
    assert story.creates == ["ocr/1/0/1", "ocr/1/0/2"]


async def test_an_instance_that_fails_between_two_rounds_gives_its_reason(story: Story) -> None:
    await story.deploy()
    await story.round()
    (load,) = story.loads.values()
    load.state, load.state_reason, load.state_message = FAILED, "START_FAILED", "no such program"
    story.report()
    story.loads.clear()
    await story.round(1)
    problem = story.catalog.problem("ocr")
    assert problem is not None
    assert (problem.reason, problem.message) == ("START_FAILED", "no such program")


async def test_scale_in_retires_before_it_stops(story: Story) -> None:
    await story.deploy(target=2)
    await story.round()
    await story.round()
    await story.deploy(target=1)
    await story.round()
    assert story.stops == ["i2"]
    assert InstanceRetired("i2") in story.told
    await story.round()
    assert len(story.creates) == 2


async def test_nothing_is_created_while_a_known_node_may_still_have_it(story: Story) -> None:
    story.fleet.expect("n2")
    await story.deploy()
    await story.round()
    assert story.creates == []
    for _ in range(4):
        await story.round(3)
        story.fleet.check_silence()
    await story.round()
    assert story.creates == ["ocr/1/0/1"], "n2 is lost"


async def test_a_deleted_function_is_dropped_when_its_last_instance_ends(story: Story) -> None:
    await story.deploy()
    await story.round()
    await story.round()
    await story.catalog.delete("ocr")
    await story.round()
    assert story.stops == ["i1"]
    assert len(story.catalog.all()) == 1
    await story.round()
    assert story.catalog.all() == []


async def test_draining_leaves_requests_the_time_that_a_function_may_have(story: Story) -> None:
    """A request may take a day; the agent's default of 30 s would cut it."""
    await story.deploy(timeout_ns=86_400 * SECOND_NS)
    await story.round()
    await story.round()
    await story.deploy(target=0, timeout_ns=86_400 * SECOND_NS)
    await story.round()
    assert story.graces == [86_400 * SECOND_NS]


async def test_an_instance_that_drains_for_long_is_no_failure(story: Story) -> None:
    await story.deploy()
    await story.round()
    await story.round()
    story.stop_error = DeadlineError("DEADLINE_EXCEEDED", "requests are still in flight")
    await story.deploy(target=0)
    await story.round()
    story.loads["i1"].state = Instance.STATE_STOPPING
    for _ in range(3):
        await story.round(1)
    assert story.stops == ["i1"], "the agent goes on by itself"
    story.loads.clear()
    await story.round()
    await story.deploy(target=1)
    await story.round()
    assert story.creates == ["ocr/1/0/1", "ocr/1/0/2"], "at once: nothing failed"


async def test_an_instance_whose_stop_failed_serves_again_when_needed(story: Story) -> None:
    await story.deploy(target=2)
    await story.round()
    await story.round()
    story.stop_error = UnavailableError("UNREACHABLE", "the node is gone for a moment")
    await story.deploy(target=1)
    await story.round()
    assert story.told[-1] == InstanceRetired("i2")
    await story.deploy(target=2)
    async with asyncio.timeout(10):
        while InstanceRetired("i2", retired=False) not in story.told:
            await story.round()
            await asyncio.sleep(0.02)
    assert len(story.creates) == 2


async def test_instances_of_deleted_functions_on_a_returning_node_are_stopped(story: Story) -> None:
    await story.deploy()
    await story.round()
    await story.round()
    story.fleet.stream_closed("n1", story.agents["n1"].stream)
    story.clock.advance(11 * SECOND_NS)
    story.fleet.check_silence()
    await story.catalog.delete("ocr")
    await story.provisioner.round()
    assert story.catalog.all() == [], "a lost node does not keep a function from being deleted"
    assert story.stops == []
    story.agents["n1"].stream, story.agents["n1"].sequence = story.fleet.stream_opened("n1"), 0
    await story.round()
    assert story.stops == ["i1"]


async def test_instances_of_a_function_never_deployed_here_are_left_alone(story: Story) -> None:
    """A new scheduler with an empty database must not empty the fleet."""
    story.loads["x"] = InstanceLoad(uid="x", function="tts", request_id="tts/4/0/1", state=RUNNING)
    await story.round()
    assert story.stops == []


async def test_instances_without_a_gpu_take_no_gpu_from_others(story: Story) -> None:
    for number in range(3):
        uid = f"cpu{number}"
        story.loads[uid] = InstanceLoad(uid=uid, function="web", request_id=f"web/1/{number}/1", state=RUNNING)
    message = FunctionSpec(name="web", entrypoint=["app"])
    message.gpu.count = 0
    await story.catalog.deploy(DeployFunctionRequest(spec=message, target=3))
    await story.deploy(target=2)
    await story.round()
    assert [one for one in story.creates if one.startswith("ocr")] == ["ocr/1/0/1", "ocr/1/1/1"]
