"""Which instances go first when a function has more than its target, and which outdated ones may go."""

from __future__ import annotations

from agent.core.provisioning.model import ObservedInstance, Scheduling
from agent.core.types import InstanceState


def scale_in_order(instance: ObservedInstance) -> tuple[int, int, int, int, int, str]:
    """The sort key: the lowest goes first.

    First those that have not come up, then those on a cordoned node or unsteady, then frozen ones, then idle ones (the
    longest idle first), then those with the fewest requests; the highest ordinal breaks ties.
    """
    if not instance.serving:
        use = 0
    elif instance.scheduling is not Scheduling.NORMAL or instance.unsteady:
        use = 1
    elif instance.requests:
        use = 4
    else:
        use = 2 if instance.state in (InstanceState.FROZEN, InstanceState.FREEZING) else 3
    made_by = instance.made_by
    return (use, instance.requests, -instance.idle_ns, -made_by.ordinal, -made_by.attempt, instance.uid)


def replaced(target: int, outdated: list[ObservedInstance], kept: list[ObservedInstance]) -> list[ObservedInstance]:
    """Those of `outdated`, in scale-in order, that may go because instances in `kept` serve in their place.

    `target` instances always remain, except where an operator has EMPTIED a node.
    """
    stay = max(0, target - sum(one.serving for one in kept))
    leave = outdated[: max(0, len(outdated) - stay)]
    return [*leave, *(one for one in outdated[len(leave) :] if one.scheduling is Scheduling.EMPTIED)]
