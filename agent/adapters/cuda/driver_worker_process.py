"""One driver worker: the subprocess, its socket, and the batch it works on.

Its owner (`driver_checkpointer.py`) submits one batch at a time and learns by callback that the worker is ready, has
answered, or is gone. Everything runs on the loop's thread, because PDEATHSIG follows the thread that spawns.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from signal import SIGKILL, Signals
from typing import Any

from agent.adapters.cuda.result_codes import OP_NUMBERS, process_state
from agent.log import get_logger
from agent.ports import CudaAnswer, CudaCall

WORKER_SCRIPT = Path(__file__).with_name("driver_worker.py")
MAX_MESSAGE_BYTES = 1 << 17
ENDED = "the worker ended by itself"
_log = get_logger()


class Phase(Enum):
    """STARTING until the hello; ENDING from the kill, or the end of the socket, until the process is reaped."""

    STARTING = "STARTING"
    IDLE = "IDLE"
    BUSY = "BUSY"
    ENDING = "ENDING"
    GONE = "GONE"


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """How a worker is spawned."""

    environment: Mapping[str, str] | None = None  # decides which libcuda it loads; None: the agent's own
    init_before_restore: bool = False  # persistence mode is off, so cuInit precedes its first restore
    start_timeout_s: float = 30.0
    kill_timeout_s: float = 5.0
    script: Path = WORKER_SCRIPT
    kill_signal: int = SIGKILL


@dataclass(frozen=True, slots=True)
class WorkerEvents:
    """Callbacks to the owner. `gone(worker, stuck, error)`: with `stuck` it survived SIGKILL and is abandoned."""

    ready: Callable[[DriverWorkerProcess], None]
    answered: Callable[[DriverWorkerProcess, Sequence[CudaAnswer]], None]
    gone: Callable[[DriverWorkerProcess, bool, str], None]


class DriverWorkerProcess:
    """A running worker. Never raises after construction: every failure ends in `gone`."""

    def __init__(self, options: WorkerOptions, events: WorkerEvents) -> None:
        """Spawn it, on the loop's thread. Raises OSError if no process can be made."""
        self.phase = Phase.STARTING
        self.cuda_version = 0
        self._options = options
        self._events = events
        self._loop = asyncio.get_running_loop()
        self._calls: Sequence[CudaCall] = ()
        self._message_id = 0
        self._error = ""
        self._channel, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with other:
            try:
                self._process = subprocess.Popen(self._command(other.fileno()), **self._spawn_arguments(other))
            except OSError:
                self._channel.close()
                raise
        try:
            self._pidfd = os.pidfd_open(self._process.pid)
        except OSError:  # no descriptor left
            self._channel.close()
            self._process.kill()
            raise
        self._channel.setblocking(False)
        self._loop.add_reader(self._channel.fileno(), self._on_readable)
        self._timer = self._loop.call_later(
            options.start_timeout_s, self.kill, f"the worker was not ready within {options.start_timeout_s:g} s"
        )

    def _command(self, descriptor: int) -> list[str]:
        # -I and -S keep the user's Python environment out of a root process that talks to the driver.
        return [sys.executable, "-I", "-S", str(self._options.script), str(descriptor), str(os.getpid())]

    def _spawn_arguments(self, other: socket.socket) -> dict[str, Any]:
        environment = os.environ if self._options.environment is None else self._options.environment
        return {
            "pass_fds": (other.fileno(),),
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.DEVNULL,
            "env": dict(environment),
            "cwd": "/",
            "start_new_session": True,  # the agent handles a terminal's Ctrl-C
        }

    @property
    def pid(self) -> int:
        return self._process.pid

    def submit(self, calls: Sequence[CudaCall], deadline_s: float, *, init: bool = False) -> bool:
        """Send an IDLE worker a batch; it is killed if no answer comes within `deadline_s`. With `init` cuInit precedes
        its first restore. False if the worker has died meanwhile: nothing was begun, and `gone` follows."""
        assert self.phase is Phase.IDLE
        self._message_id += 1
        rows = [[OP_NUMBERS[c.op], c.pid, c.timeout_ms, c.gpu_map] for c in calls]
        try:
            self._channel.send(json.dumps({"id": self._message_id, "init": init, "calls": rows}).encode())
        except OSError as error:
            self._loop.call_soon(self.kill, f"the worker takes no message ({error})")
            self.phase = Phase.BUSY  # it must not get the next batch
            return False
        self.phase = Phase.BUSY
        self._calls = calls
        self._timer = self._loop.call_later(deadline_s, self.kill, f"the driver did not answer within {deadline_s:g} s")
        return True

    def kill(self, error: str) -> None:
        """End the process; `gone` follows when it is reaped or has survived `kill_timeout_s`. Idempotent."""
        if self.phase in (Phase.ENDING, Phase.GONE):
            return
        self.phase = Phase.ENDING
        self._error = error
        self._close_channel()
        self._process.send_signal(self._options.kill_signal)
        self._loop.add_reader(self._pidfd, self._on_exit)
        self._timer = self._loop.call_later(self._options.kill_timeout_s, self._on_stuck)

    def _on_readable(self) -> None:
        try:
            message = self._channel.recv(MAX_MESSAGE_BYTES)
        except BlockingIOError:
            return
        except ConnectionResetError:  # it died before it read our message
            self.kill(ENDED)
            return
        except OSError as error:
            self.kill(f"the worker's socket failed ({error})")
            return
        if not message:
            self.kill(ENDED)
            return
        try:
            self._on_message(json.loads(message))
        except (ValueError, KeyError, TypeError) as error:
            self.kill(f"the worker sent a message that can't be read ({error!r})")

    def _on_message(self, message: dict[str, Any]) -> None:
        if self.phase is Phase.STARTING:
            if message["error"]:
                self.kill(message["error"])
                return
            self._timer.cancel()
            self.cuda_version = int(message["hello"])
            self.phase = Phase.IDLE
            self._events.ready(self)
        elif self.phase is Phase.BUSY and message["id"] == self._message_id:
            answers = _read_answers(self._calls, message["answers"])
            self._timer.cancel()
            self._calls = ()
            self.phase = Phase.IDLE
            self._events.answered(self, answers)

    def _on_exit(self) -> None:
        """Reap the dead process. One that was abandoned before ends here too, without a callback."""
        self._timer.cancel()
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        code = self._process.wait()
        if self._error == ENDED and code < 0:  # libcuda crashed, or another process killed it
            self._error = f"{ENDED}: {Signals(-code).name}"
        if self.phase is not Phase.GONE:
            self.phase = Phase.GONE
            self._events.gone(self, False, self._error)

    def _on_stuck(self) -> None:
        """Abandon a process that survives SIGKILL: it is stuck in the kernel."""
        if self._process.poll() is not None:  # dead; its reader runs in this iteration of the loop
            self._on_exit()
            return
        _log.error("driver.worker_stuck", pid=self.pid, error=self._error)
        self.phase = Phase.GONE
        self._events.gone(self, True, self._error)

    def _close_channel(self) -> None:
        """Remove the reader first: a socket at its end stays readable and would spin the loop."""
        self._timer.cancel()
        self._loop.remove_reader(self._channel.fileno())
        self._channel.close()


def _read_answers(calls: Sequence[CudaCall], rows: Sequence[Sequence[int]]) -> list[CudaAnswer]:
    """Pair the answers with their calls. Raises ValueError for a wrong number: only a failure may end them early."""
    if not 0 < len(rows) <= len(calls) or (len(rows) < len(calls) and rows[-1][0] == 0):
        raise ValueError(f"{len(rows)} answers to {len(calls)} calls")
    return [
        CudaAnswer(call, code, None if state_code < 0 else process_state(state_code, state), elapsed_us)
        for call, (code, state_code, state, elapsed_us) in zip(calls, rows, strict=False)
    ]
