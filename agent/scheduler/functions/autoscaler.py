"""The autoscaler: sets each function's target by its schedule and its target tracking policies.

`core/provisioning/autoscaling.py` decides from the clock and from what the fleet reports; the catalog gets the outcome.
Functions that have neither schedule nor policies keep their default target.

Across a restart of the scheduler only the last target is kept (last_targets.py), for what can't be read then. Firings
follow from the clock, and policies begin anew with the instances there are, once every known node has reported or is
lost. Until then nothing is created or stopped (core/provisioning/reconcile.py), and after that the autoscaler acts
before the provisioner does. If a node is lost before its first report and reports later, the policies raise their
targets to the instances there are then.
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
from agent.core.provisioning.model import parse_request_id
from agent.event_log import EventLog
from agent.ports import Clock
from agent.scheduler.fleet.fleet import ENDED, Fleet, NodeRecord
from agent.scheduler.functions.catalog import Catalog
from agent.scheduler.functions.deployed import Deployed
from agent.scheduler.functions.last_targets import LastTargets
from agent.scheduler.functions.scaling_metrics import Gauge, ScalingMetrics, View
from agent.v1.types_pb2 import Instance

CHECK_S = 1.0
_GOING = (Instance.STATE_STOPPING, *ENDED)


@dataclass(frozen=True, slots=True)
class PolicyState:
    """A policy as users see it. `target`: 0 if it is not active; `metric`: its last sample, if any."""

    name: str
    active: bool
    target: int
    metric: Fraction | None


class _ActionTimer:
    """An action's last firing, computed again only when the next one is due or the clock has gone back."""

    def __init__(self, action: Action) -> None:
        self.action = action
        self.fired: Fired | None = None
        self._checked_ns = -1
        self._due_ns: int | None = 0

    def at(self, wall_ns: int) -> Fired | None:
        if wall_ns < self._checked_ns or (self._due_ns is not None and wall_ns >= self._due_ns):
            window = self.action.window
            self.fired = last_fired(self.action, wall_ns)
            self._due_ns = self.action.schedule.next(max(wall_ns, window.start_ns - 1), window.end_ns)
        self._checked_ns = wall_ns
        return self.fired


@dataclass(slots=True)
class _FunctionScaling:
    """One function's schedule and policies. `tracking`: of the active policies; `metrics`: the last samples."""

    provisioning: Provisioning
    timers: list[_ActionTimer]
    tracking: dict[ScalingPolicy, Tracking] = field(default_factory=dict)
    metrics: dict[Metric, Fraction | None] = field(default_factory=dict)
    meter: ScalingMetrics | None = None
    active: tuple[ScalingPolicy, ...] = ()


class Autoscaler:
    """Checks all functions once a second, and when asked. `changed` is called when a target has changed."""

    def __init__(
        self,
        clock: Clock,
        events: EventLog,
        catalog: Catalog,
        fleet: Fleet,
        dispatcher: Dispatcher,
        period_ns: int,
        patience: Patience,
        changed: Callable[[], None],
        last_targets: LastTargets,
    ) -> None:
        self._clock = clock
        self._events = events
        self._catalog = catalog
        self._fleet = fleet
        self._dispatcher = dispatcher
        self._period_ns = period_ns
        self._patience = patience
        self._changed = changed
        self._last_targets = last_targets
        self._scaling: dict[str, _FunctionScaling] = {}
        self._never_heard: set[str] = set()
        self._policies_wait = False

    @property
    def waiting(self) -> bool:
        """Whether to `check` when the fleet changes: policies wait for nodes to report, or a lost node is back."""
        return self._policies_wait or any(map(self._is_back, self._never_heard))

    async def run(self) -> None:
        while True:
            self.check()
            await asyncio.sleep(CHECK_S)

    def check(self) -> None:
        """Measure and decide for all functions with a schedule or policies."""
        functions = {one.spec.name: one for one in self._catalog.all() if one.provisioning and not one.deleting}
        for name in self._scaling.keys() - functions.keys():
            del self._scaling[name]
            self._last_targets.forget(name)
        self._policies_wait = False
        late_nodes = self._late_nodes_reported()
        if not functions:
            return
        at, wall = self._clock.monotonic_ns(), self._clock.wall_ns()
        views = self._views(functions)
        all_reported = self._fleet.all_reported()
        changed = False
        for name, function in functions.items():
            scaling = self._follow(name, function.provisioning)
            scaling.active = tuple(one for one in function.provisioning.policies if one.window.contains(wall))
            self._measure(function, scaling, views[name], all_reported, at)
            if late_nodes:
                _raise_targets(scaling, views[name].current)
            changed |= self._decide(function, scaling, views[name], all_reported, wall)
        if changed:
            self._changed()

    def states(self, name: str) -> tuple[PolicyState, ...]:
        """The policies of a function, in the order of its configuration."""
        scaling = self._scaling.get(name)
        if scaling is None:
            return ()
        found = []
        for policy in scaling.provisioning.policies:
            tracking = scaling.tracking.get(policy)
            active = policy in scaling.active
            target = 0 if not active else policy.min_capacity if tracking is None else tracking.target
            found.append(PolicyState(policy.name, active, target, scaling.metrics.get(policy.metric)))
        return tuple(found)

    # ---- one function -----------------------------------------------------------------------------------------

    def _follow(self, name: str, provisioning: Provisioning) -> _FunctionScaling:
        """The function's state; a policy that a new configuration repeats keeps its tracking."""
        before = self._scaling.get(name)
        if before is not None and before.provisioning is provisioning:
            return before
        after = _FunctionScaling(provisioning, [_ActionTimer(action) for action in provisioning.actions])
        if before is not None:
            after.meter, after.metrics = before.meter, before.metrics
            after.tracking = {one: before.tracking[one] for one in provisioning.policies if one in before.tracking}
        self._scaling[name] = after
        return after

    def _measure(self, function: Deployed, scaling: _FunctionScaling, view: View, all_reported: bool, at: int) -> None:
        """Record the function, and at the end of a period give each active policy its sample."""
        if not scaling.active:
            scaling.meter, scaling.metrics = None, {}
            return
        leases = self._dispatcher.lease_time_ns(function.spec.name, at)
        if scaling.meter is None:
            scaling.meter = ScalingMetrics(at, leases, view)
            return
        scaling.meter.record(at, view)
        if at - scaling.meter.began_ns < self._period_ns:
            return
        samples = scaling.meter.samples(leases, function.spec.vcpu_millis)
        average, blind = scaling.meter.average(), scaling.meter.blind
        scaling.meter = ScalingMetrics(at, leases, view)
        scaling.metrics = dict(samples)
        for policy, tracking in scaling.tracking.items():
            sample = samples[policy.metric]
            if not all_reported or (blind and sample is not None and sample < policy.metric_target):
                sample = None  # the load of instances on silent nodes is unknown: do not scale in
            scaling.tracking[policy] = observe(policy, tracking, sample, view.current, self._patience, average)

    def _decide(self, function: Deployed, scaling: _FunctionScaling, view: View, all_reported: bool, wall: int) -> bool:
        for policy in scaling.tracking.keys() - set(scaling.active):
            del scaling.tracking[policy]
        targets, waits = [], False
        for policy in scaling.active:
            tracking = scaling.tracking.get(policy)
            if tracking is None and all_reported:
                tracking = scaling.tracking[policy] = begin(policy, view.current)
            waits |= tracking is None
            targets.append((policy.name, policy.min_capacity if tracking is None else tracking.target))
        firings = [fired for timer in scaling.timers if (fired := timer.at(wall)) is not None]
        name, last = function.spec.name, 0
        unreadable = [one for one in scaling.provisioning.unreadable if one.window.contains(wall)]
        if unreadable:
            known = self._last_target(function, view, all_reported)
            waits |= known is None
            last = function.target if known is None else known
        decided = decide(function.default_target, scheduled(firings, wall), targets, unreadable, last)
        self._policies_wait |= waits
        if not (waits or unreadable):
            self._last_targets.note(name, decided.target)
        changed = self._catalog.set_target(name, decided)
        if changed:
            before, by = function.target, decided.decided_by
            self._events.info("scaling.decided", function=name, target=decided.target, before=before, decided_by=by)
        return changed

    def _last_target(self, function: Deployed, view: View, all_reported: bool) -> int | None:
        """The function's last target. If none was ever stored, the instances there are count as such; None until all
        nodes have reported them."""
        name = function.spec.name
        if self._last_targets.get(name) is None and all_reported:
            self._last_targets.note(name, max(function.default_target, view.current))
        return self._last_targets.get(name)

    # ---- what the fleet reports -------------------------------------------------------------------------------

    def _late_nodes_reported(self) -> bool:
        """Whether a node that was lost before its first report since the start has now reported."""
        self._never_heard |= {
            node.name
            for node in self._fleet.nodes()
            if node.standing is NodeStanding.LOST and not node.last_heard_wall_ns
        }
        back = set(filter(self._is_back, self._never_heard))
        self._never_heard -= back
        return bool(back)

    def _is_back(self, name: str) -> bool:
        node = self._fleet.node(name)
        return node is not None and node.all_reported and node.standing is not NodeStanding.LOST

    def _views(self, functions: Mapping[str, Deployed]) -> dict[str, View]:
        views = {name: View() for name in functions}
        nodes = self._fleet.nodes()
        for node in nodes:
            if node.standing is NodeStanding.LOST:
                continue
            reports = node.all_reported and node.standing in (NodeStanding.READY, NodeStanding.DRAINING)
            for uid, load in node.instances.items():
                view = views.get(load.function)
                if view is None or load.state in _GOING:
                    continue
                view.current += parse_request_id(load.request_id) is not None
                if reports:
                    view.slots += max(1, load.concurrency)
                else:
                    view.silent += 1
                    view.silent_leases += self._dispatcher.leased(uid)
            if reports:
                _add_gauges(node, views)
        return views


def _add_gauges(node: NodeRecord, views: Mapping[str, View]) -> None:
    """Add the gauges of the node's last heartbeat, dated by its arrival."""
    for gauge in node.load.instances:
        instance = node.instances.get(gauge.uid)
        view = None if instance is None else views.get(instance.function)
        if view is not None and instance is not None and instance.state not in _GOING:
            view.gauges[gauge.uid] = Gauge(
                node.load_ns,
                gauge.cpu_ns if gauge.HasField("cpu_ns") else None,
                gauge.vram_bytes if gauge.HasField("vram_bytes") else None,
                gauge.vram_limit_bytes,
            )


def _raise_targets(scaling: _FunctionScaling, current: int) -> None:
    """Raise the policies' targets to what they would be if the policies began with `current` instances."""
    for policy, tracking in scaling.tracking.items():
        begun = begin(policy, current)
        if begun.target > tracking.target:
            scaling.tracking[policy] = begun
