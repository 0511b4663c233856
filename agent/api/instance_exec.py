"""ExecInstance: a bidirectional stream between a caller and a command inside an instance.

Nothing is queued: the next input is read from the caller once the engine has taken the previous one, the next output
from the engine once the caller has. A slow side slows the other down.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator

from agent.core.errors import DeadlineError, InvalidArgumentError
from agent.host.node.exec_sessions import ExecSessions
from agent.ports import ExecOutput, ExecSession, ExecSpec
from agent.v1 import instance_service_pb2 as pb

START_DEADLINE_S = 10.0
CLOSE_TIMEOUT_S = 5.0
MAX_WORDS = 1000
MAX_COMMAND_BYTES = 64 * 1024
MAX_INPUT_BYTES = 64 * 1024
MAX_USER_CHARS = 100
MAX_SIDE = 10_000
DEFAULT_COLUMNS, DEFAULT_ROWS = 80, 24


async def exec_instance(
    sessions: ExecSessions,
    requests: AsyncIterator[pb.ExecInstanceRequest],
    caller: str,
    start_deadline_s: float = START_DEADLINE_S,
) -> AsyncGenerator[pb.ExecInstanceResponse, None]:
    """The answers to `requests`, the first of which is `start`. Closing the generator ends the command.

    Raises InvalidArgumentError for an invalid step, DeadlineError EXEC_NOT_STARTED, and the errors of
    `ExecSessions.open`.
    """
    messages = aiter(requests)
    start = await _start(messages, start_deadline_s)
    feeding: asyncio.Task[None] | None = None
    try:
        async with sessions.open(start.uid, exec_spec(start), wake=start.wake, caller=caller) as running:
            feeding = asyncio.create_task(_feed(messages, running.session), name=f"exec input {start.uid}")
            yield pb.ExecInstanceResponse(output=b"")
            while (output := await _next(running.session, feeding)) is not None:
                if output.data:
                    yield _response(output)
            running.exit_code = await running.session.exit_code()
        yield pb.ExecInstanceResponse(exit_code=running.exit_code)
        # The caller closes the stream. If this side did, gRPC would fail a call whose caller is sending just now, and
        # the exit code would be lost.
        await asyncio.wait([feeding], timeout=CLOSE_TIMEOUT_S)
    finally:
        if feeding is not None:
            feeding.cancel()
            await asyncio.gather(feeding, return_exceptions=True)


def _response(output: ExecOutput) -> pb.ExecInstanceResponse:
    if output.is_error:
        return pb.ExecInstanceResponse(error_output=output.data)
    return pb.ExecInstanceResponse(output=output.data)


async def _start(messages: AsyncIterator[pb.ExecInstanceRequest], deadline_s: float) -> pb.ExecInstanceRequest.Start:
    try:
        async with asyncio.timeout(deadline_s):
            first = await anext(messages, None)
    except TimeoutError:
        raise DeadlineError("EXEC_NOT_STARTED", f"no `start` came within {deadline_s:g} s") from None
    if first is None or first.WhichOneof("step") != "start":
        raise InvalidArgumentError("EXEC_NOT_STARTED", "the first request of an exec must be `start`")
    return first.start


def exec_spec(start: pb.ExecInstanceRequest.Start) -> ExecSpec:
    """The command to run. Raises InvalidArgumentError COMMAND_INVALID, USER_INVALID, TERMINAL_INVALID."""
    command = tuple(start.command)
    if not command or not command[0] or len(command) > MAX_WORDS:
        raise InvalidArgumentError("COMMAND_INVALID", f"a command has 1 to {MAX_WORDS} words, the first not empty")
    if sum(len(word.encode()) for word in command) > MAX_COMMAND_BYTES:
        raise InvalidArgumentError("COMMAND_INVALID", f"a command has at most {MAX_COMMAND_BYTES >> 10} KiB")
    if any("\0" in word for word in command):
        raise InvalidArgumentError("COMMAND_INVALID", "no word of a command can hold a NUL")
    if len(start.user) > MAX_USER_CHARS or not start.user.isprintable():
        raise InvalidArgumentError("USER_INVALID", "a user is NAME or UID, or USER:GROUP")
    if not start.HasField("terminal"):
        return ExecSpec(command, user=start.user)
    columns, rows = _size(start.terminal)
    return ExecSpec(command, terminal=True, columns=columns, rows=rows, user=start.user)


def _size(size: pb.ExecInstanceRequest.TerminalSize) -> tuple[int, int]:
    """Columns and rows; defaults for 0, which a terminal of unknown size reports."""
    if not (0 <= size.columns <= MAX_SIDE and 0 <= size.rows <= MAX_SIDE):
        raise InvalidArgumentError("TERMINAL_INVALID", f"a terminal has at most {MAX_SIDE} columns and rows")
    return size.columns or DEFAULT_COLUMNS, size.rows or DEFAULT_ROWS


async def _feed(messages: AsyncIterator[pb.ExecInstanceRequest], session: ExecSession) -> None:
    """Passes the caller's steps on, one after another; the end of the caller's stream closes the input."""
    async for message in messages:
        match message.WhichOneof("step"):
            case "input":
                if len(message.input) > MAX_INPUT_BYTES:
                    raise InvalidArgumentError("INPUT_TOO_LARGE", f"send at most {MAX_INPUT_BYTES >> 10} KiB at once")
                await session.write(message.input)
            case "end_of_input":
                await session.close_input()
            case "resize":
                await session.resize(*_size(message.resize))
            case _:
                raise InvalidArgumentError("EXEC_STEP_UNKNOWN", "after `start` come input, end_of_input and resize")
    await session.close_input()


async def _next(session: ExecSession, feeding: asyncio.Task[None]) -> ExecOutput | None:
    """The next output. Raises the error of `feeding` if that fails first."""
    reading = asyncio.ensure_future(session.read())
    try:
        if not feeding.done():
            await asyncio.wait({reading, feeding}, return_when=asyncio.FIRST_COMPLETED)
        if feeding.done():
            feeding.result()
        return await reading
    finally:
        if not reading.done():
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
