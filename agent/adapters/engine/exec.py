"""Runs commands inside a container through the engine's exec, whose HTTP request turns into a raw stream."""

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
"""Polling of facts that the engine records with a delay: a command's pid, and its exit."""
KILLED = 137
KILL_ROUNDS = 20
"""Rounds of listing and killing: a command may fork while it is killed."""

log = get_logger()


class EngineExec:
    def __init__(self, api: EngineApi) -> None:
        self._api = api

    async def open(self, handle: Handle, spec: ExecSpec) -> EngineExecSession:
        """Start the command. A missing program starts too: its output is the engine's message, its exit code 126 or
        127.

        Raises InstanceError EXEC_FAILED, UnavailableError ENGINE_UNAVAILABLE."""

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
        except BaseException:  # the command may already run
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
        """Start the command. `EngineExec.open` calls this within its deadline."""
        await self._stream._init()

    async def read(self) -> ExecOutput | None:
        if not self._unread:
            try:
                message = await self._stream.read_out()
            except (aiohttp.ClientError, OSError):
                # The connection of a command that left input unread breaks; `exit_code` asks the engine.
                message = None
            if message is None:
                return None
            data, is_error = bytes(message.data), message.stream == STDERR
            starts = range(0, len(data), CHUNK_BYTES)
            self._unread = [ExecOutput(data[start : start + CHUNK_BYTES], is_error) for start in starts]
        return self._unread.pop(0) if self._unread else ExecOutput(b"")

    async def write(self, data: bytes) -> None:
        """Wait until the engine accepts `data`; input for a command that has ended is dropped."""
        if self._transport() is not None:
            with suppress(aiohttp.ClientError, OSError):  # the command or the engine has ended: `read` reports it
                await self._stream.write_in(data)

    async def close_input(self) -> None:
        """Half-close the connection: the command reads end of input."""
        transport = self._transport()
        if transport is not None and transport.can_write_eof():
            transport.write_eof()

    def _transport(self) -> Any:
        """The connection's transport; its class depends on the event loop."""
        response = self._stream._resp
        connection = response.connection if response is not None else None
        transport = connection.transport if connection is not None else None
        return None if transport is None or transport.is_closing() else transport

    async def resize(self, columns: int, rows: int) -> None:
        """Resize the terminal; ignored for a command that has ended."""
        with suppress(EngineError):
            await self._api.call(lambda _docker: self._exec.resize(h=rows, w=columns), CLOSE_DEADLINE_S)

    async def exit_code(self) -> int:
        """The exit code, once the output has ended; polls, because the engine notices the end late. 137 (killed) if the
        container and the engine's record of the command are gone."""
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
        raise InstanceError("EXEC_FAILED", "its output has ended, but the engine does not report its exit code")

    async def _inspect(self) -> dict[str, Any]:
        return await self._api.call(lambda _docker: self._exec.inspect(), CLOSE_DEADLINE_S)

    async def _leader(self) -> int:
        """The command's host pid, 0 if it has ended. Polls: Docker forwards the first output before it records the
        pid."""
        for _ in range(INSPECT_ATTEMPTS):
            found = await self._inspect()
            if not found.get("Running"):
                return 0
            if pid := int(found.get("Pid") or 0):
                return pid
            await asyncio.sleep(INSPECT_PAUSE_S)
        raise InstanceError("EXEC_FAILED", "the engine does not report the pid of a running command")

    async def close(self) -> None:
        """Kill the command and all descendants in its session: the engine would let them run on after the client
        leaves."""
        if self._closed:
            return
        self._closed = True
        try:
            leader = await self._leader()
            if leader:
                await asyncio.to_thread(_kill_session, self._cgroup, leader)
        except EngineError as error:
            if not error.not_found:  # 404: the container and its command are gone
                log.warning("exec.close_failed", container=self._cgroup.name, error=str(error))
        except (HibernodeError, OSError) as error:
            log.warning("exec.close_failed", container=self._cgroup.name, error=str(error))
        finally:
            with suppress(aiohttp.ClientError, OSError, AssertionError):
                await self._stream.close()


def _stream(execution: Exec, spec: ExecSpec) -> Stream:
    """A stream like `Exec.start`, but with the terminal size from the start: ConsoleSize for Docker (API 1.42 on), h
    and w for Podman. On older engines the terminal has no size until the following resize."""

    async def setup() -> tuple[URL, bytes, bool]:
        size = {"ConsoleSize": [spec.rows, spec.columns], "h": spec.rows, "w": spec.columns} if spec.terminal else {}
        body = {"Detach": False, "Tty": spec.terminal, **size}
        return URL(f"exec/{execution.id}/start"), json.dumps(body).encode(), spec.terminal

    return Stream(execution.docker, setup, aiohttp.ClientTimeout(sock_connect=CLOSE_DEADLINE_S))


@contextmanager
def _failures() -> Iterator[None]:
    """Turn the engine's refusals into EXEC_FAILED."""
    try:
        yield
    except EngineError as error:
        text = f"the command can't be run in the container: {error.text}"
        raise InstanceError("EXEC_FAILED", text, status=error.status) from error


def _kill_session(cgroup_path: Path, leader: int) -> None:
    """SIGKILL the container's processes in this session (each command leads its own). Only pids listed in the cgroup
    are signalled, so a reused pid is never hit."""
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
