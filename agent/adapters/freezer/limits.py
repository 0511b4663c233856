"""Deadlines of driver calls and of every other step of a freeze or wake, and the results made from the driver's
replies."""

from __future__ import annotations

from dataclasses import dataclass

from agent.adapters.cuda.result_codes import FATAL, explain
from agent.core.types import GIB, SECOND_NS
from agent.ports import CudaReply, CudaState, FreezeResult, Outcome
from agent.settings import GpuSettings

RELIST = "RELIST"
"""Reason used only inside the freezer: list the processes again before the next lock."""


@dataclass(frozen=True, slots=True)
class FreezerLimits:
    """Deadlines in seconds, and what is allowed. A driver call that misses its deadline costs its worker process.

    - `lock_timeout_s`: the driver's wait for running kernels at a lock; `lock_attempts` locks with a new listing.
    - `state_query_s`: one batch of STATE calls; `driver_call_s`: calls that copy nothing.
    - `copy_base_s` + VRAM / `copy_bytes_per_s`: a checkpoint or restore. `unknown_image_bytes` stands for VRAM of
      unknown size (after a restart of the agent).
    - `rollback_s`: a rollback, its copies excluded. `prepare_kill_s`: the checkpoint before a kill.
    - `vram_gone_s`: NVML's proof of an empty GPU. `memory_query_s`: NVML's answer on free memory during a wake.
    - `cgroup_s`: a freeze or thaw of the threads. `death_grace_s`: the driver's answer after a target has died.
    - `migrates`: instances may wake on other GPUs.
    """

    lock_timeout_s: float = 5.0
    state_query_s: float = 5.0
    driver_call_s: float = 10.0
    copy_base_s: float = 30.0
    copy_bytes_per_s: int = 200_000_000
    unknown_image_bytes: int = 80 * GIB
    vram_gone_s: float = 5.0
    rollback_s: float = 30.0
    cgroup_s: float = 5.0
    death_grace_s: float = 2.0
    prepare_kill_s: float = 3.0
    memory_query_s: float = 0.2
    lock_attempts: int = 3
    max_processes: int = 64
    several_processes_on_several_gpus: bool = False
    migrates: bool = False

    @classmethod
    def for_timeouts(
        cls,
        lock_timeout_s: float,
        operation_timeout_s: float,
        *,
        several_processes_on_several_gpus: bool = False,
        migrates: bool = False,
    ) -> FreezerLimits:
        """Limits for the configuration's two timeouts: none is longer than its default, and all shrink with
        `operation_timeout_s`; with its default of 120 s each has its default."""
        usual = cls()
        share = min(operation_timeout_s / 120, 1.0)

        def at_most(usual_s: float, part: float) -> float:
            return min(usual_s, operation_timeout_s * part)

        return cls(
            lock_timeout_s=lock_timeout_s,
            state_query_s=at_most(usual.state_query_s, 0.5),
            driver_call_s=at_most(usual.driver_call_s, 0.5),
            copy_base_s=operation_timeout_s,
            unknown_image_bytes=round(usual.unknown_image_bytes * share),
            vram_gone_s=at_most(usual.vram_gone_s, 0.5),
            rollback_s=at_most(usual.rollback_s, 1.0),
            cgroup_s=at_most(usual.cgroup_s, 0.5),
            death_grace_s=at_most(usual.death_grace_s, 0.25),
            prepare_kill_s=at_most(usual.prepare_kill_s, 0.5),
            memory_query_s=at_most(usual.memory_query_s, 0.1),
            several_processes_on_several_gpus=several_processes_on_several_gpus,
            migrates=migrates,
        )


def freezer_limits(settings: GpuSettings, *, migrates: bool = False) -> FreezerLimits:
    """Limits for the configuration."""
    return FreezerLimits.for_timeouts(
        settings.lock_timeout_ns / SECOND_NS,
        settings.operation_timeout_ns / SECOND_NS,
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
    """Reason and message of a reply that is not the one wanted."""
    if reply is not None and reply.reason:
        return reply.reason, reply.message
    if reply is not None and not reply.ok:
        return explain(reply.answers[-1])
    stale = "the driver reported success, but the state is not the requested one"
    return reason or "CUDA_STATE_STALE", message or stale


def is_fatal(reply: CudaReply) -> bool:
    """The last answer is fatal (304): nothing the driver reports of the process can be trusted after it."""
    return bool(reply.answers) and reply.answers[-1].code in FATAL
