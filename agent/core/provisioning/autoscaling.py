"""How many instances a function is to have now: its default target, scheduled actions and target tracking policies.

Function Compute's rules (PutProvisionConfig), exactly, in whole numbers and fractions:
- out: target = min(maxCapacity, ceil(current x metric / metricTarget));
- in: current x factor x (1 - metric / metricTarget) instances go, rounded down, but never below minCapacity;
- the threshold must hold for `periods` samples in a row, of which the newest is reckoned with; a decision starts the
  count anew. No sample is not a sample of zero: it breaks the row;
- a sample is of a whole period: where fewer instances were there on average than at its end, as when an update runs
  the new revision beside the old, it is multiplied by those; else by `current`, as the rule says;
- the highest of all active policies and of the schedule counts; the default target only where none is active.

A decision to scale out never lowers what the policy asked for before (instances may still be on their way), and one to
scale in never raises it (others may hold more than this policy wants).

Times are wall nanoseconds. Pure; what is measured, and when, is the scaler's business.
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
    """What a policy follows, as the average of a period."""

    CONCURRENCY = "ProvisionedConcurrencyUtilization"
    CPU = "CPUUtilization"
    GPU_MEMORY = "GPUMemUtilization"


@dataclass(frozen=True, slots=True)
class ActiveWindow:
    """[start, end), wall ns."""

    start_ns: int
    end_ns: int

    def holds(self, at: int) -> bool:
        return self.start_ns <= at < self.end_ns


@dataclass(frozen=True, slots=True)
class Action:
    """A scheduled action: `target` instances from each firing within the window on."""

    name: str
    window: ActiveWindow
    schedule: Schedule
    target: int


@dataclass(frozen=True, slots=True)
class ScalingPolicy:
    """A target tracking policy: between `least` and `most` instances, so that the metric is `goal` (0 < goal <= 1)."""

    name: str
    window: ActiveWindow
    metric: Metric
    goal: Fraction
    least: int
    most: int

    def clamp(self, count: int) -> int:
        return max(self.least, min(self.most, count))


@dataclass(frozen=True, slots=True)
class Provisioning:
    """Schedule and policies of a function."""

    actions: tuple[Action, ...] = ()
    policies: tuple[ScalingPolicy, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.actions or self.policies)

    @property
    def windows(self) -> tuple[ActiveWindow, ...]:
        """Of the actions, then of the policies."""
        return (*(one.window for one in self.actions), *(one.window for one in self.policies))


@dataclass(frozen=True, slots=True)
class Patience:
    """`periods` samples in a row must agree; `factor` (0 < factor <= 1) of what is too much goes at once."""

    periods: int = 3
    factor: Fraction = Fraction(1, 2)


@dataclass(frozen=True, slots=True)
class Tracking:
    """An active policy at work: what it asks for, and how many samples in a row were above or below its goal."""

    target: int
    above: int = 0
    below: int = 0


@dataclass(frozen=True, slots=True)
class Fired:
    """An action's last firing."""

    name: str
    target: int
    at_ns: int
    window: ActiveWindow


@dataclass(frozen=True, slots=True)
class Decision:
    """Instances wanted, and the name of the action or policy that says so; "" is the default target."""

    target: int
    decided_by: str = ""


def begin(policy: ScalingPolicy, current: int) -> Tracking:
    """A policy becomes active while there are `current` instances that are not stopping."""
    return Tracking(policy.clamp(current))


def observe(
    policy: ScalingPolicy,
    tracking: Tracking,
    sample: Fraction | None,
    current: int,
    patience: Patience,
    average: Fraction | None = None,
) -> Tracking:
    """A period has ended with `current` instances that are not stopping, and this sample of the policy's metric; None
    where there is none. `average`: how many instances there were in the period; None where that is `current` too."""
    measured = Fraction(current) if average is None else min(Fraction(current), average)
    if sample is None or sample == policy.goal:
        return Tracking(tracking.target)
    if sample > policy.goal:
        if tracking.above + 1 < patience.periods:
            return Tracking(tracking.target, above=tracking.above + 1)
        return Tracking(max(tracking.target, policy.clamp(ceil(measured * sample / policy.goal))))
    if tracking.below + 1 < patience.periods:
        return Tracking(tracking.target, below=tracking.below + 1)
    gone = floor(measured * patience.factor * (1 - sample / policy.goal))
    return Tracking(min(tracking.target, policy.clamp(current - gone)))


def last_fired(action: Action, at: int) -> Fired | None:
    """The action's last firing within its window, up to `at`."""
    window = action.window
    if at < window.start_ns:
        return None
    fired = action.schedule.last(window.start_ns, min(at, window.end_ns - 1))
    return None if fired is None else Fired(action.name, action.target, fired, window)


def scheduled(firings: Iterable[Fired], at: int) -> Fired | None:
    """Who decides: the action that fired last, unless its window has ended; of several at once the last of the list."""
    newest: Fired | None = None
    for fired in firings:
        if newest is None or fired.at_ns >= newest.at_ns:
            newest = fired
    return newest if newest is not None and newest.window.holds(at) else None


def decide(default: int, schedule: Fired | None, policies: Sequence[tuple[str, int]]) -> Decision:
    """The highest of the schedule and the active policies' (name, target); the first of equals is named."""
    asked = [(schedule.name, schedule.target)] if schedule is not None else []
    asked += policies
    if not asked:
        return Decision(default)
    name, target = max(asked, key=lambda one: one[1])
    return Decision(target, name)
