"""The driver's side of the control socket, whose client is control.py."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import asdict
from typing import cast

from agent.core.errors import HibernodeError, PreconditionError
from agent.emulated.control import DEADLINE_S, DeviceView, FaultView, ProcessView
from agent.emulated.control_request import Request, boolean, check_keys, integer, optional_integer, text
from agent.emulated.driver import Driver
from agent.emulated.faults import Fault, find_operation, operation_name
from agent.emulated.latency import Latency
from agent.emulated.options import parse_compute_mode
from agent.emulated.processes import CudaProcess

MAX_LINE = 65536
MAX_RECORDS = 2000
MAX_FLIPS = 1024
MAX_XID = 1 << 31
MAX_NVML_RETURN = 999


class ControlServer:
    """Answers one line at a time. A new command is a method and an entry in the table."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._clients: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._commands: dict[str, Callable[[Request], object]] = {
            "devices": self._devices,
            "processes": self._processes,
            "oplog": self._oplog,
            "frozen_calls": lambda _request: driver.checkpointing.frozen_calls.count,
            "take_frozen_calls": lambda _request: [asdict(call) for call in driver.checkpointing.frozen_calls.take()],
            "fault": self._fault,
            "faults": self._faults,
            "clear_faults": self._clear_faults,
            "set_device": self._set_device,
            "raise_xid": self._raise_xid,
            "reserve": self._reserve,
            "flip_byte": self._flip_byte,
            "set_latency": self._set_latency,
        }

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = cast("asyncio.Task[None]", asyncio.current_task())
        self._clients[task] = writer
        try:
            while line := await reader.readline():
                writer.write(json.dumps(self._answer(line)).encode() + b"\n")
                await writer.drain()
        except (ValueError, OSError):  # a line too long, or a client that disconnected
            pass
        finally:
            writer.close()
            del self._clients[task]

    async def close(self) -> None:
        """Disconnect every client and wait for its task to end."""
        clients = dict(self._clients)
        for writer in clients.values():
            writer.close()
        if clients:
            await asyncio.wait(clients, timeout=DEADLINE_S)

    def _answer(self, line: bytes) -> dict[str, object]:
        try:
            request = json.loads(line)
            command = self._commands[request["command"]]
        except (ValueError, KeyError, TypeError):
            return {"reason": "EMULATED_COMMAND_UNKNOWN", "message": f"Commands: {', '.join(self._commands)}."}
        try:
            return {"result": command(request)}
        except HibernodeError as error:
            return {"reason": error.reason, "message": error.message}

    def _devices(self, _request: Request) -> object:
        return [
            asdict(
                DeviceView(
                    device.index,
                    device.uuid_text,
                    device.name,
                    device.vram.total_bytes,
                    device.vram.used_bytes,
                    device.persistence,
                    device.mig,
                    device.compute_mode.name,
                    device.nvml_error,
                    device.silent,
                )
            )
            for device in self._driver.devices
        ]

    def _processes(self, _request: Request) -> object:
        devices = self._driver.devices
        return [
            asdict(
                ProcessView(
                    process.pid,
                    process.state.name,
                    {d.uuid_text: used for d in devices if (used := process.bytes_on(d.index))},
                    process.image_bytes(),
                    process.current.op.name.lower() if process.current else "",
                    [operation.op.name.lower() for operation in process.hung],
                )
            )
            for process in self._driver.processes.values()
        ]

    def _oplog(self, request: Request) -> object:
        return [asdict(record) for record in self._driver.oplog.since(integer(request, "since"), MAX_RECORDS)]

    def _set_latency(self, request: Request) -> object:
        self._driver.checkpointing.latency = Latency(
            integer(request, "fixed_us"), integer(request, "bandwidth_bytes_s")
        )
        return None

    # ---- faults and changes of the hardware -------------------------------------------------------------------

    def _fault(self, request: Request) -> object:
        check_keys(request, "operation", "kind", "pid", "gpu", "times", "skip", "after", "delay_ms")
        return self._driver.checkpointing.faults.add(
            Fault(
                id=0,
                operation=find_operation(text(request, "operation")),
                kind=text(request, "kind"),
                pid=optional_integer(request, "pid"),
                device=None if request.get("gpu") is None else self._driver.device_of(text(request, "gpu")).index,
                times=integer(request, "times"),
                skip=integer(request, "skip"),
                after=boolean(request, "after"),
                delay_ms=integer(request, "delay_ms"),
            )
        )

    def _faults(self, _request: Request) -> object:
        return [
            asdict(
                FaultView(
                    fault.id,
                    operation_name(fault.operation),
                    fault.kind,
                    fault.pid,
                    None if fault.device is None else self._driver.devices[fault.device].uuid_text,
                    fault.times,
                    fault.skip,
                    fault.after,
                    fault.delay_ms,
                    fault.seen,
                    fault.hits,
                )
            )
            for fault in self._driver.checkpointing.faults.pending()
        ]

    def _clear_faults(self, _request: Request) -> object:
        self._driver.checkpointing.clear_faults(list(self._driver.processes.values()))
        return None

    def _set_device(self, request: Request) -> object:
        """Validate every argument before changing anything."""
        check_keys(request, "uuid", "persistence", "mig", "compute_mode", "nvml_error", "silent")
        uuid = text(request, "uuid")
        asked = {key for key, value in request.items() if value is not None}
        self._driver.set_device(
            uuid,
            persistence=boolean(request, "persistence") if "persistence" in asked else None,
            mig=boolean(request, "mig") if "mig" in asked else None,
            compute_mode=parse_compute_mode(text(request, "compute_mode")) if "compute_mode" in asked else None,
            nvml_error=integer(request, "nvml_error", MAX_NVML_RETURN) if "nvml_error" in asked else None,
            silent=boolean(request, "silent") if "silent" in asked else None,
        )
        return None

    def _raise_xid(self, request: Request) -> object:
        check_keys(request, "uuid", "code")
        self._driver.raise_xid(text(request, "uuid"), integer(request, "code", MAX_XID))
        return None

    def _reserve(self, request: Request) -> object:
        check_keys(request, "uuid", "bytes")
        self._driver.reserve(text(request, "uuid"), integer(request, "bytes"))
        return None

    def _flip_byte(self, request: Request) -> object:
        offset = integer(request, "offset")
        device = next((d.index for d in self._driver.devices if d.uuid_text == request.get("uuid")), None)
        if request.get("uuid") is not None and device is None:
            raise PreconditionError("EMULATED_NO_BYTE", "No emulated GPU has this uuid.")
        for process in self._driver.processes.values():
            if request.get("pid") in (None, process.pid) and self._flip(process, device, offset):
                return process.pid
        raise PreconditionError("EMULATED_NO_BYTE", "No CUDA process holds a byte of device memory there.")

    def _flip(self, process: CudaProcess, device: int | None, offset: int) -> bool:
        """Flip a byte. A checkpointed image may be unreachable in a frozen process, so it is flipped at the restore."""
        for slot, allocation in process.allocations.items():
            if device not in (None, allocation.device):
                continue
            if offset >= allocation.size:
                offset -= allocation.size
                continue
            if allocation.extent is not None:
                self._driver.devices[allocation.device].vram.flip(allocation.extent.offset + offset)
            elif len(process.flips) < MAX_FLIPS:
                process.flips.append((slot, offset))
            else:
                return False
            return True
        return False
