"""Answers NVML: device state, processes and XID events; also for lost and silent GPUs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from agent.emulated.activity import Activity
from agent.emulated.clock import now_ns
from agent.emulated.connection import Connection
from agent.emulated.devices import Device
from agent.emulated.processes import CudaProcess
from agent.emulated.protocol import DEVICE_STATUS, GPU_PROCESS, MAX_GPU_PROCESSES, Message, MessageOp, State

XID_EVENT = 8
"""nvmlEventTypeXidCriticalError."""
_IDLE_CELSIUS = 31
_IDLE_MILLIWATTS = 25_000

Handler = Callable[[Connection, Message], None]


class Management:
    """NVML's side of the driver process, on its event loop.

    A query about a silent device waits until the device answers again or the client leaves. A connection has at most
    one such query, because the library waits for each answer."""

    def __init__(self, devices: list[Device], processes: Mapping[int, CudaProcess], activity: Activity) -> None:
        self._devices = devices
        self._processes = processes
        self._activity = activity
        self._waiting: dict[Connection, Message] = {}
        self._watchers: dict[Connection, int] = {}
        self.handlers: dict[int, Handler] = {
            MessageOp.DEVICES: self._describe_devices,
            MessageOp.DEVICE_CHECK: self._query,
            MessageOp.DEVICE_STATUS: self._query,
            MessageOp.WATCH: self._query,
        }

    def encoded_devices(self) -> bytes:
        return b"".join(device.encode() for device in self._devices)

    def _describe_devices(self, connection: Connection, message: Message) -> None:
        connection.send(Message(message.op, b=len(self._devices), payload=self.encoded_devices()))

    def on_close(self, connection: Connection) -> None:
        self._waiting.pop(connection, None)
        self._watchers.pop(connection, None)

    # ---- queries about one device -----------------------------------------------------------------------------

    def _query(self, connection: Connection, message: Message) -> None:
        if message.a >= len(self._devices) or connection in self._waiting:
            connection.close()
        elif self._devices[message.a].silent:
            self._waiting[connection] = message
            connection.send(Message(MessageOp.HOLD))
        else:
            self._answer(connection, message, self._devices[message.a])

    def answer_waiting(self) -> None:
        """Answer the queries that waited for a device that is no longer silent."""
        for connection, message in list(self._waiting.items()):
            device = self._devices[message.a]
            if not device.silent and self._waiting.pop(connection, None) is not None:
                self._answer(connection, message, device)

    def _answer(self, connection: Connection, message: Message, device: Device) -> None:
        answer = Message(message.op, status=device.nvml_error, id=message.id)
        if message.op == MessageOp.DEVICE_STATUS and not device.nvml_error:
            answer.payload = self._status(device)
        elif message.op == MessageOp.WATCH and not device.nvml_error and message.b & XID_EVENT:
            self._watchers[connection] = device.index
        connection.send(answer)

    def compute_processes(self, index: int) -> list[tuple[int, int]]:
        """(host pid, bytes of VRAM) of each process with a context on a device; a checkpointed process has none."""
        return [
            (process.pid, process.bytes_on(index))
            for process in self._processes.values()
            if process.state is not State.CHECKPOINTED and process.contexts.get(index)
        ][:MAX_GPU_PROCESSES]

    def _status(self, device: Device) -> bytes:
        listed = self.compute_processes(device.index)
        busy = self._activity.percent(device.index, now_ns())
        status = DEVICE_STATUS.pack(
            device.vram.used_bytes,
            device.persistence,
            int(device.mig) if device.model.mig else -1,
            *(busy, busy),  # SM and memory: the only work is copies and fills
            *(0, 0),
            _IDLE_CELSIUS,
            _IDLE_MILLIWATTS,
            len(listed),
            device.compute_mode,
        )
        return status + b"".join(GPU_PROCESS.pack(pid, 0, used) for pid, used in listed)

    # ---- events -----------------------------------------------------------------------------------------------

    def raise_xid(self, device: Device, code: int) -> None:
        """Send an XID event to every NVML event set registered for this device."""
        event = Message(MessageOp.EVENT, a=device.index, b=XID_EVENT, c=code)
        for connection, index in list(self._watchers.items()):
            if index == device.index:
                connection.send(event)
