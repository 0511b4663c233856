"""Looking inside a running emulated driver, and touching it, from tests, benchmarks and the CLI.

One JSON object a line each way on `control.sock`: {"command": ..., arguments} -> {"result": ...} or
{"reason": ..., "message": ...}.
"""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from agent.core.errors import PreconditionError, UnavailableError
from agent.emulated.oplog import OpRecord
from agent.emulated.paths import CONTROL_SOCKET, socket_path

DEADLINE_S = 10.0


@dataclass(frozen=True, slots=True)
class DeviceView:
    """A GPU now. `uuid` as NVML writes it."""

    index: int
    uuid: str
    name: str
    total_bytes: int
    used_bytes: int
    persistence: bool


@dataclass(frozen=True, slots=True)
class ProcessView:
    """A CUDA process now. state: RUNNING, LOCKED, CHECKPOINTED or FAILED; vram_bytes by GPU uuid.

    image_bytes: what the host holds of its VRAM. operation: the checkpoint call under way, "" if none.
    """

    pid: int
    state: str
    vram_bytes: dict[str, int]
    image_bytes: int
    operation: str


class EmulatedDriver:
    """A client of the driver that runs in `directory`. Blocking, every answer within DEADLINE_S.

    Raises UnavailableError EMULATED_DRIVER_DOWN if none runs there.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._socket: socket.socket | None = None
        self._buffer = b""

    def __enter__(self) -> EmulatedDriver:
        return self

    def __exit__(self, _t: type[BaseException] | None, _e: BaseException | None, _b: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def devices(self) -> list[DeviceView]:
        return [DeviceView(**row) for row in self._ask("devices")]

    def processes(self) -> list[ProcessView]:
        return [ProcessView(**row) for row in self._ask("processes")]

    def oplog(self, since: int = 0) -> list[OpRecord]:
        """Every operation kept after sequence number `since`, oldest first."""
        found: list[OpRecord] = []
        while rows := self._ask("oplog", since=found[-1].seq if found else since):
            found.extend(OpRecord(**row) for row in rows)
        return found

    def frozen_calls(self) -> int:
        """Checkpoint calls made on a process whose cgroup was frozen: a caller that is right makes none."""
        return int(self._ask("frozen_calls"))

    def flip_byte(self, pid: int | None = None, uuid: str | None = None, offset: int = 0) -> int:
        """Invert one byte of a process's VRAM, live or checkpointed (then it shows after the restore).

        pid: None = the first CUDA process that has VRAM (on `uuid`). offset: within the process's allocations on that
        GPU, or on all GPUs, in the order they were made. Returns the pid. Raises PreconditionError EMULATED_NO_BYTE.
        """
        return int(self._ask("flip_byte", pid=pid, uuid=uuid, offset=offset))

    def set_latency(self, fixed_us: int = 0, bandwidth_bytes_s: int = 0) -> None:
        """How long operations take from now on; 0, 0 = as fast as memory."""
        self._ask("set_latency", fixed_us=fixed_us, bandwidth_bytes_s=bandwidth_bytes_s)

    def _ask(self, command: str, **arguments: object) -> Any:
        try:
            answer = json.loads(self._exchange(json.dumps({"command": command, **arguments}).encode() + b"\n"))
        except (OSError, ValueError) as error:
            self.close()
            raise UnavailableError(
                "EMULATED_DRIVER_DOWN",
                f"No emulated driver answers in {self._directory}; start one with `hibernode emulated up --dir`.",
            ) from error
        if "reason" in answer:
            raise PreconditionError(answer["reason"], answer["message"])
        return answer["result"]

    def _exchange(self, line: bytes) -> bytes:
        if self._socket is None:
            self._buffer = b""
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._socket.settimeout(DEADLINE_S)
            with socket_path(self._directory / CONTROL_SOCKET) as path:
                self._socket.connect(path)
        self._socket.sendall(line)
        while b"\n" not in self._buffer:
            received = self._socket.recv(1 << 18)
            if not received:
                raise ConnectionResetError
            self._buffer += received
        answer, _, self._buffer = self._buffer.partition(b"\n")
        return answer
