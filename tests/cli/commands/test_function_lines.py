"""What `functions` and `provision list` say of a function in trouble."""

from __future__ import annotations

import pytest

from agent.cli.commands.functions import error_of, last_failure, revisions_of
from agent.cli.commands.provision_view import fields_of
from agent.core.provisioning.model import Scheduling
from agent.v1 import function_service_pb2 as pb
from agent.wire.convert_time import time_to_proto

FAILURE = pb.StartFailure(
    reason="IMAGE_PULL_FAILED",
    message="the registry is away",
    time=time_to_proto(0),
    node="gpu-1",
    uid="i-7",
    attempt=2,
    max_attempts=5,
    next_try=pb.StartFailure.NEXT_TRY_WAITING,
)


def function(running: dict[str, int], **fields: object) -> pb.Function:
    runs = [pb.RunningRevision(revision=revision, current=count) for revision, count in running.items()]
    found = pb.Function(name="ocr", running=runs, **fields)  # type: ignore[arg-type]  # fields of the message
    found.spec.revision = "3"
    return found


@pytest.mark.parametrize(
    ("running", "text"), [({}, "3"), ({"3": 2}, "3"), ({"2": 1}, "3 (runs 2)"), ({"3": 1, "2": 1}, "3 (runs 3, 2)")]
)
def test_the_revision_that_runs_is_named_if_it_is_not_the_deployed_one(running: dict[str, int], text: str) -> None:
    assert revisions_of(function(running)) == text


def test_an_error_names_what_is_in_the_way_and_the_last_failure() -> None:
    assert error_of(function({})) == "-"
    assert error_of(function({}, current_error_reason="NO_NODE")) == "NO_NODE"
    both = function({}, current_error_reason="NO_FREE_GPU", last_failure=FAILURE)
    assert error_of(both) == "NO_FREE_GPU; IMAGE_PULL_FAILED 2/5"
    assert error_of(function({}, current_error_reason=FAILURE.reason, last_failure=FAILURE)) == "IMAGE_PULL_FAILED 2/5"


@pytest.mark.parametrize("state", [one for one in pb.StartFailure.NextTry.values() if one])
def test_each_next_try_has_words(state: pb.StartFailure.NextTry.ValueType) -> None:
    failure = pb.StartFailure()
    failure.CopyFrom(FAILURE)
    failure.next_try = state
    text = last_failure(failure)
    assert ", on gpu-1 i-7, attempt 2 of 5, " in text
    assert text.rpartition(", ")[2]


def test_provisioning_shows_the_failure() -> None:
    shown = fields_of(pb.Provision(function="ocr", current_error="no room", last_failure=FAILURE))
    assert shown["currentError"] == "no room"
    assert shown["lastFailure"]["reason"] == "IMAGE_PULL_FAILED"
    assert (shown["lastFailure"]["attempt"], shown["lastFailure"]["instance"]) == ("2 of 5", "i-7")
    assert fields_of(pb.Provision(function="ocr"))["lastFailure"] is None


@pytest.mark.parametrize(
    ("scheduling", "instances", "text"),
    [
        (Scheduling.NORMAL, 3, "NORMAL"),
        (Scheduling.CORDONED, 0, "CORDONED"),
        (Scheduling.DRAINED, 1, "DRAINING"),
        (Scheduling.EMPTIED, 1, "DRAINING"),
        (Scheduling.DRAINED, 0, "DRAINED"),
        (Scheduling.EMPTIED, 0, "DRAINED"),
    ],
)
def test_a_node_is_drained_once_its_last_instance_has_ended(scheduling: Scheduling, instances: int, text: str) -> None:
    assert scheduling.shown(instances) == text
