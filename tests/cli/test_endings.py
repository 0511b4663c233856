"""Exit codes and output: colour, pipes, Ctrl-C, unexpected errors."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
from collections.abc import Iterator

import click
import pytest

from agent.cli import main as entry
from agent.core import errors
from agent.exit_codes import ExitCode, exit_of, exit_of_http
from tests.cli.conftest import Run


def on_terminal(program: list[str], environment: dict[str, str]) -> str:
    """The program's output on a terminal."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(program, env=environment, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        written = b"".join(_until_closed(ours))
        assert process.wait(timeout=20) == 0
    os.close(ours)
    return written.decode()


def _until_closed(descriptor: int) -> Iterator[bytes]:
    while True:
        try:
            data = os.read(descriptor, 65536)
        except OSError:  # the other side is closed
            return
        if not data:
            return
        yield data


@pytest.mark.parametrize(
    ("variables", "colourful"),
    [
        ({"TERM": "xterm-256color"}, True),
        ({"TERM": "xterm-256color", "NO_COLOR": "1"}, False),
        ({"TERM": "dumb"}, False),
    ],
    ids=["colour", "NO_COLOR", "dumb"],
)
def test_colour_only_on_a_terminal_that_supports_it(
    program: list[str], environment: dict[str, str], variables: dict[str, str], colourful: bool
) -> None:
    plain = {key: value for key, value in environment.items() if key not in ("NO_COLOR", "FORCE_COLOR", "COLORTERM")}
    shown = on_terminal([*program, "ps"], {**plain, "COLUMNS": "200", **variables})
    assert "i-cold" in shown
    assert ("\x1b[3" in shown) is colourful


def test_no_colour_in_a_pipe_even_if_forced(at_home: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b" not in at_home("ps").out


def test_closed_pipe_is_no_error(program: list[str], environment: dict[str, str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [*program, "ps"],
            env=environment,
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            timeout=30,
            check=False,
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_ctrl_c_is_exit_130(program: list[str], environment: dict[str, str]) -> None:
    with subprocess.Popen(
        [*program, "wake", "i-stuck"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        first = process.stderr.readline()  # it is waiting for the agent
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait(timeout=20) == 130
    assert first == "waking i-stuck ... (1 s)\n"
    assert rest.strip() == "hibernode: interrupted"


def test_unexpected_error_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    def broken() -> None:
        raise LookupError("shelf 7")

    monkeypatch.setattr(entry.cli, "get_command", lambda _context, _name: broken)
    done = run("ps")
    assert (done.code, done.err) == (1, "hibernode: unexpected LookupError: shelf 7; HIBERNODE_DEBUG=1 shows where\n")
    monkeypatch.setenv("HIBERNODE_DEBUG", "1")
    with pytest.raises(LookupError):
        entry.main(["ps"])


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.InvalidArgumentError, 2),
        (errors.ConfigError, 2),
        (errors.NotFoundError, 3),
        (errors.UnauthenticatedError, 4),
        (errors.PermissionDeniedError, 4),
        (errors.ConflictError, 4),
        (errors.PreconditionError, 4),
        (errors.UnsupportedError, 4),
        (errors.ExhaustedError, 5),
        (errors.UnavailableError, 5),
        (errors.DeadlineError, 5),
        (errors.InstanceError, 1),
        (errors.HibernodeError, 1),
    ],
)
def test_exit_code_of_every_kind_of_error(kind: type[errors.HibernodeError], code: int) -> None:
    """As documented in agent/core/errors.py."""
    assert exit_of(kind("REASON", "what to do")) == code
    assert kind is errors.HibernodeError or kind is errors.ConfigError or f"exit {code}." in (kind.__doc__ or "")


@pytest.mark.parametrize(
    ("status", "code"),
    [(200, 0), (304, 0), (400, 2), (413, 2), (403, 4), (404, 3), (429, 5), (500, 1), (502, 1), (503, 5), (504, 5)],
)
def test_exit_code_of_an_answer(status: int, code: int) -> None:
    assert exit_of_http(status) is ExitCode(code)
