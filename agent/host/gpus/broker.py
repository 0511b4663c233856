"""The shell of the GPU book: one writer on the node loop; hands out grants, asks holders to give way, wants proof.

A GPU is released on proof, not on state: NVML shows none of the instance's processes on it any more. Without proof
within `release_timeout_ns` the GPU is cordoned, for whatever still sits on it would share it with the next holder.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from contextlib import suppress
from typing import assert_never

from agent.core.errors import ExhaustedError, HibernodeError
from agent.core.gpus import allocator
from agent.core.gpus import allocator_events as book_events
from agent.core.gpus.allocator import GpuAllocator
from agent.core.gpus.allocator_events import AllocatorEvent
from agent.core.lifecycle import events as ev
from agent.core.types import SECOND_NS, Gpu, InstanceState
from agent.host.instance.actor import Actor
from agent.host.instance.events import EventLog
from agent.log import get_logger
from agent.ports import Clock, Gpus, Timer

PROOF_PAUSE_S = 0.01
PROOF_PAUSE_MAX_S = 0.2
LATE_PROOF_PAUSE_S = 1.0
END_TIMEOUT_S = 60.0
"""Killing an instance has its own deadlines; past this it is not waited for any more."""


class GpuBroker:
    """Implements `actor.GpuRequests`. `tasks` keeps the proofs under way; `close` ends them."""

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
        self.book = GpuAllocator(devices, per_gpu=per_gpu, max_hold_ns=max_hold_ns, migrate=migrate)
        self._release_timeout_s = release_timeout_ns / SECOND_NS
        self._gpus = gpus
        self._clock = clock
        self._events = events
        self._actor_of = actor_of
        self._pids_of = pids_of
        self._inbox: deque[tuple[AllocatorEvent, int]] = deque()
        self._untold: dict[str, tuple[AllocatorEvent, int]] = {}
        self._stepping = False
        self._answers: dict[str, book_events.Assigned | book_events.Unassignable] = {}
        self._timer: Timer | None = None
        self._proofs: dict[str, asyncio.Task[None]] = {}
        self._late: set[asyncio.Task[None]] = set()
        self._log = get_logger()

    # ---- what instances say -------------------------------------------------------------------------------------

    def want(self, actor: Actor, avoid: tuple[str, ...]) -> None:
        """The instance needs its GPUs to go on; rather not those in `avoid`."""
        stays = actor.state is InstanceState.WAITING_GPU and not actor.instance.movable
        self.apply(book_events.Ask(actor.uid, avoid, stays))

    def withdraw(self, actor: Actor) -> None:
        """It does not any more."""
        self.apply(book_events.Leave(actor.uid))

    def refused(self, actor: Actor) -> None:
        """An ordered freeze or drain did not happen."""
        self.apply(book_events.FreezeRefused(actor.uid))

    def became(self, actor: Actor, idle: bool, preemptible_at_ns: int) -> None:
        """The holder's idleness changed: the book is told before anything else happens to it, at once where somebody
        waits for a GPU. (Two such edges go with each request.)"""
        event = book_events.BecameIdle(actor.uid, preemptible_at_ns) if idle else book_events.BecameBusy(actor.uid)
        self._untold.pop(actor.uid, None)  # in the order of time
        self._untold[actor.uid] = (event, self._clock.monotonic_ns())
        if self.book.queue:
            self._step()

    def release(self, actor: Actor) -> None:
        """The holder gives up its GPUs: start collecting the proof."""
        self.apply(book_events.Releasing(actor.uid))
        if actor.uid not in self._proofs:
            task = asyncio.create_task(self._prove(actor), name=f"release {actor.uid}")
            self._proofs[actor.uid] = task

    # ---- what the node says -------------------------------------------------------------------------------------

    def assign(self, uid: str, count: int, model: str) -> tuple[str, ...]:
        """Choose the GPUs of a new instance. Raises ExhaustedError GPU_CAPACITY."""
        self.apply(book_events.Assign(uid, count, model))
        answer = self._answers.pop(uid)
        if isinstance(answer, book_events.Unassignable):
            raise ExhaustedError("GPU_CAPACITY", answer.message)
        return answer.gpus

    async def unassign(self, uid: str) -> None:
        """The instance is gone for good: wait for the proof of its GPUs, then forget it."""
        proof = self._proofs.get(uid)
        if proof is not None:
            await asyncio.wait([proof])  # it has its own deadlines
        self.apply(book_events.Unassign(uid))

    def apply(self, event: AllocatorEvent) -> None:
        """Feed the book; when this returns, everything that followed has been handed out."""
        self._hand_in()
        self._inbox.append((event, self._clock.monotonic_ns()))
        self._step()

    def _hand_in(self) -> None:
        if self._untold:
            self._inbox.extend(self._untold.values())
            self._untold.clear()

    def _step(self) -> None:
        if self._stepping:
            return
        self._stepping = True
        try:
            while self._inbox or (self._untold and self.book.queue):
                self._hand_in()
                event, at_ns = self._inbox.popleft()
                self.book, effects = allocator.step(self.book, event, at_ns)
                for effect in effects:
                    self._perform(effect)
        finally:
            self._stepping = False

    def _perform(self, effect: book_events.AllocatorEffect) -> None:
        match effect:
            case book_events.Assigned(uid) | book_events.Unassignable(uid):
                self._answers[uid] = effect
            case book_events.Grant(uid, gpus):
                proof = self._proofs.pop(uid, None)
                if proof is not None:  # it has its own GPUs back: there is nothing to prove any more
                    proof.cancel()
                self._tell(uid, ev.Granted(gpus))
            case book_events.Unservable(uid, message):
                self._tell(uid, ev.GpusLost(message))
            case book_events.AskFreeze(uid):
                self._tell(uid, ev.FreezeOrdered())
            case book_events.AskDrain(uid):
                self._tell(uid, ev.DrainOrdered())
            case book_events.WakeMeAt(at_ns):
                if self._timer is not None:
                    self._timer.cancel()
                self._timer = self._clock.call_at(at_ns, lambda: self.apply(book_events.Tick()))
            case _:
                assert_never(effect)

    def _tell(self, uid: str, event: ev.Event) -> None:
        actor = self._actor_of(uid)
        if actor is None:  # it ended between its wish and the grant
            self.apply(book_events.Unassign(uid))
            return
        actor.handle(event)

    # ---- proof --------------------------------------------------------------------------------------------------

    async def _prove(self, actor: Actor) -> None:
        """Ends with Released, whatever happens: proven, or with the GPUs cordoned."""
        why = ""
        held = self.book.holders.get(actor.uid)
        try:
            if actor.state.terminal:  # the release counts from its end: until it is killed it is no surprise there
                async with asyncio.timeout(END_TIMEOUT_S):
                    await actor.ended.wait()
            async with asyncio.timeout(self._release_timeout_s):
                await self._until_gone(actor)
        except TimeoutError:
            why = f"{actor.uid} still shows on it"
        except asyncio.CancelledError:
            raise
        except Exception as error:
            why = str(error)
        if why and held is not None:
            self.cordon(actor.uid, held.gpus, f"RELEASE_NOT_PROVEN: {why}", source=actor.uid, lasting=False)
            pids = frozenset(self._pids_of(actor))  # nobody remembers them for long once it has ended
            late = asyncio.create_task(self._prove_late(actor.uid, pids, held.gpus), name=f"late release {actor.uid}")
            self._late.add(late)
            late.add_done_callback(self._late.discard)
        self._proofs.pop(actor.uid, None)  # from here on the next release needs a proof of its own
        self.apply(book_events.Released(actor.uid))

    async def _until_gone(self, actor: Actor) -> None:
        """Poll NVML, ever more slowly, for wakes need its thread; one answer that fails is asked again, for only the
        deadline says that there is no proof."""
        pause_s = PROOF_PAUSE_S
        while True:
            try:
                held = self.book.holders.get(actor.uid)
                if held is None or not await self._shows_on(self._pids_of(actor), held.gpus):
                    return
            except HibernodeError as error:
                self._log.debug("gpu.proof_delayed", instance=actor.uid, reason=error.reason)
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 1.5, PROOF_PAUSE_MAX_S)

    async def _prove_late(self, uid: str, pids: frozenset[int], gpus: tuple[str, ...]) -> None:
        """The proof may still come: the cordon that its absence made is lifted then. Until the agent goes away."""
        while True:
            await asyncio.sleep(LATE_PROOF_PAUSE_S)
            with suppress(HibernodeError):
                if not await self._shows_on(pids, gpus):
                    self.uncordon(gpus, source=uid)
                    return

    async def places_of(self, pids: set[int]) -> list[str] | None:
        """The GPUs on which NVML shows one of these processes. None: on no GPU, but not all of them could be read (of
        those that are lost for good nobody waits for an answer)."""
        try:
            shown = await self._gpus.processes()
        except HibernodeError:
            return None
        found = sorted({process.gpu_uuid for process in shown if process.pid in pids})
        return None if not found and shown.unanswered - shown.lost else found

    def cordon(self, uid: str, gpu_uuids: Iterable[str], reason: str, *, source: str, lasting: bool) -> None:
        """Nothing new may use these GPUs until `source` lifts it, or if `lasting` until the agent is started anew.

        `uid` is the instance to blame, if any. A source has one cordon on a GPU: its newest reason counts.
        """
        for uuid in gpu_uuids:
            device = self.book.devices.get(uuid)
            cordon = book_events.Cordon(uuid, reason, source, lasting)
            if device is not None and cordon not in device.cordons:
                self._events.add(uid, "gpu.cordoned", reason, gpu=uuid)
                self.apply(cordon)

    def uncordon(self, gpu_uuids: Iterable[str], source: str) -> None:
        """The source's reason is gone. Idempotent."""
        for uuid in gpu_uuids:
            device = self.book.devices.get(uuid)
            if device is not None and any(cordon.source == source for cordon in device.cordons):
                self.apply(book_events.Uncordon(uuid, source))
                left = self.book.devices[uuid].cordoned
                name = "gpu.cordon_lifted" if left else "gpu.uncordoned"
                self._events.add("", name, left and f"still cordoned: {left}", gpu=uuid)

    async def _shows_on(self, pids: Set[int], gpus: tuple[str, ...]) -> bool:
        if not gpus:
            return False
        shown = (await self._gpus.processes()).on(gpus)  # these must have answered: silence is no proof
        return any(process.pid in pids and process.used_bytes for process in shown)

    async def close(self) -> None:
        """Stop the timer and the proofs under way."""
        if self._timer is not None:
            self._timer.cancel()
        proofs = [*self._proofs.values(), *self._late]
        for proof in proofs:
            proof.cancel()
        await asyncio.gather(*proofs, return_exceptions=True)
