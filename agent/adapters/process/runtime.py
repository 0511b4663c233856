"""The runtime for `image: host`: a function's entrypoint and command as a host process.

Each runs in its own cgroup where one can be written. Memory and CPU are not limited: a freeze charges the copy of VRAM
to the process, and a limit at the function's memory size would kill it during the checkpoint
(agent/docs/facts/emulated-driver.md, pitfall 7). The order of a start makes it safe to die at any point: bundle,
cgroup, launcher, record, plan. What has no record when the agent starts again never ran; `list_handles` removes it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from agent.adapters.kernel import cgroup, process_table
from agent.adapters.kernel.cgroup_freezer import instance_mark
from agent.adapters.kernel.listening import listening
from agent.adapters.process import launch
from agent.adapters.process.launch import LaunchPlan, make_plan, require_explicit_root, resolve_user
from agent.adapters.runtime.bundles import UID_PATTERN, Bundle, Bundles
from agent.adapters.runtime.exits import ExitWatch, kill_timeout
from agent.adapters.runtime.log_files import LogFiles
from agent.core.errors import (
    ConflictError,
    HibernodeError,
    InstanceError,
    InvalidArgumentError,
    PreconditionError,
)
from agent.core.function_rules import HOST_IMAGE
from agent.core.types import MIB, SECOND_NS, Exit, FunctionSpec, Handle, ProcessId
from agent.log import get_logger
from agent.ports import Clock, ExecSession, ExecSpec, StartSpec, Timer

LOOPBACK = "127.0.0.1"
START_DEADLINE_S = 15.0
DESTROY_DEADLINE_S = 10.0
FOLLOW_POLL_S = 0.15
LOG_CHECK_NS = 5 * SECOND_NS
PORT_ATTEMPTS = 16

log = get_logger()


@dataclass(frozen=True, slots=True)
class ProcessRuntimeOptions:
    """Settings of the process runtime."""

    state_dir: Path
    state_uuid: str
    slice_: cgroup.CgroupSlice | None  # from `cgroup.open_slice`; None: fall back to process trees
    enabled: bool = False
    user: str = ""  # `runtime.process.user`; "" = the agent's own, which must not be root if `enabled`
    ports: tuple[int, int] = (0, 0)  # first and last that instances may get; (0, 0) = any free one
    open_files: int | None = None  # soft limit of instances, -1 = none; None = that of the agent
    log_cap_bytes: int = 8 * MIB  # a log is rotated past this
    log_keep: int = 200  # logs of the newest ended instances that stay


class ProcessRuntime:
    """Implements `ports.Runtime`. Lives on one event loop; call `close` before the loop ends (containers stay)."""

    name = "process"

    def __init__(self, settings: ProcessRuntimeOptions, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        if settings.enabled:
            require_explicit_root(settings.user)
        self._user = resolve_user(settings.user)
        self._boot_id = process_table.boot_id()
        self._bundles = Bundles(settings.state_dir, settings.state_uuid)
        self._logs = LogFiles(settings.state_dir, settings.log_cap_bytes, settings.log_keep)
        self._exits = ExitWatch(self._boot_id)
        self._starting: set[str] = set()
        self._ports: dict[str, int] = {}
        self._log_timer: Timer | None = None

    def close(self) -> None:
        """Stop watching. Waiters are cancelled, containers live on."""
        if self._log_timer:
            self._log_timer.cancel()
        self._exits.close()

    # ---- start ------------------------------------------------------------------------------------------------

    def accepts(self, function: FunctionSpec) -> None:
        """Accepts only `image: host` with something to run."""
        if function.image != HOST_IMAGE:
            raise PreconditionError(
                "IMAGE_RUNTIME_UNAVAILABLE",
                "this node runs host processes only: set `image: host` with an entrypoint, or use a node with a "
                "container engine",
                image=function.image,
            )
        if not function.entrypoint + function.command:
            raise InvalidArgumentError("COMMAND_MISSING", "`image: host` needs an entrypoint or a command to run")

    async def prepare(self, function: FunctionSpec, progress: Callable[[str], None]) -> None:
        """There is no image to pull."""

    async def start(self, spec: StartSpec) -> Handle:
        """See `ports.Runtime`. The handle is on disk before the workload's first instruction."""
        uid = spec.instance.uid
        if not UID_PATTERN.fullmatch(uid):
            raise InvalidArgumentError("BAD_INSTANCE_UID", "an instance uid is 1 to 128 of A-Z a-z 0-9 . _ -", uid=uid)
        self.accepts(spec.instance.function)
        if uid in self._starting:
            raise ConflictError("START_UNDER_WAY", "this instance is already being started", uid=uid)
        self._starting.add(uid)
        try:
            async with asyncio.timeout(START_DEADLINE_S):
                await self._destroy_earlier(uid)
                return await self._start(spec)
        except TimeoutError:
            raise self._start_failed(uid, f"no answer from the launcher within {START_DEADLINE_S:g} s") from None
        except OSError as error:
            raise self._start_failed(uid, f"{error.strerror} ({error.filename or 'no file'})") from error
        finally:
            self._starting.discard(uid)

    async def _start(self, spec: StartSpec) -> Handle:
        uid = spec.instance.uid
        port = self._choose_port(uid)
        plan = make_plan(
            spec,
            port=port,
            folder=self._bundles.scratch(uid),
            user=self._user,
            state_uuid=self._settings.state_uuid,
            open_files=self._settings.open_files,
        )
        plan.encode()  # raises before anything is made
        try:
            self._bundles.create(uid, self._user)
            path = self._settings.slice_.create(uid) if self._settings.slice_ else None
            return await self._launch(uid, port, plan, path)
        except BaseException:
            await asyncio.shield(self._clean_up_failed_start(uid))
            raise

    async def _launch(self, uid: str, port: int, plan: LaunchPlan, path: Path | None) -> Handle:
        log_fd = self._logs.open(uid, self._user)
        try:
            pid, control = launch.spawn(uid, str(path or ""), log_fd)
        finally:
            os.close(log_fd)
        with control:
            handle = self._handle(uid, pid, port, path)
            self._exits.watch(handle)
            self._bundles.write(handle)
            await launch.release(control, plan)
        self._schedule_log_check()
        return handle

    def _handle(self, uid: str, pid: int, port: int, path: Path | None) -> Handle:
        process = process_table.identify(pid, self._boot_id)
        assert process, "an unreaped child has a stat line"
        return Handle(uid, process, LOOPBACK, port, str(path or ""), str(self._logs.path(uid)))

    def _choose_port(self, uid: str) -> int:
        """A free loopback port. If another process takes it before the workload listens, readiness fails the start."""
        first, last = self._settings.ports
        for wanted in range(first, last + 1) if first else [0] * PORT_ATTEMPTS:
            if wanted and wanted in self._ports.values():
                continue
            with socket.socket() as probe, suppress(OSError):  # in use
                probe.bind((LOOPBACK, wanted))
                port = int(probe.getsockname()[1])
                if port not in self._ports.values():
                    self._ports[uid] = port
                    return port
        why = f"runtime.process.ports {first} to {last} are all in use" if first else "see net.ipv4.ip_local_port_range"
        raise self._start_failed(uid, f"no free loopback port; {why}")

    def _start_failed(self, uid: str, detail: str) -> InstanceError:
        return InstanceError("START_FAILED", f"the instance could not be started: {detail}", uid=uid)

    async def _destroy_earlier(self, uid: str) -> None:
        """Destroy what an earlier attempt with this uid left."""
        bundle = self._bundles.read(uid)
        if bundle and bundle.foreign:
            raise ConflictError(
                "FOREIGN_BUNDLE", "the bundle folder belongs to another state directory; remove it by hand", uid=uid
            )
        if bundle and bundle.handle:
            await self.destroy(bundle.handle)
        else:
            await self._remove_traces(uid)

    async def _clean_up_failed_start(self, uid: str) -> None:
        """Leave nothing behind. Only logs its own errors, so that the start's error is raised."""
        try:
            handle = next((handle for handle in self._exits.handles() if handle.uid == uid), None)
            if handle:
                await self.destroy(handle)
            else:
                await self._remove_traces(uid)
        except (HibernodeError, OSError) as error:
            log.error("runtime.discard_failed", uid=uid, error=str(error))

    # ---- its end ----------------------------------------------------------------------------------------------

    async def wait(self, handle: Handle) -> Exit:
        ended = self._exits.watch(handle)
        self._schedule_log_check()
        return await asyncio.shield(ended)

    async def alive(self, handle: Handle) -> bool:
        return process_table.is_alive(handle.process, self._boot_id)

    async def terminate(self, handle: Handle) -> None:
        process_table.send_signal(handle.process, self._boot_id, signal.SIGTERM)

    async def kill(self, handle: Handle, deadline_s: float = DESTROY_DEADLINE_S) -> None:
        if handle.process.boot_id != self._boot_id or self._superseded(handle):
            return

        async def empty() -> None:
            if handle.cgroup:
                await cgroup.kill(Path(handle.cgroup), deadline_s)
            else:
                await self._kill_members(handle, deadline_s)

        # The main process too: a launcher may not have joined its cgroup yet.
        await self._exits.kill(handle, empty, deadline_s)

    async def _kill_members(self, handle: Handle, deadline_s: float) -> None:
        def emptied() -> bool:
            members = self._members(handle)
            for stat in members:
                process = ProcessId(self._boot_id, stat.pid, stat.start_time)
                process_table.send_signal(process, self._boot_id, signal.SIGKILL)
            return not members

        if not await cgroup.poll_until(emptied, deadline_s):
            raise kill_timeout(handle, deadline_s)

    async def kill_processes(self, handle: Handle, pids: Sequence[int]) -> None:
        await self._exits.kill_processes(handle, pids, lambda: self.pids(handle))

    def _superseded(self, handle: Handle) -> bool:
        """Whether the uid was started again since: cgroup, mark and bundle then belong to the successor."""
        bundle = self._bundles.read(handle.uid)
        return bundle is not None and bundle.handle is not None and bundle.handle.process != handle.process

    async def destroy(self, handle: Handle) -> None:
        if self._superseded(handle):
            return
        await self.kill(handle, DESTROY_DEADLINE_S)
        if handle.cgroup:
            await cgroup.remove(Path(handle.cgroup), DESTROY_DEADLINE_S)
        self._exits.forget(handle.uid)
        await self._remove_traces(handle.uid)

    async def _remove_traces(self, uid: str) -> None:
        """Remove a uid's cgroup, bundle and port. Its log stays, within its cap; old logs go."""
        if self._settings.slice_:
            await cgroup.remove(self._settings.slice_.path_of(uid), DESTROY_DEADLINE_S)
            self._settings.slice_.remove_if_empty()
        await asyncio.to_thread(self._bundles.remove, uid)
        self._ports.pop(uid, None)
        with suppress(OSError):  # the last check; the file may have grown since the previous one
            await asyncio.to_thread(self._logs.trim, self._logs.path(uid))
        self._logs.prune({bundle.uid for bundle in self._bundles.all()} | self._starting)

    # ---- listing ----------------------------------------------------------------------------------------------

    async def list_handles(self) -> Sequence[Handle]:
        """Every recorded container, ended ones included (`alive` tells). Traces without a record never ran a workload:
        they are removed and logged as `runtime.orphan_removed`."""
        handles = []
        bundles = self._bundles.all()
        for bundle in bundles:
            if bundle.uid in self._starting or bundle.foreign or bundle.container:
                continue
            if bundle.handle:
                handles.append(bundle.handle)
                self._ports[bundle.uid] = bundle.handle.port
            else:
                await self._remove_orphan(bundle)
        known = {bundle.uid for bundle in bundles} | self._starting
        for uid in self._settings.slice_.uids() if self._settings.slice_ else []:
            if uid not in known:
                await self._remove_orphan(Bundle(uid, None))
        return handles

    async def _remove_orphan(self, orphan: Bundle) -> None:
        try:
            await self._remove_traces(orphan.uid)
            log.warning("runtime.orphan_removed", uid=orphan.uid)
        except HibernodeError as error:
            log.error("runtime.orphan_stays", uid=orphan.uid, error=str(error))

    async def pids(self, handle: Handle) -> Sequence[int]:
        if self._superseded(handle):
            return []
        if handle.cgroup:
            return cgroup.procs(Path(handle.cgroup))
        return [stat.pid for stat in self._members(handle)]

    async def listening(self, handle: Handle) -> Sequence[str]:
        return await asyncio.to_thread(listening, await self.pids(handle))

    def _members(self, handle: Handle) -> list[process_table.ProcessStat]:
        mark = instance_mark(self._settings.state_uuid, handle.uid)
        return process_table.members(handle.process, self._boot_id, mark)

    # ---- logs -------------------------------------------------------------------------------------------------

    async def read_log(self, handle: Handle, tail_bytes: int) -> bytes:
        return await asyncio.to_thread(self._logs.read, Path(handle.log_path), tail_bytes)

    async def follow_log(self, handle: Handle, tail_bytes: int) -> AsyncGenerator[bytes, None]:
        """See `ports.Runtime`. Polls the file, because the workload writes it without telling the agent."""
        reader = self._logs.follow(Path(handle.log_path), tail_bytes)
        while True:
            ended = not await self.alive(handle)
            while part := await asyncio.to_thread(reader.read):
                yield part
            if ended:
                return
            await asyncio.sleep(FOLLOW_POLL_S)

    async def exec(self, handle: Handle, spec: ExecSpec) -> ExecSession:
        """Always raises: there is no container to run a command in."""
        raise PreconditionError(
            "EXEC_UNAVAILABLE",
            "this instance is a process of the host, not a container; log in to the node and inspect pid "
            f"{handle.process.pid} there (nsenter, gdb, py-spy)",
            uid=handle.uid,
        )

    def trim_logs(self) -> None:
        """Rotate the logs that have passed the cap; called every five seconds while a container runs."""
        for handle in self._exits.handles():
            with suppress(OSError):  # disk full: the next check retries
                self._logs.trim(Path(handle.log_path))

    def _schedule_log_check(self) -> None:
        if self._log_timer is None and self._exits.handles():
            self._log_timer = self._clock.call_at(self._clock.monotonic_ns() + LOG_CHECK_NS, self._check_logs)

    def _check_logs(self) -> None:
        self._log_timer = None
        self.trim_logs()
        self._schedule_log_check()
