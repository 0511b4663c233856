"""Wakes an instance on demand: for the API's Wake, and for the scheduler's over the ingress."""

from __future__ import annotations

from agent.core.errors import InstanceError, InvalidArgumentError, PreconditionError
from agent.core.lifecycle.machine import Instance
from agent.core.types import SECOND_NS, InstanceState
from agent.host.instance.actor import Actor

MAX_HOLD_NS = 600 * SECOND_NS


async def wake_up(actor: Actor, now_ns: int, hold_ns: int, timeout_ns: int) -> int:
    """Wake the instance within `timeout_ns`, and keep it awake for `hold_ns` or until the first request.

    Returns its free slots.

    Raises InvalidArgumentError HOLD_INVALID, DeadlineError WAKE_TIMEOUT, PreconditionError INSTANCE_STOPPING or
    PREEMPTED, UnavailableError AGENT_STOPPING, and InstanceError with the instance's own reason if it failed.
    """
    if not (0 <= hold_ns <= MAX_HOLD_NS and timeout_ns >= 0):
        raise InvalidArgumentError("HOLD_INVALID", "hold must be between 0 and 600 s, timeout not negative")
    timeout_ns = min(timeout_ns, MAX_HOLD_NS)
    before = actor.figures.wakes
    actor.wake(hold_ns, now_ns + timeout_ns)

    def reached(instance: Instance) -> bool:
        """Whether to end the wait: also if it woke and was frozen again in between, else the wait would time out."""
        ended = instance.state is InstanceState.STOPPING or instance.state.terminal
        return ended or instance.state is InstanceState.RUNNING or actor.figures.wakes > before

    await actor.wait_until(reached, timeout_ns / SECOND_NS, "WAKE")
    raise_if_failed(actor)
    if actor.state is not InstanceState.RUNNING:
        what = f"instance {actor.uid} is {actor.state.value}"
        if actor.instance.stop:
            text = f"{what}: its stop was asked for; `hibernode ps` lists the others"
            raise PreconditionError("INSTANCE_STOPPING", text)
        raise PreconditionError("PREEMPTED", f"{what}: another instance was granted its GPU; try again")
    return max(0, actor.gate.concurrency - actor.gate.in_flight - actor.gate.waiting)


def raise_if_failed(actor: Actor) -> None:
    """Raise InstanceError with the instance's own reason if it has failed."""
    if actor.state is InstanceState.FAILED:
        reason = actor.instance.reason or "INSTANCE_FAILED"
        raise InstanceError(reason, actor.instance.message or "the instance failed")
