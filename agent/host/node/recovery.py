"""Recovers the instances of an earlier agent: the state found counts, not the state last written.

What can't be read is left alone: an instance whose record is damaged, or of a newer version, is neither adopted, billed
nor killed, and its GPUs are out of use, until an agent can read it or its processes have ended.

Containers outlive the agent. A process is identified by (boot, pid, start time). The cgroup is read before any driver
call, because the driver can't answer for a frozen process. The node is ready when all are done or past their deadline.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from agent.core.errors import HibernodeError, UnavailableError
from agent.core.instance_record import InstanceRecord, RecordPhase, UnreadableRecord
from agent.core.lifecycle import events as ev
from agent.core.types import Handle, InstanceState
from agent.host.instance.actor import Actor
from agent.host.instance.memory_reservations import ImageSize
from agent.host.node.node import Node
from agent.log import get_logger
from agent.ports import Condition, Outcome

INSTANCE_DEADLINE_S = 60.0
ASK_AGAIN_S = 0.25


@dataclass(slots=True)
class RecoverySummary:
    """What a recovery found, for the log and the tests."""

    running: int = 0
    frozen: int = 0
    restarted: int = 0
    gone: int = 0
    killed: int = 0
    orphans: int = 0
    unreadable: int = 0


class Recovery:
    """Runs once, before the node is ready.

    Raises UnavailableError: STORE_FAILED if the records can't be read; GPUS_UNKNOWN if living instances hold GPUs but
    no GPU can be seen (going on would kill them all).
    """

    def __init__(
        self,
        node: Node,
        known_gpus: frozenset[str],
        *,
        instance_deadline_s: float = INSTANCE_DEADLINE_S,
        ask_again_s: float = ASK_AGAIN_S,
    ) -> None:
        self._node = node
        self._context = node.context
        self._known_gpus = known_gpus
        self._deadline_s = instance_deadline_s
        self._ask_again_s = ask_again_s
        self.found = RecoverySummary()
        self._cold: list[Actor] = []
        self._left_alone: list[str] = []
        self._log = get_logger()

    async def run(self) -> RecoverySummary:
        """Adopt, restart, kill or clean up every instance of this state directory, in parallel."""
        records = await self._context.store.load_instances()
        handles = {handle.uid: handle for handle in await self._context.runtime.list_handles()}
        await self._require_gpus(records, handles)
        unreadable = await self._context.store.unreadable_instances()
        recorded = {record.spec.uid for record in records} | {record.uid for record in unreadable}
        orphans = [handle for uid, handle in handles.items() if uid not in recorded]
        await asyncio.gather(
            *(self._within_deadline(record, handles.get(record.spec.uid)) for record in records),
            *(self._destroy_orphan(handle) for handle in orphans),
            *(self._leave_alone(record, handles.get(record.uid) or record.handle) for record in unreadable),
        )
        actors = self._node.actors
        frozen = [uid for uid, actor in actors.items() if actor.state is InstanceState.FROZEN]
        # Those left alone keep what is noted of them, and may be frozen.
        await self._context.memory.restore_limits([*actors, *self._left_alone], [*frozen, *self._left_alone])
        for actor in self._cold:  # last: the instances found awake hold their GPUs by now
            actor.handle(ev.Created())
        return self.found

    async def _require_gpus(self, records: Sequence[InstanceRecord], handles: Mapping[str, Handle]) -> None:
        if self._known_gpus:
            return
        for record in records:
            handle = handles.get(record.spec.uid) or record.handle
            if record.gpu_uuids and handle is not None and await self._context.runtime.alive(handle):
                raise UnavailableError(
                    "GPUS_UNKNOWN",
                    f"instance {record.spec.uid} runs and holds a GPU, but the driver shows none; see `nvidia-smi` "
                    "and start the agent again (to drop the instance, kill its processes first)",
                )

    async def _within_deadline(self, record: InstanceRecord, found: Handle | None) -> None:
        """Recover one instance; if that fails, kill it. A failure never ends the recovery of the others."""
        handle = found or record.handle
        try:
            async with asyncio.timeout(self._deadline_s):
                await self._recover(record, handle)
        except TimeoutError:
            await self._kill(record, handle, f"it could not be recovered within {self._deadline_s:g} s")
        except Exception as error:
            if not isinstance(error, HibernodeError):
                self._log.exception("recovery.crashed", instance=record.spec.uid)
            await self._kill(record, handle, f"it could not be recovered: {error}")

    async def _recover(self, record: InstanceRecord, handle: Handle | None) -> None:
        runtime = self._context.runtime
        alive = handle is not None and await runtime.alive(handle)
        if record.phase in (RecordPhase.CREATED, RecordPhase.STARTED):
            await self._start_anew(record, handle)
        elif not alive or handle is None:
            await self._gone(record, handle)
        elif record.phase is not RecordPhase.READY:
            await self._kill(record, handle, "it was being stopped")
        elif not set(record.gpu_uuids) <= self._known_gpus:
            await self._kill(record, handle, "one of its GPUs is not on this host any more")
        else:
            await self._adopt(record, handle)

    async def _adopt(self, record: InstanceRecord, handle: Handle) -> None:
        condition = await self._condition(handle)
        if condition is Condition.PAUSED_BY_OTHERS:
            await self._context.freezer.thaw(handle)
            condition = await self._condition(handle)
        match condition:
            case Condition.FROZEN:
                await self._frozen(record, handle)
            case Condition.AWAKE:
                await self._running(record, handle)
            case Condition.LOCKED:
                if (await self._context.freezer.unlock(handle)).outcome is Outcome.OK:
                    await self._running(record, handle)
                else:
                    await self._kill(record, handle, "it stayed locked")
            case Condition.CHECKPOINTED:
                await self._finish_freeze(record, handle)
            case Condition.GONE:
                await self._gone(record, handle)
            case Condition.PAUSED_BY_OTHERS | Condition.BROKEN:
                await self._kill(record, handle, f"it was found {condition.value}")

    async def _condition(self, handle: Handle) -> Condition:
        """The instance's condition. While the driver is unavailable, retry until the deadline."""
        while True:
            try:
                return await self._context.freezer.condition(handle)
            except UnavailableError as error:
                self._log.warning("recovery.driver_unavailable", instance=handle.uid, reason=error.reason)
            await asyncio.sleep(self._ask_again_s)

    async def _finish_freeze(self, record: InstanceRecord, handle: Handle) -> None:
        match (await self._context.freezer.finish_freeze(handle)).outcome:
            case Outcome.OK:
                await self._frozen(record, handle)
            case Outcome.REFUSED if await self._condition(handle) is Condition.AWAKE:  # rolled back
                await self._running(record, handle)
            case Outcome.REFUSED | Outcome.BROKEN:
                await self._kill(record, handle, "its freeze could not be finished")

    # No await after `adopt`: the deadline must not leave an instance half adopted.

    async def _frozen(self, record: InstanceRecord, handle: Handle) -> None:
        pids = set(await self._context.runtime.pids(handle))
        size = self._context.memory.frozen_image(record.spec.uid, pids)
        actor = self._node.adopt(record, InstanceState.FROZEN, size)
        self._node.executors[actor.uid].adopt(record, handle, pids, awake=False)
        self.found.frozen += 1
        self._note(actor.uid, "FROZEN")

    async def _running(self, record: InstanceRecord, handle: Handle) -> None:
        pids = set(await self._context.runtime.pids(handle))
        stored, record = record, replace(record, gpu_uuids=await self._gpus(record, pids))
        size = await self._on_gpu(handle)
        devices = self._node.broker.allocator.devices
        taken = [uuid for uuid in record.gpu_uuids if devices[uuid].holder]
        if taken:
            await self._kill(record, handle, f"GPU {taken[0]} is held by {devices[taken[0]].holder}, also awake")
            return
        actor = self._node.adopt(record, InstanceState.RUNNING, size)
        # A move that is not on disk is written at the next freeze.
        self._node.executors[actor.uid].adopt(stored, handle, pids, awake=True)
        self.found.running += 1
        self._note(actor.uid, "RUNNING")
        actor.handle(ev.WaitersGone())  # starts its idle timer

    async def _gpus(self, record: InstanceRecord, pids: set[int]) -> tuple[str, ...]:
        """The GPUs that an awake instance is on. A move is written only at the next freeze, so where instances can move
        NVML is polled until it answers: with an outdated record the instance's GPU would be granted to others."""
        broker, written = self._node.broker, record.gpu_uuids
        while written:
            shown = await broker.gpus_of(pids)
            if shown is not None and len(shown) == len(written) and set(shown) <= self._known_gpus:
                return tuple(shown)
            if shown is not None or not broker.allocator.migrate:
                break
            self._log.warning("recovery.place_unknown", instance=record.spec.uid)
            await asyncio.sleep(self._ask_again_s)
        return written

    async def _on_gpu(self, handle: Handle) -> ImageSize:
        try:
            return ImageSize(await self._context.freezer.vram_bytes(handle))
        except HibernodeError as error:  # measured again before its next freeze
            self._log.warning("instance.vram_unknown", instance=handle.uid, reason=error.reason)
            return ImageSize()

    async def _start_anew(self, record: InstanceRecord, handle: Handle | None) -> None:
        """Found in STARTING: /initialize runs once per container, so start a new container."""
        if handle is not None:
            await self._context.runtime.kill(handle)
            await self._context.remove(handle)
        if not set(record.gpu_uuids) <= self._known_gpus:
            await self._forget_record(record.spec.uid)
            self.found.gone += 1
            self._context.events.add(record.spec.uid, "instance.gone", "its GPU is not on this host any more")
            return
        record = replace(record, phase=RecordPhase.CREATED, handle=None)
        await self._context.store.put_instance(record)
        actor = self._node.adopt(record, InstanceState.STARTING)
        self.found.restarted += 1
        self._note(actor.uid, "STARTING")
        self._cold.append(actor)

    async def _gone(self, record: InstanceRecord, handle: Handle | None) -> None:
        """It ended while no agent ran, or the host was rebooted: its ledger ends at its last window."""
        if handle is not None:
            await self._context.remove(handle)
        await self._forget_record(record.spec.uid)
        self.found.gone += 1
        self._context.events.add(record.spec.uid, "instance.gone", "it ended while the agent was down")

    async def _kill(self, record: InstanceRecord, handle: Handle | None, why: str) -> None:
        if handle is not None and not await self._destroy(handle, record.gpu_uuids):
            return  # the record stays: the next start tries again
        await self._forget_record(record.spec.uid)
        self.found.killed += 1
        self._context.events.add(record.spec.uid, "instance.killed_at_recovery", why)

    async def _destroy_orphan(self, handle: Handle) -> None:
        """Destroy a container with our label but without a record: its creation was never confirmed."""
        if await self._destroy(handle, ()):
            self.found.orphans += 1
            self._context.events.add(handle.uid, "instance.orphan_destroyed", "a container of ours without a record")

    async def _leave_alone(self, record: UnreadableRecord, handle: Handle | None) -> None:
        """Keep others off the GPUs of an instance whose record can't be read. Forget it once its processes are gone. A
        failure never ends the recovery of the others: the next start tries again."""
        problem = record.problem
        uuids: Sequence[str] = record.gpu_uuids
        try:
            async with asyncio.timeout(self._deadline_s):
                if await self._forget_ended(record.uid, handle):
                    return
                shown = await self._gpus_in_use(handle)
                uuids = uuids if shown is None else shown
        except TimeoutError:
            problem += f"; it could not be looked at within {self._deadline_s:g} s"
        except Exception as error:
            if not isinstance(error, HibernodeError):
                self._log.exception("recovery.crashed", instance=record.uid)
            problem += f"; it could not be looked at: {error}"
        self._node.broker.cordon(
            record.uid,
            [uuid for uuid in uuids if uuid in self._known_gpus],
            f"INSTANCE_UNREADABLE: {record.uid} runs on it, and its record can't be read",
            source=record.uid,
            lasting=True,
        )
        self._left_alone.append(record.uid)
        self.found.unreadable += 1
        text = (
            f"its record can't be read ({problem}), so it is left alone, unused and unbilled; install the "
            "version that wrote it, or kill its processes and restart the agent"
        )
        self._context.events.add(record.uid, "instance.record_unreadable", text)

    async def _forget_ended(self, uid: str, handle: Handle | None) -> bool:
        """Forget an instance whose record can't be read if its processes are gone; returns whether they are."""
        if handle is not None:
            if await self._context.runtime.alive(handle):
                return False
            await self._context.remove(handle)
        await self._forget_record(uid)
        self.found.gone += 1
        self._context.events.add(uid, "instance.gone", "it ended while its record could not be read")
        return True

    async def _gpus_in_use(self, handle: Handle | None) -> Sequence[str] | None:
        """The GPUs that NVML shows its processes on; None if it does not answer."""
        if handle is None:
            return ()
        return await self._node.broker.gpus_of(set(await self._context.runtime.pids(handle)))

    async def _destroy(self, handle: Handle, gpu_uuids: Sequence[str]) -> bool:
        """Kill and clean up; returns whether that succeeded. If not, its GPUs are cordoned: it may still use them."""
        runtime = self._context.runtime
        try:
            async with asyncio.timeout(self._deadline_s):
                await runtime.kill(handle)
                await self._context.remove(handle)
        except (HibernodeError, OSError, TimeoutError) as error:
            self._context.events.add(handle.uid, "instance.kill_failed", str(error) or "no end within the deadline")
            shown = await self._node.broker.gpus_of(set(await runtime.pids(handle)))
            uuids = {*gpu_uuids, *(shown or ())}  # a move may not be on disk yet
            self._node.broker.cordon(
                handle.uid,
                uuids,
                "KILL_FAILED: an instance of an earlier agent survives SIGKILL",
                source=handle.uid,
                lasting=True,
            )
            return False
        return True

    async def _forget_record(self, uid: str) -> None:
        try:
            await self._context.store.delete_instance(uid)
        except HibernodeError as error:  # the next recovery finds no container and deletes the record
            self._context.events.add(uid, "store.failed", error.message)

    def _note(self, uid: str, state: str) -> None:
        self._context.events.add(uid, "instance.recovered", state=state)
