"""`hibernode exec`: runs a command inside an instance, with or without a terminal."""

from __future__ import annotations

import asyncio
import sys
from contextlib import ExitStack, suppress
from dataclasses import dataclass

import click

from agent.cli.console.log_text import OutputWriter
from agent.cli.console.output import note
from agent.cli.console.progress import progress
from agent.cli.console.terminal import ended_by_signals, raw_mode, read_some, size_changes, size_of
from agent.cli.daemon_calls import with_agent
from agent.cli.options import agent_options
from agent.core.errors import HibernodeError, UnavailableError
from agent.exit_codes import ExitCode, exit_of
from agent.v1 import instance_service_pb2 as pb
from agent.wire.clients import DaemonChannel, ExecStream

EXEC_FAILED = 125
"""As with docker: the command did not run, or its exit code is unknown."""
SIGNAL_BASE = 128

Step = pb.ExecInstanceRequest


@dataclass(frozen=True, slots=True)
class ExecOptions:
    """Arguments and options of the command."""

    uid: str
    command: tuple[str, ...]
    interactive: bool
    terminal: bool
    wake: bool
    user: str


@click.command("exec", context_settings={"allow_interspersed_args": False})
@click.option("--interactive", "-i", is_flag=True, help="Pass stdin to the command; otherwise it is empty.")
@click.option("--tty", "-t", "terminal", is_flag=True, help="Run the command on a terminal, connected to yours.")
@click.option("--wake", is_flag=True, help="Wake a frozen instance first; this may take a GPU from another one.")
@click.option("--user", "-u", default="", metavar="USER[:GROUP]", help="Run as this user; default: the container's.")
@agent_options
@click.argument("uid")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="[--] COMMAND [ARGUMENT]...")
def exec_(uid: str, command: tuple[str, ...], interactive: bool, terminal: bool, wake: bool, user: str) -> None:
    """Run a command inside an instance's container and exit with the command's exit code.

    The instance is not frozen while the command runs. A frozen instance is refused (exit 4) unless --wake is given.
    Ctrl-C without -t, or a lost connection, ends the command. The command does not run in a shell; start one explicitly
    if you need it.

    Exit codes: the command's own; 128+N if signal N ended it; 126 or 127 if the image can't run it or has no such
    program. Of this program: 2 usage, 3 no such instance, 4 instance frozen or not running, 5 agent or engine
    unavailable, 125 any other error; stderr then has a line that begins "hibernode:".

    With -t the command controls your terminal. Without it, control characters other than colours are shown as `?` on a
    terminal, and a pipe gets every byte.

    \b
    Examples:
      hibernode exec -it i-3f9a -- sh
      hibernode exec --wake i-3f9a -- nvidia-smi
      hibernode exec -i i-3f9a -- tar -xf - -C /tmp < files.tar
    """
    command = command[1:] if command[0] == "--" else command
    if not command:
        raise click.UsageError("name the command to run, as in `hibernode exec UID -- ls`")
    if terminal and not sys.stdin.isatty():
        raise click.UsageError("-t needs a terminal on stdin; leave it out (-i alone passes stdin on)")
    options = ExecOptions(uid, command, interactive, terminal, wake, user)
    try:
        code = with_agent(lambda channel: _run(channel, options), "")
    except HibernodeError as error:
        if exit_of(error) is not ExitCode.UNEXPECTED:
            raise
        note(f"hibernode: {error.message} ({error.reason})")
        code = EXEC_FAILED
    click.get_current_context().exit(code)


async def _run(channel: DaemonChannel, options: ExecOptions) -> int:
    """The exit code."""
    stream = channel.exec_instance()
    with ended_by_signals() as signals:
        try:
            return await _session(stream, options)
        except asyncio.CancelledError:
            if not signals:
                raise
            return SIGNAL_BASE + signals[0]
        finally:
            stream.close()


async def _session(stream: ExecStream, options: ExecOptions) -> int:
    start = Step.Start(uid=options.uid, command=options.command, user=options.user, wake=options.wake)
    if options.terminal:
        start.terminal.CopyFrom(_own_size())
    async with progress(f"starting {options.command[0]} in {options.uid}"):
        await stream.send(Step(start=start))
        first = await _next(stream)  # sent when the command runs, even without output
    with ExitStack() as stack:
        if options.terminal:
            stack.enter_context(raw_mode(sys.stdin.fileno()))
        sending = asyncio.create_task(_send(stream, options))
        try:
            return await _receive(stream, first, raw=options.terminal)
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)


async def _receive(stream: ExecStream, step: pb.ExecInstanceResponse, *, raw: bool) -> int:
    """Writes the output until the exit code arrives, and returns that."""
    out, err = OutputWriter(sys.stdout, raw=raw), OutputWriter(sys.stderr, raw=raw)
    while True:
        match step.WhichOneof("step"):
            case "output":
                out.write(step.output)
            case "error_output":
                err.write(step.error_output)
            case "exit_code":
                out.end()
                err.end()
                return step.exit_code
            case _:
                pass  # sent by a newer agent
        step = await _next(stream)


async def _next(stream: ExecStream) -> pb.ExecInstanceResponse:
    step = await stream.receive()
    if step is None:
        raise UnavailableError("ANSWER_CUT", "the agent ended the session without an exit code; see its log")
    return step


async def _send(stream: ExecStream, options: ExecOptions) -> None:
    """Sends input and terminal sizes until they or the stream end; `_receive` reports why a stream ended."""
    one_at_a_time = asyncio.Lock()

    async def send(step: Step) -> None:
        async with one_at_a_time:
            await stream.send(step)

    async def sizes() -> None:
        with size_changes() as changed:
            while True:
                await send(Step(resize=_own_size()))
                await changed.wait()
                changed.clear()

    async def inputs() -> None:
        if options.interactive:
            while data := await read_some(sys.stdin.fileno()):
                await send(Step(input=data))
        if not options.terminal:
            await send(Step(end_of_input=True))

    with suppress(HibernodeError):
        await asyncio.gather(inputs(), *([sizes()] if options.terminal else []))


def _own_size() -> pb.ExecInstanceRequest.TerminalSize:
    columns, rows = size_of(sys.stdin.fileno())
    return Step.TerminalSize(columns=columns, rows=rows)
