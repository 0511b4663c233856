"""Commands inside a running container: the engine's exec, a stream of its own that was an HTTP request once."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import aiodocker
import aiohttp
from aiodocker.execs import Exec
from aiodocker.stream import Stream
from yarl import URL

from agent.adapters.engine.api import EngineApi, EngineError
from agent.adapters.kernel import cgroup, process_table
from agent.core.errors import HibernodeError, InstanceError
from agent.core.types import Handle
from agent.log import get_logger
from agent.ports import ExecOutput, ExecSpec

STDERR = 2
CHUNK_BYTES = 64 * 1024
CLOSE_DEADLINE_S = 5.0
INSPECT_ATTEMPTS, INSPECT_PAUSE_S = 50, 0.1
"""How often and after what pause an engine is asked what it notes late: a command's pid, and how it ended."""
KILLED = 137
KILL_ROUNDS = 20
"""A command that forks while it is killed is listed again; its children are few, and die faster than they are born."""

log = get_logger()


class EngineExec:
    """Opens sessions through `api`."""

    def __init__(self, api: EngineApi) -> None:
        self._api = api

    async def open(self, handle: Handle, spec: ExecSpec) -> EngineExecSession:
        """Start the command. One that the image does not have is started as well: the engine says so as its output,
        and its exit code is 126 or 127.

        Raises InstanceError EXEC_FAILED, UnavailableError ENGINE_UNAVAILABLE.
        """

        async def create(docker: aiodocker.Docker) -> Exec:
            container = docker.containers.container(handle.container_id)
            return await container.exec(
                list(spec.command), stdin=True, stdout=True, stderr=True, tty=spec.terminal, user=spec.user
            )

        with _failures():
            execution = await self._api.call(create)
        session = EngineExecSession(self._api, execution, _stream(execution, spec), Path(handle.cgroup))
        try:
            with _failures():
                await self._api.call(lambda _docker: session.start())
                if spec.terminal:
                    await session.resize(spec.columns, spec.rows)
        except BaseException:  # it may run already
            await asyncio.shield(session.close())
            raise
        return session


class EngineExecSession:
    """Implements `ports.ExecSession`."""

    def __init__(self, api: EngineApi, execution: Exec, stream: Stream, cgroup_path: Path) -> None:
        self._api = api
        self._exec = execution
        self._stream = stream
        self._cgroup = cgroup_path
        self._unread: list[ExecOutput] = []
        self._closed = False

    async def start(self) -> None:
        """Run it. `EngineExec.open` calls this within its deadline."""
        await self._stream._init()

    async def read(self) -> ExecOutput | None:
        if not self._unread:
            try:
                message = await self._stream.read_out()
            except (aiohttp.ClientError, OSError):
                # So ends the connection of a command that did not read all of its input; `exit_code` asks the engine.
                message = None
            if message is None:
                return None
            data, is_error = bytes(message.data), message.stream == STDERR
            starts = range(0, len(data), CHUNK_BYTES)
            self._unread = [ExecOutput(data[start : start + CHUNK_BYTES], is_error) for start in starts]
        return self._unread.pop(0) if self._unread else ExecOutput(b"")

    async def write(self, data: bytes) -> None:
        """Waits until the engine takes it; what a command that has ended is sent is lost."""
        if self._transport() is not None:
            with suppress(aiohttp.ClientError, OSError):  # the command has ended meanwhile, or the engine: `read` tells
                await self._stream.write_in(data)

    async def close_input(self) -> None:
        """Half of the connection is closed: the command reads its end of input."""
        transport = self._transport()
        if transport is not None and transport.can_write_eof():
            transport.write_eof()

    def _transport(self) -> Any:
        """The connection's; not every event loop's transports are asyncio's own classes."""
        response = self._stream._resp
        connection = response.connection if response is not None else None
        transport = connection.transport if connection is not None else None
        return None if transport is None or transport.is_closing() else transport

    async def resize(self, columns: int, rows: int) -> None:
        """Of its terminal; a command that has just ended has none any more."""
        with suppress(EngineError):
            await self._api.call(lambda _docker: self._exec.resize(h=rows, w=columns), CLOSE_DEADLINE_S)

    async def exit_code(self) -> int:
        """After its output has ended; the engine may take a moment to notice the end. 137 (killed) if the container
        has ended and the engine knows nothing of either any more."""
        for _ in range(INSPECT_ATTEMPTS):
            try:
                found = await self._inspect()
            except EngineError as error:
                if error.not_found:
                    return KILLED
                raise
            if not found.get("Running"):
                return int(found.get("ExitCode") or 0)
            await asyncio.sleep(INSPECT_PAUSE_S)
        raise InstanceError("EXEC_FAILED", "its output has ended, but the engine does not tell how it ended")

    async def _inspect(self) -> dict[str, Any]:
        return await self._api.call(lambda _docker: self._exec.inspect(), CLOSE_DEADLINE_S)

    async def _leader(self) -> int:
        """The command's pid on the host, 0 if it has ended. Docker hands its first output on before it has noted the
        pid: a command that runs and has none yet is asked for again."""
        for _ in range(INSPECT_ATTEMPTS):
            found = await self._inspect()
            if not found.get("Running"):
                return 0
            if pid := int(found.get("Pid") or 0):
                return pid
            await asyncio.sleep(INSPECT_PAUSE_S)
        raise InstanceError("EXEC_FAILED", "the engine does not tell the pid of a command that runs")

    async def close(self) -> None:
        """End it, with all that it has started and that has not left its session: an engine leaves running what its
        caller has left."""
        if self._closed:
            return
        self._closed = True
        try:
            leader = await self._leader()
            if leader:
                await asyncio.to_thread(_kill_session, self._cgroup, leader)
        except EngineError as error:
            if not error.not_found:  # the container is gone, and the command with it
                log.warning("exec.close_failed", container=self._cgroup.name, error=str(error))
        except (HibernodeError, OSError) as error:
            log.warning("exec.close_failed", container=self._cgroup.name, error=str(error))
        finally:
            with suppress(aiohttp.ClientError, OSError, AssertionError):
                await self._stream.close()


def _stream(execution: Exec, spec: ExecSpec) -> Stream:
    """What `execution.start` gives, with the terminal's size from the first moment where the engine knows how: Docker from
    API 1.42 on by ConsoleSize, Podman by h and w. The others have a terminal of no size until the resize that follows.
    """

    async def setup() -> tuple[URL, bytes, bool]:
        size = {"ConsoleSize": [spec.rows, spec.columns], "h": spec.rows, "w": spec.columns} if spec.terminal else {}
        body = {"Detach": False, "Tty": spec.terminal, **size}
        return URL(f"exec/{execution.id}/start"), json.dumps(body).encode(), spec.terminal

    return Stream(execution.docker, setup, aiohttp.ClientTimeout(sock_connect=CLOSE_DEADLINE_S))


@contextmanager
def _failures() -> Iterator[None]:
    """The engine's refusals are failures of the exec."""
    try:
        yield
    except EngineError as error:
        text = f"the command can't be run inside: {error.text}"
        raise InstanceError("EXEC_FAILED", text, status=error.status) from error


def _kill_session(cgroup_path: Path, leader: int) -> None:
    """SIGKILL to the container's processes of this session. A runtime makes each command the leader of its own, and
    only processes that are in the cgroup now are signalled: nobody else's number is."""
    boot = process_table.boot_id()
    killed: set[int] = set()
    for _ in range(KILL_ROUNDS):
        stats = [process_table.read_stat(pid) for pid in cgroup.procs(cgroup_path)]
        found = {stat.pid for stat in stats if stat and not stat.dead and leader in (stat.pid, stat.session)} - killed
        if not found:
            return
        for pid in found:
            process = process_table.identify(pid, boot)
            if process is not None:
                process_table.send_signal(process, boot, signal.SIGKILL)
        killed |= found
    log.warning("exec.stays", container=cgroup_path.name, leader=leader)
