"""Commands inside a running container: the engine's exec, a stream of its own that was an HTTP request once."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress
from typing import Any

import aiodocker
import aiohttp
from aiodocker.execs import Exec
from aiodocker.stream import Stream

from agent.adapters import process_table
from agent.adapters.cgroup import parse_membership
from agent.adapters.engine_api import EngineApi, EngineError
from agent.core.errors import HibernodeError, InstanceError
from agent.log import get_logger
from agent.ports import ExecOutput, ExecSpec

STDERR = 2
CLOSE_DEADLINE_S = 5.0
NOT_FOUND, NOT_EXECUTABLE = 127, 126
"""What engines answer as exit code where the command can't be run."""

log = get_logger()


class EngineExec:
    """Opens sessions through `api`."""

    def __init__(self, api: EngineApi) -> None:
        self._api = api

    async def open(self, container_id: str, spec: ExecSpec) -> EngineExecSession:
        """Start the command. Raises InstanceError EXEC_FAILED, UnavailableError ENGINE_UNAVAILABLE."""

        async def begin(docker: aiodocker.Docker) -> tuple[Exec, Stream]:
            container = docker.containers.container(container_id)
            made = await container.exec(
                list(spec.command), stdin=True, stdout=True, stderr=True, tty=spec.terminal, user=spec.user
            )
            stream = made.start(detach=False)
            await stream._init()
            return made, stream

        try:
            made, stream = await self._api.call(begin)
        except EngineError as error:
            raise InstanceError(
                "EXEC_FAILED", f"the command can't be run inside: {error.text}", status=error.status
            ) from error
        session = EngineExecSession(self._api, made, stream, container_id)
        if spec.terminal:
            await session.resize(spec.columns, spec.rows)
        return session


class EngineExecSession:
    """Implements `ports.ExecSession`."""

    def __init__(self, api: EngineApi, made: Exec, stream: Stream, container_id: str) -> None:
        self._api = api
        self._exec = made
        self._stream = stream
        self._container_id = container_id
        self._closed = False

    async def read(self) -> ExecOutput | None:
        with self._api.errors():
            message = await self._stream.read_out()
        return None if message is None else ExecOutput(bytes(message.data), message.stream == STDERR)

    async def write(self, data: bytes) -> None:
        with self._api.errors():
            await self._stream.write_in(data)

    async def close_input(self) -> None:
        """Half of the connection is closed: the command reads its end of input."""
        transport = self._transport()
        if transport is not None and transport.can_write_eof():
            transport.write_eof()

    def _transport(self) -> asyncio.WriteTransport | None:
        response = self._stream._resp
        connection = response.connection if response is not None else None
        found: Any = connection.transport if connection is not None else None
        return found if isinstance(found, asyncio.WriteTransport) else None

    async def resize(self, columns: int, rows: int) -> None:
        """Of its terminal; a command that has just ended has none any more."""
        with suppress(EngineError):
            await self._api.call(lambda _docker: self._exec.resize(h=rows, w=columns))

    async def exit_code(self) -> int:
        """After its output has ended; the engine may take a moment to notice the end."""
        for _ in range(50):
            found = await self._inspect()
            if not found.get("Running"):
                return int(found.get("ExitCode") or 0)
            await asyncio.sleep(0.1)
        raise InstanceError("EXEC_FAILED", "its output has ended, but the engine does not tell how it ended")

    async def _inspect(self) -> dict[str, Any]:
        return await self._api.call(lambda _docker: self._exec.inspect(), CLOSE_DEADLINE_S)

    async def close(self) -> None:
        """End it: an engine leaves a command running whose caller has gone, so it is killed by its pid."""
        if self._closed:
            return
        self._closed = True
        try:
            found = await self._inspect()
            if found.get("Running") and found.get("Pid"):
                self._kill(int(found["Pid"]))
        except (HibernodeError, OSError) as error:
            log.warning("exec.close_failed", container=self._container_id[:12], error=str(error))
        finally:
            with suppress(aiohttp.ClientError, OSError, AssertionError):
                await self._stream.close()

    def _kill(self, pid: int) -> None:
        """SIGKILL, if that pid is a process of the container: nobody else's number is signalled."""
        process = process_table.identify(pid, process_table.boot_id())
        pidfd = process_table.open_pidfd(process, process.boot_id) if process else None
        if pidfd is None:
            return
        try:
            with open(f"/proc/{pid}/cgroup", encoding="utf-8") as file:
                if self._container_id in parse_membership(file.read()).get("", ""):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        except (FileNotFoundError, ProcessLookupError):
            return
        finally:
            os.close(pidfd)
