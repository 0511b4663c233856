"""Runs instances as containers of Docker or Podman.

The engine pulls, creates, starts, inspects and removes. Everything else uses the kernel and works while the engine is
down: exits (pidfd), process lists (cgroup), signals and freezing. The bundle of a container, written right after its
start, records what is known of it. A labelled container without a bundle is adopted if it runs, else removed. A start
goes through these steps: network, create, start, identify, isolate, record.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from agent.adapters.engine.api import EngineApi, EngineError
from agent.adapters.engine.containers import EngineContainers, ListedContainer
from agent.adapters.engine.errors import disk_limit_refused, network_missing, start_refused
from agent.adapters.engine.exits import UNKNOWN, exit_of
from agent.adapters.engine.identity import ContainerIdentity, identify
from agent.adapters.engine.images import Images
from agent.adapters.engine.network import EngineNetwork
from agent.adapters.engine.planner import ContainerPlanner
from agent.adapters.kernel import cgroup, cgroup_v1_freezer, process_table
from agent.adapters.kernel.listening import listening
from agent.adapters.runtime.bundles import UID_PATTERN, Bundles
from agent.adapters.runtime.exits import ExitWatch, Signs
from agent.adapters.runtime.log_files import LogFiles
from agent.core.errors import (
    ConflictError,
    HibernodeError,
    InstanceError,
    InvalidArgumentError,
    PreconditionError,
    UnavailableError,
)
from agent.core.function_rules import HOST_IMAGE
from agent.core.types import Exit, FunctionSpec, Handle, ProcessId
from agent.log import get_logger
from agent.ports import ExecSession, ExecSpec, StartSpec

KILL_DEADLINE_S = 10.0
DISCARD_DEADLINE_S = 30.0
KEEP_LOG_DEADLINE_S = 10.0
LEAVE_DEADLINE_S = 15.0
NETWORK_PAUSE_S = 0.5
KEPT_LOG_BYTES = 1 << 20
TAIL_BYTES = 2048

log = get_logger()


class Logs(Protocol):
    """Implemented by `logs.EngineLogs`."""

    async def read(self, container_id: str, tail_bytes: int) -> bytes: ...

    def follow(self, container_id: str, tail_bytes: int) -> AsyncGenerator[bytes, None]: ...


class Execs(Protocol):
    """Implemented by `exec.EngineExec`."""

    async def open(self, handle: Handle, spec: ExecSpec) -> ExecSession: ...


@dataclass(frozen=True, slots=True)
class EngineComponents:
    """The parts of the runtime, assembled by `build.open_engine_runtime`."""

    api: EngineApi
    images: Images
    planner: ContainerPlanner
    network: EngineNetwork
    containers: EngineContainers
    bundles: Bundles
    files: LogFiles
    logs: Logs
    execs: Execs


@dataclass(frozen=True, slots=True)
class Origin:
    """Handle fields that only the start knows. Port 0: unknown, for an adopted container."""

    uid: str
    port: int = 0
    sees_all_gpus: bool = False


class EngineRuntime:
    """Implements `ports.Runtime`. Lives on one event loop; call `close` before the loop ends (containers stay)."""

    name = "engine"

    def __init__(self, components: EngineComponents) -> None:
        self._components = components
        self._containers = components.containers
        self._bundles = components.bundles
        self._boot_id = process_table.boot_id()
        self._exits = ExitWatch(self._boot_id)
        self._known_exits: dict[ProcessId, Exit] = {}
        self._starting: set[str] = set()

    @property
    def health(self) -> str:
        """ "" while the engine answers, else why it can't be used."""
        return self._components.api.health

    async def check(self) -> None:
        """Check the engine now. Raises UnavailableError ENGINE_UNAVAILABLE, ENGINE_TOO_OLD."""
        await self._components.api.check()

    async def close(self) -> None:
        """Stop watching: cancel waiters and keep containers. Removes the network if there are none.

        The end of the last container keeps the network: creating it takes a third of the time of a start."""
        self._exits.close()
        await self._components.images.close()
        if not any(bundle.container for bundle in self._bundles.all()):
            await self._remove_network()
        await self._components.api.close()

    async def _remove_network(self) -> None:
        """Remove the network, as soon as the engine has taken down its last container. An engine that cannot be reached
        is not waited for.

        Tries whatever `health` says: on a busy host one late answer marks the engine as unavailable."""
        network, why = self._components.network, "the engine did not answer in time"
        try:
            async with asyncio.timeout(LEAVE_DEADLINE_S):
                while why_now := await network.remove_if_unused():
                    why = why_now
                    await asyncio.sleep(NETWORK_PAUSE_S)
                return
        except TimeoutError:
            pass
        except HibernodeError as error:
            why = error.message
        log.warning("engine.network_stays", network=network.name, error=why)

    # ---- start ------------------------------------------------------------------------------------------------

    def accepts(self, function: FunctionSpec) -> None:
        """Accept any image but `host`. Raises UnavailableError ENGINE_UNAVAILABLE while the engine is unavailable."""
        _refuse_host(function)
        if self.health:
            raise UnavailableError("ENGINE_UNAVAILABLE", self.health)

    async def prepare(self, function: FunctionSpec, progress: Callable[[str], None]) -> None:
        await self._components.images.ensure(function.image, function.container.registry, progress)

    async def start(self, spec: StartSpec) -> Handle:
        uid = spec.instance.uid
        if not UID_PATTERN.fullmatch(uid):
            raise InvalidArgumentError("BAD_INSTANCE_UID", "an instance uid is 1 to 128 of A-Z a-z 0-9 . _ -", uid=uid)
        _refuse_host(spec.instance.function)
        if uid in self._starting:
            raise ConflictError("START_UNDER_WAY", "this instance is already being started", uid=uid)
        self._starting.add(uid)
        try:
            await self._remove_earlier_attempt(uid)
            return await self._start(spec)
        finally:
            self._starting.discard(uid)

    async def _remove_earlier_attempt(self, uid: str) -> None:
        """Destroy what an earlier attempt with this uid left. `create` finds a container without a bundle by its
        name."""
        bundle = self._bundles.read(uid)
        if bundle and bundle.foreign:
            raise ConflictError(
                "FOREIGN_BUNDLE", "the bundle folder belongs to another state directory; remove it by hand", uid=uid
            )
        if bundle and bundle.container:
            await self.destroy(bundle.container)

    async def _start(self, spec: StartSpec) -> Handle:
        """Try twice: recreate a missing network, or drop an unsupported disk limit, once."""
        function = spec.instance.function
        for attempt in (1, 2):
            await self._components.api.connect()
            plan = await self._components.planner.plan(spec)
            try:
                return await self._attempt(spec, plan.config, plan.devices)
            except EngineError as error:
                if attempt == 1 and network_missing(error):
                    self._components.network.forget()
                elif not (attempt == 1 and plan.limits_disk and self._does_without_disk_limit(error)):
                    raise start_refused(function, error) from error
        raise AssertionError("the second attempt returns or raises")

    def _does_without_disk_limit(self, error: EngineError) -> bool:
        return disk_limit_refused(error) and self._components.planner.disk_limit_refused()

    async def _attempt(self, spec: StartSpec, config: Mapping[str, Any], devices: tuple[str, ...]) -> Handle:
        uid = spec.instance.uid
        try:
            await self._components.network.ensure()
            container_id = await self._containers.create(uid, config, devices)
            if self._components.api.kind == "podman":  # Docker isolates a port from the beginning (enable_icc)
                await self._containers.initialize(container_id)
                await self._components.network.isolate_ports()
            await self._containers.start(container_id)
            return await self._adopt(Origin(uid, spec.instance.function.port, spec.all_gpus), container_id)
        except BaseException:
            await asyncio.shield(self._discard(uid))
            raise

    async def _adopt(self, origin: Origin, container_id: str) -> Handle:
        """Identify, isolate and record a container that was just started."""
        inspected = await self._containers.inspect(container_id)
        found = identify(inspected, self._boot_id)
        if found is None:
            ended = await exit_of(self._containers, container_id, Signs())
            tail = await self._tail(container_id)
            reason = "OUT_OF_MEMORY" if ended.oom_killed else "FUNCTION_NOT_STARTED"
            raise InstanceError(reason, f"the container's main process ended at once: {ended.message}. Logs: {tail}")
        await self._components.network.isolate_ports()
        host = self._components.network.address(inspected)
        if not host:
            raise InstanceError(
                "START_FAILED", f"the container has no address on network {self._components.network.name}"
            )
        return self._record(origin, container_id, host, found)

    def _record(self, origin: Origin, container_id: str, host: str, found: ContainerIdentity) -> Handle:
        handle = Handle(
            origin.uid,
            found.process,
            host,
            origin.port,
            str(found.cgroup),
            str(self._components.files.path(origin.uid)),
            container_id,
            origin.sees_all_gpus,
        )
        self._exits.watch(handle)
        self._bundles.create_bare(origin.uid)
        self._bundles.write(handle, found.stop_signal)
        return handle

    async def _tail(self, container_id: str) -> str:
        try:
            tail = await self._components.logs.read(container_id, TAIL_BYTES)
        except (HibernodeError, OSError):
            tail = b""
        return tail.decode(errors="replace").strip() or "(none)"

    async def _discard(self, uid: str) -> None:
        """Remove everything after a failed start. Never hides the error that led here."""
        self._exits.forget(uid)
        try:
            async with asyncio.timeout(DISCARD_DEADLINE_S):
                await self._containers.remove_by_name(uid)
                await asyncio.to_thread(self._bundles.remove, uid)
        except (HibernodeError, OSError) as error:  # includes TimeoutError; `list_handles` removes what remains
            log.error("runtime.discard_failed", uid=uid, error=str(error))

    # ---- end --------------------------------------------------------------------------------------------------

    async def wait(self, handle: Handle) -> Exit:
        if handle.process in self._known_exits:
            return self._known_exits[handle.process]
        if self._superseded(handle) or handle.process.boot_id != self._boot_id:
            return UNKNOWN
        await asyncio.shield(self._exits.watch(handle))
        ended = await exit_of(self._containers, handle.container_id, self._exits.signs(handle))
        if not self._superseded(handle) and self._bundles.read(handle.uid):
            self._known_exits[handle.process] = ended
        return ended

    async def alive(self, handle: Handle) -> bool:
        return process_table.is_alive(handle.process, self._boot_id)

    async def terminate(self, handle: Handle) -> None:
        """Send the image's STOPSIGNAL, else SIGTERM, without the engine."""
        bundle = self._bundles.read(handle.uid)
        number = bundle.stop_signal if bundle and bundle.container == handle else 0
        process_table.send_signal(handle.process, self._boot_id, signal.Signals(number or signal.SIGTERM))

    async def kill(self, handle: Handle, deadline_s: float = KILL_DEADLINE_S) -> None:
        if handle.process.boot_id != self._boot_id or self._superseded(handle):
            return

        async def empty() -> None:
            if process_table.is_alive(handle.process, self._boot_id):
                cgroup_v1_freezer.thaw(handle.process.pid)  # SIGKILL is pending: none of its code runs again
            await cgroup.kill(Path(handle.cgroup), deadline_s)

        await self._exits.kill(handle, empty, deadline_s)

    async def kill_processes(self, handle: Handle, pids: Sequence[int]) -> None:
        await self._exits.kill_processes(handle, pids, lambda: self.pids(handle))

    def _superseded(self, handle: Handle) -> bool:
        """Whether the uid was started again since: bundle and name then belong to the new container."""
        bundle = self._bundles.read(handle.uid)
        return bundle is not None and bundle.handle is not None and bundle.handle.process != handle.process

    async def destroy(self, handle: Handle) -> None:
        """Raises UnavailableError ENGINE_UNAVAILABLE while the engine is down; the bundle stays, so a later listing
        finds it."""
        if self._superseded(handle):
            return
        await self.kill(handle, KILL_DEADLINE_S)
        await self._keep_log(handle)
        await self._containers.remove(handle.container_id)
        self._exits.forget(handle.uid)
        self._known_exits.pop(handle.process, None)
        await asyncio.to_thread(self._bundles.remove, handle.uid)
        await asyncio.to_thread(self._components.files.prune, {bundle.uid for bundle in self._bundles.all()})

    async def _keep_log(self, handle: Handle) -> None:
        """Save the end of the log. Other than an unavailable engine, no failure stops the removal of the container."""
        try:
            async with asyncio.timeout(KEEP_LOG_DEADLINE_S):
                tail = await self._components.logs.read(handle.container_id, KEPT_LOG_BYTES)
                if tail:
                    await asyncio.to_thread(self._components.files.keep, handle.uid, tail)
        except UnavailableError:
            raise  # the removal would fail too, and the log be lost
        except EngineError as error:
            if not error.not_found:
                log.warning("runtime.log_lost", uid=handle.uid, error=str(error))
        except (HibernodeError, OSError) as error:  # includes TimeoutError
            log.warning("runtime.log_lost", uid=handle.uid, error=str(error))

    # ---- listing ----------------------------------------------------------------------------------------------

    async def list_handles(self) -> Sequence[Handle]:
        """Every recorded container, including ended ones (see `alive`), and running ones without a record. Removes all
        others, logged as `runtime.orphan_removed`. While the engine is down: the recorded ones."""
        try:
            listed = await self._containers.list()
        except HibernodeError as error:
            log.warning("runtime.listed_without_engine", error=str(error))
            listed = []
        # Read after the engine's answer: a start may have ended meanwhile.
        found = [bundle for bundle in self._bundles.all() if bundle.uid not in self._starting]
        handles = {bundle.uid: bundle.container for bundle in found if bundle.container}
        for container in listed:
            if handle := await self._unrecorded(container):
                handles[handle.uid] = handle
        return [handles[uid] for uid in sorted(handles)]

    async def _unrecorded(self, container: ListedContainer) -> Handle | None:
        """Record a running container that has no bundle and return its handle; remove one that has ended."""
        bundle = self._bundles.read(container.uid)
        recorded = bundle.container if bundle else None
        if container.uid in self._starting or (recorded and recorded.container_id == container.id):
            return None
        try:
            if container.running and not recorded:
                inspected = await self._containers.inspect(container.id)
                found = identify(inspected, self._boot_id)
                if found:
                    return self._record(
                        Origin(container.uid), container.id, self._components.network.address(inspected), found
                    )
            await self._containers.remove(container.id)
            log.warning("runtime.orphan_removed", uid=container.uid, container=container.id[:12])
        except HibernodeError as error:
            if not (isinstance(error, EngineError) and error.not_found):
                log.error("runtime.orphan_stays", uid=container.uid, container=container.id[:12], error=str(error))
        return None

    async def pids(self, handle: Handle) -> Sequence[int]:
        if self._superseded(handle) or handle.process.boot_id != self._boot_id:
            return []
        return cgroup.procs(Path(handle.cgroup))

    async def listening(self, handle: Handle) -> Sequence[str]:
        return await asyncio.to_thread(listening, await self.pids(handle))

    # ---- logs and exec ----------------------------------------------------------------------------------------

    async def read_log(self, handle: Handle, tail_bytes: int) -> bytes:
        """The engine's log, or the end that was saved when the container was destroyed."""
        if not self._is_current(handle):
            return await asyncio.to_thread(self._components.files.read, Path(handle.log_path), tail_bytes)
        try:
            return await self._components.logs.read(handle.container_id, tail_bytes)
        except EngineError as error:
            if not error.not_found:
                raise
        return await asyncio.to_thread(self._components.files.read, Path(handle.log_path), tail_bytes)

    async def follow_log(self, handle: Handle, tail_bytes: int) -> AsyncGenerator[bytes, None]:
        if not self._is_current(handle):
            yield await self.read_log(handle, tail_bytes)
            return
        async with aclosing(self._components.logs.follow(handle.container_id, tail_bytes)) as chunks:
            async for chunk in chunks:
                yield chunk

    def _is_current(self, handle: Handle) -> bool:
        bundle = self._bundles.read(handle.uid)
        return bundle is not None and bundle.container == handle

    async def exec(self, handle: Handle, spec: ExecSpec) -> ExecSession:
        return await self._components.execs.open(handle, spec)


def _refuse_host(function: FunctionSpec) -> None:
    if function.image == HOST_IMAGE:
        raise PreconditionError("PROCESS_RUNTIME_DISABLED", "`image: host` is not run in a container")
