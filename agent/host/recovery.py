"""After a restart: find what runs, believe what is, not what was last written (DESIGN section 4).

Containers outlive the agent. Identity is (boot, pid, start time). The cgroup is read before the driver is asked,
for a frozen process does not answer. Every instance has a deadline; only then is the node ready.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace

from agent.core import lifecycle_events as ev
from agent.core.errors import HibernodeError
from agent.core.types import Handle, InstanceState
from agent.host.actor import Actor
from agent.host.node import Node
from agent.ports import Condition, InstanceRecord, Outcome

INSTANCE_DEADLINE_S = 60.0


@dataclass(slots=True)
class Found:
    """What a recovery found, for the log and the tests."""

    running: int = 0
    frozen: int = 0
    restarted: int = 0
    gone: int = 0
    killed: int = 0
    orphans: int = 0


class Recovery:
    """Runs once, before the node is ready. Raises UnavailableError STORE_FAILED if the records can't be read."""

    def __init__(self, node: Node, known_gpus: frozenset[str]) -> None:
        self._node = node
        self._shell = node.shell
        self._known_gpus = known_gpus
        self.found = Found()
        self._cold: list[Actor] = []

    async def run(self) -> Found:
        """Adopt, finish, restart or clean up every instance of this state directory, in parallel."""
        records = await self._shell.store.load_instances()
        handles = {handle.uid: handle for handle in await self._shell.runtime.list_handles()}
        recorded = {record.spec.uid for record in records}
        orphans = [handle for uid, handle in handles.items() if uid not in recorded]
        await asyncio.gather(
            *(self._within_deadline(record, handles.get(record.spec.uid)) for record in records),
            *(self._orphan(handle) for handle in orphans),
        )
        for actor in self._cold:  # only now: whoever was found awake already holds its GPU
            actor.handle(ev.Created())
        return self.found

    async def _within_deadline(self, record: InstanceRecord, found: Handle | None) -> None:
        handle = found or record.handle
        try:
            async with asyncio.timeout(INSTANCE_DEADLINE_S):
                await self._recover(record, handle)
        except (TimeoutError, HibernodeError) as error:
            why = str(error) or f"no answer within {INSTANCE_DEADLINE_S:g} s"
            await self._kill(record, handle, f"it could not be recovered: {why}")

    async def _recover(self, record: InstanceRecord, handle: Handle | None) -> None:
        runtime = self._shell.runtime
        alive = handle is not None and await runtime.alive(handle)
        if record.phase in ("CREATED", "STARTED"):
            await self._start_anew(record, handle)
        elif not alive or handle is None:
            await self._gone(record, handle)
        elif record.phase != "READY":
            await self._kill(record, handle, "it was being stopped")
        elif not set(record.gpu_uuids) <= self._known_gpus:
            await self._kill(record, handle, "one of its GPUs is not on this host any more")
        else:
            await self._adopt(record, handle)

    async def _adopt(self, record: InstanceRecord, handle: Handle) -> None:
        condition = await self._shell.freezer.condition(handle)
        if condition is Condition.PAUSED_BY_OTHERS:
            await self._shell.freezer.thaw(handle)
            condition = await self._shell.freezer.condition(handle)
        match condition:
            case Condition.FROZEN:
                self._frozen(record, handle)
            case Condition.AWAKE:
                await self._running(record, handle)
            case Condition.LOCKED:
                if (await self._shell.freezer.unlock(handle)).outcome is Outcome.OK:
                    await self._running(record, handle)
                else:
                    await self._kill(record, handle, "it stayed locked")
            case Condition.CHECKPOINTED:
                if (await self._shell.freezer.finish_freeze(handle)).outcome is Outcome.OK:
                    self._frozen(record, handle)
                else:
                    await self._kill(record, handle, "its freeze could not be finished")
            case Condition.GONE:
                await self._gone(record, handle)
            case Condition.PAUSED_BY_OTHERS | Condition.BROKEN:
                await self._kill(record, handle, f"it was found {condition.value}")

    def _frozen(self, record: InstanceRecord, handle: Handle) -> None:
        actor = self._node.adopt(record, InstanceState.FROZEN)
        self._node.executors[actor.uid].adopt(handle)
        self._shell.memory.took(actor.uid, 0)
        self.found.frozen += 1
        self._note(actor.uid, "FROZEN")

    async def _running(self, record: InstanceRecord, handle: Handle) -> None:
        actor = self._node.adopt(record, InstanceState.RUNNING)
        executor = self._node.executors[actor.uid]
        executor.adopt(handle)
        executor.known_pids = set(await self._shell.runtime.pids(handle))
        executor.resume_health()
        self.found.running += 1
        self._note(actor.uid, "RUNNING")
        actor.handle(ev.Unwanted())  # settle: idle until the first request

    async def _start_anew(self, record: InstanceRecord, handle: Handle | None) -> None:
        """Found in STARTING: /initialize runs once per container, so the container is made again."""
        if handle is not None:
            await self._shell.runtime.kill(handle)
            await self._shell.runtime.destroy(handle)
        if not set(record.gpu_uuids) <= self._known_gpus:
            await self._shell.store.delete_instance(record.spec.uid)
            return
        record = replace(record, phase="CREATED", handle=None)
        await self._shell.store.put_instance(record)
        actor = self._node.adopt(record, InstanceState.STARTING)
        self.found.restarted += 1
        self._note(actor.uid, "STARTING")
        self._cold.append(actor)

    async def _gone(self, record: InstanceRecord, handle: Handle | None) -> None:
        """It ended while no agent watched, or the host was booted: its ledger ends at its last mark."""
        if handle is not None:
            await self._shell.runtime.destroy(handle)
        await self._shell.store.delete_instance(record.spec.uid)
        self.found.gone += 1
        self._shell.events.add(record.spec.uid, "instance.gone", "it ended while the agent was down")

    async def _kill(self, record: InstanceRecord, handle: Handle | None, why: str) -> None:
        if handle is not None:
            try:
                await self._shell.runtime.kill(handle)
                await self._shell.runtime.destroy(handle)
            except HibernodeError as error:  # the record stays: the next start tries again
                self._shell.events.add(record.spec.uid, "instance.kill_failed", error.message)
                return
        await self._shell.store.delete_instance(record.spec.uid)
        self.found.killed += 1
        self._shell.events.add(record.spec.uid, "instance.killed_at_recovery", why)

    async def _orphan(self, handle: Handle) -> None:
        """Ours by its label, but without a record: it was never promised to anybody."""
        await self._shell.runtime.kill(handle)
        await self._shell.runtime.destroy(handle)
        self.found.orphans += 1
        self._shell.events.add(handle.uid, "instance.orphan_destroyed", "a container of ours without a record")

    def _note(self, uid: str, state: str) -> None:
        self._shell.events.add(uid, "instance.recovered", state=state)
