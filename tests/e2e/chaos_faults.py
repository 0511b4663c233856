"""Random faults of a host, drawn from a seed: the driver, NVML, external pauses, and SIGKILL of any process.

Each fault is a method of `Chaos`; `strike` draws one. All are recorded with their times (CLOCK_MONOTONIC ns): the
checks excuse an answer only by faults during its request.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from agent.adapters.kernel import cgroup
from agent.core.errors import PreconditionError
from agent.core.types import SECOND_NS
from agent.emulated.control import EmulatedDriver
from agent.emulated.faults import KINDS, OPERATIONS
from tests.e2e.stack import Stack

APPLICATION_XIDS = (13, 31, 43, 45)
"""Errors that a program causes itself (bad access, reset of its channel): the GPU stays in use."""
RECOVERY_S = 4
NVML_UNKNOWN_ERROR = 999
"""Transient errors. A GPU that NVML reports as lost (15) needs a reset, so 15 is not among them."""


@dataclass
class Pause:
    """An external stop of an instance's threads, from `began_ns` to `ended_ns` (0 = not yet)."""

    uid: str
    pids: frozenset[int]
    began_ns: int
    ended_ns: int = 0


@dataclass
class Chaos:
    """Injects the faults. `log` shows their order when a test fails."""

    stack: Stack
    driver: EmulatedDriver
    source: random.Random
    log: list[str] = field(default_factory=list)
    kills: list[int] = field(default_factory=list)
    pauses: list[Pause] = field(default_factory=list)
    began_ns: int = field(default_factory=time.monotonic_ns)
    _later: set[asyncio.Task[None]] = field(default_factory=set)

    def note(self, text: str) -> None:
        self.log.append(f"{(time.monotonic_ns() - self.began_ns) / SECOND_NS:8.3f} {text}")

    def paused(self, pid: int, at_ns: int) -> bool:
        """Whether the process was paused from outside at that time."""
        return any(pid in pause.pids and pause.began_ns <= at_ns <= (pause.ended_ns or at_ns) for pause in self.pauses)

    # ---- random choice ----------------------------------------------------------------------------------------------

    def strike(self) -> None:
        """Inject one fault; temporary ones end by themselves."""
        weights: dict[Callable[[], None], int] = {
            self.driver_fault: 40,
            self.clear_faults: 6,
            self.kill_agent: 5,
            self.kill_worker: 8,
            self.kill_instance: 6,
            self.pause: 10,
            self.fill_gpu: 8,
            self.fail_nvml: 8,
            self.raise_xid: 5,
        }
        (misfortune,) = self.source.choices(list(weights), list(weights.values()))
        misfortune()

    def _for_a_while(self, seconds: float, end: Callable[[], None]) -> None:
        async def wait() -> None:
            try:
                await asyncio.sleep(seconds)  # the duration of the fault
            finally:
                end()

        self._start(wait())

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._later.add(task)
        task.add_done_callback(self._later.discard)

    async def heal(self) -> None:
        """Remove all faults; hung operations run now."""
        later = list(self._later)
        for task in later:
            task.cancel()
        await asyncio.gather(*later, return_exceptions=True)
        self.driver.clear_faults()
        for device in self.driver.devices():
            self.driver.set_device(device.uuid, nvml_error=0, silent=False)
            self.driver.reserve(device.uuid, 0)
        self.note("healed")

    # ---- the driver -------------------------------------------------------------------------------------------------

    def driver_fault(self) -> None:
        operation, kind = self.source.choice(list(OPERATIONS)), self.source.choice(KINDS)
        after = self.source.random() < 0.25
        delay_ms = self.source.choice([20, 200, 1500]) if kind == "SLOW" else 0
        skip = self.source.choice([0, 0, 1, 3])
        try:
            self.driver.fault(operation, kind, times=1, skip=skip, after=after, delay_ms=delay_ms)
        except PreconditionError:  # `after` is invalid for some kinds
            after = False
            with suppress(PreconditionError):  # 64 faults are already planned
                self.driver.fault(operation, kind, times=1, skip=skip, delay_ms=delay_ms)
        self.note(f"fault {operation} {kind} skip={skip} after={after} delay_ms={delay_ms}")

    def clear_faults(self) -> None:
        """Run what hung, long after its callers have given up."""
        self.driver.clear_faults()
        self.note("faults cleared")

    def fail_nvml(self) -> None:
        devices = self.driver.devices()
        chosen = devices if self.source.random() < 0.5 else [self.source.choice(devices)]
        seconds = self.source.uniform(0.05, 1.5)
        for device in chosen:
            self.driver.set_device(device.uuid, nvml_error=NVML_UNKNOWN_ERROR)
        self.note(f"nvml fails for {[d.index for d in chosen]}, {seconds:.2f} s")

        def end() -> None:
            for device in chosen:
                self.driver.set_device(device.uuid, nvml_error=0)

        self._for_a_while(seconds, end)

    def fill_gpu(self) -> None:
        device = self.source.choice(self.driver.devices())
        seconds = self.source.uniform(0.1, 1.5)
        with suppress(PreconditionError):  # an instance took the memory meanwhile
            self.driver.reserve(device.uuid, device.total_bytes - device.used_bytes)
        self.note(f"outsider fills gpu {device.index}, {seconds:.2f} s")
        self._for_a_while(seconds, lambda: self.driver.reserve(device.uuid, 0))

    def raise_xid(self) -> None:
        device, code = self.source.choice(self.driver.devices()), self.source.choice(APPLICATION_XIDS)
        self.driver.raise_xid(device.uuid, code)
        self.note(f"xid {code} on gpu {device.index}")

    # ---- processes --------------------------------------------------------------------------------------------------

    def kill_agent(self) -> None:
        """Kill the agent, sometimes during its recovery, but rarely enough that requests are served."""
        recovers = bool(self.kills) and time.monotonic_ns() - self.kills[-1] < RECOVERY_S * SECOND_NS
        spared = recovers and self.source.random() < 0.7
        if self.stack.processes["agent"].poll() is None and not spared:
            self.kills.append(time.monotonic_ns())
            self.stack.kill_agent()
            self.note("agent killed")

    def kill_worker(self) -> None:
        """Kill a random process that calls the driver for the agent."""
        with suppress(psutil.Error, ProcessLookupError):
            children = psutil.Process(self.stack.processes["agent"].pid).children(recursive=True)
            workers = [child for child in children if any("driver_worker" in word for word in child.cmdline())]
            if workers:
                worker = self.source.choice(sorted(workers, key=lambda child: child.pid))
                worker.kill()
                self.note(f"worker {worker.pid} killed")

    def kill_instance(self) -> None:
        """Kill an instance, like the OOM killer or an operator."""
        path = self._some_instance()
        if path is not None:
            self.note(f"instance {path.name} killed, pids {cgroup.procs(path)}")
            for pid in cgroup.procs(path):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def pause(self) -> None:
        """Pause and unpause an instance from outside, like `docker pause`, in any state."""
        path = self._some_instance()
        if path is None:
            return
        pause = Pause(path.name, frozenset(cgroup.procs(path)), time.monotonic_ns())
        seconds = self.source.choice([0.05, 0.5, 1.5])
        with suppress(OSError):
            cgroup.write_freeze(path, frozen=True)
            self.pauses.append(pause)
            self.note(f"instance {path.name} paused, {seconds} s, pids {sorted(pause.pids)}")

            def end() -> None:
                with suppress(OSError):
                    cgroup.write_freeze(path, frozen=False)
                pause.ended_ns = time.monotonic_ns()
                self.note(f"instance {path.name} goes on")

            self._for_a_while(seconds, end)

    def _some_instance(self) -> Path | None:
        slice_ = cgroup.open_slice((self.stack.folder / "agent" / "uuid").read_text().strip())
        uids = sorted(slice_.uids()) if slice_ is not None else []
        return slice_.path_of(self.source.choice(uids)) if slice_ is not None and uids else None


async def keep_agent_running(stack: Stack, note: Callable[[str], None]) -> None:
    """Restart the agent whenever it ends, like systemd. Runs until cancelled."""
    while True:
        code = stack.processes["agent"].poll()
        if code is not None:
            note(f"agent ended with {code}, started anew")
            (stack.folder / "agent" / "endpoints.json").unlink(missing_ok=True)
            await stack.start_agent(wait=False)
        await asyncio.sleep(0.2)
