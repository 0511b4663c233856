"""The selftest of a GPU host: `python -P -m agent.selftest.run`, started by `hibernode doctor --selftest`.

A CUDA program of its own is frozen and woken by what the agent freezes and wakes instances with, and every byte of its
memory is compared. On stdout one JSON object a line: {"begun": {"deadline_s", "cgroup"}}, {"step": text}, {"done":
text}, and at the end {"report": {...}}, whose keys docs are in `report`. Ends itself when its stdin ends, on SIGTERM
and on SIGINT; the program ends with it whatever happens, also by SIGKILL.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import signal
import sys
from contextlib import AsyncExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import uvloop

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
from agent.core.types import GIB, Gpu
from agent.exit_codes import exit_of
from agent.selftest.checks import HostFindings, SelftestPlan, survey
from agent.selftest.rounds import CheckpointerUnderTest, Rounds, touch_deadline_s
from agent.selftest.target_process import SLICE_NAME, SelftestProcess, TargetPlace, find_place
from agent.selftest.timing import TimedCheckpointer, TimedProcessFreezer
from agent.selftest.verdict import Proof, SelftestRun, Verdict, ratios, summarize, verdict_of
from agent.settings import AgentConfig, GpuSettings

START_S = 180.0
"""For everything before the first round."""

_SUBJECTS = {
    Proof.MEMORY_CHANGED: "memory",
    Proof.FAILED: "freeze, wake",
    Proof.TIMED_OUT: "freeze, wake",
    Proof.NOT_RUN: "start",
}
"""What a check that fails during the test is called."""


class Selftest:
    """One selftest. `run` gives the report; whatever it made is gone when `stack` is closed."""

    def __init__(self, asked: SelftestPlan, stack: AsyncExitStack) -> None:
        self._asked = asked
        self._stack = stack
        self._clock = SystemClock()
        self._boot_id = process_table.boot_id()
        self._ground = HostFindings()
        self._freezer_name = ""
        self._rounds: Rounds | None = None

    async def run(self) -> dict[str, Any]:
        """Look, test, judge. Only a cancellation comes through."""
        limits = freezer_limits(self._asked.settings)
        deadline_s = self._deadline_s(limits)
        try:
            async with asyncio.timeout(deadline_s):
                verdict = await self._test(limits, deadline_s)
        except TimeoutError:
            text = f"the whole test did not end within {deadline_s:.0f} s"
            verdict = Verdict(Proof.TIMED_OUT, "SELFTEST_TIMEOUT", text, "look at `dmesg` for XID errors")
        except HibernodeError as error:
            verdict = verdict_of(error, begun=self._rounds is not None)
        if verdict.proof is not Proof.PROVED and not self._ground.failures:
            self._ground.say("FAIL", _SUBJECTS[verdict.proof], verdict.message, verdict.fix)
        return self._report(verdict)

    async def _test(self, limits: FreezerLimits, deadline_s: float) -> Verdict:
        gpus = NvmlGpus()
        self._stack.push_async_callback(gpus.close)
        locks = GpuLocks()
        self._stack.callback(locks.release)
        _say("step", "looking at this host")
        self._ground = ground = await survey(self._asked, gpus, locks)
        if ground.gpu is None or ground.failures:
            missing = "; ".join(f"{line.name}: {line.reason}" for line in ground.failures)
            fix = "; ".join(dict.fromkeys(line.fix for line in ground.failures if line.fix))
            return Verdict(Proof.NOT_RUN, "PRECONDITION", missing, fix)
        self._rounds = rounds = await self._build(ground.gpu, gpus, limits, deadline_s)
        await rounds.prepare()
        self._check_headroom(rounds)
        await rounds.all()
        await rounds.finish()
        self._say_result(rounds)
        return Verdict(Proof.PROVED)

    async def _build(self, gpu: Gpu, gpus: NvmlGpus, limits: FreezerLimits, deadline_s: float) -> Rounds:
        """The agent's own parts, with clocks between them."""
        place = find_place(self._boot_id)
        cgroups = TimedProcessFreezer(choose_freezer(place.slice_, SLICE_NAME, self._boot_id), self._clock)
        self._freezer_name = cgroups.name
        checkpointers = {name: await self._checkpointer(*way) for name, way in self._ground.ways.items()}
        _say("begun", {"deadline_s": deadline_s, "cgroup": str(place.path or "")})
        target = await self._start(place, gpu)
        ways = {}
        for name, checkpointer in checkpointers.items():
            timed = TimedCheckpointer(checkpointer)
            freezer = CudaFreezer(timed, cgroups, gpus, target.pids, self._boot_id, limits)
            self._stack.callback(freezer.forget, target.handle)
            ways[name] = CheckpointerUnderTest(freezer, timed)
        return Rounds(self._asked, gpu, target, ways, cgroups, gpus, self._clock, _say)

    async def _start(self, place: TargetPlace, gpu: Gpu) -> SelftestProcess:
        _say("step", "starting the CUDA program")
        target = await SelftestProcess.start(place, gpu.uuid)
        self._stack.push_async_callback(self._end, target)
        return target

    async def _end(self, target: SelftestProcess) -> None:
        try:
            await target.end()
        except HibernodeError as error:
            log.get_logger().error("selftest.left_behind", reason=error.reason, message=error.message)

    async def _checkpointer(self, capabilities: Capabilities, settings: GpuSettings) -> HostCheckpointer:
        made = choose_checkpointer(capabilities, settings)
        self._stack.push_async_callback(made.close)
        await made.start()
        return made

    def _check_headroom(self, rounds: Rounds) -> None:
        """The image is charged to the program's memory cgroup: over its limit the kernel would kill it."""
        headroom = ProcHostMemory().headroom_bytes(rounds.target.handle)
        if headroom is not None and headroom < self._asked.size_bytes:
            raise PreconditionError(
                "HOST_MEMORY_SHORT",
                f"the memory limit of this command's cgroup leaves {headroom / GIB:.2f} GiB",
                fix="a smaller --gib, or run it outside of that limit (a login as root, not a container)",
            )

    def _say_result(self, rounds: Rounds) -> None:
        size = self._asked.size_bytes
        count = len(rounds.runs)
        ground = self._ground
        if self._freezer_name == "cgroup":
            ground.say("OK", "freezer", "cgroup v2, as for instances")
        else:
            ground.say("WARN", "freezer", "no cgroup can be written: SIGSTOP was used", "run as root")
        ground.say(
            "OK", "freeze, wake", f"{count} of {count} done and verified, by the {' and the '.join(rounds.ways)}"
        )
        text = f"all {size} bytes in {rounds.allocations} allocations equal after each wake, at the same addresses"
        ground.say("OK", "memory", text)
        troubles = [trouble for way in rounds.ways.values() for trouble in way.timed.troubles]
        if troubles:
            text = f"{len(troubles)} driver calls failed and were made good; the first: {troubles[0]}"
            ground.say("WARN", "driver calls", text, "look at `dmesg` for XID errors; run it again with more --runs")
        least = min(run.figures.released_bytes for run in rounds.runs)
        if least < size * 0.9:
            fix = "did another program take memory meanwhile? If not, instances would not fit that share this GPU"
            ground.say("WARN", "given back", f"NVML saw only {least / GIB:.2f} GiB more free while frozen", fix)
        else:
            ground.say("OK", "given back", f"{least / GIB:.2f} GiB more free on the GPU while frozen, by NVML")

    def _deadline_s(self, limits: FreezerLimits) -> float:
        """The sum of what each step may take: never met, unless a step forgets its own."""
        size = self._asked.size_bytes
        copy_s = limits.copy_base_s + size / limits.copy_bytes_per_s
        freeze_and_wake = 2 * (copy_s + limits.rollback_s) + limits.lock_timeout_s + limits.vram_gone_s
        ways = 2 if self._asked.against else 1
        return START_S + 2 * touch_deadline_s(size) + (self._asked.runs + 1) * ways * (
            4 * touch_deadline_s(size) + freeze_and_wake
        )  # fmt: skip

    def _report(self, verdict: Verdict) -> dict[str, Any]:
        """Keys: `hibernode doctor --selftest --help` names them."""
        ground, runs = self._ground, self._rounds.runs if self._rounds else []
        summary: dict[str, Any] = {
            name: {key: asdict(one) for key, one in spreads.items()} for name, spreads in summarize(runs).items()
        }
        names = list(ground.ways)
        compared = ratios(runs, names[1], names[0]) if len(names) == 2 else {}
        return {
            "host": {
                "gpu": _describe(ground.gpu) if ground.gpu else None,
                "driver": ground.driver.version if ground.driver else "",
                "cuda": ground.driver.cuda if ground.driver else 0,
                "machine": platform.machine(),
                "kernel": platform.release(),
                "user_id": os.geteuid(),
                "freezer": self._freezer_name,
                "hibernode": __version__,
            },
            "size_bytes": self._asked.size_bytes,
            "allocations": self._rounds.allocations if self._rounds else 0,
            "checkpointers": names,
            "checks": [asdict(line) for line in ground.lines],
            "runs": [_flat(run) for run in runs],
            "summary": summary,
            "ratio": {key: asdict(one) for key, one in compared.items()},
            "verdict": {**asdict(verdict), "proof": verdict.proof.value},
        }


def _describe(gpu: Gpu) -> dict[str, Any]:
    keys = ("model", "uuid", "index", "memory_bytes", "persistence", "mig")
    return {key: getattr(gpu, key) for key in keys}


def _flat(run: SelftestRun) -> dict[str, Any]:
    """A run that is in the list was compared, and nothing had changed."""
    return {
        "run": run.run,
        "counted": run.counted,
        "checkpointer": run.checkpointer,
        "bytes_equal": True,
        **asdict(run.figures),
        "pinned": asdict(run.pinned),
    }


def _say(key: str, value: object) -> None:
    print(json.dumps({key: value}, default=str), flush=True)  # noqa: T201 - its protocol


async def _main(asked: SelftestPlan) -> None:
    """Run until done or told to stop; what was made is taken down in both cases."""
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as stack:
        test = asyncio.ensure_future(Selftest(asked, stack).run())
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, test.cancel)
        with suppress(OSError):  # no pipe, a file or nothing: nobody to outlive
            loop.add_reader(0, _watch_stdin, test)
        try:
            report = await test
        except asyncio.CancelledError:
            return
        finally:
            with suppress(OSError):
                loop.remove_reader(0)
    _say("report", report)


def _watch_stdin(test: asyncio.Future[Any]) -> None:
    """Whoever started us holds the other end: it ended."""
    if not os.read(0, 4096):
        asyncio.get_running_loop().remove_reader(0)
        test.cancel()


def main() -> None:
    """Parse, run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, help="the agent's; default: its defaults")
    parser.add_argument("--size-bytes", type=int, required=True)
    parser.add_argument("--runs", type=int, required=True)
    parser.add_argument("--gpu", default="")
    parser.add_argument("--against", default="", choices=["", "utility"])
    found = parser.parse_args()
    log.configure("warning", "console")
    try:
        settings = load(found.config, AgentConfig).gpu if found.config else GpuSettings()
    except HibernodeError as error:
        print(f"hibernode: {error.message} ({error.reason})", file=sys.stderr)  # noqa: T201 - as daemons do
        sys.exit(exit_of(error))
    try:
        uvloop.run(_main(SelftestPlan(settings, found.size_bytes, found.runs, found.gpu, found.against)))
    except BrokenPipeError:  # whoever asked is gone
        os._exit(1)


if __name__ == "__main__":
    main()
