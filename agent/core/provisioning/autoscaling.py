"""How many instances a function should have: default target, scheduled actions and target tracking policies.

The rules are Function Compute's (PutProvisionConfig), exactly, in whole numbers and fractions:
- out: target = min(maxCapacity, ceil(current x metric / metricTarget));
- in: current x factor x (1 - metric / metricTarget) instances go, rounded down, but never below minCapacity;
- `periods` samples in a row must be above or below the metricTarget, and the newest is used; a decision starts a new
  row. A missing sample is not 0: it ends the row;
- a sample covers a whole period: if there were fewer instances on average than at its end, as during an update, it is
  multiplied by the average instead of `current`;
- the highest of the active policies and the schedule counts, and the default target only if none is active.

A stored action or policy that can't be read today counts all the same: as active, with the last target decided while
all could be read, but with no more than it can ask for itself (an action's target, a policy's max_capacity). If no
other is active, the last target stays. So nothing is stopped because of something unreadable.

Scaling out never lowers a policy's target (its instances may still be starting), and scaling in never raises it
(another policy may hold more instances). Times are wall nanoseconds. Pure; scheduler/functions/autoscaler.py measures.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from math import ceil, floor

from agent.core.provisioning.schedule import Schedule

MAX_TARGET = 10_000


class Metric(Enum):
    """What a policy tracks, as the average of a period."""

    CONCURRENCY = "ProvisionedConcurrencyUtilization"
    CPU = "CPUUtilization"
    GPU_MEMORY = "GPUMemUtilization"


@dataclass(frozen=True, slots=True)
class ActiveWindow:
    """[start, end), wall ns."""

    start_ns: int
    end_ns: int

    def contains(self, at: int) -> bool:
        return self.start_ns <= at < self.end_ns


@dataclass(frozen=True, slots=True)
class Action:
    """A scheduled action: sets `target` instances at each firing within the window."""

    name: str
    window: ActiveWindow
    schedule: Schedule
    target: int


@dataclass(frozen=True, slots=True)
class ScalingPolicy:
    """A target tracking policy: as many instances as bring the metric to `metric_target` (0 < metric_target <= 1)."""

    name: str
    window: ActiveWindow
    metric: Metric
    metric_target: Fraction
    min_capacity: int
    max_capacity: int

    def clamp(self, count: int) -> int:
        return max(self.min_capacity, min(self.max_capacity, count))


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A stored action or policy that this host or version can't read.

    - `window`: all of the time in which it may be active. `most`: the most instances that it can ask for.
    - `problem`: which one, why it can't be read, and what to do.
    """

    name: str
    window: ActiveWindow
    most: int
    problem: str


@dataclass(frozen=True, slots=True)
class Provisioning:
    actions: tuple[Action, ...] = ()
    policies: tuple[ScalingPolicy, ...] = ()
    unreadable: tuple[Unreadable, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.actions or self.policies or self.unreadable)

    @property
    def windows(self) -> dict[str, ActiveWindow]:
        """By the name of the action or policy."""
        found = {one.name: one.window for one in self.actions}
        found |= {one.name: one.window for one in self.policies}
        return found | {one.name: one.window for one in self.unreadable}


@dataclass(frozen=True, slots=True)
class Patience:
    """`periods` samples in a row must agree; `factor` (0 < factor <= 1) of the surplus goes at a time."""

    periods: int = 3
    factor: Fraction = Fraction(1, 2)


@dataclass(frozen=True, slots=True)
class Tracking:
    """An active policy: its target, and how many samples in a row were above or below its metric target."""

    target: int
    above: int = 0
    below: int = 0


@dataclass(frozen=True, slots=True)
class Fired:
    name: str
    target: int
    at_ns: int
    window: ActiveWindow


@dataclass(frozen=True, slots=True)
class Decision:
    """The target, and the name of the action or policy that set it; "" for the default target."""

    target: int
    decided_by: str = ""


def begin(policy: ScalingPolicy, current: int) -> Tracking:
    """The tracking of a policy that becomes active with `current` instances that are not stopping."""
    return Tracking(policy.clamp(current))


def observe(
    policy: ScalingPolicy,
    tracking: Tracking,
    sample: Fraction | None,
    current: int,
    patience: Patience,
    average: Fraction | None = None,
) -> Tracking:
    """The tracking after a period.

    - `sample`: of the policy's metric in the period; None if there is none.
    - `current`: non-stopping instances at its end; `average`: their mean number in the period, None for `current`.
    """
    measured = Fraction(current) if average is None else min(Fraction(current), average)
    if sample is None or sample == policy.metric_target:
        return Tracking(tracking.target)
    if sample > policy.metric_target:
        if tracking.above + 1 < patience.periods:
            return Tracking(tracking.target, above=tracking.above + 1)
        return Tracking(max(tracking.target, policy.clamp(ceil(measured * sample / policy.metric_target))))
    if tracking.below + 1 < patience.periods:
        return Tracking(tracking.target, below=tracking.below + 1)
    surplus = floor(measured * patience.factor * (1 - sample / policy.metric_target))
    return Tracking(min(tracking.target, policy.clamp(current - surplus)))


def last_fired(action: Action, at: int) -> Fired | None:
    """The action's last firing within its window, up to `at`."""
    window = action.window
    if at < window.start_ns:
        return None
    fired = action.schedule.last(window.start_ns, min(at, window.end_ns - 1))
    return None if fired is None else Fired(action.name, action.target, fired, window)


def scheduled(firings: Iterable[Fired], at: int) -> Fired | None:
    """The action that fired last, unless its window has ended; of several at once the last of the list."""
    newest: Fired | None = None
    for fired in firings:
        if newest is None or fired.at_ns >= newest.at_ns:
            newest = fired
    return newest if newest is not None and newest.window.contains(at) else None


def decide(
    default: int,
    schedule: Fired | None,
    policies: Sequence[tuple[str, int]],
    unreadable: Sequence[Unreadable] = (),
    last: int = 0,
) -> Decision:
    """The highest target of the schedule and the active policies (name, target); of equal ones the first.

    `unreadable`: those whose window contains the time. `last`: the target last decided while all could be read.
    """
    targets = [*([(schedule.name, schedule.target)] if schedule is not None else []), *policies]
    if unreadable and not targets:
        return Decision(last, unreadable[0].name)
    targets += [(one.name, min(last, one.most)) for one in unreadable]
    if not targets:
        return Decision(default)
    name, target = max(targets, key=lambda one: one[1])
    return Decision(target, name)
