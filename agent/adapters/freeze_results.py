"""What a freeze or a wake gives back, made from the driver's replies; and how long each may take."""

from __future__ import annotations

from dataclasses import dataclass

from agent.adapters.cuda_api import explain
from agent.core.types import GIB
from agent.ports import CudaReply, CudaState, FreezeResult, Outcome

WORKERS_DOWN = "DRIVER_WORKERS_DOWN"
"""A checkpointer's reason: no worker can be had, now and for the time to come."""

START_OVER = "START_OVER"
"""The reason, inside the freezer only, that asks for another listing before the next lock."""


@dataclass(frozen=True, slots=True)
class FreezerLimits:
    """Deadlines in seconds. A copy may take `copy_base_s` + VRAM / `copy_bytes_per_s`; `unknown_image_bytes` stands
    for the VRAM where it is not known (after a restart of the agent)."""

    lock_timeout_s: float = 5.0
    state_s: float = 5.0
    answer_s: float = 10.0
    copy_base_s: float = 30.0
    copy_bytes_per_s: int = 200_000_000
    unknown_image_bytes: int = 80 * GIB
    vram_gone_s: float = 5.0
    settle_s: float = 30.0
    lock_attempts: int = 3
    several_processes_on_several_gpus: bool = False


def refused(reason: str, message: str, driver_ns: int = 0) -> FreezeResult:
    """Rolled back: the instance is as before."""
    return FreezeResult(Outcome.REFUSED, reason, message, driver_ns)


def broken(reason: str, message: str, driver_ns: int = 0) -> FreezeResult:
    """Unknown: only a kill is safe."""
    return FreezeResult(Outcome.BROKEN, reason, message, driver_ns)


def all_in(reply: CudaReply, state: CudaState, count: int) -> bool:
    """Everything succeeded, and the last `count` answers (the STATE calls) say `state`."""
    return reply.ok and all(answer.state is state for answer in reply.answers[len(reply.answers) - count :])


def failure(reply: CudaReply | None, reason: str = "", message: str = "") -> tuple[str, str]:
    """Why a reply is not what was wanted."""
    if reply is not None and reply.reason:
        return reply.reason, reply.message
    if reply is not None and not reply.ok:
        return explain(reply.answers[-1])
    stale = "the driver reported success, but the state is not the one that was asked for"
    return reason or "CUDA_STATE_STALE", message or stale
