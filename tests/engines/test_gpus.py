"""GPUs in real containers: the emulated driver by mounts and by CDI, and what stays unreachable for instances."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from agent.adapters.engine.build import open_engine_api, open_engine_runtime
from agent.adapters.engine.exec import EngineExec
from agent.adapters.engine.gpus import CDI_FOLDERS, cdi_device_names
from agent.adapters.engine.logs import EngineLogs
from agent.adapters.engine.runtime import EngineRuntime
from agent.core.errors import PreconditionError
from agent.core.types import MIB, ContainerOptions, FunctionSpec, GpuNeed, Handle, InstanceSpec
from agent.emulated.env import attachment, cdi_spec
from agent.ports import StartSpec
from agent.settings import EngineRuntimeSettings as EngineSettings
from agent.settings import GpuSettings, MountSettings, RuntimeSettings
from tests.engines import images
from tests.engines.engines import Engine
from tests.engines.world import EngineWorld
from tests.fakes.emulated_driver import EmulatedNvidia

PROGRAM = """
import ctypes, os, time
cuda = ctypes.CDLL("libcuda.so.1")
context, memory, count = ctypes.c_void_p(), ctypes.c_uint64(), ctypes.c_int()
assert cuda.cuInit(0) == 0
assert cuda.cuDeviceGetCount(ctypes.byref(count)) == 0
assert cuda.cuCtxCreate_v2(ctypes.byref(context), 0, 0) == 0
assert cuda.cuMemAlloc_v2(ctypes.byref(memory), 1 << 20) == 0
folder = os.path.dirname(os.environ["HIBERNODE_EMULATED_SOCKET"])
try:
    open(os.path.join(folder, "lib", "libcuda.so.1"), "r+")
    writable = True
except OSError:
    writable = False
names = os.environ["NVIDIA_VISIBLE_DEVICES"], os.environ["CUDA_VISIBLE_DEVICES"]
print(count.value, sorted(os.listdir(folder)), writable, os.getuid(), *names, flush=True)
time.sleep(86399)
"""


class GpuWorld(EngineWorld):
    """The runtime on a real engine, with GPUs attached by method `gpu`."""

    def __init__(self, engine: Engine, gpu: GpuSettings, nvidia: EmulatedNvidia) -> None:
        self._gpu, self._nvidia = gpu, nvidia
        super().__init__(engine)

    def _new_runtime(self) -> EngineRuntime:
        settings = RuntimeSettings(engine=EngineSettings(socket=self.engine.socket, pull="never"))
        api = open_engine_api(settings)
        return open_engine_runtime(
            api,
            settings,
            self._gpu,
            state_dir=self.folder / "state",
            state_uuid=self.state_uuid,
            logs=EngineLogs(api),
            execs=EngineExec(api),
        )

    def cuda(self, gpus: tuple[str, ...], user: str = "", *, all_gpus: bool = False) -> StartSpec:
        function = FunctionSpec(
            name="vision",
            image=images.ECHO,
            entrypoint=("python3", "-c", PROGRAM),
            memory_bytes=256 * MIB,
            vcpu_millis=1000,
            gpu=GpuNeed(len(gpus)),
            container=ContainerOptions(user=user, read_only_root=True),
        )
        spec = InstanceSpec("vision-1", "vision/1/1", function)
        numbers = {gpu.uuid: number for number, gpu in enumerate(self._nvidia.control.devices())}
        return StartSpec(
            spec,
            self._gpu.mounts.environment,
            gpus,
            all_gpus=all_gpus,
            gpu_numbers=tuple(numbers[gpu] for gpu in gpus),
        )

    async def said(self, handle: Handle) -> str:
        await self.until_said(handle, b"\n")
        return (await self.runtime.read_log(handle, 4096)).decode().strip()


def by_mounts(nvidia: EmulatedNvidia) -> GpuSettings:
    mounts = attachment(nvidia.directory)["mounts"]
    return GpuSettings(attach="mounts", mounts=MountSettings(mounts["environment"], tuple(mounts["binds"])))


@pytest.fixture
def cdi(nvidia: EmulatedNvidia) -> Iterator[Path]:
    """The emulated GPUs in the host's CDI folder, the only one that engines read."""
    if os.geteuid() != 0:
        pytest.skip("only root can write the host's CDI folder")
    if "all" in cdi_device_names():
        pytest.skip("this host has a CDI specification of its own GPUs")
    folder = CDI_FOLDERS[0]
    made = not folder.exists()
    folder.mkdir(exist_ok=True)
    file = folder / f"hibernode-test-{os.getpid()}.json"
    file.write_text(json.dumps(cdi_spec(nvidia.directory, [gpu.uuid for gpu in nvidia.control.devices()])))
    try:
        yield file
    finally:
        file.unlink()
        if made:
            folder.rmdir()


@pytest.fixture
async def world(engine: Engine, request: pytest.FixtureRequest) -> AsyncIterator[GpuWorld]:
    """With the settings of the test's parameter."""
    images.load(engine, images.ECHO)
    nvidia = request.getfixturevalue("nvidia")
    made = GpuWorld(engine, request.param(nvidia), nvidia)
    yield made
    await made.close()


async def end(world: GpuWorld, handle: Handle) -> None:
    await world.runtime.kill(handle)
    await world.runtime.destroy(handle)


def vram(nvidia: EmulatedNvidia) -> dict[int, dict[str, int]]:
    return {process.pid: dict(process.vram_bytes) for process in nvidia.control.processes()}


@pytest.mark.parametrize("world", [by_mounts], indirect=True)
@pytest.mark.parametrize("user", ["", "1000:1000"])
async def test_by_mounts(world: GpuWorld, nvidia: EmulatedNvidia, user: str) -> None:
    gpu = nvidia.control.devices()[1].uuid
    handle = await world.runtime.start(world.cuda((gpu,), user))
    uid = user.partition(":")[0] or "0"
    assert await world.said(handle) == f"1 ['driver.sock', 'lib'] False {uid} void 1"
    assert set(vram(nvidia)[handle.process.pid]) == {gpu}  # with its host pid, on its own GPU
    await end(world, handle)


@pytest.mark.parametrize("world", [lambda _nvidia: GpuSettings(attach="auto")], indirect=True, ids=["auto"])
@pytest.mark.parametrize(("all_gpus", "number"), [(False, 0), (True, 1)], ids=["own GPU only", "all GPUs"])
async def test_by_cdi(world: GpuWorld, nvidia: EmulatedNvidia, cdi: Path, all_gpus: bool, number: int) -> None:
    """On the second GPU, which is number 0 to a container that has only this one.

    Podman 4.3 through its own API. A Docker without CDI would need its NVIDIA runtime, which no test host has."""
    gpu = nvidia.control.devices()[1].uuid
    if world.engine.kind == "docker" and not world.engine.must("GET", "/info").get("CDISpecDirs"):
        pytest.skip("this Docker has no CDI")
    handle = await world.runtime.start(world.cuda((gpu,), all_gpus=all_gpus))
    assert await world.said(handle) == f"1 ['driver.sock', 'lib'] False 0 void {number}"
    assert set(vram(nvidia)[handle.process.pid]) == {gpu}
    shown = world.engine.container("vision-1")
    assert shown["HostConfig"]["Memory"] == 256 * MIB
    assert shown["Config"]["Labels"]["hibernode.state"] == world.state_uuid
    await end(world, handle)


@pytest.mark.parametrize("world", [lambda _nvidia: GpuSettings(attach="cdi")], indirect=True, ids=["cdi"])
async def test_cdi_without_a_specification_refuses_to_start(world: GpuWorld, nvidia: EmulatedNvidia) -> None:
    spec = world.cuda((nvidia.control.devices()[0].uuid,))
    with pytest.raises(PreconditionError) as caught:
        await world.runtime.start(spec)
    assert caught.value.reason == "GPU_ATTACH_UNAVAILABLE"
    assert world.traces("vision-1") == []
    function = replace(spec.instance.function, gpu=GpuNeed(0), entrypoint=("sleep", "86399"))
    without = StartSpec(replace(spec.instance, function=function), {}, ())
    handle = await world.runtime.start(without)  # needs no specification
    await end(world, handle)
