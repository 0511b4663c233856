"""What can go wrong on a host, drawn from a seed: the driver, NVML, somebody else's hands, and SIGKILL of anybody.

Each misfortune is one method of `Chaos`; `strike` draws one. Everything that was done is kept with its time
(CLOCK_MONOTONIC ns): the checks excuse an answer only by what happened while its request was under way.
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
"""What a program does to itself (bad access, reset of its channel): no reason to take the GPU out of use."""
RECOVERY_S = 4
NVML_UNKNOWN_ERROR = 999
"""What passes. A GPU that NVML calls lost (15) does not come back without a reset, so it has no place here."""


@dataclass
class Pause:
    """Somebody stopped an instance's threads, and let them go on: from `began_ns` to `ended_ns` (0 = not yet)."""

    uid: str
    pids: frozenset[int]
    began_ns: int
    ended_ns: int = 0


@dataclass
class Chaos:
    """See the module. `diary` tells a failed test what happened, in order."""

    stack: Stack
    driver: EmulatedDriver
    source: random.Random
    diary: list[str] = field(default_factory=list)
    kills: list[int] = field(default_factory=list)
    pauses: list[Pause] = field(default_factory=list)
    began_ns: int = field(default_factory=time.monotonic_ns)
    _later: set[asyncio.Task[None]] = field(default_factory=set)

    def note(self, text: str) -> None:
        self.diary.append(f"{(time.monotonic_ns() - self.began_ns) / SECOND_NS:8.3f} {text}")

    def paused(self, pid: int, at_ns: int) -> bool:
        """Had somebody stopped this process then?"""
        return any(pid in pause.pids and pause.began_ns <= at_ns <= (pause.ended_ns or at_ns) for pause in self.pauses)

    # ---- drawing ----------------------------------------------------------------------------------------------------

    def strike(self) -> None:
        """One misfortune; those that last a while end by themselves."""
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
                await asyncio.sleep(seconds)  # how long the misfortune lasts
            finally:
                end()

        self._start(wait())

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._later.add(task)
        task.add_done_callback(self._later.discard)

    async def heal(self) -> None:
        """Nothing goes wrong any more; what hung may run now."""
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
        except PreconditionError:  # `after` does not go with every kind
            after = False
            with suppress(PreconditionError):  # 64 are planned already
                self.driver.fault(operation, kind, times=1, skip=skip, delay_ms=delay_ms)
        self.note(f"fault {operation} {kind} skip={skip} after={after} delay_ms={delay_ms}")

    def clear_faults(self) -> None:
        """What hung runs now: much later than anybody who asked for it waited."""
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
        with suppress(PreconditionError):  # an instance took it between the question and now
            self.driver.reserve(device.uuid, device.total_bytes - device.used_bytes)
        self.note(f"outsider fills gpu {device.index}, {seconds:.2f} s")
        self._for_a_while(seconds, lambda: self.driver.reserve(device.uuid, 0))

    def raise_xid(self) -> None:
        device, code = self.source.choice(self.driver.devices()), self.source.choice(APPLICATION_XIDS)
        self.driver.raise_xid(device.uuid, code)
        self.note(f"xid {code} on gpu {device.index}")

    # ---- processes --------------------------------------------------------------------------------------------------

    def kill_agent(self) -> None:
        """Now and then during its recovery, too; not so often that nobody is served any more."""
        recovers = bool(self.kills) and time.monotonic_ns() - self.kills[-1] < RECOVERY_S * SECOND_NS
        spared = recovers and self.source.random() < 0.7
        if self.stack.processes["agent"].poll() is None and not spared:
            self.kills.append(time.monotonic_ns())
            self.stack.kill_agent()
            self.note("agent killed")

    def kill_worker(self) -> None:
        """A random one of the processes that call the driver for the agent."""
        with suppress(psutil.Error, ProcessLookupError):
            children = psutil.Process(self.stack.processes["agent"].pid).children(recursive=True)
            workers = [child for child in children if any("driver_worker" in word for word in child.cmdline())]
            if workers:
                worker = self.source.choice(sorted(workers, key=lambda child: child.pid))
                worker.kill()
                self.note(f"worker {worker.pid} killed")

    def kill_instance(self) -> None:
        """The OOM killer, or an operator."""
        path = self._some_instance()
        if path is not None:
            self.note(f"instance {path.name} killed, pids {cgroup.procs(path)}")
            for pid in cgroup.procs(path):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def pause(self) -> None:
        """`docker pause` and `unpause` by somebody else, in whatever state the instance is by then."""
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
    """What systemd does: start it anew whenever it has ended. Until cancelled."""
    while True:
        code = stack.processes["agent"].poll()
        if code is not None:
            note(f"agent ended with {code}, started anew")
            (stack.folder / "agent" / "endpoints.json").unlink(missing_ok=True)
            await stack.start_agent(wait=False)
        await asyncio.sleep(0.2)
