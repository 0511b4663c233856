"""The provisioner against an agent that fails, on a clock that moves only when events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from agent.core.dispatch.events import FunctionSet, InstanceRetired
from agent.core.errors import (
    ConflictError,
    DeadlineError,
    ExhaustedError,
    HibernodeError,
    PreconditionError,
    UnavailableError,
)
from agent.core.provisioning.problem import LastFailure, NextTry
from agent.core.provisioning.reconcile import MAX_ATTEMPTS
from agent.core.types import SECOND_NS
from agent.scheduler.database.store import Store
from agent.v1.function_service_pb2 import DeployFunctionRequest
from agent.v1.scheduler_service_pb2 import InstanceLoad
from agent.v1.types_pb2 import FunctionSpec, Instance
from tests.scheduler.functions.provisioner_rig import FAILED, RUNNING, ProvisionerRig, fails, raises


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[ProvisionerRig]:
    store = Store(f"sqlite:///{tmp_path}/scheduler.db")
    await store.open()
    yield ProvisionerRig(store)
    await store.close()


def _last(rig: ProvisionerRig) -> LastFailure:
    problem = rig.catalog.problem("ocr")
    assert problem is not None
    assert problem.last is not None
    return problem.last


async def test_a_start_that_always_fails_is_given_up_until_a_deploy(rig: ProvisionerRig) -> None:
    rig.answer = fails(rig, "INITIALIZATION_ERROR")
    await rig.deploy()
    for _ in range(40):
        await rig.round(1)
    assert rig.creates == [f"ocr/1/0/{attempt}" for attempt in range(1, MAX_ATTEMPTS + 1)]
    problem = rig.catalog.problem("ocr")
    assert problem is not None
    assert (problem.reason, problem.no_capacity_expected) == ("INITIALIZATION_ERROR", True)
    rig.answer = rig.running
    await rig.deploy()
    await rig.round()
    await rig.round()
    assert rig.creates[-1] == f"ocr/1/0/{MAX_ATTEMPTS + 1}"
    assert rig.catalog.problem("ocr") is None


async def test_a_revision_that_never_comes_up_costs_one_old_instance_where_both_gpus_are_full(
    rig: ProvisionerRig,
) -> None:
    await rig.deploy(target=2)
    await rig.rounds(2)
    old = rig.uids()
    assert len(old) == 2
    rig.answer = fails(rig, "FUNCTION_NOT_STARTED")
    await rig.deploy(target=2, command=["broken"])
    await rig.rounds(60, 1)
    assert len([made for made in rig.creates if made.startswith("ocr/2/")]) == 2 * MAX_ATTEMPTS
    assert (len(rig.stops), len(rig.uids() & old)) == (1, 1), "the other one serves on"
    rig.answer = rig.running
    await rig.deploy(target=2)
    await rig.rounds(6, 1)
    assert len(rig.uids()) == 2
    assert not rig.uids() & old


async def test_a_failure_is_shown_until_an_instance_has_come_up(rig: ProvisionerRig) -> None:
    rig.answer = fails(rig, "IMAGE_PULL_FAILED")
    await rig.deploy()
    await rig.rounds(2)
    last = _last(rig)
    assert (last.failure.reason, last.failure.node, last.failure.uid) == ("IMAGE_PULL_FAILED", "n1", "dead-ocr/1/0/1")
    assert (last.attempt, last.next_try) == (1, NextTry.SCHEDULED)
    assert last.next_ns > rig.clock.monotonic_ns()
    rig.answer, rig.comes_up = rig.running, False
    await rig.rounds(2, 2)
    assert (_last(rig).failure, _last(rig).next_try) == (last.failure, NextTry.UNDER_WAY), "it is still starting"
    rig.come_up()
    await rig.round()
    assert rig.catalog.problem("ocr") is None


async def test_a_crash_is_shown_while_the_next_instance_starts(rig: ProvisionerRig) -> None:
    await rig.deploy()
    await rig.rounds(2)
    rig.loads["i1"].state, rig.loads["i1"].state_reason = FAILED, "OUT_OF_MEMORY"
    rig.comes_up = False
    await rig.rounds(3, 2)
    assert rig.uids() == {"i1", "i2"}
    assert (rig.reason(), _last(rig).failure.uid, _last(rig).next_try) == ("OUT_OF_MEMORY", "i1", NextTry.UNDER_WAY)


async def test_a_full_fleet_is_shown_beside_the_failure_and_then_refuses_requests(rig: ProvisionerRig) -> None:
    rig.answer = fails(rig, "IMAGE_PULL_FAILED")
    await rig.deploy()
    await rig.round()
    rig.loads.update(
        {f"x{n}": InstanceLoad(uid=f"x{n}", function="x", state=RUNNING, gpu_uuids=[f"n1-g{n}"]) for n in (0, 1)}
    )
    await rig.round(2)
    problem = rig.catalog.problem("ocr")
    assert problem is not None
    assert (problem.reason, problem.no_capacity_expected) == ("NO_FREE_GPU", False)
    assert (_last(rig).failure.reason, _last(rig).next_try) == ("IMAGE_PULL_FAILED", NextTry.WAITING)
    await rig.rounds(6, 2)
    assert FunctionSet("ocr", expects_instances=False) in rig.events
    rig.answer = rig.running
    rig.ended("x0")
    await rig.rounds(2, 2)
    assert rig.catalog.problem("ocr") is None
    assert [one for one in rig.events if isinstance(one, FunctionSet)][-1].expects_instances


async def test_each_new_failure_is_logged_once(rig: ProvisionerRig) -> None:
    rig.answer = fails(rig, "IMAGE_PULL_FAILED")
    await rig.deploy()
    with capture_logs() as lines:
        await rig.rounds(20, 1)
        rig.event_log.flush()
    attempts = [line["attempt"] for line in lines if line["event"] == "function.degraded"]
    assert attempts == list(range(1, len(attempts) + 1))
    assert len(attempts) >= 4


@pytest.mark.parametrize(
    "error",
    [ExhaustedError("GPU_CAPACITY", "full"), UnavailableError("UNREACHABLE", "no answer")],
    ids=["full", "away"],
)
async def test_what_is_tried_again_and_again_is_one_event_of_its_function(
    rig: ProvisionerRig, error: HibernodeError
) -> None:
    rig.answer = raises(error)
    await rig.deploy()
    await rig.rounds(200, 2)
    assert len(rig.creates) > 100
    found = [one for one in rig.event_log.read(function="ocr") if one.name == "provision.create_failed"]
    assert [(one.attributes["reason"], one.attributes["node"], one.count) for one in found] == [
        (error.reason, "n1", len(rig.creates))
    ]
    assert len(rig.event_log.read()) < 10


async def test_a_function_finds_the_events_of_its_instances(rig: ProvisionerRig) -> None:
    await rig.deploy()
    other = FunctionSpec(name="other", entrypoint=["app"])
    await rig.catalog.deploy(DeployFunctionRequest(spec=other, target=1))
    await rig.rounds(3)
    await rig.deploy(target=0)
    await rig.rounds(2)
    events = rig.event_log.read(function="ocr")
    assert [(one.name, one.instance_uid) for one in events] == [
        ("function.deployed", ""),
        ("provision.created", "i1"),
        ("function.deployed", ""),
        ("provision.stopping", "i1"),
    ]
    assert [one.attributes["node"] for one in events if one.instance_uid] == ["n1", "n1"]


async def test_a_create_without_an_answer_is_repeated_with_its_request_id(rig: ProvisionerRig) -> None:
    rig.answer = raises(UnavailableError("UNREACHABLE", "no answer"))
    await rig.deploy()
    await rig.round()
    rig.answer = rig.running
    await rig.round(1)
    assert len(rig.creates) == 1, "it waits before it asks again"
    await rig.round(2)
    assert rig.creates == ["ocr/1/0/1", "ocr/1/0/1"]


@pytest.mark.parametrize(
    "full", [ExhaustedError("GPU_CAPACITY", "full"), PreconditionError("HOST_MEMORY_SHORT", "too little memory")]
)
async def test_a_full_agent_is_asked_again_and_never_given_up(rig: ProvisionerRig, full: HibernodeError) -> None:
    rig.answer = raises(full)
    await rig.deploy()
    for _ in range(MAX_ATTEMPTS * 3):
        await rig.round(3)
    assert len(rig.creates) > MAX_ATTEMPTS
    assert set(rig.creates) == {"ocr/1/0/1"}


async def test_a_request_id_that_is_taken_is_skipped(rig: ProvisionerRig) -> None:
    rig.answer = raises(ConflictError("REQUEST_ID_REUSED", "another spec"))
    await rig.deploy()
    await rig.round()
    rig.answer = rig.running
    await rig.round(2)
    assert rig.creates == ["ocr/1/0/1", "ocr/1/0/2"]


async def test_instances_of_an_earlier_run_are_skipped_without_a_failure(rig: ProvisionerRig) -> None:
    """The scheduler restarted: the agent still remembers more ended attempts than may fail."""
    rig.answer = fails(rig, "INSTANCE_CRASHED", age_s=3600)
    await rig.deploy()
    for _ in range(MAX_ATTEMPTS + 3):
        await rig.round(0.2)
    rig.answer = rig.running
    await rig.round(0.2)
    await rig.round()
    assert rig.creates[-1] == f"ocr/1/0/{MAX_ATTEMPTS + 4}"
    assert rig.catalog.problem("ocr") is None


async def test_an_instance_that_vanishes_unreported_is_replaced(rig: ProvisionerRig) -> None:
    await rig.deploy()
    await rig.round()
    await rig.round()
    rig.loads.clear()
    await rig.round(1)
    await rig.round(2)
    assert rig.creates == ["ocr/1/0/1", "ocr/1/0/2"]


async def test_an_instance_that_fails_between_two_rounds_gives_its_reason(rig: ProvisionerRig) -> None:
    await rig.deploy()
    await rig.round()
    (load,) = rig.loads.values()
    load.state, load.state_reason, load.state_message = FAILED, "START_FAILED", "no such program"
    rig.report()
    rig.loads.clear()
    await rig.round(1)
    problem = rig.catalog.problem("ocr")
    assert problem is not None
    assert (problem.reason, problem.message) == ("START_FAILED", "no such program")


async def test_scale_in_retires_before_it_stops(rig: ProvisionerRig) -> None:
    await rig.deploy(target=2)
    await rig.round()
    await rig.round()
    await rig.deploy(target=1)
    await rig.round()
    assert rig.stops == ["i2"]
    assert InstanceRetired("i2") in rig.events
    await rig.round()
    assert len(rig.creates) == 2


async def test_nothing_is_created_while_a_known_node_may_still_have_it(rig: ProvisionerRig) -> None:
    rig.fleet.expect("n2")
    await rig.deploy()
    await rig.round()
    assert rig.creates == []
    for _ in range(4):
        await rig.round(3)
        rig.fleet.check_silence()
    await rig.round()
    assert rig.creates == ["ocr/1/0/1"], "n2 is lost"


async def test_a_deleted_function_is_dropped_when_its_last_instance_ends(rig: ProvisionerRig) -> None:
    await rig.deploy()
    await rig.round()
    await rig.round()
    await rig.catalog.delete("ocr")
    await rig.round()
    assert rig.stops == ["i1"]
    assert len(rig.catalog.all()) == 1
    await rig.round()
    assert rig.catalog.all() == []


async def test_draining_leaves_requests_the_time_that_a_function_may_have(rig: ProvisionerRig) -> None:
    """A request may take a day; the agent's default of 30 s would cut it."""
    await rig.deploy(timeout_ns=86_400 * SECOND_NS)
    await rig.round()
    await rig.round()
    await rig.deploy(target=0, timeout_ns=86_400 * SECOND_NS)
    await rig.round()
    assert rig.graces == [86_400 * SECOND_NS]


async def test_an_instance_that_drains_for_long_is_no_failure(rig: ProvisionerRig) -> None:
    await rig.deploy()
    await rig.round()
    await rig.round()
    rig.stop_error = DeadlineError("DEADLINE_EXCEEDED", "requests are still in flight")
    await rig.deploy(target=0)
    await rig.round()
    rig.loads["i1"].state = Instance.STATE_STOPPING
    for _ in range(3):
        await rig.round(1)
    assert rig.stops == ["i1"], "the agent goes on by itself"
    rig.loads.clear()
    await rig.round()
    await rig.deploy(target=1)
    await rig.round()
    assert rig.creates == ["ocr/1/0/1", "ocr/1/0/2"], "at once: nothing failed"


async def test_an_instance_whose_stop_failed_serves_again_when_needed(rig: ProvisionerRig) -> None:
    await rig.deploy(target=2)
    await rig.round()
    await rig.round()
    rig.stop_error = UnavailableError("UNREACHABLE", "the node is gone for a moment")
    await rig.deploy(target=1)
    await rig.round()
    assert rig.events[-1] == InstanceRetired("i2")
    await rig.deploy(target=2)
    async with asyncio.timeout(10):
        while InstanceRetired("i2", retired=False) not in rig.events:
            await rig.round()
            await asyncio.sleep(0.02)
    assert len(rig.creates) == 2


async def test_instances_of_deleted_functions_on_a_returning_node_are_stopped(rig: ProvisionerRig) -> None:
    await rig.deploy()
    await rig.round()
    await rig.round()
    rig.fleet.stream_closed("n1", rig.agents["n1"].stream)
    rig.clock.advance(11 * SECOND_NS)
    rig.fleet.check_silence()
    await rig.catalog.delete("ocr")
    await rig.provisioner.round()
    assert rig.catalog.all() == [], "a lost node does not keep a function from being deleted"
    assert rig.stops == []
    rig.agents["n1"].stream, rig.agents["n1"].sequence = rig.fleet.stream_opened("n1"), 0
    await rig.round()
    assert rig.stops == ["i1"]


async def test_instances_of_a_function_never_deployed_here_are_left_alone(rig: ProvisionerRig) -> None:
    """A new scheduler with an empty database must not empty the fleet."""
    rig.loads["x"] = InstanceLoad(uid="x", function="tts", request_id="tts/4/0/1", state=RUNNING)
    await rig.round()
    assert rig.stops == []


async def test_instances_without_a_gpu_take_no_gpu_from_others(rig: ProvisionerRig) -> None:
    for number in range(3):
        uid = f"cpu{number}"
        rig.loads[uid] = InstanceLoad(uid=uid, function="web", request_id=f"web/1/{number}/1", state=RUNNING)
    message = FunctionSpec(name="web", entrypoint=["app"])
    message.gpu.count = 0
    await rig.catalog.deploy(DeployFunctionRequest(spec=message, target=3))
    await rig.deploy(target=2)
    await rig.round()
    assert [one for one in rig.creates if one.startswith("ocr")] == ["ocr/1/0/1", "ocr/1/1/1"]
