"""`hibernode exec` and `logs -f` as programs: exit codes, pipes, terminals, signals."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent.cli.console.log_text import LogText
from agent.cli.console.output import clean_log
from tests.cli.conftest import Run
from tests.cli.console.test_terminal_attacks import ATTACKS
from tests.fakes.exec_story import STEERING
from tests.fakes.node_story import LOG, MORE_LOG

PATIENCE_S = 20.0


# ---- without a terminal ---------------------------------------------------------------------------------------------


def test_separate_outputs_and_exit_code(at_home: Run) -> None:
    done = at_home("exec", "i-run", "--", "say", "-l", "--user", "x")
    assert (done.code, done.out, done.err) == (0, "out -l --user x\n", "err\n")
    assert at_home("exec", "--user", "app:staff", "i-run", "say", "hi").out == "out hi app:staff\n"
    for code in (1, 3, 126, 137, 255):
        assert at_home("exec", "i-run", "exit", str(code)).code == code


@pytest.mark.parametrize(
    ("arguments", "code", "problem"),
    [
        (
            ("i-cold", "say"),
            4,
            "instance i-cold is frozen (FROZEN); add --wake to wake it first, which may take a GPU (INSTANCE_FROZEN)",
        ),
        (("i-nobody", "say"), 3, "INSTANCE_NOT_FOUND"),
        (("-u", "ghost", "i-run", "nobody"), 125, "unable to find user ghost (EXEC_FAILED)"),
        (("i-run", "lost"), 5, "AGENT_STOPPING"),
        (("i-run", "cut"), 5, "ANSWER_CUT"),
        (("i-run",), 2, "Missing argument"),
        (("i-run", "--"), 2, "name the command to run"),
        (("-t", "i-run", "keys"), 2, "-t needs a terminal on stdin; leave it out"),
    ],
)
def test_our_own_failures(
    at_home: Run, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], code: int, problem: str
) -> None:
    with open(os.devnull) as nothing:
        monkeypatch.setattr("sys.stdin", nothing)
        done = at_home("exec", *arguments)
    assert (done.code, done.out) == (code, "")
    assert problem in done.err


def test_frozen_instance_is_woken_with_the_option(at_home: Run) -> None:
    assert at_home("freeze", "i-chat").code == 0
    assert at_home("exec", "i-chat", "say").code == 4
    assert at_home("exec", "--wake", "i-chat", "say").code == 0
    assert at_home("exec", "i-chat", "say").code == 0


def test_no_agent(run: Run) -> None:
    assert run("exec", "--agent", "127.0.0.1:1", "i-run", "ls").code in (4, 5)


@pytest.mark.parametrize("size", [0, 11, 1_000_000])
def test_stdin_is_passed_from_a_pipe(program: list[str], environment: dict[str, str], size: int) -> None:
    given = os.urandom(size)
    done = subprocess.run(
        [*program, "exec", "-i", "i-run", "cat"],
        env=environment,
        input=given,
        capture_output=True,
        timeout=30,
        check=True,
    )
    assert done.stdout == given


def test_stdin_is_passed_from_a_file_or_empty(program: list[str], environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "given").write_bytes(b"x" * 200_000)
    for options, expected in (("-i",), b"x" * 200_000), ((), b""):
        with (tmp_path / "given").open("rb") as file:
            done = subprocess.run(
                [*program, "exec", *options, "i-run", "cat"],
                env=environment,
                stdin=file,
                capture_output=True,
                timeout=30,
                check=True,
            )
        assert done.stdout == expected


def test_closed_pipe_is_no_error(program: list[str], environment: dict[str, str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [*program, "exec", "i-run", "say"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=writing,
            stderr=subprocess.PIPE,
            timeout=30,
            check=False,
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_end_it(program: list[str], environment: dict[str, str], number: signal.Signals, code: int) -> None:
    with subprocess.Popen(
        [*program, "exec", "i-run", "hang"],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"hanging\n"
        process.send_signal(number)
        assert process.wait(timeout=PATIENCE_S) == code
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()


# ---- on a terminal --------------------------------------------------------------------------------------------------


class Terminal:
    """A terminal that runs the program. `modes`: the terminal modes."""

    def __init__(self, process: subprocess.Popen[bytes], ours: int, theirs: int) -> None:
        self.process = process
        self._ours = ours
        self._theirs = theirs
        self.seen = b""

    def modes(self) -> list[object]:
        return termios.tcgetattr(self._theirs)

    def until(self, text: bytes) -> None:
        ends = time.monotonic() + PATIENCE_S
        while text not in self.seen:
            assert select.select([self._ours], [], [], max(0.0, ends - time.monotonic()))[0], self.seen
            self.seen += os.read(self._ours, 65536)

    def type(self, keys: bytes) -> None:
        os.write(self._ours, keys)

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self._theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.process.send_signal(signal.SIGWINCH)

    def ended(self) -> int:
        return self.process.wait(timeout=PATIENCE_S)


@contextmanager
def on_terminal(program: list[str], environment: dict[str, str], *arguments: str) -> Iterator[tuple[Terminal, object]]:
    """The program on a terminal of 132 x 43, and the terminal's modes before it."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 43, 132, 0, 0))
    before = termios.tcgetattr(theirs)
    with subprocess.Popen(
        [*program, *arguments], env=environment, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    ) as process:
        try:
            yield Terminal(process, ours, theirs), before
        finally:
            process.kill()
            process.wait()
            os.close(ours)
            os.close(theirs)


def test_keys_and_sizes_are_passed_unchanged(program: list[str], environment: dict[str, str]) -> None:
    with on_terminal(program, environment, "exec", "-it", "i-run", "keys") as (terminal, before):
        terminal.until(b"<132x43>")
        assert terminal.modes() != before
        terminal.type(b"\x03\x1a\x04")  # Ctrl-C, Ctrl-Z, Ctrl-D
        terminal.until(b"031a04;")
        terminal.resize(80, 25)
        terminal.until(b"<80x25>")
        terminal.type(b"q")
        terminal.until(b"71;")
        assert terminal.ended() == 0
        assert terminal.modes() == before
        assert b"^C" not in terminal.seen, "nothing is echoed but by the program inside"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_terminal_is_restored_at_every_end(
    program: list[str], environment: dict[str, str], number: signal.Signals, code: int
) -> None:
    with on_terminal(program, environment, "exec", "-it", "i-run", "hang") as (terminal, before):
        terminal.until(b"hanging")
        assert terminal.modes() != before
        terminal.process.send_signal(number)
        assert terminal.ended() == code
        assert terminal.modes() == before


def test_terminal_is_restored_after_a_failure(program: list[str], environment: dict[str, str]) -> None:
    with on_terminal(program, environment, "exec", "-it", "i-run", "cut") as (terminal, before):
        terminal.until(b"ANSWER_CUT")
        assert terminal.ended() == 5
        assert terminal.modes() == before


def test_without_tty_nothing_controls_the_terminal(program: list[str], environment: dict[str, str]) -> None:
    with on_terminal(program, environment, "exec", "i-run", "steer") as (terminal, _before):
        terminal.until(b"red\x1b[0m")
        assert terminal.ended() == 0
        assert b"\x1b]0" not in terminal.seen
        assert terminal.seen.startswith(b"?]0;owned?\x1b[31mred")


# ---- logs -f --------------------------------------------------------------------------------------------------------


def test_followed_log_is_immediate_and_ends_with_ctrl_c(program: list[str], environment: dict[str, str]) -> None:
    with subprocess.Popen(
        [*program, "logs", "-f", "i-run", "--tail", "64KiB"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        lines = [process.stdout.readline() for _ in range(3)]
        assert lines == [b"Loading model\n", b"\xff not UTF-8\n", MORE_LOG]
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=PATIENCE_S) == 130
        assert process.stderr.read().strip() == b"hibernode: interrupted"


def test_a_followed_log_ends_with_its_instance(at_home: Run) -> None:
    done = at_home("logs", "--follow", "--tail", "9B", "i-dead")
    assert (done.code, done.out, done.err) == (0, "ot UTF-8\n", "")


def test_closed_pipe_ends_a_followed_log(program: list[str], environment: dict[str, str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [*program, "logs", "-f", "i-run"],
            env=environment,
            stdout=writing,
            stderr=subprocess.PIPE,
            timeout=30,
            check=False,
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("tail", ["-1", "1.5", "many", "1 GB", "0KiB", "٣"])
def test_a_tail_is_a_number_of_lines_or_a_size(run: Run, tail: str) -> None:
    done = run("logs", "i-run", "--tail", tail)
    assert done.code == 2
    assert "is neither a number of lines nor a size such as 64KiB" in done.err


@pytest.mark.parametrize(
    ("tail", "shown"),
    [("1", b"\xff not UTF-8\n"), ("2", LOG), ("9" * 30, LOG), ("all", LOG), ("0", b""), ("9B", LOG[-9:])],
)
def test_a_tail_counts_lines(program: list[str], environment: dict[str, str], tail: str, shown: bytes) -> None:
    done = subprocess.run([*program, "logs", "i-run", "--tail", tail], env=environment, capture_output=True, check=True)
    assert done.stdout == shown


@pytest.mark.parametrize("attack", [*ATTACKS.values(), "\x1b[1;32mINFO\x1b[0m\tepoch 1\r\n完 é\n", STEERING.decode()])
def test_text_is_cleaned_independent_of_its_pieces(attack: str) -> None:
    data = f"before {attack} after\n".encode()
    for cut in range(1, len(data)):
        text = LogText()
        shown = text.feed(data[:cut]) + text.feed(data[cut:]) + text.end()
        assert shown == clean_log(data), cut
    text = LogText()
    assert "".join(text.feed(bytes([one])) for one in data) + text.end() == clean_log(data)
