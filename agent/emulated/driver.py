"""Answers the libraries on behalf of the driver: owns the emulated GPUs and the table of CUDA processes."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import assert_never

from agent.core.errors import InvalidArgumentError
from agent.emulated import pids
from agent.emulated.activity import Activity
from agent.emulated.cgroups import find_v2_mount
from agent.emulated.checkpointing import Checkpointing
from agent.emulated.clock import now_ns
from agent.emulated.connection import Connection
from agent.emulated.devices import Device, make_devices
from agent.emulated.management import Management
from agent.emulated.oplog import OpLog
from agent.emulated.options import Options
from agent.emulated.processes import Allocation, CudaProcess, Operation
from agent.emulated.profiles import find_profile
from agent.emulated.protocol import (
    CHECKPOINT_OPS,
    PROTOCOL,
    ComputeMode,
    CuResult,
    Message,
    MessageOp,
)
from agent.emulated.vram import Extent

_CHANGES = frozenset({MessageOp.LOCK, MessageOp.CHECKPOINT, MessageOp.RESTORE, MessageOp.UNLOCK})


class Driver:
    """Everything that happens on the driver's socket. One event loop, no locks; nothing here blocks it."""

    def __init__(self, options: Options, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._executor = ThreadPoolExecutor(2, "vram")
        self.profile = find_profile(options.profile)
        self.devices = make_devices(options, self._executor)
        self.processes: dict[int, CudaProcess] = {}
        self.activity = Activity()
        self.management = Management(self.devices, self.processes, self.activity)
        self.oplog = OpLog()
        self.checkpointing = Checkpointing(self.devices, self.profile, self.oplog, options.latency)
        self._mount = find_v2_mount(Path("/proc/self/mountinfo").read_text())
        self._namespace = pids.namespace_of(os.getpid())
        self._by_token: dict[int, CudaProcess] = {}
        self._by_connection: dict[Connection, CudaProcess] = {}
        self._last_token = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._handlers: dict[int, Callable[[Connection, Message], None]] = {
            MessageOp.HELLO_PROCESS: self._hello_process,
            MessageOp.HELLO_RESTORE: self._hello_restore,
            **self.management.handlers,
            MessageOp.ALLOC: self._alloc,
            MessageOp.FREE: self._free,
            MessageOp.MEMINFO: self._meminfo,
            MessageOp.CONTEXT: self._context,
        }

    # ---- connections ------------------------------------------------------------------------------------------

    def on_message(self, connection: Connection, message: Message) -> None:
        process = self._by_connection.get(connection)
        if process is not None and connection is process.restore_thread:
            if message.op == MessageOp.HELLO_RESTORE:
                process.tid = message.b
            else:
                self.checkpointing.on_answer(process, message)
        elif message.op in CHECKPOINT_OPS:
            self._checkpoint_call(connection, message)
        else:
            handler = self._handlers.get(message.op)
            if handler is None:
                connection.close()
            else:
                handler(connection, message)

    def on_close(self, connection: Connection) -> None:
        """Release the process: either of its sockets closes when it exits or execs, and CUDA is gone in both cases."""
        self.management.on_close(connection)
        process = self._by_connection.pop(connection, None)
        if process is not None:
            self._release(process)

    def _device(self, connection: Connection, index: int) -> Device | None:
        if index < len(self.devices):
            return self.devices[index]
        connection.close()
        return None

    # ---- CUDA processes: start and end --------------------------------------------------------------------

    def _hello_process(self, connection: Connection, message: Message) -> None:
        if message.a != PROTOCOL or connection in self._by_connection:
            connection.send(Message(message.op, status=CuResult.UNKNOWN))
            return
        earlier = self.processes.get(connection.pid)
        if earlier is not None:
            self._release(earlier)  # the end of an exec's old sockets has not been read yet
        self._last_token += 1
        try:
            process = CudaProcess(self._last_token, connection, self._mount)
        except OSError:  # the process is gone, or no descriptors are left
            connection.close()
            return
        self.processes[process.pid] = self._by_token[process.token] = self._by_connection[connection] = process
        self._loop.add_reader(process.pidfd, self._release, process)
        connection.send(
            Message(message.op, a=process.token, b=len(self.devices), payload=self.management.encoded_devices()),
            [process.table_fd, self.activity.fd, *(device.vram.fd for device in self.devices)],
        )

    def _hello_restore(self, connection: Connection, message: Message) -> None:
        process = self._by_token.get(message.a)
        if process is None or process.pid != connection.pid or process.restore_thread is not None:
            connection.close()
            return
        process.restore_thread = connection
        self._by_connection[connection] = process
        self.checkpointing.advance(process)

    def _release(self, process: CudaProcess) -> None:
        """Free the VRAM of a process that exited or called exec, and answer its callers."""
        if process.released:
            return
        process.released = True
        self._loop.remove_reader(process.pidfd)
        if self.processes.get(process.pid) is process:
            del self.processes[process.pid]
        del self._by_token[process.token]
        for allocation in process.allocations.values():
            if allocation.extent is not None:
                self.devices[allocation.device].vram.free(allocation.extent)
        self.checkpointing.on_death(process)
        for connection in (process.connection, process.restore_thread):
            if connection is not None:
                self._by_connection.pop(connection, None)
                connection.close()
        process.close()

    # ---- memory -------------------------------------------------------------------------------------------

    def _alloc(self, connection: Connection, message: Message) -> None:
        process = self._by_connection.get(connection)
        device = self._device(connection, message.a)
        if process is None or device is None:
            return
        slot = process.new_slot()
        extent = device.vram.allocate(message.b) if slot is not None and message.b else None
        if slot is None or extent is None:
            if slot is not None:
                process.free_slot(slot)
            connection.send(Message(message.op, status=CuResult.OUT_OF_MEMORY))
            return
        process.allocations[slot] = Allocation(device.index, message.b, extent)
        answer = Message(message.op, a=slot, b=extent.offset, c=extent.length)
        if device.vram.claim(extent, zeroed=True):
            connection.send(answer)
            return
        # The task owns the range until its pages exist, so that an exit meanwhile can't free it.
        process.allocations[slot].extent = None
        task = self._loop.create_task(self._prepare_alloc(process, device, extent, answer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _prepare_alloc(self, process: CudaProcess, device: Device, extent: Extent, answer: Message) -> None:
        try:
            await device.vram.prepare(extent, zeroed=True)
        except OSError:
            answer.status = CuResult.OUT_OF_MEMORY
        if process.released or answer.status:
            device.vram.free(extent)
            process.allocations.pop(answer.a, None)
            process.free_slot(answer.a)
        else:
            process.allocations[answer.a].extent = extent
        process.connection.send(answer)

    def _free(self, connection: Connection, message: Message) -> None:
        process = self._by_connection.get(connection)
        allocation = process.allocations.pop(message.a, None) if process is not None else None
        if process is None or allocation is None:
            connection.send(Message(message.op, status=CuResult.INVALID_VALUE))
            return
        if allocation.extent is not None:
            self.devices[allocation.device].vram.free(allocation.extent)
        process.free_slot(message.a)
        connection.send(Message(message.op))

    def _meminfo(self, connection: Connection, message: Message) -> None:
        device = self._device(connection, message.a)
        if device is not None:
            vram = device.vram
            connection.send(
                Message(message.op, a=vram.total_bytes - vram.used_bytes, b=vram.total_bytes, c=device.compute_mode)
            )

    def _context(self, connection: Connection, message: Message) -> None:
        process = self._by_connection.get(connection)
        device = self._device(connection, message.a)
        if process is None or device is None:
            return
        result = CuResult.SUCCESS
        if message.b > process.contexts.get(device.index, 0) and not self._may_compute(process, device):
            result = CuResult.DEVICE_UNAVAILABLE
        else:
            process.contexts[device.index] = message.b
        connection.send(Message(message.op, status=result))

    def _may_compute(self, process: CudaProcess, device: Device) -> bool:
        """Whether the process may create a context there now. A checkpointed process blocks no other."""
        match device.compute_mode:
            case ComputeMode.DEFAULT:
                return True
            case ComputeMode.PROHIBITED:
                return False
            case ComputeMode.EXCLUSIVE_PROCESS:
                return all(pid == process.pid for pid, _ in self.management.compute_processes(device.index))
            case _:
                assert_never(device.compute_mode)

    # ---- control: faults and changes of the hardware ----------------------------------------------------------

    def device_of(self, uuid_text: str) -> Device:
        """The device with this NVML uuid. Raises InvalidArgumentError EMULATED_NO_DEVICE."""
        for device in self.devices:
            if device.uuid_text == uuid_text:
                return device
        raise InvalidArgumentError("EMULATED_NO_DEVICE", f"There is no emulated GPU {uuid_text}; see `emulated ps`.")

    def set_device(
        self,
        uuid_text: str,
        *,
        persistence: bool | None = None,
        mig: bool | None = None,
        compute_mode: ComputeMode | None = None,
        nvml_error: int | None = None,
        silent: bool | None = None,
    ) -> None:
        """Change the given values. Raises InvalidArgumentError EMULATED_NO_DEVICE or EMULATED_MIG_UNSUPPORTED."""
        device = self.device_of(uuid_text)
        if mig is not None:
            device.set_mig(mig)
        if persistence is not None:
            device.persistence = persistence
        if compute_mode is not None:
            device.compute_mode = compute_mode
        if nvml_error is not None:
            device.nvml_error = nvml_error
        if silent is not None:
            device.silent = silent
            self.management.answer_waiting()

    def raise_xid(self, uuid_text: str, code: int) -> None:
        """Report an XID error of a GPU to all its watchers. Raises InvalidArgumentError EMULATED_NO_DEVICE."""
        self.management.raise_xid(self.device_of(uuid_text), code)

    def reserve(self, uuid_text: str, size: int) -> None:
        """`Vram.reserve` of this GPU. Raises InvalidArgumentError EMULATED_NO_DEVICE."""
        self.device_of(uuid_text).vram.reserve(size)

    # ---- checkpoint calls -------------------------------------------------------------------------------------

    def _checkpoint_call(self, caller: Connection, message: Message) -> None:
        op = MessageOp(message.op)
        operation = Operation(
            op=op,
            caller=caller,
            id=message.id,
            start_ns=now_ns(),
            pid_asked=message.a,
            timeout_ms=message.c & 0xFFFFFFFF if op is MessageOp.LOCK else 0,
            pairs=_decode_pairs(message.payload) if op is MessageOp.RESTORE else (),
            caller_initialized=bool(message.b) and self.profile.init_suffices,
        )
        process = self._find(caller, message.a)
        if process is None:
            caller.send(Message(op, status=self._no_process(caller, op, message.a), id=message.id))
        elif caller.uid not in (0, process.uid):
            caller.send(Message(op, status=CuResult.OPERATING_SYSTEM, id=message.id))
        else:
            self.checkpointing.submit(process, operation)

    def _find(self, caller: Connection, pid: int) -> CudaProcess | None:
        """The CUDA process with this pid in the caller's own pid namespace."""
        if caller.namespace in (0, self._namespace):
            return self.processes.get(pid)
        return self.processes.get(pids.find_inside(caller.namespace, pid, self.processes))

    def _no_process(self, caller: Connection, op: MessageOp, pid: int) -> CuResult:
        """Why there is none: no such process, or one without CUDA. A thread's id kills its process (issue 41)."""
        owner = pids.process_of_thread(pid)
        if owner == 0:
            return CuResult.INVALID_VALUE
        process = self.processes.get(owner)
        if process is not None and op in _CHANGES and caller.uid in (0, process.uid):
            process.kill()
            return CuResult.OPERATING_SYSTEM
        return CuResult.NOT_INITIALIZED

    async def close(self) -> None:
        """Release everything; the libraries see their connections end."""
        for process in list(self.processes.values()):
            self._release(process)
        for task in list(self._tasks):
            await task
        await self.checkpointing.drain()
        self._executor.shutdown()
        for device in self.devices:
            device.vram.close()
        self.activity.close()


def _decode_pairs(payload: bytes) -> tuple[tuple[bytes, bytes], ...]:
    return tuple((payload[at : at + 16], payload[at + 16 : at + 32]) for at in range(0, len(payload), 32))
