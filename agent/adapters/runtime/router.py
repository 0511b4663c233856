"""The node's runtimes as one: `image: host` runs as a process, any other image in a container of the engine."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Protocol

from agent.core.errors import PreconditionError, UnavailableError
from agent.core.function_rules import HOST_IMAGE
from agent.core.types import Exit, FunctionSpec, Handle
from agent.ports import ContainerEngine, ExecSession, ExecSpec, Runtime, StartSpec


class WatchedRuntime(Runtime, ContainerEngine, Protocol):
    """An engine's runtime: the engine can be down."""


class Runtimes:
    """Implements `ports.Runtime`. `process_enabled` and `engine_enabled`: whether new instances may run there; existing
    ones are served anyway. `engine` None: the node has none (`runtime.engine.socket: off`)."""

    name = "node"

    def __init__(
        self,
        process: Runtime,
        engine: WatchedRuntime | None,
        *,
        process_enabled: bool,
        engine_enabled: bool = True,
    ) -> None:
        self._process = process
        self._engine = engine
        self._process_enabled = process_enabled
        self._engine_enabled = engine_enabled

    @property
    def engine(self) -> WatchedRuntime | None:
        """The engine runtime if it takes new instances; the node then watches it."""
        return self._engine if self._engine_enabled else None

    @property
    def offered(self) -> tuple[str, ...]:
        """Names of the runtimes that take new instances."""
        return ("process",) * self._process_enabled + (("engine",) if self.engine else ())

    def accepts(self, function: FunctionSpec) -> None:
        """Raises PreconditionError PROCESS_RUNTIME_DISABLED or IMAGE_RUNTIME_UNAVAILABLE, or as the chosen runtime."""
        if function.image == HOST_IMAGE and not self._process_enabled:
            raise PreconditionError(
                "PROCESS_RUNTIME_DISABLED",
                "this node does not run functions on the host itself; set runtime.process.enabled: true to allow it",
            )
        self._for(function).accepts(function)

    async def prepare(self, function: FunctionSpec, progress: Callable[[str], None]) -> None:
        await self._for(function).prepare(function, progress)

    async def start(self, spec: StartSpec) -> Handle:
        return await self._for(spec.instance.function).start(spec)

    def _for(self, function: FunctionSpec) -> Runtime:
        if function.image == HOST_IMAGE:
            return self._process
        if self.engine is None:
            raise PreconditionError(
                "IMAGE_RUNTIME_UNAVAILABLE",
                "this node has no container engine: start docker or podman and then the agent again, set "
                "runtime.engine.socket (is it off?), or use another node",
                image=function.image,
            )
        return self.engine

    def _of(self, handle: Handle) -> Runtime:
        """The runtime of an existing container. If its engine was turned off since, the process runtime: it needs only
        the kernel to serve a running one."""
        return self._engine if handle.container_id and self._engine else self._process

    async def wait(self, handle: Handle) -> Exit:
        return await self._of(handle).wait(handle)

    async def alive(self, handle: Handle) -> bool:
        return await self._of(handle).alive(handle)

    async def terminate(self, handle: Handle) -> None:
        await self._of(handle).terminate(handle)

    async def kill(self, handle: Handle, deadline_s: float = 10.0) -> None:
        await self._of(handle).kill(handle, deadline_s)

    async def kill_processes(self, handle: Handle, pids: Sequence[int]) -> None:
        await self._of(handle).kill_processes(handle, pids)

    async def destroy(self, handle: Handle) -> None:
        self._refuse_without_engine(handle)
        await self._of(handle).destroy(handle)

    async def list_handles(self) -> Sequence[Handle]:
        found = list(await self._process.list_handles())
        if self._engine:
            found += await self._engine.list_handles()
        return sorted(found, key=lambda handle: handle.uid)

    async def pids(self, handle: Handle) -> Sequence[int]:
        return await self._of(handle).pids(handle)

    async def listening(self, handle: Handle) -> Sequence[str]:
        return await self._of(handle).listening(handle)

    async def read_log(self, handle: Handle, tail_bytes: int) -> bytes:
        return await self._of(handle).read_log(handle, tail_bytes)

    def follow_log(self, handle: Handle, tail_bytes: int) -> AsyncGenerator[bytes, None]:
        return self._of(handle).follow_log(handle, tail_bytes)

    async def exec(self, handle: Handle, spec: ExecSpec) -> ExecSession:
        self._refuse_without_engine(handle)
        return await self._of(handle).exec(handle, spec)

    def _refuse_without_engine(self, handle: Handle) -> None:
        if handle.container_id and self._engine is None:
            raise UnavailableError(
                "ENGINE_UNAVAILABLE",
                "the instance is a container, and runtime.engine.socket is off now; set it to the engine again",
                uid=handle.uid,
            )
