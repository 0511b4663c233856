"""Instances on a lost node are no reason to wait (`FunctionQueueState.hopeless`), until the node is heard again."""

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
from tests.core.dispatch.test_dispatcher import FROZEN, RUNNING, Story, instance, uids

NO_MORE = FunctionSet("ocr", expects_instances=False)


@pytest.mark.parametrize(
    ("silence", "answer"),
    [(NodeSuspect("n1"), []), (NodeLost("n1"), [Refuse(1, RefusalReason.NO_CAPACITY)])],
    ids=["suspect", "lost"],
)
def test_new_requests_are_refused_while_all_instances_are_on_a_lost_node(silence: Event, answer: list[Refuse]) -> None:
    story = Story(NO_MORE, instance("a"), silence)
    assert story.arrive(1) == answer


@pytest.mark.parametrize("state", [RUNNING, FROZEN, InstanceState.FREEZING, InstanceState.RESTORING])
def test_queued_requests_are_refused_when_the_last_node_is_lost(state: InstanceState) -> None:
    story = Story(NO_MORE, NodeReported("n2"), instance("a", state), instance("b", state, "n2"))
    story(NodeSuspect("n1"))
    story(NodeSuspect("n2"))
    assert story.arrive(1) == []
    assert story(NodeLost("n1")) == [], "the other may come back"
    assert story(NodeLost("n2")) == [Refuse(1, RefusalReason.NO_CAPACITY)]


def test_queued_requests_wait_for_instances_that_are_expected() -> None:
    story = Story(instance("a"), NodeLost("n1"))
    assert story.arrive(1) == []
    assert story(NO_MORE) == [Refuse(1, RefusalReason.NO_CAPACITY)], "and no longer than they are"


def test_a_request_refused_by_a_lost_node_gets_no_capacity_at_once() -> None:
    story = Story(NO_MORE, instance("a"))
    assert story.went(1) == "a"
    assert story(NodeLost("n1")) == []
    assert story(LeaseRefused(1)) == [Refuse(1, RefusalReason.NO_CAPACITY)]


def test_a_node_that_reports_again_is_capacity_again() -> None:
    story = Story(NO_MORE, instance("a"), instance("b"), NodeLost("n1"))
    story(InstanceRetired("b"))
    story(InstanceGone("b"))
    story(instance("a", concurrency=2))  # regeared while it is lost
    story(NodeReported("n1"))
    assert uids(story.arrive(1) + story.arrive(2)) == ["a", "a"]
    assert story.arrive(3) == [], "it waits for a slot, for there is somebody to wait for"
    assert [one.request for one in story(NodeLost("n1")) if isinstance(one, Refuse)] == [3]
    assert story.arrive(4) == [Refuse(4, RefusalReason.NO_CAPACITY)]
