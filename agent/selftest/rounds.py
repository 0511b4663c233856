"""Runs the rounds of a selftest: fill, freeze, wake, compare every byte, copy through pinned memory; timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import psutil

from agent.adapters.freezer.freezer import CudaFreezer
from agent.core.errors import InstanceError, PreconditionError
from agent.core.types import SECOND_NS, Gpu
from agent.ports import Clock, CudaOp, FreezeResult, Gpus, Outcome
from agent.selftest.checks import PINNED_CHUNK, SelftestPlan
from agent.selftest.target_process import SelftestProcess
from agent.selftest.timing import TimedCheckpointer, TimedProcessFreezer
from agent.selftest.verdict import MEMORY_CHANGED, CycleFigures, MemoryFigures, PinnedCopy, SelftestRun, gb_s

TOUCH_BASE_S = 60.0
TOUCH_BYTES_PER_S = 100_000_000
"""The slowest accepted rate of one pass over the memory."""

OUT_OF_MEMORY = 2


@dataclass(frozen=True, slots=True)
class CheckpointerUnderTest:
    """A checkpointer in the agent's own freezer."""

    freezer: CudaFreezer
    timed: TimedCheckpointer


def touch_deadline_s(size_bytes: int) -> float:
    """Deadline of one pass over the memory."""
    return TOUCH_BASE_S + size_bytes / TOUCH_BYTES_PER_S


@dataclass(slots=True)
class Rounds:
    """`report(key, text)` receives progress: "step" at the start, "done" at the end of a step. Every method raises
    InstanceError for a failure of the host and DeadlineError for a step that did not end."""

    plan: SelftestPlan
    gpu: Gpu
    target: SelftestProcess
    checkpointers: Mapping[str, CheckpointerUnderTest]
    cgroups: TimedProcessFreezer
    gpus: Gpus
    clock: Clock
    report: Callable[[str, str], None]
    runs: list[SelftestRun] = field(default_factory=list)
    allocations: int = 0
    _fills: int = 0

    async def prepare(self) -> None:
        """Allocate memory and prove that it holds without a freeze. Raises PreconditionError GPU_MEMORY_SHORT."""
        self.report("step", "creating a CUDA context")
        answer = await self.target.ask("allocate", touch_deadline_s(0), bytes=self.plan.size_bytes)
        if answer.get("code") == OUT_OF_MEMORY:
            raise PreconditionError(
                "GPU_MEMORY_SHORT", f"the GPU has no room for the test: {answer['error']}", fix="a smaller --gib"
            )
        self.allocations = int(_require_ok(answer)["allocations"])
        wrong = await self._fill_and_verify()
        if wrong:
            raise InstanceError(
                "GPU_MEMORY_UNSOUND",
                f"memory differs although nothing was frozen: {wrong}",
                fix="this GPU or its bus is faulty: look for XID and ECC errors (`dmesg`, `nvidia-smi -q -d ECC`)",
            )

    async def _fill_and_verify(self) -> str:
        await self._fill("filling the memory")
        return await self._verify("reading it back before any freeze")

    async def run_all(self, until_ns: int = 0) -> int:
        """Run the warm-up and every run; two checkpointers take turns at going first. After the first measured run,
        begin none that would not end by `until_ns` if it takes as long as the longest. Returns how many are left out.
        """
        names = list(self.checkpointers)
        longest_ns = 0
        for number in range(self.plan.runs + 1):
            begin = self.clock.monotonic_ns()
            if number > 1 and until_ns and begin + longest_ns > until_ns:
                return self.plan.runs + 1 - number
            for name in names if number % 2 else reversed(names):
                self.runs.append(await self.run_one(number, name))
            longest_ns = max(longest_ns, self.clock.monotonic_ns() - begin)
        return 0

    async def finish(self) -> None:
        """Free the restored program's memory and end it, which not every driver survives (NVIDIA/cuda-checkpoint issue
        53). Raises DeadlineError KILL_TIMEOUT."""
        self.report("step", "ending the CUDA program")
        _require_ok(await self.target.leave())
        await self.target.end()

    async def run_one(self, number: int, name: str) -> SelftestRun:
        """Freeze and wake with `name`, then compare."""
        title = f"run {number} of {self.plan.runs}" if number else "warm-up"
        title = f"{title}, {name}"
        checkpointer = self.checkpointers[name]
        begin = self.clock.monotonic_ns()
        await self._fill(f"{title}: filling the memory")
        figures = await self._freeze_and_wake(checkpointer, title)
        wrong = await self._verify(f"{title}: comparing every byte")
        if wrong:
            raise InstanceError(MEMORY_CHANGED, f"after a freeze and a wake by the {name}, {wrong}")
        pinned = await self._copy(f"{title}: copying through pinned memory")
        self.report(
            "done",
            f"{title}: frozen in {figures.freeze_s:.3f} s, awake in {figures.wake_s:.3f} s, every byte equal"
            + ("" if number else " (does not count)"),
        )
        return SelftestRun(number, name, figures, pinned, await self._memory(), self._since(begin))

    async def _freeze_and_wake(self, checkpointer: CheckpointerUnderTest, title: str) -> CycleFigures:
        handle, size = self.target.handle, self.plan.size_bytes
        free = await self._free_bytes()
        self.report("step", f"{title}: freezing")
        begin = self.clock.monotonic_ns()
        _require(await checkpointer.freezer.lock(handle), "lock")
        frozen = _require(await checkpointer.freezer.checkpoint(handle), "checkpoint")
        freeze_s = self._since(begin)
        released = await self._free_bytes() - free
        self.report("step", f"{title}: waking")
        begin = self.clock.monotonic_ns()
        _require(await checkpointer.freezer.wake(handle, {}), "wake")
        wake_s = self._since(begin)
        checkpoint_s = checkpointer.timed.pop_ns(CudaOp.CHECKPOINT) / SECOND_NS
        restore_s = checkpointer.timed.pop_ns(CudaOp.RESTORE) / SECOND_NS
        return CycleFigures(
            lock_s=checkpointer.timed.pop_ns(CudaOp.LOCK) / SECOND_NS,
            checkpoint_s=checkpoint_s,
            cgroup_freeze_s=self.cgroups.freeze_ns / SECOND_NS,
            freeze_s=freeze_s,
            thaw_s=self.cgroups.thaw_ns / SECOND_NS,
            restore_s=restore_s,
            unlock_s=checkpointer.timed.pop_ns(CudaOp.UNLOCK) / SECOND_NS,
            wake_s=wake_s,
            checkpoint_gb_s=gb_s(size, checkpoint_s),
            restore_gb_s=gb_s(size, restore_s),
            image_bytes=frozen.image_bytes,
            released_bytes=released,
        )

    async def _fill(self, step: str) -> None:
        """Write different bytes each time, so data of an earlier checkpoint can't pass for this one's."""
        self._fills += 1
        self.report("step", step)
        _require_ok(await self.target.ask("fill", touch_deadline_s(self.plan.size_bytes), round=self._fills))

    async def _verify(self, step: str) -> str:
        """The first difference in the memory, "" if none."""
        self.report("step", step)
        answer = _require_ok(await self.target.ask("verify", touch_deadline_s(self.plan.size_bytes), round=self._fills))
        if not answer["wrong_pages"]:
            return ""
        return f"{answer['first']}; pages of 4 KiB that differ: {answer['wrong_pages']}"

    async def _copy(self, step: str) -> PinnedCopy:
        self.report("step", step)
        size = self.plan.size_bytes
        answer = _require_ok(await self.target.ask("copy", 2 * touch_deadline_s(size), chunk=PINNED_CHUNK))
        if "unavailable" in answer:
            return PinnedCopy(unavailable=answer["unavailable"])
        to_host_s, to_device_s = answer["to_host_us"] / 1e6, answer["to_device_us"] / 1e6
        return PinnedCopy(to_host_s, to_device_s, gb_s(size, to_host_s), gb_s(size, to_device_s))

    async def _memory(self) -> MemoryFigures:
        program = self.target.handle.process.pid
        own = psutil.Process()
        workers = [child for child in own.children(recursive=True) if child.pid != program]
        return MemoryFigures(
            gpu_free_bytes=await self._free_bytes(),
            program_bytes=_resident_bytes(psutil.Process(program)),
            agent_bytes=_resident_bytes(own) + sum(_resident_bytes(worker) for worker in workers),
        )

    async def _free_bytes(self) -> int:
        return (await self.gpus.memory_free()).get(self.gpu.uuid, 0)

    def _since(self, begin_ns: int) -> float:
        return (self.clock.monotonic_ns() - begin_ns) / SECOND_NS


def _resident_bytes(process: psutil.Process) -> int:
    """0 if it has ended."""
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def _require_ok(answer: dict[str, Any]) -> dict[str, Any]:
    if "error" in answer:
        raise InstanceError("CUDA_CALL_FAILED", f"in the program under test, {answer['error']}")
    return answer


def _require(result: FreezeResult, step: str) -> FreezeResult:
    if result.outcome is not Outcome.OK:
        kind = "was refused and rolled back" if result.outcome is Outcome.REFUSED else "failed"
        raise InstanceError(result.reason, f"the {step} {kind}: {result.message}")
    return result
