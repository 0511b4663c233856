"""Deadlines of driver calls and the other steps of a freeze or wake, and the results made from the driver's replies."""

from __future__ import annotations

from dataclasses import dataclass

from agent.adapters.cuda.result_codes import explain, is_fatal
from agent.core.types import GIB, SECOND_NS
from agent.ports import CudaReply, CudaState, FreezeResult, Outcome
from agent.settings import GpuSettings

RELIST = "RELIST"
"""Reason used only inside the freezer: list the processes again before the next lock."""


@dataclass(frozen=True, slots=True)
class FreezerLimits:
    """Deadlines of driver calls, NVML queries and cgroup changes in seconds, and what may be frozen.

    A worker process whose driver call misses its deadline is killed. A copy (checkpoint or restore) may take
    `copy_base_s` + VRAM / `copy_bytes_per_s`.
    """

    lock_timeout_s: float = 5.0  # the driver's wait for running kernels at a lock
    state_query_s: float = 5.0  # one batch of STATE calls
    driver_call_s: float = 10.0  # calls that copy nothing
    copy_base_s: float = 30.0
    copy_bytes_per_s: int = 200_000_000
    unknown_image_bytes: int = 80 * GIB  # stands for an unknown VRAM size (after a restart of the agent)
    vram_gone_s: float = 5.0  # NVML's proof that the VRAM is released
    rollback_s: float = 30.0  # a rollback without its copies
    cgroup_s: float = 5.0  # a freeze or thaw of the threads
    death_grace_s: float = 2.0  # wait for the driver's answer after a target has died
    prepare_kill_s: float = 3.0  # the checkpoint before a kill, without its copy
    memory_query_s: float = 0.2  # NVML's answer on free memory during a wake
    lock_attempts: int = 3  # each with a new listing
    max_processes: int = 64
    several_processes_on_several_gpus: bool = False
    migrates: bool = False  # instances may wake on other GPUs


def freezer_limits(settings: GpuSettings, *, migrates: bool = False) -> FreezerLimits:
    """Limits for the configured timeouts: `lock_timeout_s` and `copy_base_s` are taken from them; the others have their
    defaults, or less if the operation timeout is short."""
    usual = FreezerLimits()
    operation_s = settings.operation_timeout_ns / SECOND_NS

    def at_most(usual_s: float, part: float) -> float:
        return min(usual_s, operation_s * part)

    return FreezerLimits(
        lock_timeout_s=settings.lock_timeout_ns / SECOND_NS,
        state_query_s=at_most(usual.state_query_s, 0.5),
        driver_call_s=at_most(usual.driver_call_s, 0.5),
        copy_base_s=operation_s,
        unknown_image_bytes=round(usual.unknown_image_bytes * min(operation_s / 120, 1.0)),
        vram_gone_s=at_most(usual.vram_gone_s, 0.5),
        rollback_s=at_most(usual.rollback_s, 1.0),
        cgroup_s=at_most(usual.cgroup_s, 0.5),
        death_grace_s=at_most(usual.death_grace_s, 0.25),
        prepare_kill_s=at_most(usual.prepare_kill_s, 0.5),
        memory_query_s=at_most(usual.memory_query_s, 0.1),
        several_processes_on_several_gpus=settings.multi_process_multi_gpu,
        migrates=migrates,
    )


def refused(reason: str, message: str, driver_ns: int = 0) -> FreezeResult:
    """Rolled back: the instance is as before."""
    return FreezeResult(Outcome.REFUSED, reason, message, driver_ns)


def broken(reason: str, message: str, driver_ns: int = 0) -> FreezeResult:
    """State unknown: only a kill is safe."""
    return FreezeResult(Outcome.BROKEN, reason, message, driver_ns)


def all_in(reply: CudaReply, state: CudaState, count: int) -> bool:
    """All calls succeeded, and the last `count` answers (the STATE calls) report `state`."""
    return reply.ok and all(answer.state is state for answer in reply.answers[len(reply.answers) - count :])


def failure(reply: CudaReply | None, reason: str = "", message: str = "") -> tuple[str, str]:
    """Reason and message of a reply that is not the one wanted; `reason` and `message` stand in if it has none."""
    if reply is not None and reply.reason:
        return reply.reason, reply.message
    if reply is not None and not reply.ok:
        return explain(reply.answers[-1])
    stale = "the driver reported success, but the state is not the requested one"
    return reason or "CUDA_STATE_STALE", message or stale


def ends_fatally(reply: CudaReply) -> bool:
    """The last answer is fatal: nothing that the driver reports of the process after it can be trusted."""
    return bool(reply.answers) and is_fatal(reply.answers[-1])
