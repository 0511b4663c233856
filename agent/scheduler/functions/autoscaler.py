"""The scaler: how many instances each function is to have now, by its schedule and its policies.

`core/provisioning/autoscaling.py` decides; this shows it the clock and what the fleet reports, and hands the outcome to
the catalog. It looks once a second and whenever a deploy or put changed something, at functions with a schedule or
policies only.

Nothing is kept over a restart of the scheduler, and nothing is lost by one: firings follow from the clock, and policies
begin anew from the instances there are. They do so once every known node has reported or is lost; until then nothing is
created or stopped (core/provisioning/reconcile.py), and whoever makes the provisioner look after that lets the scaler
look first. A node that comes only after it was given up for lost brings instances that no policy began with: what they
ask for then is at least what there is with them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction

from agent.core.dispatch.dispatcher import Dispatcher
from agent.core.dispatch.model import NodeStanding
from agent.core.provisioning.autoscaling import (
    Action,
    Fired,
    Metric,
    Patience,
    Provisioning,
    ScalingPolicy,
    Tracking,
    begin,
    decide,
    last_fired,
    observe,
    scheduled,
)
from agent.core.provisioning.reconcile import parse_request_id
from agent.log import get_logger
from agent.ports import Clock
from agent.scheduler.fleet.fleet import ENDED, Fleet, NodeRecord
from agent.scheduler.functions.catalog import Catalog, Deployed
from agent.scheduler.functions.scaling_metrics import Gauge, ScalingMetrics, View
from agent.v1.scheduler_service_pb2 import NodeLoad
from agent.v1.types_pb2 import Instance

LOOK_S = 1.0
_GOING = (Instance.STATE_STOPPING, *ENDED)
_log = get_logger()


@dataclass(frozen=True, slots=True)
class PolicyState:
    """A policy at work: 0 is the target of one that is not active; `metric` is its last sample, if there was one."""

    name: str
    active: bool
    target: int
    metric: Fraction | None


class _Timer:
    """An action's last firing, looked up again only when the next one is due."""

    def __init__(self, action: Action) -> None:
        self.action = action
        self.fired: Fired | None = None
        self._looked_ns = -1
        self._due_ns: int | None = 0

    def at(self, wall_ns: int) -> Fired | None:
        """The last firing up to now."""
        if wall_ns < self._looked_ns or (self._due_ns is not None and wall_ns >= self._due_ns):
            window = self.action.window
            self.fired = last_fired(self.action, wall_ns)
            self._due_ns = self.action.schedule.next(max(wall_ns, window.start_ns - 1), window.end_ns)
        self._looked_ns = wall_ns
        return self.fired


@dataclass(slots=True)
class _Following:
    """One function's schedule and policies at work. `tracking` and `metrics` by policy; of active policies only."""

    provisioning: Provisioning
    timers: list[_Timer]
    tracking: dict[ScalingPolicy, Tracking] = field(default_factory=dict)
    metrics: dict[Metric, Fraction | None] = field(default_factory=dict)
    meter: ScalingMetrics | None = None
    active: tuple[ScalingPolicy, ...] = ()


class Autoscaler:
    """Looks until cancelled. `changed` is called when a target has changed."""

    def __init__(
        self,
        clock: Clock,
        catalog: Catalog,
        fleet: Fleet,
        dispatcher: Dispatcher,
        period_ns: int,
        patience: Patience,
        changed: Callable[[], None],
    ) -> None:
        self._clock = clock
        self._catalog = catalog
        self._fleet = fleet
        self._dispatcher = dispatcher
        self._period_ns = period_ns
        self._patience = patience
        self._changed = changed
        self._following: dict[str, _Following] = {}
        self._heard: dict[str, tuple[NodeLoad, int]] = {}
        self._late: set[str] = set()
        self._unbegun = False

    @property
    def waiting(self) -> bool:
        """`look` whenever the fleet has changed: a policy begins as soon as the fleet is settled, or anew as soon as a
        node is back that was lost since the start."""
        return self._unbegun or any(map(self._is_back, self._late))

    async def run(self) -> None:
        """Look once a second, until cancelled."""
        while True:
            self.look()
            await asyncio.sleep(LOOK_S)

    def look(self) -> None:
        """Take everything in and decide."""
        functions = {one.spec.name: one for one in self._catalog.all() if one.provisioning and not one.deleting}
        for name in self._following.keys() - functions.keys():
            del self._following[name]
        self._unbegun = False
        anew = self._late_are_back()
        if not functions:
            self._heard.clear()
            return
        at, wall = self._clock.monotonic_ns(), self._clock.wall_ns()
        views = self._views(functions)
        settled = self._fleet.settled()
        moved = False
        for name, function in functions.items():
            following = self._follow(name, function.provisioning)
            following.active = tuple(one for one in function.provisioning.policies if one.window.holds(wall))
            self._measure(function, following, views[name], settled, at)
            if anew:
                _raise(following, views[name].current)
            moved |= self._decide(function, following, views[name], settled, wall)
        if moved:
            self._changed()

    def states(self, name: str) -> tuple[PolicyState, ...]:
        """What the policies of a function see, in their order."""
        following = self._following.get(name)
        if following is None:
            return ()
        found = []
        for policy in following.provisioning.policies:
            tracking = following.tracking.get(policy)
            active = policy in following.active
            target = 0 if not active else policy.least if tracking is None else tracking.target
            found.append(PolicyState(policy.name, active, target, following.metrics.get(policy.metric)))
        return tuple(found)

    # ---- one function -----------------------------------------------------------------------------------------

    def _follow(self, name: str, provisioning: Provisioning) -> _Following:
        """What is put again as it was goes on as it was."""
        before = self._following.get(name)
        if before is not None and before.provisioning is provisioning:
            return before
        after = _Following(provisioning, [_Timer(action) for action in provisioning.actions])
        if before is not None:
            after.meter, after.metrics = before.meter, before.metrics
            after.tracking = {one: before.tracking[one] for one in provisioning.policies if one in before.tracking}
        self._following[name] = after
        return after

    def _measure(self, function: Deployed, following: _Following, view: View, settled: bool, at: int) -> None:
        """At the end of a period every policy at work is told."""
        if not following.active:
            following.meter, following.metrics = None, {}
            return
        leases = self._dispatcher.lease_time_ns(function.spec.name, at)
        if following.meter is None:
            following.meter = ScalingMetrics(at, leases, view)
            return
        following.meter.look(at, view)
        if at - following.meter.began_ns < self._period_ns:
            return
        samples = following.meter.samples(leases, function.spec.vcpu_millis)
        average, blind = following.meter.average(), following.meter.blind
        following.meter = ScalingMetrics(at, leases, view)
        following.metrics = dict(samples)
        for policy, tracking in following.tracking.items():
            sample = samples[policy.metric]
            if not settled or (blind and sample is not None and sample < policy.goal):
                sample = None  # what those do that nobody hears is not known: no reason to have fewer
            following.tracking[policy] = observe(policy, tracking, sample, view.current, self._patience, average)

    def _decide(self, function: Deployed, following: _Following, view: View, settled: bool, wall: int) -> bool:
        for policy in following.tracking.keys() - set(following.active):
            del following.tracking[policy]
        asked = []
        for policy in following.active:
            tracking = following.tracking.get(policy)
            if tracking is None and settled:
                tracking = following.tracking[policy] = begin(policy, view.current)
            self._unbegun |= tracking is None
            asked.append((policy.name, policy.least if tracking is None else tracking.target))
        firings = [fired for timer in following.timers if (fired := timer.at(wall)) is not None]
        decided = decide(function.default_target, scheduled(firings, wall), asked)
        name = function.spec.name
        moved = self._catalog.set_target(name, decided)
        if moved:
            before, by = function.target, decided.decided_by
            _log.info("scaling.decided", function=name, target=decided.target, before=before, decided_by=by)
        return moved

    # ---- what the fleet reports -------------------------------------------------------------------------------

    def _late_are_back(self) -> bool:
        """Whether nodes have come of which nothing had been heard since the start when they were given up for lost."""
        self._late |= {
            node.name for node in self._fleet.nodes() if node.standing is NodeStanding.LOST and not node.wall_ns
        }
        back = set(filter(self._is_back, self._late))
        self._late -= back
        return bool(back)

    def _is_back(self, name: str) -> bool:
        node = self._fleet.node(name)
        return node is not None and node.settled and node.standing is not NodeStanding.LOST

    def _views(self, functions: Mapping[str, Deployed]) -> dict[str, View]:
        views = {name: View() for name in functions}
        nodes = self._fleet.nodes()
        for node in nodes:
            if node.standing is NodeStanding.LOST:
                continue
            heard = node.settled and node.standing in (NodeStanding.READY, NodeStanding.DRAINING)
            for uid, load in node.instances.items():
                view = views.get(load.function)
                if view is None or load.state in _GOING:
                    continue
                view.current += parse_request_id(load.request_id) is not None
                if heard:
                    view.slots += max(1, load.concurrency)
                else:
                    view.unheard += 1
                    view.unheard_leases += self._dispatcher.leased(uid)
            if heard:
                self._gauges(node, views)
        for name in self._heard.keys() - {node.name for node in nodes}:
            del self._heard[name]
        return views

    def _gauges(self, node: NodeRecord, views: Mapping[str, View]) -> None:
        """Gauges come with heartbeats; one that was seen before is as old as it was then."""
        load, heard_ns = self._heard.get(node.name, (None, 0))
        if load is not node.load:
            heard_ns = node.heard_ns
            self._heard[node.name] = (node.load, heard_ns)
        for gauge in node.load.instances:
            instance = node.instances.get(gauge.uid)
            view = None if instance is None else views.get(instance.function)
            if view is not None and instance is not None and instance.state not in _GOING:
                view.gauges[gauge.uid] = Gauge(
                    heard_ns,
                    gauge.cpu_ns if gauge.HasField("cpu_ns") else None,
                    gauge.vram_bytes if gauge.HasField("vram_bytes") else None,
                    gauge.vram_limit_bytes,
                )


def _raise(following: _Following, current: int) -> None:
    """Its policies ask for `current` instances at least, as if they began with them."""
    for policy, tracking in following.tracking.items():
        anew = begin(policy, current)
        if anew.target > tracking.target:
            following.tracking[policy] = anew
