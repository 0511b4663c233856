"""The figures of a selftest, their summary, and the verdict.

Times are seconds. GB/s are 10^9 bytes of the test's own memory per second inside the driver's call. What the driver
copies besides (a CUDA context is 0.3 to 0.5 GB) costs time but is not counted, so the figures are conservative.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from enum import Enum

from agent.core.errors import DeadlineError, HibernodeError, PreconditionError

GB = 1_000_000_000

MEMORY_CHANGED = "MEMORY_CHANGED"
"""Reason of the error for a byte that changed."""

FIX_CHANGED = (
    "deploy with `idle: never` on this host until this is solved: look for XID and ECC errors (`dmesg`, `nvidia-smi -q "
    "-d ECC`), update the driver (580 or newer), and report it to NVIDIA/cuda-checkpoint"
)
FIX_FAILED = (
    "check `hibernode doctor`, and `dmesg` for XID errors; drivers before 580 are known to fail at this; deploy "
    "with `idle: never` on this host until the selftest passes"
)


class Proof(Enum):
    """The outcome of a selftest. Only PROVED allows this host to freeze instances."""

    PROVED = "PROVED"
    FAILED = "FAILED"
    MEMORY_CHANGED = "MEMORY_CHANGED"
    NOT_RUN = "NOT_RUN"
    TIMED_OUT = "TIMED_OUT"


@dataclass(frozen=True, slots=True)
class Verdict:
    """`reason` is stable (UPPER_SNAKE, "" when PROVED); `message` is a sentence, `fix` the advice."""

    proof: Proof
    reason: str = ""
    message: str = ""
    fix: str = ""


@dataclass(frozen=True, slots=True)
class CycleFigures:
    """One freeze and wake by one checkpointer, with every byte compared afterwards.

    `freeze_s` and `wake_s` are totals; the other times are steps: driver calls and the cgroup's (or SIGSTOP's).
    `released_bytes`: growth of free memory, by NVML, while frozen."""

    lock_s: float
    checkpoint_s: float
    cgroup_freeze_s: float
    freeze_s: float
    thaw_s: float
    restore_s: float
    unlock_s: float
    wake_s: float
    checkpoint_gb_s: float
    restore_gb_s: float
    image_bytes: int
    released_bytes: int


@dataclass(frozen=True, slots=True)
class PinnedCopy:
    """A copy of all memory through a pinned buffer, to host and device: the speed of the bus. `unavailable` says why
    there are no figures."""

    to_host_s: float = 0.0
    to_device_s: float = 0.0
    to_host_gb_s: float = 0.0
    to_device_gb_s: float = 0.0
    unavailable: str = ""


@dataclass(frozen=True, slots=True)
class MemoryFigures:
    """Memory at the end of a run, with the program awake: what grows from run to run is leaked.

    `gpu_free_bytes` by NVML; `program_bytes` and `agent_bytes`: resident memory of the program, and of this process
    with the driver workers."""

    gpu_free_bytes: int
    program_bytes: int
    agent_bytes: int


@dataclass(frozen=True, slots=True)
class SelftestRun:
    """One freeze and wake. Run 0 is the warm-up and does not count: it pays for first touches of host memory.

    `round_s`: all of it, with filling, comparing and the pinned copy."""

    run: int
    checkpointer: str
    figures: CycleFigures
    pinned: PinnedCopy
    memory: MemoryFigures
    round_s: float

    @property
    def counted(self) -> bool:
        return self.run > 0


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and range over the counted runs."""

    median: float
    min: float
    max: float


TIMES = tuple(field.name for field in fields(CycleFigures) if field.name.endswith("_s"))
PINNED = tuple(field.name for field in fields(PinnedCopy) if field.name.endswith("_s"))


def gb_s(bytes_: int, seconds: float) -> float:
    """10^9 bytes per second; 0 without a measurement."""
    return bytes_ / GB / seconds if seconds > 0 else 0.0


def summarize(runs: Iterable[SelftestRun]) -> dict[str, dict[str, Spread]]:
    """Spread of each figure over the counted runs, by checkpointer; key "pinned" for the pinned copy."""
    counted = [run for run in runs if run.counted]
    summary: dict[str, dict[str, Spread]] = {}
    for name in dict.fromkeys(run.checkpointer for run in counted):
        of_name = [run.figures for run in counted if run.checkpointer == name]
        summary[name] = {key: _of(of_name, key) for key in TIMES}
    copies = [run.pinned for run in counted if not run.pinned.unavailable]
    if copies:
        summary["pinned"] = {key: _of(copies, key) for key in PINNED}
    return summary


def ratios(runs: Iterable[SelftestRun], of: str, to: str) -> dict[str, Spread]:
    """`of` / `to` for each figure, compared within the same run."""
    by_run: dict[tuple[int, str], CycleFigures] = {
        (run.run, run.checkpointer): run.figures for run in runs if run.counted
    }
    pairs = [(figures, by_run[number, to]) for (number, name), figures in by_run.items() if name == of
             if (number, to) in by_run]  # fmt: skip
    summary = {}
    for key in TIMES:
        values = [getattr(figures, key) / getattr(other, key) for figures, other in pairs if getattr(other, key) > 0]
        if values:
            summary[key] = Spread(statistics.median(values), min(values), max(values))
    return summary


def _of(rows: Sequence[CycleFigures] | Sequence[PinnedCopy], key: str) -> Spread:
    values = [float(getattr(row, key)) for row in rows]
    return Spread(statistics.median(values), min(values), max(values))


def verdict_of(error: HibernodeError, *, begun: bool) -> Verdict:
    """The verdict for an error. `begun`: the program ran and freezes had started."""
    if error.reason == MEMORY_CHANGED:
        return Verdict(Proof.MEMORY_CHANGED, error.reason, error.message, FIX_CHANGED)
    if not begun or isinstance(error, PreconditionError):
        return Verdict(Proof.NOT_RUN, error.reason, error.message, error.metadata.get("fix", ""))
    proof = Proof.TIMED_OUT if isinstance(error, DeadlineError) else Proof.FAILED
    return Verdict(proof, error.reason, error.message, error.metadata.get("fix", FIX_FAILED))
