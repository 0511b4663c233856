"""Starts drivers and CUDA programs for the tests, with deadlines, and always ends them."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from agent.emulated.control import EmulatedDriver
from agent.emulated.env import exports
from agent.emulated.oplog import OpRecord

PROGRAM = Path(__file__).with_name("cuda_program.py")
NVML_PROGRAM = Path(__file__).with_name("nvml_program.py")
ROOT = Path(__file__).parents[3]
DEADLINE_S = 20.0
MIB = 1 << 20


def eventually(condition: Callable[[], bool], what: str) -> None:
    """Poll, with a deadline, for an effect of another process that sends no event."""
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, f"not within {DEADLINE_S} s: {what}"
        time.sleep(0.005)


class Lines:
    """Reads lines from a pipe with a deadline."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._buffer = b""
        self._selector = selectors.DefaultSelector()
        self._selector.register(fd, selectors.EVENT_READ)

    def waiting(self) -> bool:
        """Whether there is something to read. Reads nothing."""
        return b"\n" in self._buffer or bool(self._selector.select(0))

    def read(self, deadline_s: float = DEADLINE_S) -> bytes | None:
        """The next line; None at the deadline. Raises EOFError at the end."""
        end = time.monotonic() + deadline_s
        while b"\n" not in self._buffer:
            if not self._selector.select(max(0.0, end - time.monotonic())):
                return None
            data = os.read(self._fd, 1 << 16)
            if not data:
                raise EOFError
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def close(self) -> None:
        self._selector.close()


class CudaProgram:
    """Runs cuda_program.py, an application or checkpoint tool, or another script with the same protocol."""

    def __init__(self, environment: dict[str, str], wrapper: Sequence[str] = (), script: Path = PROGRAM) -> None:
        flags = ("-I", "-S") if script is PROGRAM else ()  # it needs no packages, and starts in half the time
        self.process = subprocess.Popen(
            [*wrapper, sys.executable, *flags, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._lines = Lines(self.process.stdout.fileno())
        self.pid = self.process.pid
        try:
            self.own_pid = int(self.receive()["pid"])
        except BaseException:
            self.close()
            raise

    def send(self, command: str, **arguments: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"command": command, **arguments}).encode() + b"\n")
        self.process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        line = self._lines.read()
        assert line is not None, "no answer in time"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def is_waiting(self) -> bool:
        """Whether no answer has arrived yet. Leaves an answer unread."""
        return not self._lines.waiting()

    def ask(self, command: str, **arguments: object) -> dict[str, Any]:
        self.send(command, **arguments)
        return self.receive()

    def must(self, command: str, **arguments: object) -> dict[str, Any]:
        answer = self.ask(command, **arguments)
        assert answer["rc"] == 0, f"{command} answered {answer}"
        return answer

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)

    def close(self) -> None:
        self.kill()
        self.process.wait(DEADLINE_S)
        self._lines.close()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()


class RunningDriver:
    """`hibernode emulated up` in its own directory, with the programs started on it."""

    def __init__(self, directory: Path, cache: Path, *arguments: str) -> None:
        self.directory = directory
        self.programs: list[CudaProgram] = []
        self.control = EmulatedDriver(directory)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "agent.cli.main", "emulated", "up", "--dir", str(directory), *arguments],
            stderr=subprocess.PIPE,
            cwd=ROOT,
            env={**os.environ, "XDG_CACHE_HOME": str(cache)},
        )
        assert self.process.stderr is not None
        lines = Lines(self.process.stderr.fileno())
        said: list[bytes] = []
        while not said or b"emulated.ready" not in said[-1]:
            line = lines.read()
            assert line is not None, "the driver did not get ready in time"
            said.append(line)
        lines.close()
        self._logged_before = 0

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, **exports(self.directory)}

    def program(self, *wrapper: str, **environment: str) -> CudaProgram:
        program = CudaProgram({**self.environment, **environment}, wrapper)
        self.programs.append(program)
        return program

    def application(self, device: int = 0, **environment: str) -> CudaProgram:
        """Start a program with a context on a GPU."""
        program = self.program(**environment)
        program.must("init")
        program.must("context", device=device)
        return program

    def tool(self) -> CudaProgram:
        """Start a program that has called cuInit and uses the checkpoint API."""
        program = self.program()
        program.must("init")
        return program

    def nvml(self) -> CudaProgram:
        """Start nvml_program.py."""
        program = CudaProgram(self.environment, script=NVML_PROGRAM)
        self.programs.append(program)
        return program

    def uuids(self) -> list[str]:
        """The NVML uuids of the GPUs."""
        return [device.uuid for device in self.control.devices()]

    def used_bytes(self, index: int = 0) -> int:
        return self.control.devices()[index].used_bytes

    def take_frozen_calls(self) -> list[tuple[str, int]]:
        """(op, pid) of the calls on frozen processes. A test that makes such calls must take them itself."""
        return [(call.op, call.pid) for call in self.control.take_frozen_calls()]

    def oplog(self) -> list[OpRecord]:
        """Operations since the test began."""
        return self.control.oplog(self._logged_before)

    def begin_test(self) -> None:
        """Reset to the state of a new driver: no programs, no counts."""
        self.close_programs()
        eventually(lambda: not self.control.processes(), "the last test's processes are released")
        self.control.set_latency()
        self.control.clear_faults()
        for uuid in self.uuids():
            self.control.reserve(uuid, 0)
            self.control.set_device(
                uuid, persistence=True, mig=False, compute_mode="DEFAULT", nvml_error=0, silent=False
            )
        self._logged_before = max((record.seq for record in self.control.oplog()), default=0)

    def close_programs(self) -> None:
        while self.programs:
            self.programs.pop().close()

    def end_test(self) -> None:
        self.close_programs()
        assert self.take_frozen_calls() == [], "calls were made on a frozen process"

    def close(self) -> None:
        self.close_programs()
        frozen_calls = self.take_frozen_calls() if self.process.poll() is None else []
        self.control.close()
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(DEADLINE_S)
        assert self.process.stderr is not None
        rest = self.process.stderr.read().decode()
        self.process.stderr.close()
        assert code == 0, f"the driver ended with {code}: {rest}"
        assert "Traceback" not in rest, rest
        assert frozen_calls == [], "calls were made on a frozen process"


def freeze(tool: CudaProgram, pid: int) -> None:
    tool.must("lock", pid=pid, timeout_ms=5000)
    tool.must("checkpoint", pid=pid)


def wake(tool: CudaProgram, pid: int) -> None:
    tool.must("restore", pid=pid)
    tool.must("unlock", pid=pid)
