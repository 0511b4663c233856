"""Commands "inside" the instances of the fake daemon: what they do is what they are called."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

from agent.api.instance_exec import exec_spec
from agent.core.errors import InstanceError, InvalidArgumentError, UnavailableError
from agent.v1.instance_service_pb2 import ExecInstanceRequest as Request
from agent.v1.instance_service_pb2 import ExecInstanceResponse as Response

STEERING = b"\x1b]0;owned\x07\x1b[31mred\x1b[0m\n"
SAID = {
    "say": (Response(output=b"out "), Response(error_output=b"err\n")),
    "steer": (Response(output=STEERING[:5]), Response(output=STEERING[5:])),
    "hang": (Response(output=b"hanging\n"),),
}


async def exec_story(
    requests: AsyncIterator[Request], enter: Callable[[Request.Start], None]
) -> AsyncIterator[Response]:
    """`say` prints to both outputs, `cat` what it is given until the end, `steer` what steers terminals, `exit N` ends
    with N, `keys` prints sizes and keys until q, `hang` says "hanging" and no more; some fail in their own ways."""
    messages = aiter(requests)
    first = await anext(messages, None)
    if first is None or first.WhichOneof("step") != "start":
        raise InvalidArgumentError("EXEC_NOT_STARTED", "the first request of an exec must be `start`")
    start = first.start
    exec_spec(start)
    enter(start)
    if start.command[0] == "nobody":
        raise InstanceError(
            "EXEC_FAILED", f"the command can't be run in the container: unable to find user {start.user}"
        )
    yield Response(output=b"")
    match start.command[0]:
        case "cut":
            await _end_of_input(messages)
            return
        case "lost":
            await _end_of_input(messages)
            raise UnavailableError("AGENT_STOPPING", "this node's agent is stopping")
        case "keys":
            async for answer in _keys(messages):
                yield answer
        case "cat":
            async for message in messages:
                if message.WhichOneof("step") == "end_of_input":
                    break
                yield Response(output=message.input)
        case name:
            for answer in SAID.get(name, ()):
                yield answer
            if name == "hang":
                await asyncio.Event().wait()
            if name == "say":
                yield Response(output=f"{' '.join(start.command[1:])} {start.user}".strip().encode() + b"\n")
    yield Response(exit_code=int(start.command[1]) if start.command[0] == "exit" else 0)
    with suppress(TimeoutError):  # the caller hangs up, as with the agent
        async with asyncio.timeout(5):
            async for _ in messages:
                pass


async def _end_of_input(messages: AsyncIterator[Request]) -> None:
    """gRPC loses the status of a call that ends while the caller is writing: he has said all before this one ends."""
    with suppress(TimeoutError):
        async with asyncio.timeout(5):
            async for message in messages:
                if message.WhichOneof("step") == "end_of_input":
                    return


async def _keys(messages: AsyncIterator[Request]) -> AsyncIterator[Response]:
    async for message in messages:
        if message.WhichOneof("step") == "resize":
            yield Response(output=f"<{message.resize.columns}x{message.resize.rows}>".encode())
            continue
        yield Response(output=message.input.hex().encode() + b";")
        if b"q" in message.input:
            return
