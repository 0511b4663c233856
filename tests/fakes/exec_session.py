"""A command inside a fake container: the test sets its output and end, and reads its input."""

from __future__ import annotations

import asyncio

from agent.ports import ExecOutput, ExecSpec


class FakeExecSession:
    """Implements `ports.ExecSession`. `writes` holds a permit for each write that is taken (all, by default)."""

    def __init__(self, spec: ExecSpec) -> None:
        self.spec = spec
        self.given = bytearray()
        self.sizes = [(spec.columns, spec.rows)] if spec.terminal else []
        self.input_ended = asyncio.Event()
        self.resized = asyncio.Event()
        self.closed = asyncio.Event()
        self.writes: asyncio.Semaphore | None = None
        self._said: asyncio.Queue[ExecOutput | None] = asyncio.Queue()
        self._code = 0

    # ---- knobs ------------------------------------------------------------------------------------------------------

    def say(self, data: bytes, *, is_error: bool = False) -> None:
        self._said.put_nowait(ExecOutput(data, is_error))

    def end(self, code: int) -> None:
        self._code = code
        self._said.put_nowait(None)

    # ---- the port ---------------------------------------------------------------------------------------------------

    async def read(self) -> ExecOutput | None:
        return await self._said.get()

    async def write(self, data: bytes) -> None:
        if self.writes:
            await self.writes.acquire()
        self.given += data

    async def close_input(self) -> None:
        self.input_ended.set()

    async def resize(self, columns: int, rows: int) -> None:
        self.sizes.append((columns, rows))
        self.resized.set()

    async def exit_code(self) -> int:
        return self._code

    async def close(self) -> None:
        self.closed.set()
