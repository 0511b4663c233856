"""An `EngineRuntime` on a stand-in engine with real processes in real cgroups."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path

import pytest

from agent.adapters.engine.api import EngineApi, EngineError
from agent.adapters.engine.containers import EngineContainers
from agent.adapters.engine.images import Images
from agent.adapters.engine.network import EngineNetwork
from agent.adapters.engine.planner import ContainerPlanner
from agent.adapters.engine.runtime import EngineComponents, EngineRuntime
from agent.adapters.kernel import cgroup
from agent.adapters.runtime.bundles import Bundles
from agent.adapters.runtime.log_files import LogFiles
from agent.core.errors import PreconditionError
from agent.core.types import FunctionSpec, Handle, InstanceSpec
from agent.ports import ExecSession, ExecSpec, StartSpec
from agent.settings import EngineRuntimeSettings as EngineSettings
from agent.settings import GpuSettings, RuntimeSettings
from tests.adapters.engine.stand_in import IMAGE, EngineStandIn, StandInContainer


class FixedLogs:
    """The stand-in's logs: fixed bytes, while the container exists."""

    def __init__(self, engine: EngineStandIn, api: EngineApi) -> None:
        self._engine = engine
        self._api = api

    async def read(self, container_id: str, tail_bytes: int) -> bytes:
        await self._api.check()
        if container_id not in self._engine.containers:
            raise EngineError(404, "No such container")
        return self._engine.logs[-tail_bytes:] if tail_bytes else b""

    async def follow(self, container_id: str, tail_bytes: int) -> AsyncGenerator[bytes, None]:
        yield await self.read(container_id, tail_bytes)


class NoExecs:
    async def open(self, handle: Handle, spec: ExecSpec) -> ExecSession:
        raise PreconditionError("EXEC_UNAVAILABLE", f"{handle.uid}: {spec.command}")


class EngineRig:
    """`bridges`: folder that replaces /sys/class/net, with plain files as bridge ports."""

    def __init__(self, slice_: cgroup.CgroupSlice, state_uuid: str) -> None:
        self.slice = slice_
        slice_.path.mkdir(exist_ok=True)
        self.engine = EngineStandIn(cgroups=slice_.path)
        self.state_uuid = state_uuid
        self.folder = Path(tempfile.mkdtemp(prefix="hibernode-rig-"))
        self.bridges = self.folder / "net"
        self.state_dir = self.folder / "state"
        self.restart()
        self.plug("veth1")

    def restart(self, settings: EngineSettings | None = None) -> EngineRuntime:
        """Start another agent on the same state directory; the caller has closed the previous one."""
        self.api = EngineApi(self.engine.socket, deadline_s=5.0)
        self.network = EngineNetwork(self.api, self.state_uuid, self.bridges)
        self.bundles = Bundles(self.state_dir, self.state_uuid)
        self.files = LogFiles(self.state_dir, 1 << 20, 200)
        self.containers = EngineContainers(self.api, self.state_uuid)
        images = Images(self.api, "missing")
        planner = ContainerPlanner(
            self.api,
            images,
            RuntimeSettings(engine=settings or EngineSettings(socket=self.engine.socket)),
            GpuSettings(),
            state_uuid=self.state_uuid,
            network=self.network.name,
            excluded_paths=(self.state_dir,),
        )
        self.runtime = EngineRuntime(
            EngineComponents(
                api=self.api,
                images=images,
                planner=planner,
                network=self.network,
                containers=self.containers,
                bundles=self.bundles,
                files=self.files,
                logs=FixedLogs(self.engine, self.api),
                execs=NoExecs(),
            )
        )
        return self.runtime

    def plug(self, port: str) -> Path:
        """Add a bridge port that is not isolated."""
        isolated = self.bridges / self.network.bridge / "brif" / port / "isolated"
        isolated.parent.mkdir(parents=True)
        isolated.write_text("0")
        return isolated

    def spec(self, uid: str, *command: str, image: str = IMAGE) -> StartSpec:
        function = FunctionSpec(name="resize", image=image, entrypoint=command or ("/bin/sleep", "1000"))
        return StartSpec(InstanceSpec(uid, f"resize/1/{uid}", function), {}, ())

    def container(self, handle: Handle) -> StandInContainer:
        return self.engine.containers[handle.container_id]

    async def close(self) -> None:
        await self.runtime.close()
        await self.engine.close()
        for uid in self.slice.uids():
            await cgroup.remove(self.slice.path_of(uid), 10.0)
        self.slice.remove_if_empty()
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture
async def rig() -> AsyncIterator[EngineRig]:
    state_uuid = str(uuid.uuid4())
    slice_ = cgroup.open_slice(state_uuid)
    if slice_ is None:
        pytest.skip("this user can't write a v2 cgroup here")
    made = EngineRig(slice_, state_uuid)
    await made.engine.up()
    yield made
    async with asyncio.timeout(20):
        await made.close()
