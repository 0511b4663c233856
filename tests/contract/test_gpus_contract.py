"""The contract of every Gpus port: the fake, and NVML on the emulated driver."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import pytest
from pynvml import NVML_ERROR_GPU_IS_LOST

from agent.adapters.nvml.gpus import NvmlGpus
from agent.core.errors import UnavailableError
from agent.core.types import MIB, GpuProcess
from agent.ports import Gpus
from tests.fakes.emulated_driver import CudaTarget, EmulatedNvidia
from tests.fakes.gpus import FakeGpus

UUID = re.compile(r"GPU-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclass
class World:
    """A host with two GPUs. `program(bytes)` runs a CUDA program on the first one and gives its pid;
    `lose(uuid)`: NVML loses that one."""

    gpus: Gpus
    program: Callable[[int], int]
    end: Callable[[int], None]
    lose: Callable[[str], None]

    async def figures(self, uuid: str) -> Figures:
        (sample,) = [sample for sample in await self.gpus.samples() if sample.uuid == uuid]
        assert sample.memory_used_bytes is not None
        return Figures(sample.memory_used_bytes, (await self.gpus.memory_free())[uuid])


class Figures(NamedTuple):
    used: int
    free: int


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

    yield World(gpus, program, end, lambda uuid: gpus.errors.update({uuid: "lost"}))


@contextmanager
def real(nvidia: EmulatedNvidia) -> Iterator[World]:
    nvidia.see_nvml_here()
    running: dict[int, CudaTarget] = {}

    def program(size: int) -> int:
        target = CudaTarget(nvidia.environment)
        running[target.pid] = target
        target.fill(size)
        return target.pid

    ill: set[str] = set()

    def lose(uuid: str) -> None:
        ill.add(uuid)
        nvidia.control.set_device(uuid, nvml_error=NVML_ERROR_GPU_IS_LOST)

    try:
        yield World(NvmlGpus(), program, lambda pid: running[pid].end(), lose)
    finally:
        for uuid in ill:
            nvidia.control.set_device(uuid, nvml_error=0)
        for target in running.values():
            target.end()


@pytest.fixture(params=["fake", "nvml"])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    made = fake() if request.param == "fake" else real(request.getfixturevalue("nvidia"))
    with made as it:
        yield it
        if isinstance(it.gpus, NvmlGpus):
            await it.gpus.close()


async def test_gpus_come_in_index_order_with_model_and_memory(world: World) -> None:
    gpus = await world.gpus.list_gpus()
    assert [gpu.index for gpu in gpus] == [0, 1]
    assert all(UUID.fullmatch(gpu.uuid) for gpu in gpus)
    assert len({gpu.uuid for gpu in gpus}) == 2
    assert all(gpu.model.startswith("Emulated ") for gpu in gpus)
    assert [gpu.pci_address for gpu in gpus] == [(0, 1, 0), (0, 2, 0)]
    assert all(gpu.memory_bytes >= 512 * MIB and gpu.persistence and not gpu.mig for gpu in gpus)


async def test_a_program_shows_with_its_host_pid_and_memory_until_it_ends(world: World) -> None:
    first = (await world.gpus.list_gpus())[0].uuid
    before = await world.figures(first)
    pid = world.program(8 * MIB)
    (entry,) = [process for process in await world.gpus.processes() if process.pid == pid]
    assert entry.gpu_uuid == first
    assert entry.used_bytes >= 8 * MIB
    awake = await world.figures(first)
    assert awake.used >= before.used + 8 * MIB
    assert awake.free <= before.free - 8 * MIB
    world.end(pid)
    assert pid not in {process.pid for process in await world.gpus.processes()}
    assert await world.figures(first) == before


async def test_figures_of_every_device(world: World) -> None:
    samples = await world.gpus.samples()
    assert [sample.uuid for sample in samples] == [gpu.uuid for gpu in await world.gpus.list_gpus()]
    for sample in samples:
        assert not sample.error
        assert not sample.lost
        for percent in (sample.sm_percent, sample.memory_percent, sample.encoder_percent, sample.decoder_percent):
            assert percent is not None
            assert 0 <= percent <= 100
        assert sample.temperature_celsius
        assert sample.power_milliwatts


async def test_lost_gpu_does_not_hide_the_other_and_is_not_empty(world: World) -> None:
    first, second = [gpu.uuid for gpu in await world.gpus.list_gpus()]
    pid = world.program(8 * MIB)
    world.lose(second)
    shown = await world.gpus.processes()
    assert pid in {process.pid for process in shown.on([first])}
    assert shown.unanswered == shown.lost == {second}
    with pytest.raises(UnavailableError, match="NVML_UNAVAILABLE"):
        shown.on([first, second])
    well, ill = await world.gpus.samples()
    assert (well.error, well.lost, well.uuid) == ("", False, first)
    assert ill.error
    assert ill.lost
    assert ill.uuid == second
    assert ill.memory_used_bytes is None
    assert set(await world.gpus.memory_free()) == {first}
    assert [gpu.uuid for gpu in await world.gpus.list_gpus()] == [first]


async def test_the_driver_says_its_version(world: World) -> None:
    info = await world.gpus.driver()
    assert re.fullmatch(r"580\.\d+\.\d+", info.version)
    assert info.cuda == 13000
