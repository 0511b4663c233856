"""Containers without processes; the runtime contract runs on it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field

from agent.core.errors import (
    ConflictError,
    DeadlineError,
    HibernodeError,
    InvalidArgumentError,
    PreconditionError,
    UnavailableError,
)
from agent.core.types import Exit, FunctionSpec, Handle, ProcessId
from agent.ports import ExecSession, ExecSpec, StartSpec
from tests.fakes.exec_session import FakeExecSession

TERMINATED = Exit(code=-1, signal=15, message="killed by signal 15 (Terminated)")
KILLED = Exit(code=-1, signal=9, message="killed by signal 9 (Killed)")


@dataclass
class FakeContainer:
    """What the fake knows of one container. `heeds_term=False` ignores SIGTERM."""

    spec: StartSpec
    handle: Handle
    ended: asyncio.Future[Exit]
    heeds_term: bool = True
    extra_pids: list[int] = field(default_factory=list)


class FakeRuntime:
    """Implements `ports.Runtime`. Keep the object over a simulated restart of the agent: containers survive in it.

    Knobs: `start_error` is raised by the next starts; `start_gate`, while set, holds every start until it is set(), and
    `prepare_error` and `prepare_gate` do the same for the pull; `kill_hangs` makes kill and destroy end in
    KILL_TIMEOUT, `engine_away` leaves what was killed unremoved; `port_of` gives a container the port of a test's
    server; `listens_on`: what `listening` tells of each; `accepted_images`; `executes`: its instances are containers,
    and `sessions` are the commands run inside
    (before that `exec_error` is raised, or `exec_gate` waited for). `exit(uid, Exit)` ends a container, `print(uid,
    text)` adds to its log; `calls` records every call.
    """

    name = "fake"

    def __init__(self) -> None:
        self.start_error: HibernodeError | None = None
        self.start_gate: asyncio.Event | None = None
        self.prepare_error: HibernodeError | None = None
        self.prepare_gate: asyncio.Event | None = None
        self.kill_hangs = False
        self.engine_away = False
        self.accepted_images = {"host"}
        self.executes = False
        self.exec_error: HibernodeError | None = None
        self.exec_gate: asyncio.Event | None = None
        self.sessions: list[FakeExecSession] = []
        self.listens_on: list[str] = []
        self.port_of: Callable[[StartSpec], int] | None = None
        self.containers: dict[str, FakeContainer] = {}
        self.calls: list[tuple[str, str]] = []
        self.boot_id = "5eed0000-0000-4000-8000-000000000000"
        self._logs: dict[str, bytes] = {}
        self._next_pid = 100_000
        self._starting: set[str] = set()

    # ---- knobs ------------------------------------------------------------------------------------------------

    def exit(self, uid: str, exit_: Exit) -> None:
        """The container ends now, by itself."""
        self.containers[uid].ended.set_result(exit_)

    def print(self, uid: str, text: bytes) -> None:
        self._logs[uid] = self._logs.get(uid, b"") + text

    def running(self) -> list[str]:
        """Uids of the containers that have not ended."""
        return sorted(uid for uid, container in self.containers.items() if not container.ended.done())

    def reboot(self, boot_id: str) -> None:
        """The host restarted: every process is gone, the records are still there."""
        self.boot_id = boot_id
        for container in self.containers.values():
            if not container.ended.done():
                container.ended.set_result(Exit(code=-1, message="the host restarted"))

    # ---- the port ---------------------------------------------------------------------------------------------

    def accepts(self, function: FunctionSpec) -> None:
        if function.image not in self.accepted_images:
            raise PreconditionError("IMAGE_RUNTIME_UNAVAILABLE", "the fake runs `image: host`", image=function.image)
        if not function.entrypoint + function.command:
            raise InvalidArgumentError("COMMAND_MISSING", "`image: host` needs an entrypoint or a command to run")

    async def prepare(self, function: FunctionSpec, progress: Callable[[str], None]) -> None:
        self.calls.append(("prepare", function.name))
        if self.prepare_gate:
            progress("pulling: 45 %")
            await self.prepare_gate.wait()
        if self.prepare_error:
            raise self.prepare_error

    async def start(self, spec: StartSpec) -> Handle:
        uid = spec.instance.uid
        self.accepts(spec.instance.function)
        if uid in self._starting:
            raise ConflictError("START_UNDER_WAY", "this instance is being started already", uid=uid)
        self.calls.append(("start", uid))
        self._starting.add(uid)
        try:
            if uid in self.containers:
                await self.destroy(self.containers[uid].handle)
            if self.start_gate:
                await self.start_gate.wait()
            if self.start_error:
                raise self.start_error
            return self._start(spec)
        finally:
            self._starting.discard(uid)

    def _start(self, spec: StartSpec) -> Handle:
        uid = spec.instance.uid
        self._next_pid += 10
        handle = Handle(
            uid=uid,
            process=ProcessId(self.boot_id, self._next_pid, self._next_pid * 7),
            host="127.0.0.1",
            port=self.port_of(spec) if self.port_of else 20_000 + self._next_pid % 10_000,
            cgroup=f"/fake/cgroup/{uid}",
            log_path=f"/fake/logs/{uid}.log",
            container_id=f"c0ffee-{uid}" if self.executes else "",
        )
        self.containers[uid] = FakeContainer(spec, handle, asyncio.get_running_loop().create_future())
        return handle

    async def wait(self, handle: Handle) -> Exit:
        container = self._find(handle)
        if container is None:
            return Exit(code=-1, message="exit status unknown: started by an earlier agent")
        return await asyncio.shield(container.ended)

    async def alive(self, handle: Handle) -> bool:
        container = self._find(handle)
        return container is not None and not container.ended.done()

    async def terminate(self, handle: Handle) -> None:
        self.calls.append(("terminate", handle.uid))
        container = self._find(handle)
        if container and container.heeds_term and not container.ended.done():
            container.ended.set_result(TERMINATED)

    async def kill(self, handle: Handle, deadline_s: float = 10.0) -> None:
        self.calls.append(("kill", handle.uid))
        self._kill(handle, deadline_s)

    def _kill(self, handle: Handle, deadline_s: float) -> None:
        container = self._find(handle)
        if container is None or (container.ended.done() and not container.extra_pids):
            return
        if self.kill_hangs:
            raise DeadlineError("KILL_TIMEOUT", f"the process survives SIGKILL for {deadline_s:g} s", uid=handle.uid)
        container.extra_pids.clear()
        if not container.ended.done():
            container.ended.set_result(KILLED)

    async def kill_processes(self, handle: Handle, pids: Sequence[int]) -> None:
        self.calls.append(("kill_processes", handle.uid))
        container = self._find(handle)
        if container is None:
            return
        container.extra_pids = [pid for pid in container.extra_pids if pid not in pids]
        if handle.process.pid in pids and not container.ended.done():
            container.ended.set_result(KILLED)

    async def destroy(self, handle: Handle) -> None:
        self.calls.append(("destroy", handle.uid))
        self._kill(handle, 10.0)
        if self.engine_away:
            raise UnavailableError("ENGINE_UNAVAILABLE", "no engine answers at /run/docker.sock; start docker")
        if self._find(handle):
            del self.containers[handle.uid]

    async def list_handles(self) -> Sequence[Handle]:
        return [container.handle for _, container in sorted(self.containers.items())]

    async def pids(self, handle: Handle) -> Sequence[int]:
        container = self._find(handle)
        if container is None:
            return []
        main = [] if container.ended.done() else [handle.process.pid]
        return main + container.extra_pids

    async def listening(self, handle: Handle) -> Sequence[str]:
        return self.listens_on

    async def read_log(self, handle: Handle, tail_bytes: int) -> bytes:
        text = self._logs.get(handle.uid, b"")
        return text[max(0, len(text) - max(0, tail_bytes)) :]

    async def follow_log(self, handle: Handle, tail_bytes: int) -> AsyncGenerator[bytes, None]:
        at = max(0, len(self._logs.get(handle.uid, b"")) - max(0, tail_bytes))
        while True:
            ended = not await self.alive(handle)
            text = self._logs.get(handle.uid, b"")
            if len(text) > at:
                yield text[at:]
                at = len(text)
            if ended:
                return
            await asyncio.sleep(0.01)

    async def exec(self, handle: Handle, spec: ExecSpec) -> ExecSession:
        self.calls.append(("exec", handle.uid))
        if not handle.container_id:
            raise PreconditionError("EXEC_UNAVAILABLE", "the fake has no inside", uid=handle.uid)
        if self.exec_gate:
            await self.exec_gate.wait()
        if self.exec_error:
            raise self.exec_error
        session = FakeExecSession(spec)
        self.sessions.append(session)
        return session

    def _find(self, handle: Handle) -> FakeContainer | None:
        container = self.containers.get(handle.uid)
        return container if container and container.handle.process == handle.process else None
