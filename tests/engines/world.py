"""Containers for the runtime contract: an `EngineRuntime` on a real engine."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import uuid
from pathlib import Path

from agent.adapters.engine.build import open_engine_api, open_engine_runtime
from agent.adapters.engine.exec import EngineExec
from agent.adapters.engine.logs import EngineLogs
from agent.adapters.engine.runtime import EngineRuntime
from agent.core.types import MIB, ContainerOptions, FunctionSpec, Handle, InstanceSpec
from agent.ports import StartSpec
from agent.settings import EngineRuntimeSettings as EngineSettings
from agent.settings import GpuSettings, RuntimeSettings
from tests.contract.runtime_worlds import World
from tests.engines import images
from tests.engines.engines import Engine

FIFO = "/tmp/told"
# The fifo is open at both ends, so no message is lost. pid 1 ignores signals without a handler.
OBEDIENT = (
    f"trap 'exit 143' TERM; mkfifo {FIFO}; exec 3<>{FIFO}; "
    'echo "hello from $HIBERNODE_INSTANCE"; while :; do read -r line <&3 && eval "$line"; done'
)
STUBBORN = OBEDIENT.replace("'exit 143'", "''").replace("echo", "echo stubborn; echo", 1)
MEMORY_BYTES = 128 * MIB
PLAIN = ContainerOptions()


class EngineWorld(World):
    foreign_image = "host"
    foreign_reason = "PROCESS_RUNTIME_DISABLED"
    breakable_reason = "COMMAND_NOT_FOUND"
    strays_outlive = False
    limits_memory = True
    executes = True

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.folder = Path(tempfile.mkdtemp(prefix="hibernode-contract-"))
        self.state_uuid = str(uuid.uuid4())
        self.runtime = self.engine_runtime = self._new_runtime()

    def _new_runtime(self) -> EngineRuntime:
        settings = RuntimeSettings(engine=EngineSettings(socket=self.engine.socket, pull="never"))
        api = open_engine_api(settings)
        return open_engine_runtime(
            api,
            settings,
            GpuSettings(attach="mounts"),
            state_dir=self.folder / "state",
            state_uuid=self.state_uuid,
            logs=EngineLogs(api),
            execs=EngineExec(api),
        )

    def spec(
        self,
        uid: str,
        *,
        image: str = images.BUSYBOX,
        stubborn: bool = False,
        script: str = "",
        options: ContainerOptions = PLAIN,
    ) -> StartSpec:
        function = FunctionSpec(
            name="resize",
            image=image,
            entrypoint=("/bin/sh",),
            command=("-c", script or (STUBBORN if stubborn else OBEDIENT)),
            memory_bytes=MEMORY_BYTES,
            container=options,
        )
        return StartSpec(InstanceSpec(uid, f"resize/1/{uid}", function), {}, ())

    async def settled(self, handle: Handle, *, stubborn: bool = False) -> None:
        await self.until_said(handle, b"hello from")

    def tell(self, handle: Handle, line: str) -> None:
        told = os.open(f"/proc/{handle.process.pid}/root{FIFO}", os.O_WRONLY | os.O_NONBLOCK)
        try:
            os.write(told, line.encode() + b"\n")
        finally:
            os.close(told)

    async def exit_now(self, handle: Handle, code: int) -> None:
        self.tell(handle, f"exit {code}")

    async def speak(self, handle: Handle, text: str) -> None:
        self.tell(handle, f"echo {text}")
        await self.until_said(handle, text.encode())

    async def fork_stray(self, handle: Handle) -> None:
        self.tell(handle, "setsid sleep 86399 & echo stray $!")
        await self.until_said(handle, b"stray")

    async def run_out_of_memory(self, handle: Handle) -> None:
        self.tell(handle, "exec dd if=/dev/zero of=/dev/null bs=256M")

    def reachable_at(self, handle: Handle) -> bool:
        return not handle.host.startswith("127.") and handle.host.count(".") == 3 and handle.port == 9000

    def breakable(self, uid: str) -> StartSpec:
        function = FunctionSpec(name="resize", image=images.BUSYBOX, entrypoint=("/nowhere/at-all",))
        return StartSpec(InstanceSpec(uid, f"resize/1/{uid}", function), {}, ())

    async def restart_agent(self) -> None:
        await self.engine_runtime.close()
        self.runtime = self.engine_runtime = self._new_runtime()

    def traces(self, uid: str) -> list[str]:
        found = [f"container {entry['Id']}" for entry in self.engine.ps(self.state_uuid)]
        bundle = self.folder / "state/instances" / uid
        return found + ([str(bundle)] if bundle.exists() else [])

    async def close(self) -> None:
        try:
            for handle in await self.engine_runtime.list_handles():
                await self.engine_runtime.destroy(handle)
            await self.engine_runtime.close()
            left = await asyncio.to_thread(self.engine.leftovers, self.state_uuid)
            assert not left, left
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)
