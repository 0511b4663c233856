"""One instance with real processes, a driver with faults on demand, and the freezer between them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from agent.adapters.freezer.freezer import CudaFreezer
from agent.adapters.freezer.limits import FreezerLimits
from agent.adapters.kernel import process_table
from agent.core.types import Handle
from agent.ports import CudaState, Outcome
from tests.fakes.checkpointer import FakeCheckpointer, FakeCudaProcess
from tests.fakes.gpus import FakeGpus, gpu
from tests.fakes.process_freezer import FakeProcessFreezer

LIMITS = FreezerLimits(
    lock_timeout_s=0.2, state_query_s=0.5, driver_call_s=1.0, copy_base_s=1.0, vram_gone_s=0.05, rollback_s=1.0
)


class WaitingProcesses:
    """Processes that only wait, and the pids that the freezer is shown."""

    def __init__(self) -> None:
        self.children: list[subprocess.Popen[bytes]] = []
        self.shown: list[int] = []
        self.listings = 0
        self.appear_at: dict[int, int] = {}

    def spawn(self, *, shown: bool = True) -> int:
        child = subprocess.Popen(["sleep", "600"])
        self.children.append(child)
        if shown:
            self.shown.append(child.pid)
        return child.pid

    def end(self, pid: int) -> None:
        self.kill(pid).wait()
        self.shown.remove(pid)

    def kill(self, pid: int) -> subprocess.Popen[bytes]:
        """SIGKILL; it stays a zombie, and listed, until it is reaped."""
        child = next(child for child in self.children if child.pid == pid)
        child.kill()
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        return child

    def kill_now(self, pid: int) -> None:
        self.kill(pid)

    async def pids(self, handle: Handle) -> list[int]:
        self.listings += 1
        if self.listings in self.appear_at:
            self.shown.append(self.appear_at.pop(self.listings))
        return list(self.shown)


@dataclass
class FreezerRig:
    """One instance `bert-7` with a main process, its driver and its freezer."""

    instance: WaitingProcesses
    driver: FakeCheckpointer
    cgroups: FakeProcessFreezer
    gpus: FakeGpus
    freezer: CudaFreezer
    handle: Handle
    main: int

    def state(self, pid: int = 0) -> CudaState:
        return self.driver.processes[pid or self.main].state

    def add_process(self, *, cuda: bool = True, gpu_index: int = 0, shown: bool = True) -> int:
        pid = self.instance.spawn(shown=shown)
        if cuda:
            self.driver.processes[pid] = FakeCudaProcess(gpu_uuid=gpu(gpu_index).uuid)
        return pid

    async def freeze(self) -> None:
        assert (await self.freezer.lock(self.handle)).outcome is Outcome.OK
        assert (await self.freezer.checkpoint(self.handle)).outcome is Outcome.OK

    def states(self) -> set[CudaState]:
        return {process.state for process in self.driver.processes.values()}

    def restarted(self, limits: FreezerLimits = LIMITS) -> CudaFreezer:
        """The freezer of an agent that has just started: it remembers nothing."""
        return CudaFreezer(self.driver, self.cgroups, self.gpus, self.instance.pids, process_table.boot_id(), limits)


@pytest.fixture
def world() -> Iterator[FreezerRig]:
    instance = WaitingProcesses()
    main = instance.spawn()
    driver = FakeCheckpointer({main: FakeCudaProcess()}, kill=instance.kill_now)
    cgroups = FakeProcessFreezer(driver=driver)
    gpus = FakeGpus(processes_now=driver.gpu_processes)
    boot = process_table.boot_id()
    freezer = CudaFreezer(driver, cgroups, gpus, instance.pids, boot, LIMITS)
    identity = process_table.identify(main, boot)
    assert identity is not None
    handle = Handle("bert-7", identity, "127.0.0.1", 9000)
    yield FreezerRig(instance, driver, cgroups, gpus, freezer, handle, main)
    freezer.forget(handle)
    for child in instance.children:
        child.kill()
        child.wait()
