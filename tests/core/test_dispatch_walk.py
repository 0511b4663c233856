"""Random walks over the dispatcher: whatever happens in whatever order, its invariants hold after every event."""

from __future__ import annotations

import random
import sys
from collections import Counter
from dataclasses import dataclass, field
from math import ceil

import pytest

from agent.core.dispatch import Dispatcher
from agent.core.dispatch_events import (
    DeadlinePassed,
    Dispatch,
    Event,
    FunctionSet,
    InstanceGone,
    InstanceReported,
    InstanceRetired,
    LeaseEnded,
    LeaseRefused,
    NodeLost,
    NodeReported,
    NodeSuspect,
    Refuse,
    RequestArrived,
    RequestGone,
    Wake,
    WakeAnswered,
    WakeFailed,
)
from agent.core.types import MILLISECOND_NS, DispatchPolicy, InstanceState

FUNCTIONS = ("ocr", "llm")
NODES = ("n1", "n2", "n3")
CONCURRENCY = {"ocr": 1, "llm": 3}
WAKEABLE = (InstanceState.FROZEN, InstanceState.FREEZING, InstanceState.WAITING_GPU, InstanceState.RESTORING)
STATES = (
    InstanceState.RUNNING,
    InstanceState.RUNNING,
    InstanceState.FROZEN,
    InstanceState.FREEZING,
    InstanceState.RESTORING,
    InstanceState.WAITING_GPU,
    InstanceState.STARTING,
    InstanceState.STOPPING,
)


@dataclass
class Seen:
    """What the world believes of an instance."""

    function: str
    node: str
    state: InstanceState
    waking: bool = False
    usable: bool = True


@dataclass
class World:
    """The shell's side, kept independently of the dispatcher."""

    rng: random.Random
    dispatcher: Dispatcher = field(default_factory=Dispatcher)
    now: int = 1
    ready: set[str] = field(default_factory=set)
    instances: dict[str, Seen] = field(default_factory=dict)
    waiting: dict[int, str] = field(default_factory=dict)
    leased: dict[int, str] = field(default_factory=dict)
    answered: set[int] = field(default_factory=set)
    made: int = 0
    requests: int = 0
    retired: set[str] = field(default_factory=set)
    function_of: dict[int, str] = field(default_factory=dict)

    def tell(self, event: Event) -> None:
        self.now += MILLISECOND_NS
        for effect in self.dispatcher.step(event, self.now):
            match effect:
                case Dispatch(request, uid, node):
                    function = self.waiting.pop(request)
                    seen = self.instances[uid]
                    assert seen.function == function
                    assert node == seen.node
                    assert node in self.ready, "dispatched to a node that is suspect or lost"
                    assert seen.usable
                    older = [r for r, f in self.waiting.items() if f == function and r < request]
                    assert not older, "overtaken"
                    self.leased[request] = uid
                    assert Counter(self.leased.values())[uid] <= CONCURRENCY[function]
                case Wake(uid, node):
                    seen = self.instances[uid]
                    assert seen.state is InstanceState.FROZEN
                    assert not seen.waking
                    assert node in self.ready
                    seen.waking = True
                    under_way = sum(
                        self.will_be_awake(s) for s in self.instances.values() if s.function == seen.function
                    )
                    queued = sum(f == seen.function for f in self.waiting.values())
                    assert under_way <= ceil(queued / CONCURRENCY[seen.function])
                case Refuse(request, _):
                    del self.waiting[request]
                    self.answered.add(request)
        self.check()

    def will_be_awake(self, seen: Seen) -> bool:
        """Its wake counts: nothing came between."""
        return seen.waking and seen.usable and seen.node in self.ready and seen.state in WAKEABLE

    def check(self) -> None:
        for function in FUNCTIONS:
            queued = sum(f == function for f in self.waiting.values())
            assert self.dispatcher.queue_state(function).queued == queued
            if not queued:
                continue
            for uid, seen in self.instances.items():
                idle = CONCURRENCY[function] > Counter(self.leased.values())[uid]
                awake = seen.state is InstanceState.RUNNING and seen.usable and seen.node in self.ready
                assert not (seen.function == function and awake and idle), f"{uid} idles while requests wait"
        for uid in self.instances:
            assert self.dispatcher.leased(uid) == Counter(self.leased.values())[uid]

    # ---- what may happen --------------------------------------------------------------------------------------

    def arrive(self) -> None:
        function = self.rng.choice(FUNCTIONS)
        self.requests += 1
        self.waiting[self.requests] = self.function_of[self.requests] = function
        self.tell(RequestArrived(self.requests, function, self.now + 10**12))

    def report(self) -> None:
        if not self.instances or (self.rng.random() < 0.2 and len(self.instances) < 12):
            self.made += 1
            uid, function, node = f"i{self.made}", self.rng.choice(FUNCTIONS), self.rng.choice(NODES)
        else:
            uid = self.rng.choice(list(self.instances))
            function, node = self.instances[uid].function, self.instances[uid].node
        before = self.instances.get(uid)
        state = self.rng.choice(STATES)
        waking = before is not None and before.waking and state is not InstanceState.RUNNING
        self.instances[uid] = Seen(function, node, state, waking, usable=uid not in self.retired)
        self.tell(InstanceReported(uid, function, node, state, CONCURRENCY[function], gpus=(f"{node}-g",)))

    def retire(self) -> None:
        if self.instances and self.rng.random() < 0.1:
            uid = self.rng.choice(list(self.instances))
            self.retired.add(uid)
            self.instances[uid].usable = False
            self.tell(InstanceRetired(uid))

    def vanish(self) -> None:
        if self.instances and self.rng.random() < 0.3:
            uid = self.rng.choice(list(self.instances))
            del self.instances[uid]
            self.tell(InstanceGone(uid))

    def end(self) -> None:
        if self.leased:
            request = self.rng.choice(list(self.leased))
            del self.leased[request]
            self.answered.add(request)
            self.tell(self.rng.choice((LeaseEnded, RequestGone))(request))

    def refuse(self) -> None:
        if self.leased:
            request = self.rng.choice(list(self.leased))
            uid = self.leased.pop(request)
            if uid in self.instances:
                self.instances[uid].usable = False
            self.waiting[request] = self.function_of[request]
            self.tell(LeaseRefused(request))

    def leave(self) -> None:
        if self.waiting:
            request = self.rng.choice(list(self.waiting))
            if self.rng.random() < 0.5:
                del self.waiting[request]
                self.answered.add(request)
                self.tell(RequestGone(request))
            else:
                self.tell(DeadlinePassed(request))
                assert request in self.answered

    def wake_ends(self) -> None:
        waking = [uid for uid, seen in self.instances.items() if seen.waking]
        if waking:
            uid = self.rng.choice(waking)
            seen = self.instances[uid]
            seen.waking = False
            if self.rng.random() < 0.7:
                seen.state = InstanceState.RUNNING
                self.tell(WakeAnswered(uid))
            else:
                seen.usable = False
                self.tell(WakeFailed(uid))

    def node(self) -> None:
        name = self.rng.choice(NODES)
        if self.rng.random() < 0.6:
            self.ready.add(name)
            for uid, seen in self.instances.items():
                if seen.node == name and uid not in self.retired:
                    seen.usable = True
            self.tell(NodeReported(name, gpu_count=self.rng.choice((0, 2))))
        else:
            self.ready.discard(name)
            self.tell(self.rng.choice((NodeSuspect, NodeLost))(name))


@pytest.mark.parametrize("seed", range(60))
def test_every_request_is_waiting_leased_or_answered_exactly_once(seed: int) -> None:
    rng = random.Random(seed)
    world = World(rng)
    for function in FUNCTIONS:
        policy = rng.choice(list(DispatchPolicy))
        world.tell(FunctionSet(function, policy=policy, queue_length=20, wake_factor=rng.choice((0.0, 1.0))))
    actions = [
        *(world.arrive,) * 6, *(world.report,) * 3, *(world.end,) * 5, *(world.wake_ends,) * 2,
        world.refuse, world.leave, world.vanish, world.node, world.retire,
    ]  # fmt: skip
    for _ in range(500):
        rng.choice(actions)()
        accounted = [*world.waiting, *world.leased, *world.answered]
        assert sorted(accounted) == list(range(1, world.requests + 1))
    assert world.answered


def test_one_decision_costs_the_same_with_ten_and_with_ten_thousand_instances() -> None:
    """Counted, not timed: the index holds one bucket entry per instance and none is looked at but the chosen."""
    small, large = _steps_per_request(10), _steps_per_request(10_000)
    assert large <= small * 1.5


def _steps_per_request(instances: int) -> float:
    dispatcher = Dispatcher()
    dispatcher.step(FunctionSet("ocr"), 1)
    dispatcher.step(NodeReported("n1"), 1)
    for n in range(instances):
        state = InstanceState.RUNNING if n % 2 else InstanceState.FROZEN
        dispatcher.step(InstanceReported(f"i{n}", "ocr", f"n{n % 7}", state, 4), 1)
        dispatcher.step(NodeReported(f"n{n % 7}"), 1)
    calls = 0

    def count(frame: object, event: str, arg: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        for request in range(200):
            dispatcher.step(RequestArrived(request, "ocr", 10**15), request + 2)
            if request >= 3:
                dispatcher.step(LeaseEnded(request - 3), request + 2)
    finally:
        sys.setprofile(None)
    return calls / 200
