"""Reads container logs from the engine (json-file, rotated by the engine at `runtime.log_limit`).

The stream is a sequence of frames: one byte for the output, three zero bytes, a four-byte length, then that many bytes
(Docker Engine API, "Attach to a container", stream format). Both outputs stay mixed in the order they were written.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing

import aiodocker
import aiohttp

from agent.adapters.engine.api import EngineApi, EngineError

FRAME_HEADER_BYTES = 8
CHUNK_BYTES = 64 * 1024
READ_ATTEMPTS = 4
MAX_CONCURRENT_READS = 2
READ_PAUSE_S = 0.02
PARTIAL_LINE = "not a valid container log line"
"""Podman's error when it reads a line that is still being written."""
READ_DEADLINE_S = 30.0
BYTES_PER_LINE = 4
"""The engine counts lines, not bytes. Requesting one line per 4 bytes covers nearly every log; a log of shorter lines
yields fewer bytes than requested."""
MAX_LINES = 1_000_000


class EngineLogs:
    def __init__(self, api: EngineApi) -> None:
        self._api = api
        # Callers of a function can trigger log reads (x-fc-log-type); these must not block starts and removals.
        self._reads = asyncio.Semaphore(MAX_CONCURRENT_READS)

    async def read(self, container_id: str, tail_bytes: int) -> bytes:
        """The last `tail_bytes` bytes of both outputs. Buffers at most twice that.

        Raises EngineError (404: no such container), UnavailableError ENGINE_UNAVAILABLE."""
        if tail_bytes <= 0:
            return b""

        async def collect(docker: aiodocker.Docker) -> bytes:
            collected: deque[bytes] = deque()
            size = 0
            async with aclosing(_payloads(docker, container_id, _lines(tail_bytes), follow=False)) as payloads:
                async for payload in payloads:
                    collected.append(payload)
                    size += len(payload)
                    while size - len(collected[0]) >= tail_bytes:
                        size -= len(collected.popleft())
            return b"".join(collected)[-tail_bytes:]

        for _ in range(READ_ATTEMPTS - 1):
            try:
                return await self._read(collect)
            except EngineError as error:
                if PARTIAL_LINE not in error.text:
                    raise
            await asyncio.sleep(READ_PAUSE_S)
        return await self._read(collect)

    async def _read(self, collect: Callable[[aiodocker.Docker], Awaitable[bytes]]) -> bytes:
        """The deadline includes the wait for a free slot."""
        with self._api.errors():
            async with asyncio.timeout(READ_DEADLINE_S), self._reads:
                return await self._api.call(collect, READ_DEADLINE_S)

    async def follow(self, container_id: str, tail_bytes: int) -> AsyncGenerator[bytes, None]:
        """Yield about the last `tail_bytes` bytes, then new output until the container ends. Closing it closes the
        connection.

        The engine counts lines, so the tail is read first to find its number of lines; lines written between the two
        requests shift it. Raises as `read` does; UnavailableError also when the engine goes away midway."""
        last = await self.read(container_id, tail_bytes)
        lines = last.count(b"\n") + (not last.endswith(b"\n")) if len(last) >= tail_bytes > 0 else _lines(tail_bytes)
        async with (
            self._api.stream() as docker,
            aclosing(_payloads(docker, container_id, lines, follow=True)) as payloads,
        ):
            async for payload in payloads:
                for start in range(0, len(payload), CHUNK_BYTES):
                    yield payload[start : start + CHUNK_BYTES]


def _lines(tail_bytes: int) -> int:
    return min(MAX_LINES, max(1, tail_bytes // BYTES_PER_LINE)) if tail_bytes > 0 else 0


async def _payloads(
    docker: aiodocker.Docker, container_id: str, lines: int, *, follow: bool
) -> AsyncGenerator[bytes, None]:
    params = {"stdout": 1, "stderr": 1, "tail": lines, "follow": int(follow)}
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=READ_DEADLINE_S)
    async with (
        docker._query(f"containers/{container_id}/logs", params=params, timeout=timeout) as response,
        response,
    ):
        frames = Frames()
        async for received in response.content.iter_any():
            payload = frames.feed(received)
            if payload:
                yield payload


class Frames:
    """Strips the headers from a stream that arrives in chunks of any size. Buffers an incomplete header only."""

    def __init__(self) -> None:
        self._header = b""
        self._remaining = 0

    def feed(self, data: bytes) -> bytes:
        """The payload in `data`."""
        payload = bytearray()
        at = 0
        while at < len(data):
            if self._remaining:
                part = data[at : at + self._remaining]
                payload += part
                self._remaining -= len(part)
                at += len(part)
                continue
            missing = FRAME_HEADER_BYTES - len(self._header)
            self._header += data[at : at + missing]
            at += missing
            if len(self._header) == FRAME_HEADER_BYTES:
                self._remaining = int.from_bytes(self._header[4:], "big")
                self._header = b""
        return bytes(payload)
