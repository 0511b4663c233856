"""Runs cuCheckpointProcess*: each CUDA process's state machine, one operation at a time, executed by its restore
thread.

The rules come from cuda.h and NVIDIA/cuda-checkpoint's issues. Every call first needs a reply from the target, even if
its answer is known: a frozen process replies to nothing, and its caller waits without a deadline. A caller that leaves
changes nothing: its operation still runs once the target can. Planned faults (`faults.py`) apply here.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable, Iterable

from agent.emulated.clock import now_ns
from agent.emulated.devices import Device
from agent.emulated.faults import FAILED, STALE, UNDER_WAY, FaultPlan
from agent.emulated.latency import Latency
from agent.emulated.oplog import FrozenCalls, OpLog
from agent.emulated.pids import thread_of
from agent.emulated.processes import CudaProcess, Operation
from agent.emulated.profiles import Profile
from agent.emulated.protocol import CuResult, Message, MessageOp, State, result_of
from agent.emulated.vram import Vram, rounded

MAX_QUEUED = 256
"""Limit of calls waiting for one process; more are answered OPERATING_SYSTEM."""

_NEEDS = {
    MessageOp.LOCK: State.RUNNING,
    MessageOp.CHECKPOINT: State.LOCKED,
    MessageOp.RESTORE: State.CHECKPOINTED,
    MessageOp.UNLOCK: State.LOCKED,
}


class Checkpointing:
    """Sequences the operations of every process. Runs on the event loop and never blocks it."""

    def __init__(self, devices: list[Device], profile: Profile, oplog: OpLog, latency: Latency) -> None:
        self._devices = devices
        self._profile = profile
        self._oplog = oplog
        self.latency = latency
        self.frozen_calls = FrozenCalls()
        self.faults = FaultPlan()
        self._tasks: set[asyncio.Task[None]] = set()
        self._finish: dict[MessageOp, Callable[[CudaProcess, Operation, Message], CuResult]] = {
            MessageOp.GET_STATE: self._finish_state,
            MessageOp.GET_RESTORE_THREAD: self._finish_thread,
            MessageOp.LOCK: self._finish_lock,
            MessageOp.CHECKPOINT: self._finish_checkpoint,
            MessageOp.RESTORE: self._finish_restore,
            MessageOp.UNLOCK: self._finish_unlock,
        }

    async def drain(self) -> None:
        """Wait for work in threads. Called when every process has been released."""
        for task in list(self._tasks):
            await task

    def submit(self, process: CudaProcess, operation: Operation) -> None:
        if len(process.queue) + len(process.hung) >= MAX_QUEUED:
            self._answer(process, operation, CuResult.OPERATING_SYSTEM)
            return
        if process.cgroup.frozen():
            self.frozen_calls.add(operation.op.name.lower(), process.pid, operation.start_ns)
        process.queue.append(operation)
        self.advance(process)

    def advance(self, process: CudaProcess) -> None:
        """Start the next operation if none is running and the restore thread is connected."""
        while process.current is None and process.queue and process.restore_thread is not None:
            operation = process.queue.popleft()
            operation.verdict = self._verdict(process, operation)
            if not self.faults.empty:
                self._apply_fault(process, operation)
                if operation.fault is not None and operation.fault.hangs_before:
                    self._hang(process, operation)
                    continue
            process.current = operation
            if operation.verdict is None and operation.op is MessageOp.RESTORE and not process.cgroup.frozen():
                self._begin_restore(process, operation)
                return
            # Allocate VRAM for a restore only once the target can work, not while the call hangs.
            operation.waits_for_thaw = operation.verdict is None and operation.op is MessageOp.RESTORE
            self._order(process, operation)

    # ---- faults -----------------------------------------------------------------------------------------------

    def _apply_fault(self, process: CudaProcess, operation: Operation) -> None:
        """Attach a planned fault to this call, unless it is refused anyway."""
        if operation.immune or (operation.verdict is not None and operation.op is not MessageOp.GET_STATE):
            return
        devices = process.touched()
        if operation.op is MessageOp.RESTORE:
            devices = {operation.device_map[device] for device in devices}
        operation.fault = self.faults.strike(operation.op, process.pid, devices)
        if operation.fault is not None and operation.fault.instead is not None:
            operation.verdict = operation.fault.instead

    def _hang(self, process: CudaProcess, operation: Operation, answer: Message | None = None) -> None:
        """Hold the answer until the plan is cleared. Other calls on the process are served meanwhile."""
        operation.late_answer = answer
        process.hung.append(operation)
        operation.caller.send(Message(MessageOp.HOLD, id=operation.id))

    def clear_faults(self, processes: Iterable[CudaProcess]) -> None:
        """Clear the plan, and run the operations that hung, even if their callers are gone."""
        self.faults.clear()
        for process in processes:
            hung, process.hung = process.hung, []
            for operation in hung:
                if operation.late_answer is not None:
                    self._answer(process, operation, result_of(operation.late_answer.status), operation.late_answer)
                else:
                    operation.fault, operation.immune = None, True
            process.queue.extendleft(operation for operation in reversed(hung) if operation.late_answer is None)
            self.advance(process)

    def _fault_outcome(self, process: CudaProcess, operation: Operation, done: CuResult) -> CuResult:
        """Apply the fault's after-effect and return its answer."""
        fault = operation.fault
        if fault is None:
            return done
        if fault.kind == FAILED:
            process.change(State.FAILED)
        elif fault.instead is CuResult.OUT_OF_MEMORY and operation.op is MessageOp.RESTORE:
            process.stuck = not self._profile.keeps_state
        return done if fault.answer_after is None else fault.answer_after

    def _verdict(self, process: CudaProcess, operation: Operation) -> CuResult | None:
        """The answer if it is known in advance; None if the target must do the operation."""
        if operation.op in (MessageOp.GET_STATE, MessageOp.GET_RESTORE_THREAD):
            return CuResult.SUCCESS
        if process.stuck:
            return CuResult.ILLEGAL_STATE if operation.op is MessageOp.UNLOCK else CuResult.OPERATING_SYSTEM
        if process.state is not _NEEDS[operation.op]:
            return CuResult.ILLEGAL_STATE
        if operation.op is MessageOp.CHECKPOINT and any(self._devices[index].mig for index in process.touched()):
            return CuResult.OUT_OF_MEMORY  # issue 42: only the checkpoint fails, not the lock
        if operation.op is not MessageOp.RESTORE:
            return None
        if not operation.caller_initialized and not all(device.persistence for device in self._devices):
            operation.fatal = True
            return CuResult.NOT_PERMITTED
        mapping = self._device_map(operation.pairs)
        if mapping is None:
            return CuResult.INVALID_VALUE
        operation.device_map = mapping
        return None

    def _device_map(self, pairs: tuple[tuple[bytes, bytes], ...]) -> tuple[int, ...] | None:
        """New index of every device. `pairs` must contain every GPU once as old and once as new, of the same model."""
        if not pairs:
            return tuple(range(len(self._devices)))
        by_uuid = {device.uuid.bytes: device.index for device in self._devices}
        mapping = {by_uuid.get(old, -1): by_uuid.get(new, -1) for old, new in pairs}
        all_devices = set(range(len(self._devices)))
        if len(pairs) != len(mapping) or set(mapping) != all_devices or set(mapping.values()) != all_devices:
            return None
        if any(self._devices[old].model != self._devices[new].model for old, new in mapping.items()):
            return None
        return tuple(mapping[index] for index in range(len(self._devices)))

    def _order(self, process: CudaProcess, operation: Operation) -> None:
        """Send the restore thread its order."""
        assert process.restore_thread is not None
        message = Message(MessageOp.DO_PING)
        if operation.verdict is None and not operation.waits_for_thaw:
            match operation.op:
                case MessageOp.LOCK:
                    message = Message(MessageOp.DO_LOCK, a=operation.timeout_ms)
                case MessageOp.CHECKPOINT:
                    operation.size = sum(rounded(a.size) for a in process.allocations.values())
                    message = Message(MessageOp.DO_CHECKPOINT)
                case MessageOp.RESTORE:
                    mapping = struct.pack(f"<{len(operation.device_map)}I", *operation.device_map)
                    message = Message(MessageOp.DO_RESTORE, payload=mapping)
                case _:
                    message = Message(MessageOp.DO_UNLOCK)
            message.f = self.latency.of(operation.op, operation.size)
        if operation.fault is not None and not operation.waits_for_thaw:
            message.e = operation.fault.kills_before
            message.f += operation.fault.delay_ms * 1000
        process.restore_thread.send(message)

    # ---- restore ------------------------------------------------------------------------------------------

    def _begin_restore(self, process: CudaProcess, operation: Operation) -> None:
        if not self._allocate_vram(process, operation):
            operation.verdict = CuResult.OUT_OF_MEMORY
            process.stuck = True  # issue 44, seen on 580.95.05: later restores fail too, even with enough memory
            self._order(process, operation)
            return
        unready = [
            slot
            for slot, extent in operation.extents.items()
            if not self._target_vram(process, operation, slot).claim(extent, zeroed=False)
        ]
        if not unready:
            self._order(process, operation)
            return
        operation.preparing = True
        task = asyncio.get_running_loop().create_task(self._prepare_restore(process, operation, unready))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _target_vram(self, process: CudaProcess, operation: Operation, slot: int) -> Vram:
        return self._devices[operation.device_map[process.allocations[slot].device]].vram

    def _allocate_vram(self, process: CudaProcess, operation: Operation) -> bool:
        """Allocate VRAM for every allocation, all or nothing, and publish the offsets to the target."""
        operation.size = 0
        for slot, allocation in process.allocations.items():
            extent = self._target_vram(process, operation, slot).allocate(allocation.size)
            if extent is None:
                self._free_vram(process, operation)
                return False
            operation.extents[slot] = extent
            operation.size += extent.length
            process.publish(slot, extent.offset)
        return True

    def _free_vram(self, process: CudaProcess, operation: Operation) -> None:
        for slot, extent in operation.extents.items():
            self._target_vram(process, operation, slot).free(extent)
        operation.extents.clear()

    async def _prepare_restore(self, process: CudaProcess, operation: Operation, slots: list[int]) -> None:
        try:
            for slot in slots:
                vram = self._target_vram(process, operation, slot)
                await vram.prepare(operation.extents[slot], zeroed=False)
        except OSError:
            operation.verdict = CuResult.OUT_OF_MEMORY
        operation.preparing = False
        if process.released or operation.verdict is not None:
            self._free_vram(process, operation)
        if not process.released:
            self._order(process, operation)

    # ---- answers ----------------------------------------------------------------------------------------------

    def on_answer(self, process: CudaProcess, message: Message) -> None:
        """Handle the restore thread's reply: an operation done, or a sign of life."""
        operation = process.current
        if operation is None:
            return
        if operation.waits_for_thaw:
            operation.waits_for_thaw = False
            if operation.verdict is None:
                self._begin_restore(process, operation)
                return
        if operation.fatal and process.kill():
            operation.on_death = CuResult.NOT_PERMITTED  # answered once the process is gone
            return
        fault = operation.fault
        done = operation.verdict if operation.verdict is not None else result_of(message.status)
        answer = Message(operation.op, id=operation.id)
        if done is CuResult.SUCCESS and (fault is None or fault.kind != STALE or operation.op is MessageOp.GET_STATE):
            done = self._finish[operation.op](process, operation, answer)
        elif operation.extents:
            self._free_vram(process, operation)
        if fault is not None:
            done = self._fault_outcome(process, operation, done)
            if fault.kills_after and process.restore_thread is not None:
                process.restore_thread.send(Message(MessageOp.DO_PING, e=1))
                return  # answered once the process is gone
        process.current = None
        if fault is not None and fault.hangs_after:
            answer.status = done
            self._hang(process, operation, answer)
        else:
            self._answer(process, operation, done, answer)
        self.advance(process)

    def _finish_state(self, process: CudaProcess, operation: Operation, answer: Message) -> CuResult:
        kind = "" if operation.fault is None else operation.fault.kind
        answer.a = process.state_before if kind == STALE else UNDER_WAY.get(kind, process.state)
        return CuResult.SUCCESS

    def _finish_thread(self, process: CudaProcess, operation: Operation, answer: Message) -> CuResult:
        # A caller that used another pid for the target lives in the target's own pid namespace.
        answer.a = thread_of(process.pid, process.tid) if operation.pid_asked == process.pid else process.tid
        return CuResult.SUCCESS if answer.a else CuResult.NOT_INITIALIZED

    def _finish_lock(self, process: CudaProcess, _operation: Operation, _answer: Message) -> CuResult:
        process.change(State.LOCKED)
        return CuResult.SUCCESS

    def _finish_checkpoint(self, process: CudaProcess, operation: Operation, _answer: Message) -> CuResult:
        for allocation in process.allocations.values():
            if allocation.extent is not None:
                self._devices[allocation.device].vram.free(allocation.extent)
                allocation.extent = None
        process.change(State.CHECKPOINTED)
        return CuResult.SUCCESS

    def _finish_restore(self, process: CudaProcess, operation: Operation, _answer: Message) -> CuResult:
        for slot, extent in operation.extents.items():
            allocation = process.allocations[slot]
            allocation.device = operation.device_map[allocation.device]
            allocation.extent = extent
        operation.extents.clear()
        process.contexts = {operation.device_map[device]: count for device, count in process.contexts.items()}
        for slot, offset in process.flips:
            flipped = process.allocations[slot]
            if flipped.extent is not None:
                self._devices[flipped.device].vram.flip(flipped.extent.offset + offset)
        process.flips.clear()
        process.change(State.LOCKED)
        return CuResult.SUCCESS

    def _finish_unlock(self, process: CudaProcess, _operation: Operation, _answer: Message) -> CuResult:
        process.change(State.RUNNING)
        return CuResult.SUCCESS

    def _answer(
        self, process: CudaProcess, operation: Operation, result: CuResult, answer: Message | None = None
    ) -> None:
        message = answer or Message(operation.op, id=operation.id)
        message.status = result
        self._oplog.add(operation.op.name.lower(), process.pid, operation.size, result, operation.start_ns, now_ns())
        operation.caller.send(message)

    def on_death(self, process: CudaProcess) -> None:
        """Answer every waiting caller of a dead process, and free VRAM allocated for its restore."""
        operation = process.current
        waiting = [*process.hung, *process.queue]
        process.current = None
        process.hung.clear()
        process.queue.clear()
        if operation is not None:
            if not operation.preparing:  # else the preparing task frees it
                self._free_vram(process, operation)
            self._answer(process, operation, operation.on_death)
        for other in waiting:
            self._answer(process, other, CuResult.OPERATING_SYSTEM)
