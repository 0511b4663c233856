"""GetInstanceLogs: the end of an instance's output, and with `follow` what comes until it has ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from agent.core.errors import NotFoundError
from agent.host.instance.actor import Actor
from agent.host.node.stream_limits import StreamLimits
from agent.ports import Runtime
from agent.v1 import instance_service_pb2 as pb

CHUNK_BYTES = 64 * 1024
MAX_BYTES = 8 * 1024 * 1024
MAX_FOLLOWERS = 32
LONGEST_S = 86_400.0
CONTAINER_LOOK_S = 0.2


class InstanceLogs:
    """Reads through `runtime`. `close` when the agent leaves: who follows is told."""

    def __init__(self, runtime: Runtime, *, most: int = MAX_FOLLOWERS, longest_s: float = LONGEST_S) -> None:
        self._runtime = runtime
        self._followers = StreamLimits("followed logs (`hibernode logs -f`)", most, longest_s)

    @property
    def followers(self) -> int:
        """How many follow a log now."""
        return self._followers.open

    async def read(self, actor: Actor, tail_bytes: int) -> AsyncGenerator[pb.GetInstanceLogsResponse, None]:
        """The last `tail_bytes`, or all that is kept (0), at most 8 MiB. Nothing where no container was made yet.

        Raises NotFoundError LOG_NOT_FOUND, and as the runtime does.
        """
        if actor.handle_of_container is None:
            return
        try:
            data = await self._runtime.read_log(actor.handle_of_container, _bounded(tail_bytes))
        except OSError as error:
            raise _unreadable(actor, error) from error
        for chunk in _chunks(data):
            yield chunk

    async def follow(self, actor: Actor, tail_bytes: int) -> AsyncGenerator[pb.GetInstanceLogsResponse, None]:
        """The same, then what comes, until the instance has ended. A frozen one prints nothing, and is waited for.

        Raises as `read` does, and as `StreamLimits.admit` does.
        """
        async with self._followers.admit():
            while actor.handle_of_container is None:
                if actor.state.terminal:
                    return
                await asyncio.sleep(CONTAINER_LOOK_S)  # its image is being pulled, or it waits for a GPU
            parts = self._runtime.follow_log(actor.handle_of_container, _bounded(tail_bytes))
            try:
                async with aclosing(parts):
                    async for part in parts:
                        for chunk in _chunks(part):
                            yield chunk
            except OSError as error:
                raise _unreadable(actor, error) from error

    async def close(self) -> None:
        """End those who follow."""
        await self._followers.close()


def _bounded(tail_bytes: int) -> int:
    return min(tail_bytes, MAX_BYTES) if tail_bytes > 0 else MAX_BYTES


def _chunks(data: bytes) -> list[pb.GetInstanceLogsResponse]:
    starts = range(0, len(data), CHUNK_BYTES)
    return [pb.GetInstanceLogsResponse(data=data[start : start + CHUNK_BYTES]) for start in starts]


def _unreadable(actor: Actor, error: OSError) -> NotFoundError:
    return NotFoundError("LOG_NOT_FOUND", f"the log of {actor.uid} can't be read: {error.strerror or error}")
