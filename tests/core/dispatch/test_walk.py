"""Random walks over the dispatcher: whatever happens in whatever order, its invariants hold after every event."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from math import ceil

import pytest

from agent.core.dispatch.dispatcher import Dispatcher
from agent.core.dispatch.events import (
    DeadlinePassed,
    Dispatch,
    Event,
    FunctionSet,
    InstanceGone,
    InstanceReported,
    InstanceRetired,
    LeaseAnswered,
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
CONCURRENCY = {"ocr": 1, "llm": 4}
WAKEABLE = (InstanceState.FROZEN, InstanceState.FREEZING, InstanceState.WAITING_GPU, InstanceState.RESTORING)
AWAKE_OR_WAKING = (InstanceState.RUNNING, InstanceState.FROZEN, InstanceState.WAITING_GPU, InstanceState.RESTORING)
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


MOSTLY_FROZEN = (InstanceState.FROZEN,) * 20 + (InstanceState.RUNNING, InstanceState.FREEZING, InstanceState.RESTORING)


def gpu_of(uid: str, node: str) -> str:
    """Three GPUs a node, shared by the instances in turn."""
    return f"{node}-g{int(uid[1:]) % 3}"


@dataclass
class Seen:
    """An instance as the walk knows it."""

    function: str
    node: str
    state: InstanceState
    waking: bool = False
    usable: bool = True


@dataclass
class Walk:
    """The caller's side, kept independently of the dispatcher."""

    rng: random.Random
    dispatcher: Dispatcher = field(default_factory=Dispatcher)
    now: int = 1
    ready: set[str] = field(default_factory=set)
    lost: set[str] = field(default_factory=set)
    instances: dict[str, Seen] = field(default_factory=dict)
    waiting: dict[int, str] = field(default_factory=dict)
    leased: dict[int, str] = field(default_factory=dict)
    void: set[int] = field(default_factory=set)  # of those: the lease ended with its node, the request has not
    epochs: dict[str, int] = field(default_factory=dict)
    direct_wakes: dict[str, int] = field(default_factory=dict)  # dispatched to a frozen instance, until it wakes
    answered: set[int] = field(default_factory=set)
    made: int = 0
    requests: int = 0
    retired: set[str] = field(default_factory=set)
    function_of: dict[int, str] = field(default_factory=dict)
    states: tuple[InstanceState, ...] = STATES
    direct_wake_count: int = 0
    early: dict[int, str] = field(default_factory=dict)  # requests that wait at a node, as far as the walk knows
    early_dispatches: int = 0
    lease_ns: Counter[str] = field(default_factory=Counter)

    def dispatch(self, event: Event) -> None:
        self.now += MILLISECOND_NS
        for effect in self.dispatcher.step(event, self.now):
            match effect:
                case Dispatch(request, uid, node, direct_wake=direct_wake, early=early):
                    function = self.waiting.pop(request)
                    seen = self.instances[uid]
                    assert seen.function == function
                    assert node == seen.node
                    assert node in self.ready, "dispatched to a node that is suspect or lost"
                    assert seen.usable
                    older = [r for r, f in self.waiting.items() if f == function and r < request]
                    assert not older, "overtaken"
                    if early:
                        self.check_early(function, node)
                        self.early[request] = node
                        self.early_dispatches += 1
                        continue
                    if direct_wake:
                        self.check_direct_wake(function, uid)
                        self.direct_wakes[uid] = request
                    self.leased[request] = uid
                    moved = isinstance(event, LeaseEnded) and event.uid  # `check` learns which leases were traded
                    assert (self.dispatcher.leased(uid) if moved else self.outstanding(uid)) <= CONCURRENCY[function]
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
                    queued += sum(
                        self.will_be_awake(self.instances[u]) and self.instances[u].function == seen.function
                        for u in self.direct_wakes
                    )
                    assert under_way <= ceil(queued / CONCURRENCY[seen.function])
                case Refuse(request, _):
                    del self.waiting[request]
                    self.answered.add(request)
        if isinstance(event, LeaseEnded) and event.uid:
            self.learn_who_holds()
        self.check()

    def check_early(self, function: str, node: str) -> None:
        """All instances there are busy, and no slot on another node goes idle for it."""
        elsewhere = 0
        for uid, seen in self.instances.items():
            if seen.function == function and seen.state is InstanceState.RUNNING and seen.usable:
                if seen.node == node:
                    assert self.dispatcher.leased(uid) >= CONCURRENCY[function], f"{uid} is free"
                elif seen.node in self.ready:
                    elsewhere += CONCURRENCY[function]
        assert sum(f == function for f in self.waiting.values()) >= elsewhere

    def check_direct_wake(self, function: str, uid: str) -> None:
        """No other instance of the function could be free sooner, and all instances on the GPU are frozen."""
        mine = self.instances[uid]
        assert mine.state is InstanceState.FROZEN
        assert not [f for f in self.waiting.values() if f == function]
        for name, seen in self.instances.items():
            frozen = seen.state is InstanceState.FROZEN and not seen.waking
            assert frozen or gpu_of(name, seen.node) != gpu_of(uid, mine.node), f"{name} shares its GPU"
            usable = seen.usable and seen.node in self.ready
            assert frozen or not usable or seen.function != function or seen.state not in AWAKE_OR_WAKING, name
        mine.waking = True
        self.direct_wake_count += 1

    def will_be_awake(self, seen: Seen) -> bool:
        """Its wake is still in progress."""
        return seen.waking and seen.usable and seen.node in self.ready and seen.state in WAKEABLE

    def check(self) -> None:
        self.grant_early()
        for function in FUNCTIONS:
            queued = sum(f == function for f in self.waiting.values())
            there = sum(self.function_of[request] == function for request in self.early)
            assert self.dispatcher.queue_state(function).queued == queued + there
            self.check_lost(function)
            if not queued:
                continue
            for uid, seen in self.instances.items():
                idle = CONCURRENCY[function] > self.outstanding(uid)
                awake = seen.state is InstanceState.RUNNING and seen.usable and seen.node in self.ready
                assert not (seen.function == function and awake and idle), f"{uid} idles while requests wait"
        for uid in self.instances:
            assert self.dispatcher.leased(uid) == self.outstanding(uid)
        valid = Counter(self.function_of[request] for request in self.leased if request not in self.void)
        for function in FUNCTIONS:
            self.lease_ns[function] += valid[function] * MILLISECOND_NS
            found = self.dispatcher.lease_time_ns(function, self.now + MILLISECOND_NS)
            assert found == self.lease_ns[function], "the sum of leases over time is what utilisation is made of"

    def check_lost(self, function: str) -> None:
        """Exactly the instances on lost nodes count as lost."""
        nodes = [seen.node for seen in self.instances.values() if seen.function == function]
        index = self.dispatcher._function(function).index
        assert (index.count, index.lost) == (len(nodes), sum(name in self.lost for name in nodes))

    def grant_early(self) -> None:
        """Requests that wait at a node get the slots that become free there; the dispatcher knows which."""
        for request in [request for request in self.early if request in self.holders()]:
            self.leased[request] = self.holders()[request]
            node, function = self.early[request], self.function_of[request]
            first = next(r for r, where in self.early.items() if (where, self.function_of[r]) == (node, function))
            assert first == request, "overtaken"
            assert self.instances[self.leased[request]].node == self.early.pop(request)

    def holders(self) -> dict[int, str]:
        """Instance by request, of all leases that the dispatcher holds."""
        return {request: uid for uid, instance in self.dispatcher._instances.items() for request in instance.holders}

    def outstanding(self, uid: str) -> int:
        """Leases that are not void."""
        return sum(where == uid and request not in self.void for request, where in self.leased.items())

    # ---- what may happen --------------------------------------------------------------------------------------

    def arrive(self) -> None:
        function = self.rng.choice(FUNCTIONS)
        self.requests += 1
        self.waiting[self.requests] = self.function_of[self.requests] = function
        self.dispatch(RequestArrived(self.requests, function, self.now + 10**12))

    def report(self) -> None:
        if not self.instances or (self.rng.random() < 0.2 and len(self.instances) < 12):
            self.made += 1
            uid, function, node = f"i{self.made}", self.rng.choice(FUNCTIONS), self.rng.choice(NODES)
        else:
            uid = self.rng.choice(list(self.instances))
            function, node = self.instances[uid].function, self.instances[uid].node
        before = self.instances.get(uid)
        state = self.rng.choice(self.states)
        waking = before is not None and before.waking and state is not InstanceState.RUNNING
        if not waking:
            self.direct_wakes.pop(uid, None)
        self.instances[uid] = Seen(function, node, state, waking, usable=uid not in self.retired)
        self.dispatch(InstanceReported(uid, function, node, state, CONCURRENCY[function], gpus=(gpu_of(uid, node),)))

    def retire(self) -> None:
        if self.instances and self.rng.random() < 0.1:
            uid = self.rng.choice(list(self.instances))
            self.retired.add(uid)
            self.instances[uid].usable = False
            self.dispatch(InstanceRetired(uid))

    def vanish(self) -> None:
        if self.instances and self.rng.random() < 0.3:
            uid = self.rng.choice(list(self.instances))
            del self.instances[uid]
            self.direct_wakes.pop(uid, None)
            self.dispatch(InstanceGone(uid))

    def end(self) -> None:
        if self.leased:
            request = self.rng.choice(list(self.leased))
            self.end_direct_wake(self.leased.pop(request), request)
            self.void.discard(request)
            self.answered.add(request)
            mine = [u for u, s in self.instances.items() if s.function == self.function_of[request]]
            served = LeaseEnded(request, self.rng.choice(mine) if mine else "")
            self.dispatch(self.rng.choice((served, RequestGone(request))))

    def learn_who_holds(self) -> None:
        """Two requests on one node have traded leases, since another instance served than the dispatcher assumed."""
        found = self.holders()
        for request, uid in self.leased.items():
            if request not in self.void and uid in self.instances:
                assert self.instances[found[request]].node == self.instances[uid].node
                assert self.instances[found[request]].function == self.function_of[request]
                self.leased[request] = found[request]

    def early_ends(self) -> None:
        """It is refused there, its client leaves, or it is served before the dispatcher sees the free slot."""
        if self.early:
            request = self.rng.choice(list(self.early))
            del self.early[request]
            if self.rng.random() < 0.5:
                self.waiting[request] = self.function_of[request]
                self.dispatch(LeaseRefused(request))
            else:
                self.answered.add(request)
                self.dispatch(self.rng.choice((LeaseEnded, RequestGone))(request))

    def refuse(self) -> None:
        if self.leased:
            request = self.rng.choice(list(self.leased))
            uid = self.leased.pop(request)
            self.end_direct_wake(uid, request)
            if uid in self.instances and request not in self.void:
                self.instances[uid].usable = False
            self.void.discard(request)
            self.waiting[request] = self.function_of[request]
            self.dispatch(LeaseRefused(request))

    def end_direct_wake(self, uid: str, request: int) -> None:
        """The request has ended, and with it its direct wake."""
        if self.direct_wakes.get(uid) == request:
            del self.direct_wakes[uid]
            self.instances[uid].waking = False

    def leave(self) -> None:
        if self.waiting:
            request = self.rng.choice(list(self.waiting))
            if self.rng.random() < 0.5:
                del self.waiting[request]
                self.answered.add(request)
                self.dispatch(RequestGone(request))
            else:
                self.dispatch(DeadlinePassed(request))
                assert request in self.answered

    def wake_ends(self) -> None:
        waking = [uid for uid, seen in self.instances.items() if seen.waking]
        if waking:
            uid = self.rng.choice(waking)
            seen = self.instances[uid]
            seen.waking = False
            request = self.direct_wakes.pop(uid, None)
            if self.rng.random() < 0.7:
                seen.state = InstanceState.RUNNING
                self.dispatch(
                    WakeAnswered(uid) if request is None else LeaseAnswered(request, self.rng.choice((0, 10**6)))
                )
            elif request is not None:
                seen.usable = False
                del self.leased[request]
                self.waiting[request] = seen.function
                self.dispatch(LeaseRefused(request))
            else:
                seen.usable = False
                self.dispatch(WakeFailed(uid))

    def node(self) -> None:
        name = self.rng.choice(NODES)
        self.lost.discard(name)
        if self.rng.random() < 0.6:
            self.ready.add(name)
            for uid, seen in self.instances.items():
                if seen.node == name and uid not in self.retired:
                    seen.usable = True
            if self.rng.random() < 0.2:
                self.epochs[name] = self.epochs.get(name, 0) + 1
                self.leases_end(name)
            self.dispatch(NodeReported(name, gpu_count=self.rng.choice((0, 2)), epoch=self.epochs.get(name, 0)))
        else:
            self.ready.discard(name)
            silence = self.rng.choice((NodeSuspect, NodeLost))(name)
            if isinstance(silence, NodeLost):
                self.leases_end(name)
                self.lost.add(name)
            self.dispatch(silence)

    def leases_end(self, node: str) -> None:
        """Its agent is gone or restarted: its leases are void, and its wakes have ended."""
        for uid, seen in self.instances.items():
            if seen.node == node:
                seen.waking = False
                self.direct_wakes.pop(uid, None)
                self.void |= {request for request, where in self.leased.items() if where == uid}


def walk(seed: int) -> Walk:
    """In every second walk instances are mostly frozen and requests are few; every third has early dispatch."""
    rng = random.Random(seed)
    frozen = seed % 2 == 1
    world = Walk(rng, Dispatcher(early_dispatch=seed % 3 == 0), states=MOSTLY_FROZEN if frozen else STATES)
    for function in FUNCTIONS:
        policy = rng.choice(list(DispatchPolicy))
        world.dispatch(FunctionSet(function, policy=policy, queue_length=20, wake_factor=rng.choice((0.0, 1.0))))
    actions = [
        *(world.arrive,) * (2 if frozen else 6), *(world.report,) * 3, *(world.end,) * 5, *(world.wake_ends,) * 2,
        world.refuse, world.leave, world.vanish, world.node, world.retire, world.early_ends,
    ]  # fmt: skip
    for _ in range(500):
        rng.choice(actions)()
        accounted = [*world.waiting, *world.early, *world.leased, *world.answered]
        assert sorted(accounted) == list(range(1, world.requests + 1))
    return world


@pytest.mark.parametrize("seed", range(60))
def test_every_request_is_waiting_leased_or_answered_exactly_once(seed: int) -> None:
    assert walk(seed).answered


def test_the_walks_reach_direct_wakes() -> None:
    assert sum(walk(seed).direct_wake_count for seed in range(1, 21, 2)) > 20


def test_the_walks_reach_early_dispatches() -> None:
    assert sum(walk(seed).early_dispatches for seed in range(0, 60, 6)) > 20
