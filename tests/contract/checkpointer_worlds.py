"""Set-ups of the Checkpointer contract: the fake, and workers and program on emulated drivers, with faults."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field

import pytest

from agent.adapters.cuda.driver_checkpointer import DriverCheckpointer, PoolLimits
from agent.adapters.cuda.driver_worker_process import WorkerOptions
from agent.adapters.cuda.result_codes import CudaResult
from agent.adapters.cuda.utility_checkpointer import UtilityCheckpointer
from agent.adapters.kernel import cgroup
from agent.core.types import MIB
from agent.ports import Checkpointer, CudaCall, CudaOp, CudaState
from tests.fakes.checkpointer import FakeCheckpointer, FakeCudaProcess, Fault
from tests.fakes.driver_callers import utility_pids, worker_pids
from tests.fakes.emulated_driver import CudaInstances, EmulatedNvidia, emulated_nvidia

REAL = ("driver-570", "driver-580", "utility-555", "utility-570", "utility-580")
KINDS = ("fake", *REAL)

DONE = {
    CudaOp.LOCK: CudaState.LOCKED,
    CudaOp.CHECKPOINT: CudaState.CHECKPOINTED,
    CudaOp.RESTORE: CudaState.LOCKED,
    CudaOp.UNLOCK: CudaState.RUNNING,
}


@dataclass
class World:
    """A host with a CUDA program `cuda`, a second one `other`, and one without CUDA, `plain`: their pids."""

    checkpointer: Checkpointer
    cuda: int
    other: int
    plain: int
    freeze: Callable[[bool], None]
    kind: str = "fake"
    gpu_uuids: tuple[str, ...] = ()

    async def states(self, *pids: int) -> list[CudaState | None]:
        reply = await self.checkpointer.run([CudaCall(CudaOp.STATE, pid) for pid in pids], 5.0)
        return [answer.state for answer in reply.answers]

    async def must(self, *operations: CudaOp) -> None:
        """Operations on `cuda` that succeed."""
        reply = await self.checkpointer.run([CudaCall(op, self.cuda) for op in operations], 10.0)
        assert reply.ok, reply

    async def bring_before(self, operation: CudaOp) -> None:
        """`cuda` is in the state that the operation needs."""
        order = [CudaOp.LOCK, CudaOp.CHECKPOINT, CudaOp.RESTORE]
        before = {CudaOp.STATE: 0, CudaOp.LOCK: 0, CudaOp.CHECKPOINT: 1, CudaOp.UNLOCK: 1, CudaOp.RESTORE: 2}
        await self.must(*order[: before[operation]])

    def fault(self, operation: CudaOp, kind: str, *, after: bool = False) -> None:
        """The next such operation on `cuda` goes wrong: kinds as of the emulated driver."""
        raise NotImplementedError

    def clear_faults(self) -> None:
        """What hung is done now."""
        raise NotImplementedError

    def hangs(self) -> bool:
        """Has an operation on `cuda` reached the driver, and hangs there?"""
        raise NotImplementedError

    def frozen_calls(self) -> int:
        """How many calls reached a target while it was frozen?"""
        raise NotImplementedError

    def intact(self) -> bool:
        """Does `cuda`, running again, hold every byte of its device memory?"""
        return True

    def gpus(self) -> set[str]:
        """Where `cuda` has its memory."""
        raise NotImplementedError


@dataclass
class FakeWorld(World):
    """What the fake can do of it."""

    driver: FakeCheckpointer = field(default_factory=FakeCheckpointer)

    def fault(self, operation: CudaOp, kind: str, *, after: bool = False) -> None:
        change = operation is not CudaOp.STATE
        match kind:
            case "HANG":
                fault = Fault(operation, hang=True, later=change, pid=self.cuda)
            case "DEATH":
                fault = Fault(operation, dies=True, pid=self.cuda)
            case "STALE":
                fault = Fault(operation, stale=True, pid=self.cuda)
            case "FAILED":
                fault = Fault(operation, CudaResult.OPERATING_SYSTEM, leaves=CudaState.FAILED, pid=self.cuda)
            case _:
                fault = Fault(operation, CudaResult[kind], executes=after, pid=self.cuda)
        self.driver.faults.append(fault)

    def clear_faults(self) -> None:
        self.driver.faults.clear()
        self.driver.processes[self.cuda].thaw()

    def hangs(self) -> bool:
        return bool(self.driver.processes[self.cuda].stale_operations)

    def frozen_calls(self) -> int:
        return len(self.driver.frozen_calls)

    def gpus(self) -> set[str]:
        return {self.driver.processes[self.cuda].gpu_uuid}


@dataclass
class EmulatedWorld(World):
    """On an emulated driver, which does the faults itself."""

    nvidia: EmulatedNvidia | None = None
    instances: CudaInstances | None = None

    def fault(self, operation: CudaOp, kind: str, *, after: bool = False) -> None:
        assert self.nvidia is not None
        self.nvidia.control.fault(operation.value.lower(), kind, pid=self.cuda, after=after)

    def clear_faults(self) -> None:
        assert self.nvidia is not None
        self.nvidia.control.clear_faults()

    def hangs(self) -> bool:
        assert self.nvidia is not None
        return any(process.pid == self.cuda and process.hung for process in self.nvidia.control.processes())

    def frozen_calls(self) -> int:
        assert self.nvidia is not None
        return self.nvidia.control.frozen_calls()

    def intact(self) -> bool:
        assert self.instances is not None
        return self.instances.targets["cuda"].verify()

    def gpus(self) -> set[str]:
        assert self.nvidia is not None
        (process,) = [process for process in self.nvidia.control.processes() if process.pid == self.cuda]
        return {uuid for uuid, used in process.vram_bytes.items() if used}

    def callers(self) -> list[int]:
        """Pids of the processes that call the driver for the checkpointer."""
        if isinstance(self.checkpointer, UtilityCheckpointer):
            return utility_pids()
        assert isinstance(self.checkpointer, DriverCheckpointer)
        return worker_pids()

    def kill_callers(self) -> None:
        for pid in self.callers():
            os.kill(pid, signal.SIGKILL)


@asynccontextmanager
async def fake() -> AsyncIterator[World]:
    """Processes 1001 and 1002 with CUDA, 1003 without."""
    uuids = tuple(f"GPU-00000000-0000-4000-8000-{index:012x}" for index in (0, 1))
    processes = {pid: FakeCudaProcess(gpu_uuid=uuids[0]) for pid in (1001, 1002)}
    driver = FakeCheckpointer(processes, hang_s=0.05, gpu_uuids=uuids)

    def freeze(frozen: bool) -> None:
        if frozen:
            driver.processes[1001].thawed.clear()
        else:
            driver.processes[1001].thaw()

    yield FakeWorld(driver, 1001, 1002, 1003, freeze, gpu_uuids=uuids, driver=driver)


@asynccontextmanager
async def emulated(kind: str, hosts: Hosts) -> AsyncIterator[World]:
    """Real processes under a real checkpointer, on an emulated driver. The processes serve further tests if they are
    well afterwards."""
    profile = kind.partition("-")[2]
    nvidia = hosts.driver(profile)
    instances = hosts.instances(profile)
    checkpointer: DriverCheckpointer | UtilityCheckpointer
    if kind.startswith("driver"):
        options = WorkerOptions(environment=nvidia.environment)
        checkpointer = DriverCheckpointer(options, PoolLimits(workers=2, first_backoff_s=0.001))
    else:
        checkpointer = UtilityCheckpointer(nvidia.directory / "bin" / "cuda-checkpoint", nvidia.environment)
    await checkpointer.start()
    slice_ = instances.slice_

    def freeze(frozen: bool) -> None:
        if slice_ is None:
            pytest.skip("needs a writable cgroup v2")
        cgroup.write_freeze(slice_.path_of("cuda"), frozen)

    pids = {name: target.pid for name, target in instances.targets.items()}
    uuids = tuple(device.uuid for device in nvidia.control.devices())
    yield EmulatedWorld(
        checkpointer, **pids, freeze=freeze, kind=kind, gpu_uuids=uuids, nvidia=nvidia, instances=instances
    )
    nvidia.control.clear_faults()
    provoked = nvidia.control.take_frozen_calls()  # only by the one test that freezes
    assert {(call.op, call.pid) for call in provoked} <= {("lock", pids["cuda"])}
    ways = {"LOCKED": [CudaOp.UNLOCK], "CHECKPOINTED": [CudaOp.RESTORE, CudaOp.UNLOCK]}
    for process in nvidia.control.processes():
        if process.pid == pids["cuda"] and not process.hung:
            await checkpointer.run([CudaCall(op, process.pid) for op in ways.get(process.state, [])], 5.0)
    await checkpointer.close()
    well = {
        one.pid for one in nvidia.control.processes() if one.state == "RUNNING" and not one.operation and not one.hung
    }
    if not {pids["cuda"], pids["other"]} <= well:
        await hosts.replace(profile)


@dataclass
class Hosts:
    """Emulated drivers by the profile's name, and three processes on each; made the first time they are needed."""

    shared: EmulatedNvidia
    stack: ExitStack
    drivers: dict[str, EmulatedNvidia] = field(default_factory=dict)
    processes: dict[str, CudaInstances] = field(default_factory=dict)

    def driver(self, profile: str) -> EmulatedNvidia:
        if profile == "580":
            return self.shared
        if profile not in self.drivers:
            arguments = ("--gpus", "2", "--gib", "1", "--profile", profile)
            self.drivers[profile] = self.stack.enter_context(emulated_nvidia(*arguments))
        return self.drivers[profile]

    def instances(self, profile: str) -> CudaInstances:
        if profile not in self.processes:
            made = self.processes[profile] = CudaInstances(self.driver(profile).environment)
            for name, vram_bytes in (("cuda", MIB), ("other", MIB), ("plain", None)):
                made.start(name, vram_bytes)
        return self.processes[profile]

    async def replace(self, profile: str) -> None:
        """End them; the next test gets others."""
        await self.processes.pop(profile).close()


@pytest.fixture(scope="module")
def hosts(nvidia: EmulatedNvidia) -> Iterator[Hosts]:
    """The hosts of a module's tests."""
    with ExitStack() as stack:
        made = Hosts(nvidia, stack)
        yield made
        for profile in list(made.processes):
            asyncio.run(made.replace(profile))
