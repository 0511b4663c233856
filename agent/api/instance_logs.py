"""GetInstanceLogs: the end of an instance's output, and with `follow` further output until the instance has ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from agent.core.errors import NotFoundError
from agent.core.types import Handle
from agent.host.instance.actor import Actor
from agent.host.node.stream_limits import StreamLimits
from agent.ports import Runtime
from agent.v1 import instance_service_pb2 as pb

CHUNK_BYTES = 64 * 1024
MAX_BYTES = 8 * 1024 * 1024
MAX_FOLLOWERS = 32
MAX_FOLLOW_S = 86_400.0
CONTAINER_POLL_S = 0.2


class InstanceLogs:
    """Reads logs through `runtime`. `close` ends followers with an error when the agent stops."""

    def __init__(self, runtime: Runtime, *, max_followers: int = MAX_FOLLOWERS, max_s: float = MAX_FOLLOW_S) -> None:
        self._runtime = runtime
        self._followers = StreamLimits("followed logs (`hibernode logs -f`)", max_followers, max_s)

    @property
    def followers(self) -> int:
        """Number of open followers."""
        return self._followers.open

    async def read(
        self, actor: Actor, tail_bytes: int, tail_lines: int | None = None
    ) -> AsyncGenerator[pb.GetInstanceLogsResponse, None]:
        """The last `tail_bytes` of the log (0: all of it), at most 8 MiB, and of these the last `tail_lines` lines;
        nothing before a container exists.

        Raises NotFoundError LOG_NOT_FOUND, and the runtime's errors.
        """
        if actor.handle_of_container is None:
            return
        data = await self._read(actor, actor.handle_of_container, tail_bytes)
        for chunk in _chunks(data[_start_of(data, tail_lines) :]):
            yield chunk

    async def follow(
        self, actor: Actor, tail_bytes: int, tail_lines: int | None = None
    ) -> AsyncGenerator[pb.GetInstanceLogsResponse, None]:
        """As `read`, then further output until the instance has ended; goes on while it is frozen. With `tail_lines`
        output that is written at the very beginning may shift the first line.

        Raises the errors of `read` and of `StreamLimits.admit`.
        """
        async with self._followers.admit():
            while actor.handle_of_container is None:
                if actor.state.terminal:
                    return
                await asyncio.sleep(CONTAINER_POLL_S)  # its image is being pulled, or it waits for a GPU
            size = _bounded(tail_bytes)
            if tail_lines is not None:
                data = await self._read(actor, actor.handle_of_container, tail_bytes)
                size = len(data) - _start_of(data, tail_lines)
            parts = self._runtime.follow_log(actor.handle_of_container, size)
            try:
                async with aclosing(parts):
                    async for part in parts:
                        for chunk in _chunks(part):
                            yield chunk
            except OSError as error:
                raise _unreadable(actor, error) from error

    async def _read(self, actor: Actor, handle: Handle, tail_bytes: int) -> bytes:
        try:
            return await self._runtime.read_log(handle, _bounded(tail_bytes))
        except OSError as error:
            raise _unreadable(actor, error) from error

    async def close(self) -> None:
        """Ends all followers."""
        await self._followers.close()


def _bounded(tail_bytes: int) -> int:
    return min(tail_bytes, MAX_BYTES) if tail_bytes > 0 else MAX_BYTES


def _start_of(data: bytes, lines: int | None) -> int:
    """Where the last `lines` lines begin; the end of the last one may be missing still."""
    if lines is None:
        return 0
    at = len(data) - data.endswith(b"\n")
    for _ in range(lines):
        at = data.rfind(b"\n", 0, at)
        if at < 0:
            return 0
    return at + 1 if lines > 0 else len(data)


def _chunks(data: bytes) -> list[pb.GetInstanceLogsResponse]:
    starts = range(0, len(data), CHUNK_BYTES)
    return [pb.GetInstanceLogsResponse(data=data[start : start + CHUNK_BYTES]) for start in starts]


def _unreadable(actor: Actor, error: OSError) -> NotFoundError:
    return NotFoundError("LOG_NOT_FOUND", f"the log of {actor.uid} cannot be read: {error.strerror or error}")
