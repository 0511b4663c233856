"""The steps of a proof in their order, and what each one runs. Every step is a process with a deadline of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from agent.cli.doctor.reporting_child import Ended, run_module
from agent.core.errors import DeadlineError, HibernodeError, UnavailableError
from agent.core.types import GIB, MIB
from agent.selftest.checks import CONTEXT_BYTES, PINNED_CHUNK
from agent.selftest.proof.budget import Share, choose_sizes, predict_s, selftest_share
from agent.selftest.proof.cycles import problem_of
from agent.settings import GpuSettings

PASSED, FAILED, MEMORY_CHANGED = "passed", "failed", "memory changed"
TIMED_OUT, BLOCKED, NOT_RUN = "timed out", "blocked", "not run"
"""How a step ends. Blocked: something is missing. Not run: no time, no room, or interrupted."""

END_S = 12.0
"""What a process gets to end after its deadline; it is within the step's time."""
RUNS = 5
LARGE_RUNS = 3
LARGE = 2 * GIB
FUNCTION_MIB = 1024

_OF_VERDICT = {
    "PROVED": PASSED,
    "FAILED": FAILED,
    "MEMORY_CHANGED": MEMORY_CHANGED,
    "TIMED_OUT": TIMED_OUT,
    "NOT_RUN": BLOCKED,
}


@dataclass(frozen=True, slots=True)
class Result:
    """How a step ended; `data` is its report, in the form of its process."""

    outcome: str
    reason: str = ""
    message: str = ""
    data: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Options:
    """What the user asked for. `sizes`: bytes to freeze, `cycles`: freezes in a row, `gpu`: uuid or index, "" = any."""

    sizes: tuple[int, ...]
    cycles: int
    gpu: str
    budget_s: float


@dataclass(slots=True)
class Known:
    """What earlier steps found. `measured`: bytes and seconds a round of each selftest."""

    facts: dict[str, Any] = field(default_factory=dict)
    against: str = ""
    without_utility: str = "the host's facts are not known"
    measured: list[tuple[int, float]] = field(default_factory=list)


def shares_of(options: Options) -> list[Share]:
    """All steps in order, small and certain ones first: what falls away for lack of time is the largest size."""
    of_size = {size: selftest_share(name_of(size), size) for size in sorted(set(options.sizes))}
    small = [share for size, share in of_size.items() if size <= GIB]
    middle = [share for size, share in of_size.items() if GIB < size <= 8 * GIB]
    large = [share for size, share in of_size.items() if size > 8 * GIB]
    return [
        Share("facts", 15, 80),
        Share("doctor", 8, 40),
        *small,
        Share("end to end", 35, 120),
        *middle,
        Share("cycles", 25, 160),
        *large,
    ]


def name_of(size_bytes: int) -> str:
    return f"selftest {size_bytes / GIB:g} GiB"


class Steps:
    """Runs one step at a time; `known` grows with each."""

    def __init__(self, options: Options, environment: Mapping[str, str] = os.environ) -> None:
        self._options = options
        self._environment = environment
        self._sizes = {name_of(size): size for size in options.sizes}
        self.known = Known()

    def run(self, name: str, allowed_s: float) -> Result:
        """Runs the step, which ends within `allowed_s`. Raises KeyboardInterrupt; its process has ended by then."""
        try:
            if name == "facts":
                return self._facts(allowed_s)
            if name == "doctor":
                return self._doctor(allowed_s)
            if not self.known.facts.get("gpus"):
                return Result(BLOCKED, "NO_GPU", "no GPU answers")
            if name == "end to end":
                return self._end_to_end(allowed_s)
            if name == "cycles":
                return self._cycles(allowed_s)
            return self._selftest(self._sizes[name], allowed_s)
        except DeadlineError as error:
            return Result(TIMED_OUT, error.reason, error.message)
        except HibernodeError as error:
            return Result(FAILED, error.reason, error.message)

    # ---- the steps ----------------------------------------------------------------------------------------------

    def _facts(self, allowed_s: float) -> Result:
        report = _report_of(self._start("agent.selftest.proof.facts", allowed_s))
        self.known.facts = report
        if report["checkpointer"] != "driver":
            self.known.without_utility = "the agent itself uses the cuda-checkpoint program here"
        elif report["utility"]["path"] is None:
            self.known.without_utility = report["utility"]["problem"]
        else:
            self.known.against, self.known.without_utility = "utility", ""
        return Result(PASSED, data=report)

    def _doctor(self, allowed_s: float) -> Result:
        command = ["-m", "agent.cli.demo.child", str(os.getpid()), "agent.cli.main", "doctor", "--local", "--json"]
        try:
            done = subprocess.run(
                [sys.executable, "-P", *command],
                env=dict(self._environment),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                timeout=allowed_s,
                check=False,
            )
            report = json.loads(done.stdout)
        except subprocess.TimeoutExpired:
            return Result(TIMED_OUT, "SELFTEST_TIMEOUT", f"the doctor did not end within {allowed_s:.0f} s")
        except ValueError:
            return Result(FAILED, "SELFTEST_ENDED", "the doctor ended without a report; see above")
        if report["ok"]:
            return Result(PASSED, data=report)
        failed = ", ".join(line["name"] for line in report["checks"] if line["level"] == "FAIL")
        return Result(FAILED, "CHECKS_FAILED", f"no instance can be frozen here until this is fixed: {failed}", report)

    def _selftest(self, wanted_bytes: int, allowed_s: float) -> Result:
        size = self._fitting(wanted_bytes)
        if not size:
            return self._no_room()
        runs = RUNS if size <= LARGE else LARGE_RUNS
        against, without = self.known.against, ""
        least = predict_s(self.known.measured, size, 4 if against else 2)  # a warm-up and one run of each
        if least > allowed_s and against:
            against, least, without = "", least / 2, "no time left for the cuda-checkpoint program"
        if least > allowed_s:
            return Result(NOT_RUN, "NO_TIME_LEFT", f"needs about {least:.0f} s; {allowed_s:.0f} s are left for it")
        result = self._freeze(size, runs, against, allowed_s)
        if result.outcome == BLOCKED and against:
            self.known.against, self.known.without_utility = "", result.message
            without = f"without the cuda-checkpoint program: {result.message}"
            result = self._freeze(size, runs, "", allowed_s)
        notes = [without, f"{size / GIB:g} GiB, for which there is room" if size != wanted_bytes else ""]
        return replace(result, message="; ".join(filter(None, [result.message, *notes])))

    def _cycles(self, allowed_s: float) -> Result:
        """Many freezes of one process, by the agent's own checkpointer."""
        size = min(self._options.sizes)
        result = self._freeze(size, self._options.cycles, "", allowed_s)
        if result.outcome == PASSED and result.data is not None:
            leak = problem_of(result.data["runs"])
            if leak:
                return Result(FAILED, "MEMORY_LEAK", leak, result.data)
        return result

    def _end_to_end(self, allowed_s: float) -> Result:
        torch = self.known.facts["torch"]
        fit, _ = choose_sizes(self._options.sizes, self._room_bytes())
        if not fit:
            return self._no_room()
        vram_mib = min(FUNCTION_MIB, fit[-1] // MIB)
        arguments = ["--vram-mib", str(vram_mib), "--within-s", f"{allowed_s - END_S:.1f}"]
        if torch["python"]:
            arguments += ["--torch-python", torch["python"], "--torch-version", torch["version"]]
        report = _report_of(self._start("agent.selftest.proof.end_to_end", allowed_s, *arguments))
        if not report["problems"]:
            return Result(PASSED, data=report)
        worst = report["problems"][0]
        outcome = MEMORY_CHANGED if worst["reason"] == "MEMORY_CHANGED" else FAILED
        text = "; ".join(problem["message"] for problem in report["problems"])
        return Result(outcome, worst["reason"], text, report)

    # ---- processes ----------------------------------------------------------------------------------------------

    def _freeze(self, size_bytes: int, runs: int, against: str, allowed_s: float) -> Result:
        arguments = ["--size-bytes", str(size_bytes), "--runs", str(runs), "--gpu", self._options.gpu]
        arguments += ["--against", against, "--within-s", f"{max(1.0, allowed_s - END_S):.1f}"]
        report = _report_of(self._start("agent.selftest.run", allowed_s, *arguments))
        verdict = report["verdict"]
        if report["runs"]:
            seconds = sum(run["round_s"] for run in report["runs"]) / len(report["runs"])
            self.known.measured.append((size_bytes, seconds))
        cut = next((check["reason"] for check in report["checks"] if check["name"] == "runs"), "")
        return Result(_OF_VERDICT[verdict["proof"]], verdict["reason"], verdict["message"] or cut, report)

    def _start(self, module: str, allowed_s: float, *arguments: str) -> Ended:
        limit_s = max(1.0, allowed_s - END_S / 2)
        return run_module(module, *arguments, limit_s=limit_s, spare_s=END_S / 2, environment=self._environment)

    # ---- room ---------------------------------------------------------------------------------------------------

    def _fitting(self, wanted_bytes: int) -> int:
        """The size to test in place of `wanted_bytes`; 0 if there is no room."""
        fit, rest = choose_sizes(self._options.sizes, self._room_bytes())
        if wanted_bytes in fit:
            return wanted_bytes
        smaller = [size for size in fit if size not in self._options.sizes]
        return smaller[0] if smaller and wanted_bytes == rest[0] else 0

    def _no_room(self) -> Result:
        room = max(0, self._room_bytes()) / GIB
        return Result(NOT_RUN, "NO_ROOM", f"GPU and host memory have room for {room:.2f} GiB")

    def _room_bytes(self) -> int:
        """GPU memory without a context, or host memory without its reserve, whichever is less."""
        free = [
            gpu["free_bytes"]
            for gpu in self.known.facts["gpus"]
            if gpu["free_bytes"] and self._options.gpu in ("", gpu["uuid"], str(gpu["index"]))
        ]
        host = self.known.facts["host"]["memory_available_bytes"]
        reserve = GpuSettings().host_memory_reserve_bytes + PINNED_CHUNK
        return int(min(max(free, default=0) - CONTEXT_BYTES, host - reserve))


def _report_of(ended: Ended) -> dict[str, Any]:
    """Raises UnavailableError SELFTEST_ENDED."""
    if ended.report is None:
        raise UnavailableError("SELFTEST_ENDED", f"its process ended without a report (exit {ended.code}); see above")
    return ended.report
