"""The figures of a selftest, and the verdict for each error."""

from __future__ import annotations

import pytest

from agent.core.errors import DeadlineError, HibernodeError, InstanceError, PreconditionError, UnavailableError
from agent.selftest.verdict import (
    MEMORY_CHANGED,
    CycleFigures,
    MemoryFigures,
    PinnedCopy,
    Proof,
    SelftestRun,
    gb_s,
    ratios,
    summarize,
    verdict_of,
)

MEMORY = MemoryFigures(gpu_free_bytes=0, program_bytes=0, agent_bytes=0)


def run(number: int, checkpointer: str, wake_s: float, pinned: PinnedCopy | None = None) -> SelftestRun:
    figures = CycleFigures(
        lock_s=0.001,
        checkpoint_s=wake_s * 2,
        cgroup_freeze_s=0.0,
        freeze_s=wake_s * 3,
        thaw_s=0.0,
        restore_s=wake_s,
        unlock_s=0.0,
        wake_s=wake_s,
        checkpoint_gb_s=gb_s(10**9, wake_s * 2),
        restore_gb_s=gb_s(10**9, wake_s),
        image_bytes=10**9,
        released_bytes=10**9,
    )
    return SelftestRun(
        number, checkpointer, figures, pinned or PinnedCopy(unavailable="no cuMemHostAlloc"), MEMORY, 1.0
    )


def test_warm_up_does_not_count() -> None:
    found = summarize([run(0, "driver", 99.0), run(1, "driver", 1.0), run(2, "driver", 3.0), run(3, "driver", 2.0)])
    wake = found["driver"]["wake_s"]
    assert (wake.median, wake.min, wake.max) == (2.0, 1.0, 3.0)
    assert found["driver"]["restore_gb_s"].max == 1.0
    assert "pinned" not in found


def test_pinned_copy_is_summarised_over_all_checkpointers() -> None:
    copies = [PinnedCopy(to_host_s=1.0, to_host_gb_s=10.0), PinnedCopy(to_host_s=3.0, to_host_gb_s=30.0)]
    found = summarize([run(1, "driver", 1.0, copies[0]), run(1, "utility", 2.0, copies[1])])
    assert found["pinned"]["to_host_gb_s"].median == 20.0


def test_ratios_compare_within_a_run() -> None:
    """The machine was slow in the second run, which affects both checkpointers of that run."""
    runs = [run(0, "driver", 1.0), run(0, "utility", 50.0)]
    runs += [run(1, "driver", 1.0), run(1, "utility", 2.0), run(2, "utility", 24.0), run(2, "driver", 8.0)]
    wake = ratios(runs, "utility", "driver")["wake_s"]
    assert (wake.min, wake.max) == (2.0, 3.0)
    assert "thaw_s" not in ratios(runs, "utility", "driver")  # took no time: division by zero


def test_no_figures_without_runs() -> None:
    assert summarize([]) == {}
    assert summarize([run(0, "driver", 1.0)]) == {}
    assert gb_s(10**9, 0.0) == 0.0


@pytest.mark.parametrize(
    ("error", "begun", "proof"),
    [
        (UnavailableError("CHECKPOINT_API_UNAVAILABLE", "no worker"), False, Proof.NOT_RUN),
        (DeadlineError("SELFTEST_TIMEOUT", "the program does not start"), False, Proof.NOT_RUN),
        (PreconditionError("GPU_MEMORY_SHORT", "no room"), True, Proof.NOT_RUN),
        (InstanceError("CUDA_NOT_SUPPORTED", "the lock was refused"), True, Proof.FAILED),
        (UnavailableError("NVML_UNAVAILABLE", "silence"), True, Proof.FAILED),
        (DeadlineError("SELFTEST_TIMEOUT", "no answer after the wake"), True, Proof.TIMED_OUT),
        (InstanceError(MEMORY_CHANGED, "byte 7 is 0x00 and was 0x01"), True, Proof.MEMORY_CHANGED),
    ],
)
def test_verdict_of_an_error(error: HibernodeError, begun: bool, proof: Proof) -> None:
    verdict = verdict_of(error, begun=begun)
    assert (verdict.proof, verdict.reason, verdict.message) == (proof, error.reason, error.message)
    if proof is not Proof.NOT_RUN:
        assert "idle: never" in verdict.fix  # safe advice even for readers of this line alone
