"""Instances on a lost node are no capacity (`FunctionQueueState.no_capacity_expected`) until the node reports again."""

from __future__ import annotations

import pytest

from agent.core.dispatch.events import (
    Event,
    FunctionSet,
    InstanceGone,
    InstanceRetired,
    LeaseRefused,
    NodeLost,
    NodeReported,
    NodeSuspect,
    RefusalReason,
    Refuse,
)
from agent.core.types import InstanceState
from tests.core.dispatch.test_dispatcher import FROZEN, RUNNING, DispatcherRig, instance, uids

NO_MORE = FunctionSet("ocr", expects_instances=False)


@pytest.mark.parametrize(
    ("silence", "answer"),
    [(NodeSuspect("n1"), []), (NodeLost("n1"), [Refuse(1, RefusalReason.NO_CAPACITY)])],
    ids=["suspect", "lost"],
)
def test_new_requests_are_refused_while_all_instances_are_on_a_lost_node(silence: Event, answer: list[Refuse]) -> None:
    rig = DispatcherRig(NO_MORE, instance("a"), silence)
    assert rig.arrive(1) == answer


@pytest.mark.parametrize("state", [RUNNING, FROZEN, InstanceState.FREEZING, InstanceState.RESTORING])
def test_queued_requests_are_refused_when_the_last_node_is_lost(state: InstanceState) -> None:
    rig = DispatcherRig(NO_MORE, NodeReported("n2"), instance("a", state), instance("b", state, "n2"))
    rig(NodeSuspect("n1"))
    rig(NodeSuspect("n2"))
    assert rig.arrive(1) == []
    assert rig(NodeLost("n1")) == [], "the other may come back"
    assert rig(NodeLost("n2")) == [Refuse(1, RefusalReason.NO_CAPACITY)]


def test_queued_requests_wait_for_instances_that_are_expected() -> None:
    rig = DispatcherRig(instance("a"), NodeLost("n1"))
    assert rig.arrive(1) == []
    assert rig(NO_MORE) == [Refuse(1, RefusalReason.NO_CAPACITY)], "until no more are expected"


def test_a_request_refused_by_a_lost_node_gets_no_capacity_at_once() -> None:
    rig = DispatcherRig(NO_MORE, instance("a"))
    assert rig.went(1) == "a"
    assert rig(NodeLost("n1")) == []
    assert rig(LeaseRefused(1)) == [Refuse(1, RefusalReason.NO_CAPACITY)]


def test_a_node_that_reports_again_is_capacity_again() -> None:
    rig = DispatcherRig(NO_MORE, instance("a"), instance("b"), NodeLost("n1"))
    rig(InstanceRetired("b"))
    rig(InstanceGone("b"))
    rig(instance("a", concurrency=2))  # resized while it is lost
    rig(NodeReported("n1"))
    assert uids(rig.arrive(1) + rig.arrive(2)) == ["a", "a"]
    assert rig.arrive(3) == [], "it is queued, since an instance can serve it"
    assert [one.request for one in rig(NodeLost("n1")) if isinstance(one, Refuse)] == [3]
    assert rig.arrive(4) == [Refuse(4, RefusalReason.NO_CAPACITY)]
