"""Controls a running emulated driver from tests, benchmarks and the CLI.

One JSON object a line each way on `control.sock`: {"command": ..., arguments} -> {"result": ...} or {"reason": ...,
"message": ...}.
"""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from agent.core.errors import PreconditionError, UnavailableError
from agent.emulated.oplog import FrozenCall, OpRecord
from agent.emulated.paths import CONTROL_SOCKET, DRIVER_SOCKET, READY_FILE, socket_path

DEADLINE_S, PROBE_S = 10.0, 1.0


@dataclass(frozen=True, slots=True)
class DeviceView:
    """A GPU's state. `uuid` as in NVML; the rest as in `EmulatedDriver.set_device`."""

    index: int
    uuid: str
    name: str
    total_bytes: int
    used_bytes: int
    persistence: bool
    mig: bool = False
    compute_mode: str = "DEFAULT"
    nvml_error: int = 0
    silent: bool = False


@dataclass(frozen=True, slots=True)
class ProcessView:
    """A CUDA process's state: RUNNING, LOCKED, CHECKPOINTED or FAILED; vram_bytes by GPU uuid.

    image_bytes: VRAM content held by the host. operation: the running checkpoint call, "" if none. hung: calls held by
    a HANG fault, oldest first."""

    pid: int
    state: str
    vram_bytes: dict[str, int]
    image_bytes: int
    operation: str
    hung: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class FaultView:
    """A pending fault from `EmulatedDriver.fault`; gone after `times` hits.

    gpu: uuid, None = any. seen: calls that matched; hits: calls it applied to."""

    id: int
    operation: str
    kind: str
    pid: int | None
    gpu: str | None
    times: int
    skip: int
    after: bool
    delay_ms: int
    seen: int
    hits: int


def check_running(directory: Path) -> None:
    """Raises UnavailableError EMULATED_DRIVER_DOWN unless a driver in `directory` accepts programs.

    Every user may call it; the control socket is only for the driver's own user."""
    try:
        (directory / READY_FILE).stat()
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe,
            socket_path(directory / DRIVER_SOCKET) as path,
        ):
            probe.settimeout(PROBE_S)
            probe.connect(path)
    except OSError as error:
        raise _driver_down(directory) from error


def _driver_down(directory: Path) -> UnavailableError:
    message = f"No emulated driver answers in {directory}; start one with `hibernode emulated up --dir {directory}`."
    return UnavailableError("EMULATED_DRIVER_DOWN", message)


class EmulatedDriver:
    """A client of the driver in `directory`. Blocking; every answer comes within DEADLINE_S.

    Raises UnavailableError EMULATED_DRIVER_DOWN if no driver runs there."""

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
        return [DeviceView(**row) for row in self._request("devices")]

    def processes(self) -> list[ProcessView]:
        return [ProcessView(**row) for row in self._request("processes")]

    def oplog(self, since: int = 0) -> list[OpRecord]:
        """Every retained operation after sequence number `since`, oldest first."""
        found: list[OpRecord] = []
        while rows := self._request("oplog", since=found[-1].seq if found else since):
            found.extend(OpRecord(**row) for row in rows)
        return found

    def frozen_calls(self) -> int:
        """Number of checkpoint calls on processes in a frozen cgroup, since the start or the last
        `take_frozen_calls()`. A correct caller makes none."""
        return int(self._request("frozen_calls"))

    def take_frozen_calls(self) -> list[FrozenCall]:
        """Those calls (the newest 256), oldest first; resets the count."""
        return [FrozenCall(**row) for row in self._request("take_frozen_calls")]

    # ---- faults -----------------------------------------------------------------------------------------------

    def fault(
        self,
        operation: str,
        kind: str,
        *,
        pid: int | None = None,
        gpu: str | None = None,
        times: int = 1,
        skip: int = 0,
        after: bool = False,
        delay_ms: int = 0,
    ) -> int:
        """Plan a fault; returns its id. Calls meet faults in planned order.

        operation: one of `faults.OPERATIONS`. kind: one of `faults.KINDS`, explained at `faults.Fault`. pid: only this
        process. gpu: only processes on that GPU (uuid); for a restore, the target GPU. times: number of hits, 0 =
        unlimited. skip: matching calls to let pass first. after: do the operation, then fail. A call that would be
        refused anyway uses up no fault. Raises PreconditionError EMULATED_FAULT_INVALID, EMULATED_FAULTS_FULL or
        EMULATED_NO_DEVICE."""
        plan = {"pid": pid, "gpu": gpu, "times": times, "skip": skip, "after": after, "delay_ms": delay_ms}
        return int(self._request("fault", operation=operation, kind=kind, **plan))

    def faults(self) -> list[FaultView]:
        """The pending faults, in order."""
        return [FaultView(**row) for row in self._request("faults")]

    def clear_faults(self) -> None:
        """Remove all faults. Operations held back by a HANG are done now, even if their callers are gone."""
        self._request("clear_faults")

    def set_device(
        self,
        uuid: str,
        *,
        persistence: bool | None = None,
        mig: bool | None = None,
        compute_mode: str | None = None,
        nvml_error: int | None = None,
        silent: bool | None = None,
    ) -> None:
        """Change a GPU's values (None = keep).

        compute_mode: DEFAULT, EXCLUSIVE_PROCESS or PROHIBITED. nvml_error: the nvmlReturn_t of every NVML call on it
        (15: GPU lost), 0 = none. silent: NVML calls on it hang while true. Raises PreconditionError EMULATED_NO_DEVICE,
        EMULATED_MIG_UNSUPPORTED or EMULATED_OPTION_INVALID."""
        values = {"persistence": persistence, "mig": mig, "compute_mode": compute_mode}
        self._request("set_device", uuid=uuid, nvml_error=nvml_error, silent=silent, **values)

    def raise_xid(self, uuid: str, code: int) -> None:
        """Send an XID error (79: fallen off the bus) to the watchers of that GPU's NVML events."""
        self._request("raise_xid", uuid=uuid, code=code)

    def reserve(self, uuid: str, bytes_: int) -> None:
        """Mark that much of the GPU's memory as used by a process outside the host's view; 0 frees it.

        Raises PreconditionError EMULATED_VRAM_SHORT if less is free."""
        self._request("reserve", uuid=uuid, bytes=bytes_)

    def flip_byte(self, pid: int | None = None, uuid: str | None = None, offset: int = 0) -> int:
        """Invert one byte of a process's VRAM; if it is checkpointed, the change shows after the restore. Returns the
        pid.

        pid: None = the first CUDA process with VRAM (on `uuid`). offset: into the process's allocations on that GPU, or
        on all GPUs, in order of creation. Raises PreconditionError EMULATED_NO_BYTE."""
        return int(self._request("flip_byte", pid=pid, uuid=uuid, offset=offset))

    def set_latency(self, fixed_us: int = 0, bandwidth_bytes_s: int = 0) -> None:
        """Set the duration of operations; 0, 0 = the speed of memory."""
        self._request("set_latency", fixed_us=fixed_us, bandwidth_bytes_s=bandwidth_bytes_s)

    def _request(self, command: str, **arguments: object) -> Any:
        try:
            answer = json.loads(self._exchange(json.dumps({"command": command, **arguments}).encode() + b"\n"))
        except (OSError, ValueError) as error:
            self.close()
            raise _driver_down(self._directory) from error
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
