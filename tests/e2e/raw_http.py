"""Raw HTTP bytes, for requests that no client library would send."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

DEADLINE_S = 30.0


@dataclass(frozen=True, slots=True)
class RawAnswer:
    """An answer after which the connection was closed. Names in `headers` are lower-case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def code(self) -> str:
        """`Code` of an error's JSON, after checking its shape."""
        return error_code(self.body, self.headers)


def error_code(body: bytes, headers: dict[str, str]) -> str:
    """`Code` of an error body (agent/docs/fc-contract.md), after checking its request id against the header."""
    found: dict[str, Any] = json.loads(body)
    assert set(found) == {"RequestId", "Code", "Message"}, found
    assert found["RequestId"] == headers["x-fc-request-id"]
    assert found["Message"], "an error says what is wrong"
    return str(found["Code"])


async def ask_raw(address: str, request: bytes) -> RawAnswer:
    """Send `request`, after which the server must close the connection, and read the whole answer."""
    async with connection(address) as (reader, writer), asyncio.timeout(DEADLINE_S):
        writer.write(request)
        head, _, body = (await reader.read(-1)).partition(b"\r\n\r\n")
    status_line, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return RawAnswer(int(status_line.split()[1]), headers, _unchunked(body) if _is_chunked(headers) else body)


@asynccontextmanager
async def connection(address: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A TCP connection to `host:port`, closed at the end in any state."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield reader, writer
    finally:
        writer.close()


def _is_chunked(headers: dict[str, str]) -> bool:
    return headers.get("transfer-encoding", "") == "chunked"


def _unchunked(body: bytes) -> bytes:
    whole = b""
    while True:
        size, _, body = body.partition(b"\r\n")
        if not int(size, 16):
            return whole
        whole, body = whole + body[: int(size, 16)], body[int(size, 16) + 2 :]
