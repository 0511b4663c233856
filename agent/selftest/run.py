"""The selftest of a GPU host: `python -P -m agent.selftest.run`, started by `hibernode doctor --selftest`.

Freezes and wakes a CUDA program with the agent's own components, and compares every byte of its memory. Reports as
`reporting.py` says; the CUDA program always ends with this process, even on SIGKILL.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import sys
from contextlib import AsyncExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from agent import __version__, log
from agent.adapters.cuda.checkpointers import HostCheckpointer, choose_checkpointer
from agent.adapters.freezer.freezer import CudaFreezer
from agent.adapters.freezer.limits import FreezerLimits, freezer_limits
from agent.adapters.kernel import process_table
from agent.adapters.kernel.cgroup_freezer import choose_freezer
from agent.adapters.kernel.clock import SystemClock
from agent.adapters.kernel.host_memory import ProcHostMemory
from agent.adapters.nvml.gpus import NvmlGpus
from agent.adapters.nvml.locks import GpuLocks
from agent.config import load
from agent.core.errors import HibernodeError, PreconditionError
from agent.core.gpus.capabilities import Capabilities
from agent.core.types import GIB, SECOND_NS, Gpu
from agent.exit_codes import exit_of
from agent.selftest.checks import HostFindings, SelftestPlan, check_preconditions
from agent.selftest.reporting import emit, report_of
from agent.selftest.rounds import CheckpointerUnderTest, Rounds, touch_deadline_s
from agent.selftest.target_process import SLICE_NAME, SelftestProcess, TargetLocation, find_location
from agent.selftest.timing import TimedCheckpointer, TimedProcessFreezer
from agent.selftest.verdict import Proof, SelftestRun, Verdict, ratios, summarize, verdict_of
from agent.settings import AgentConfig, GpuSettings

START_S = 180.0
"""Allowance for everything before the first round."""

_SUBJECTS = {
    Proof.MEMORY_CHANGED: "memory",
    Proof.FAILED: "freeze, wake",
    Proof.TIMED_OUT: "freeze, wake",
    Proof.NOT_RUN: "start",
}
"""Name of the check that fails during the test."""


class Selftest:
    """One selftest. `run` returns the report; closing `stack` removes everything it created."""

    def __init__(self, plan: SelftestPlan, stack: AsyncExitStack) -> None:
        self._plan = plan
        self._stack = stack
        self._clock = SystemClock()
        self._began_ns = self._clock.monotonic_ns()
        self._boot_id = process_table.boot_id()
        self._findings = HostFindings()
        self._freezer_name = ""
        self._rounds: Rounds | None = None

    async def run(self) -> dict[str, Any]:
        """Check, test and judge. Raises only CancelledError."""
        limits = freezer_limits(self._plan.settings)
        deadline_s = self._deadline_s(limits)
        try:
            async with asyncio.timeout(deadline_s):
                verdict = await self._test(limits, deadline_s)
        except TimeoutError:
            text = f"the whole test did not end within {deadline_s:.0f} s"
            verdict = Verdict(Proof.TIMED_OUT, "SELFTEST_TIMEOUT", text, "look at `dmesg` for XID errors")
        except HibernodeError as error:
            verdict = verdict_of(error, begun=self._rounds is not None)
        if verdict.proof is not Proof.PROVED and not self._findings.failures:
            self._findings.add("FAIL", _SUBJECTS[verdict.proof], verdict.message, verdict.fix)
        return self._report(verdict)

    async def _test(self, limits: FreezerLimits, deadline_s: float) -> Verdict:
        gpus = NvmlGpus()
        self._stack.push_async_callback(gpus.close)
        locks = GpuLocks()
        self._stack.callback(locks.release)
        emit("step", "checking this host")
        self._findings = findings = await check_preconditions(self._plan, gpus, locks)
        if findings.gpu is None or findings.failures:
            missing = "; ".join(f"{line.name}: {line.reason}" for line in findings.failures)
            fix = "; ".join(dict.fromkeys(line.fix for line in findings.failures if line.fix))
            return Verdict(Proof.NOT_RUN, "PRECONDITION", missing, fix)
        self._rounds = rounds = await self._build(findings.gpu, gpus, limits, deadline_s)
        await rounds.prepare()
        self._check_headroom(rounds)
        left_out = await rounds.run_all(self._began_ns + self._plan.within_ns if self._plan.within_ns else 0)
        if left_out:
            text = f"{left_out} of {self._plan.runs} runs were left out: no time left"
            findings.add("WARN", "runs", text, "allow more time, or test less memory")
        await rounds.finish()
        self._add_result_lines(rounds)
        return Verdict(Proof.PROVED)

    async def _build(self, gpu: Gpu, gpus: NvmlGpus, limits: FreezerLimits, deadline_s: float) -> Rounds:
        """Build the agent's own components with timers in between."""
        location = find_location(self._boot_id)
        cgroups = TimedProcessFreezer(choose_freezer(location.slice_, SLICE_NAME, self._boot_id), self._clock)
        self._freezer_name = cgroups.name
        started = {name: await self._checkpointer(*choice) for name, choice in self._findings.checkpointers.items()}
        emit("begun", {"deadline_s": deadline_s, "cgroup": str(location.path or "")})
        target = await self._start(location, gpu)
        checkpointers = {}
        for name, checkpointer in started.items():
            timed = TimedCheckpointer(checkpointer)
            freezer = CudaFreezer(timed, cgroups, gpus, target.pids, self._boot_id, limits)
            self._stack.callback(freezer.forget, target.handle)
            checkpointers[name] = CheckpointerUnderTest(freezer, timed)
        return Rounds(self._plan, gpu, target, checkpointers, cgroups, gpus, self._clock, emit)

    async def _start(self, location: TargetLocation, gpu: Gpu) -> SelftestProcess:
        emit("step", "starting the CUDA program")
        target = await SelftestProcess.start(location, gpu.uuid)
        self._stack.push_async_callback(self._end, target)
        return target

    async def _end(self, target: SelftestProcess) -> None:
        try:
            await target.end()
        except HibernodeError as error:
            log.get_logger().error("selftest.left_behind", reason=error.reason, message=error.message)

    async def _checkpointer(self, capabilities: Capabilities, settings: GpuSettings) -> HostCheckpointer:
        checkpointer = choose_checkpointer(capabilities, settings)
        self._stack.push_async_callback(checkpointer.close)
        await checkpointer.start()
        return checkpointer

    def _check_headroom(self, rounds: Rounds) -> None:
        """Check the program's memory cgroup, which pays for the image: over its limit the kernel would kill it."""
        headroom = ProcHostMemory().headroom_bytes(rounds.target.handle)
        if headroom is not None and headroom < self._plan.size_bytes:
            raise PreconditionError(
                "HOST_MEMORY_SHORT",
                f"the memory limit of this command's cgroup leaves {headroom / GIB:.2f} GiB",
                fix="a smaller --gib, or run it outside that limit (in a root login, not a container)",
            )

    def _add_result_lines(self, rounds: Rounds) -> None:
        size = self._plan.size_bytes
        count = len(rounds.runs)
        findings = self._findings
        if self._freezer_name == "cgroup":
            findings.add("OK", "freezer", "cgroup v2, as for instances")
        else:
            findings.add("WARN", "freezer", "no cgroup can be written: SIGSTOP was used", "run as root")
        findings.add(
            "OK",
            "freeze, wake",
            f"{count} of {count} done and verified, by the {' and the '.join(rounds.checkpointers)}",
        )
        text = f"all {size} bytes in {rounds.allocations} allocations equal after each wake, at the same addresses"
        findings.add("OK", "memory", text)
        failures = [
            failure for checkpointer in rounds.checkpointers.values() for failure in checkpointer.timed.failures
        ]
        if failures:
            text = f"{len(failures)} driver calls failed and were recovered; the first: {failures[0]}"
            findings.add("WARN", "driver calls", text, "look at `dmesg` for XID errors; run it again with more --runs")
        least = min(run.figures.released_bytes for run in rounds.runs)
        if least < size * 0.9:
            fix = "did another program take memory meanwhile? If not, instances that share this GPU would not fit"
            findings.add("WARN", "given back", f"NVML saw only {least / GIB:.2f} GiB more free while frozen", fix)
        else:
            findings.add("OK", "given back", f"{least / GIB:.2f} GiB more free on the GPU while frozen, by NVML")

    def _deadline_s(self, limits: FreezerLimits) -> float:
        """The sum of all step deadlines; only reached if a step misses its own."""
        size = self._plan.size_bytes
        copy_s = limits.copy_base_s + size / limits.copy_bytes_per_s
        freeze_and_wake = 2 * (copy_s + limits.rollback_s) + limits.lock_timeout_s + limits.vram_gone_s
        count = 2 if self._plan.against else 1
        return START_S + 2 * touch_deadline_s(size) + (self._plan.runs + 1) * count * (
            4 * touch_deadline_s(size) + freeze_and_wake
        )  # fmt: skip

    def _report(self, verdict: Verdict) -> dict[str, Any]:
        """The report, with the keys listed by `hibernode doctor --selftest --help`."""
        findings, runs = self._findings, self._rounds.runs if self._rounds else []
        summary: dict[str, Any] = {
            name: {key: asdict(spread) for key, spread in spreads.items()} for name, spreads in summarize(runs).items()
        }
        names = list(findings.checkpointers)
        compared = ratios(runs, names[1], names[0]) if len(names) == 2 else {}
        return {
            "host": {
                "gpu": _describe(findings.gpu) if findings.gpu else None,
                "driver": findings.driver.version if findings.driver else "",
                "cuda": findings.driver.cuda if findings.driver else 0,
                "machine": platform.machine(),
                "kernel": platform.release(),
                "user_id": os.geteuid(),
                "freezer": self._freezer_name,
                "hibernode": __version__,
            },
            "size_bytes": self._plan.size_bytes,
            "allocations": self._rounds.allocations if self._rounds else 0,
            "checkpointers": names,
            "checks": [asdict(line) for line in findings.lines],
            "runs": [_flat(run) for run in runs],
            "summary": summary,
            "ratio": {key: asdict(spread) for key, spread in compared.items()},
            "verdict": {**asdict(verdict), "proof": verdict.proof.value},
        }


def _describe(gpu: Gpu) -> dict[str, Any]:
    keys = ("model", "uuid", "index", "memory_bytes", "persistence", "mig")
    return {key: getattr(gpu, key) for key in keys}


def _flat(run: SelftestRun) -> dict[str, Any]:
    """A run in the list was compared and found equal."""
    return {
        "run": run.run,
        "counted": run.counted,
        "checkpointer": run.checkpointer,
        "bytes_equal": True,
        **asdict(run.figures),
        "pinned": asdict(run.pinned),
        "memory": asdict(run.memory),
        "round_s": run.round_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, help="the agent's configuration; default: its defaults")
    parser.add_argument("--size-bytes", type=int, required=True)
    parser.add_argument("--runs", type=int, required=True)
    parser.add_argument("--gpu", default="")
    parser.add_argument("--against", default="", choices=["", "utility"])
    parser.add_argument("--within-s", type=float, default=0.0, help="begin no run that would not end by then; 0: any")
    found = parser.parse_args()
    log.configure("warning", "console")
    try:
        settings = load(found.config, AgentConfig).gpu if found.config else GpuSettings()
    except HibernodeError as error:
        print(f"hibernode: {error.message} ({error.reason})", file=sys.stderr)  # noqa: T201 - as daemons do
        sys.exit(exit_of(error))
    plan = SelftestPlan(
        settings, found.size_bytes, found.runs, found.gpu, found.against, round(found.within_s * SECOND_NS)
    )
    report_of(lambda stack: Selftest(plan, stack).run())


if __name__ == "__main__":
    main()
