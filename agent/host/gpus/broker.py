"""Runs the GPU allocator: feeds it events, delivers grants and freeze orders to instances, proves releases.

A GPU is released once NVML shows no memory of the instance on it. Without that proof within `release_timeout_ns`
it is cordoned, because whatever is still there would share it with the next holder.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from contextlib import suppress
from typing import assert_never

from agent.core.errors import ExhaustedError, HibernodeError
from agent.core.gpus import allocator, allocator_events
from agent.core.gpus.allocator import GpuAllocator
from agent.core.gpus.allocator_events import AllocatorEvent
from agent.core.gpus.health import LOST
from agent.core.instance_variables import cuda_numbers
from agent.core.lifecycle import events as ev
from agent.core.types import SECOND_NS, Gpu, InstanceState
from agent.event_log import EventLog
from agent.host.instance.actor import Actor
from agent.log import get_logger
from agent.ports import Clock, Gpus, Timer

PROOF_PAUSE_S = 0.01
PROOF_PAUSE_MAX_S = 0.2
LATE_PROOF_PAUSE_S = 1.0
END_TIMEOUT_S = 60.0
"""Longest wait for the end of an instance that is being killed; the kill has deadlines of its own."""


class GpuBroker:
    """Implements `actor.GpuRequests`. It is the only writer of `allocator`."""

    def __init__(
        self,
        inventory: Sequence[Gpu],
        *,
        per_gpu: int,
        max_hold_ns: int,
        release_timeout_ns: int,
        migrate: bool,
        gpus: Gpus,
        clock: Clock,
        events: EventLog,
        actor_of: Callable[[str], Actor | None],
        pids_of: Callable[[Actor], set[int]],
    ) -> None:
        self.inventory: Mapping[str, Gpu] = {gpu.uuid: gpu for gpu in inventory}
        devices = {gpu.uuid: allocator.AllocatableGpu(gpu.uuid, gpu.model) for gpu in inventory}
        self.allocator = GpuAllocator(devices, per_gpu=per_gpu, max_hold_ns=max_hold_ns, migrate=migrate)
        self._release_timeout_s = release_timeout_ns / SECOND_NS
        self._gpus = gpus
        self._clock = clock
        self._events = events
        self._actor_of = actor_of
        self._pids_of = pids_of
        self._inbox: deque[tuple[AllocatorEvent, int]] = deque()
        self._deferred: dict[str, tuple[AllocatorEvent, int]] = {}  # see `report_activity`
        self._stepping = False
        self._answers: dict[str, allocator_events.Assigned | allocator_events.Unassignable] = {}
        self._timer: Timer | None = None
        self._proofs: dict[str, asyncio.Task[None]] = {}
        self._late_proofs: set[asyncio.Task[None]] = set()
        self._log = get_logger()

    # ---- from instances -------------------------------------------------------------------------------------

    def request(self, actor: Actor, avoid: tuple[str, ...]) -> None:
        """The instance needs GPUs to go on, preferably none of those in `avoid`."""
        stays = actor.state is InstanceState.WAITING_GPU and not actor.instance.movable
        self.apply(allocator_events.Ask(actor.uid, avoid, stays))

    def withdraw(self, actor: Actor) -> None:
        self.apply(allocator_events.Leave(actor.uid))

    def freeze_refused(self, actor: Actor) -> None:
        self.apply(allocator_events.FreezeRefused(actor.uid))

    def report_activity(self, actor: Actor, idle: bool, preemptible_at_ns: int) -> None:
        """The holder became idle or busy. Two such events come with every request: while no instance waits for a
        GPU, they are deferred until the next event of another kind."""
        uid = actor.uid
        event = allocator_events.BecameIdle(uid, preemptible_at_ns) if idle else allocator_events.BecameBusy(uid)
        self._deferred.pop(uid, None)  # the new one goes to the end
        self._deferred[uid] = (event, self._clock.monotonic_ns())
        if self.allocator.queue:
            self._step()

    def release(self, actor: Actor) -> None:
        """The holder gives up its GPUs: start the proof."""
        self.apply(allocator_events.Releasing(actor.uid))
        if actor.uid not in self._proofs:
            task = asyncio.create_task(self._prove(actor), name=f"release {actor.uid}")
            self._proofs[actor.uid] = task

    # ---- from the node -------------------------------------------------------------------------------------

    def assign(self, uid: str, count: int, among: frozenset[str], wanted: str) -> tuple[str, ...]:
        """Choose the GPUs of a new instance, as `allocator_events.Assign` says. Raises ExhaustedError GPU_CAPACITY."""
        self.apply(allocator_events.Assign(uid, count, among, wanted))
        answer = self._answers.pop(uid)
        if isinstance(answer, allocator_events.Unassignable):
            raise ExhaustedError("GPU_CAPACITY", answer.message)
        return answer.gpus

    async def unassign(self, uid: str) -> None:
        """The instance is gone for good: wait for the proof of its release, then forget it."""
        proof = self._proofs.get(uid)
        if proof is not None:
            await asyncio.wait([proof])  # it has its own deadlines
        self.apply(allocator_events.Unassign(uid))

    def apply(self, event: AllocatorEvent) -> None:
        """Feed the allocator and perform the effects before returning; during a step the event is only queued."""
        self._flush_deferred()
        self._inbox.append((event, self._clock.monotonic_ns()))
        self._step()

    def _flush_deferred(self) -> None:
        if self._deferred:
            self._inbox.extend(self._deferred.values())
            self._deferred.clear()

    def _step(self) -> None:
        if self._stepping:
            return
        self._stepping = True
        try:
            while self._inbox or (self._deferred and self.allocator.queue):
                self._flush_deferred()
                event, at_ns = self._inbox.popleft()
                self.allocator, effects = allocator.step(self.allocator, event, at_ns)
                for effect in effects:
                    self._perform(effect)
        finally:
            self._stepping = False

    def _perform(self, effect: allocator_events.AllocatorEffect) -> None:
        match effect:
            case allocator_events.Assigned(uid) | allocator_events.Unassignable(uid):
                self._answers[uid] = effect
            case allocator_events.Grant(uid, gpus):
                proof = self._proofs.pop(uid, None)
                if proof is not None:  # its own GPUs are back: nothing to prove
                    proof.cancel()
                self._deliver(uid, ev.Granted(gpus))
            case allocator_events.Unservable(uid, message):
                self._deliver(uid, ev.GpusLost(message))
            case allocator_events.AskFreeze(uid):
                self._deliver(uid, ev.FreezeOrdered())
            case allocator_events.AskDrain(uid):
                self._deliver(uid, ev.DrainOrdered())
            case allocator_events.WakeMeAt(at_ns):
                if self._timer is not None:
                    self._timer.cancel()
                self._timer = self._clock.call_at(at_ns, lambda: self.apply(allocator_events.Tick()))
            case _:
                assert_never(effect)

    def _deliver(self, uid: str, event: ev.Event) -> None:
        actor = self._actor_of(uid)
        if actor is None:  # it ended between the request and the grant
            self.apply(allocator_events.Unassign(uid))
            return
        actor.handle(event)

    # ---- proof --------------------------------------------------------------------------------------------------

    async def _prove(self, actor: Actor) -> None:
        """Release the holder's GPUs once they are proven free; without a proof in time, cordon them first."""
        why = ""
        held = self.allocator.holders.get(actor.uid)
        try:
            if actor.state.terminal:  # it may use them until it is killed: the timeout starts at its end
                async with asyncio.timeout(END_TIMEOUT_S):
                    await actor.ended.wait()
            async with asyncio.timeout(self._release_timeout_s):
                await self._until_gone(actor)
        except TimeoutError:
            why = f"NVML has not shown it free of {actor.uid} in time"
        except asyncio.CancelledError:
            raise
        except Exception as error:
            why = str(error)
        if why and held is not None:
            self.cordon(actor.uid, held.gpus, f"RELEASE_NOT_PROVEN: {why}", source=actor.uid, lasting=False)
            pids = frozenset(self._pids_of(actor))  # read now: they are forgotten soon after its end
            late = asyncio.create_task(self._prove_late(actor.uid, pids, held.gpus), name=f"late release {actor.uid}")
            self._late_proofs.add(late)
            late.add_done_callback(self._late_proofs.discard)
        self._proofs.pop(actor.uid, None)  # the next release starts a new proof
        self.apply(allocator_events.Released(actor.uid))

    async def _until_gone(self, actor: Actor) -> None:
        """Poll NVML until the GPUs are free, with growing pauses because wakes need its thread. After an error it polls
        on: the caller has a deadline."""
        pause_s = PROOF_PAUSE_S
        while True:
            try:
                held = self.allocator.holders.get(actor.uid)
                if held is None or not await self._shows_on(self._pids_of(actor), held.gpus):
                    return
            except HibernodeError as error:
                self._log.debug("gpu.proof_delayed", instance=actor.uid, reason=error.reason)
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 1.5, PROOF_PAUSE_MAX_S)

    async def _prove_late(self, uid: str, pids: frozenset[int], gpus: tuple[str, ...]) -> None:
        """Lift the cordon of a failed proof once the GPUs are free after all. Polls until then or the agent's stop."""
        while True:
            await asyncio.sleep(LATE_PROOF_PAUSE_S)
            with suppress(HibernodeError):
                if not await self._shows_on(pids, gpus):
                    self.uncordon(gpus, source=uid)
                    return

    async def gpus_of(self, pids: set[int]) -> list[str] | None:
        """The GPUs on which NVML shows any of these processes. None = unknown: it shows none, and NVML or a GPU did not
        answer (GPUs that are lost for good do not count)."""
        try:
            shown = await self._gpus.processes()
        except HibernodeError:
            return None
        found = sorted({process.gpu_uuid for process in shown if process.pid in pids})
        return None if not found and shown.unanswered - shown.lost else found

    def cuda_numbers(self, gpu_uuids: Sequence[str]) -> tuple[int, ...]:
        """See `StartSpec.gpu_numbers`. None while a GPU is lost: CUDA may no longer count it."""
        if any(cordon.source == LOST for device in self.allocator.devices.values() for cordon in device.cordons):
            return ()
        return cuda_numbers(self.inventory.values(), gpu_uuids)

    def cordon(self, uid: str, gpu_uuids: Iterable[str], reason: str, *, source: str, lasting: bool) -> None:
        """Grant these GPUs to no instance until `source` lifts the cordon. A `lasting` one ends only with the agent.

        `uid`: the instance that caused it, if any. A source has one cordon per GPU, with its newest reason.
        """
        for uuid in gpu_uuids:
            device = self.allocator.devices.get(uuid)
            cordon = allocator_events.Cordon(uuid, reason, source, lasting)
            if device is not None and cordon not in device.cordons:
                self._events.add(uid, "gpu.cordoned", reason, gpu=uuid)
                self.apply(cordon)

    def uncordon(self, gpu_uuids: Iterable[str], source: str) -> None:
        """Lift the cordons of `source`. Idempotent."""
        for uuid in gpu_uuids:
            device = self.allocator.devices.get(uuid)
            if device is not None and any(cordon.source == source for cordon in device.cordons):
                self.apply(allocator_events.Uncordon(uuid, source))
                left = self.allocator.devices[uuid].cordoned
                name = "gpu.cordon_lifted" if left else "gpu.uncordoned"
                self._events.add("", name, left and f"still cordoned: {left}", gpu=uuid)

    async def _shows_on(self, pids: Set[int], gpus: tuple[str, ...]) -> bool:
        if not gpus:
            return False
        shown = (await self._gpus.processes()).on(gpus)  # raises if one of them did not answer: that is no proof
        return any(process.pid in pids and process.used_bytes for process in shown)

    async def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        proofs = [*self._proofs.values(), *self._late_proofs]
        for proof in proofs:
            proof.cancel()
        await asyncio.gather(*proofs, return_exceptions=True)
