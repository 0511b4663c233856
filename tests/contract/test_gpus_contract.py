"""What every Gpus port promises: the fake, and NVML on the emulated driver."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from agent.adapters.nvml_gpus import NvmlGpus
from agent.core.types import MIB, GpuProcess
from agent.ports import Gpus
from tests.fakes.emulated_driver import CudaTarget, EmulatedNvidia
from tests.fakes.gpus import FakeGpus

UUID = re.compile(r"GPU-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclass
class World:
    """A host with two GPUs. `program(bytes)` runs a CUDA program on the first one and gives its pid."""

    gpus: Gpus
    program: Callable[[int], int]
    end: Callable[[int], None]


@contextmanager
def fake() -> Iterator[World]:
    gpus = FakeGpus()
    running: dict[int, GpuProcess] = {}
    gpus.processes_now = lambda: list(running.values())

    def program(size: int) -> int:
        running[4711] = GpuProcess(gpus.gpus[0].uuid, 4711, size)
        return 4711

    def end(pid: int) -> None:
        del running[pid]

    yield World(gpus, program, end)


@contextmanager
def real(nvidia: EmulatedNvidia) -> Iterator[World]:
    nvidia.see_nvml_here()
    running: dict[int, CudaTarget] = {}

    def program(size: int) -> int:
        target = CudaTarget(nvidia.environment)
        running[target.pid] = target
        target.fill(size)
        return target.pid

    yield World(NvmlGpus(), program, lambda pid: running[pid].end())
    for target in running.values():
        target.end()


@pytest.fixture(params=["fake", "nvml"])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    made = fake() if request.param == "fake" else real(request.getfixturevalue("nvidia"))
    with made as it:
        yield it
        if isinstance(it.gpus, NvmlGpus):
            await it.gpus.close()


async def test_gpus_come_in_index_order_with_what_places_an_instance(world: World) -> None:
    gpus = await world.gpus.list_gpus()
    assert [gpu.index for gpu in gpus] == [0, 1]
    assert all(UUID.fullmatch(gpu.uuid) for gpu in gpus)
    assert len({gpu.uuid for gpu in gpus}) == 2
    assert all(gpu.model.startswith("Emulated ") for gpu in gpus)
    assert all(gpu.memory_bytes >= 512 * MIB and gpu.persistence and not gpu.mig for gpu in gpus)


async def test_a_program_shows_with_its_host_pid_and_memory_until_it_ends(world: World) -> None:
    first = (await world.gpus.list_gpus())[0].uuid
    before = (await world.gpus.memory_used())[first]
    pid = world.program(8 * MIB)
    (entry,) = [process for process in await world.gpus.processes() if process.pid == pid]
    assert entry.gpu_uuid == first
    assert entry.used_bytes >= 8 * MIB
    used = await world.gpus.memory_used()
    assert used[first] >= before + 8 * MIB
    assert set(used) == {gpu.uuid for gpu in await world.gpus.list_gpus()}
    world.end(pid)
    assert pid not in {process.pid for process in await world.gpus.processes()}
    assert (await world.gpus.memory_used())[first] == before


async def test_the_driver_says_its_version(world: World) -> None:
    info = await world.gpus.driver()
    assert re.fullmatch(r"580\.\d+\.\d+", info.version)
    assert info.cuda == 13000
