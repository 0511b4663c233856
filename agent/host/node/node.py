"""The node: its table of instances, their creation and their end. `Actor` runs what happens in between."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from agent.core.errors import ConflictError, HibernodeError, NotFoundError, PreconditionError, UnavailableError
from agent.core.gpu_fit import NO_SUCH_GPU, NodeGpus, misfit, suits, wanted
from agent.core.gpus import allocator_events
from agent.core.instance_record import InstanceRecord, RecordPhase
from agent.core.lifecycle import events as ev
from agent.core.lifecycle.machine import Instance
from agent.core.types import FunctionSpec, Gpu, IdleMode, InstanceSpec, InstanceState
from agent.host.gpus.broker import GpuBroker
from agent.host.instance.actor import Actor, StateListener
from agent.host.instance.context import InstanceContext
from agent.host.instance.executor import InstanceExecutor
from agent.host.instance.gate import FunctionQueue
from agent.host.instance.memory_reservations import UNMEASURED, ImageSize
from agent.ports import Gpus, Meters

ENDED_KEPT = 200
END_TIMEOUT_S = 60.0
CLOSE_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """The configuration of instances. `types` maps Function Compute's GPU types to models."""

    per_gpu: int
    max_hold_ns: int
    release_timeout_ns: int
    max_waiting: int
    types: dict[str, str]
    migrate: bool = False
    freeze_unavailable: str = ""


class Node:
    """See the module. All methods run on the loop's thread; only `create`, `stop_all` and `close` wait."""

    def __init__(
        self,
        settings: NodeSettings,
        inventory: Sequence[Gpu],
        context: InstanceContext,
        *,
        gpus: Gpus,
        meters: Meters,
        new_uid: Callable[[], str],
    ) -> None:
        self.actors: dict[str, Actor] = {}
        self.ended: OrderedDict[str, Actor] = OrderedDict()
        self.executors: dict[str, InstanceExecutor] = {}
        self.queues: dict[str, FunctionQueue[Actor]] = {}
        self.listeners: list[StateListener] = []
        self.draining = False
        self.context = context
        self.memory = context.memory
        self.broker = GpuBroker(
            inventory,
            per_gpu=settings.per_gpu,
            max_hold_ns=settings.max_hold_ns,
            release_timeout_ns=settings.release_timeout_ns,
            migrate=settings.migrate,
            gpus=gpus,
            clock=context.clock,
            events=context.events,
            actor_of=self.actors.get,
            pids_of=self._pids_of,
        )
        self._settings = settings
        self._clock = context.clock
        self._events = context.events
        self._meters = meters
        self._new_uid = new_uid
        self._by_request: dict[str, str] = {}
        self._creating: dict[str, asyncio.Task[Actor]] = {}
        self._endings: set[asyncio.Task[None]] = set()

    # ---- looking up ---------------------------------------------------------------------------------------------

    def get(self, uid: str) -> Actor:
        """A living or recently ended instance, by uid or an unambiguous beginning of it. Raises NotFoundError."""
        found = self.actors.get(uid) or self.ended.get(uid)
        if found is not None:
            return found
        matches = [actor for key, actor in (self.actors | self.ended).items() if uid and key.startswith(uid)]
        if len(matches) != 1:
            many = f"{len(matches)} instances begin with" if matches else "no instance is called"
            raise NotFoundError("INSTANCE_NOT_FOUND", f"{many} {uid!r} on this node; `hibernode ps` lists them")
        return matches[0]

    # ---- making -------------------------------------------------------------------------------------------------

    async def create(self, request_id: str, function: FunctionSpec) -> Actor:
        """Make one instance; returns as soon as its record is durable (it is STARTING then).

        The same `request_id` returns the same instance again. Raises ConflictError if it was used for another function,
        PreconditionError (runtime, idle mode, GPU type and memory, host memory), ExhaustedError GPU_CAPACITY,
        UnavailableError.
        """
        # The same create may still be on its way to the disk: wait for its outcome.
        while (running := self._creating.get(request_id)) is not None:
            await asyncio.wait([running])
        known = self._known(request_id, function)
        if known is not None:
            return known
        if self.draining:
            raise UnavailableError("NODE_DRAINING", "this node accepts no new instances")
        self.context.runtime.accepts(function)
        function = self._admitted(function)
        spec = InstanceSpec(self._new_uid(), request_id, function)
        gpus = self.broker.assign(spec.uid, function.gpu.count, self._suiting(function), wanted(function.gpu))
        # A task of its own: a caller that disconnects must not leave half an instance.
        task = asyncio.create_task(self._make(spec, gpus), name=f"create {spec.uid}")
        self._creating[request_id] = task
        task.add_done_callback(lambda done: self._made(request_id, done))
        return await asyncio.shield(task)

    def _made(self, request_id: str, task: asyncio.Task[Actor]) -> None:
        del self._creating[request_id]
        if not task.cancelled():
            task.exception()  # marks the error as retrieved: the caller may be gone

    async def _make(self, spec: InstanceSpec, gpus: tuple[str, ...]) -> Actor:
        try:
            self._pledge(spec)
            record = InstanceRecord(spec, RecordPhase.CREATED, None, gpus, self._clock.wall_ns())
            actor = self._add(record, InstanceState.STARTING)
            await self.context.store.put_instance(record)
        except BaseException as error:
            self._meters.changed(spec.uid, InstanceState.FAILED)
            self._forget(spec.uid)
            await self.broker.unassign(spec.uid)
            if isinstance(error, UnavailableError):
                await self._forget_record(spec.uid)  # a late write may still have succeeded
            raise
        self._events.add(
            spec.uid,
            "instance.created",
            function=spec.function.name,
            gpus=",".join(gpus),
            request_id=spec.request_id,
        )
        self.fitness_changed(actor)  # the first report: a start may take minutes without a state change
        actor.handle(ev.Created())
        return actor

    async def _forget_record(self, uid: str) -> None:
        """Delete the record. If the store fails, the next recovery finds no container and deletes the record."""
        try:
            await self.context.store.delete_instance(uid)
        except HibernodeError as error:
            self._events.add(uid, "store.failed", error.message)

    def _known(self, request_id: str, function: FunctionSpec) -> Actor | None:
        uid = self._by_request.get(request_id) if request_id else None
        actor = (self.actors.get(uid) or self.ended.get(uid)) if uid else None
        if actor is None:
            return None
        if actor.function != self._admitted(function):
            raise ConflictError(
                "REQUEST_ID_REUSED", f"request id {request_id!r} made instance {actor.uid} from another spec"
            )
        return actor

    def _admitted(self, function: FunctionSpec) -> FunctionSpec:
        """The function as this node runs it: GPU type resolved to a model, idle mode checked."""
        need = function.gpu
        if need.gpu_type and not need.model:
            model = self._settings.types.get(need.gpu_type, "")
            need = replace(need, model=model)
            function = replace(function, gpu=need)
        missing = self._settings.freeze_unavailable
        if missing and function.idle.mode is IdleMode.REQUIRE and need.count:
            raise PreconditionError(
                "IDLE_MODE_UNSUPPORTED", f"{missing}; or set hibernode.idle: prefer, which keeps it always awake"
            )
        return function

    def _suiting(self, function: FunctionSpec) -> frozenset[str]:
        """The GPUs that have the type and memory it asks for. Raises PreconditionError NO_SUCH_GPU if they are too few,
        in use or not."""
        gpus, types = [gpu for gpu in self.broker.inventory.values() if not gpu.mig], self._settings.types
        unfit = misfit(function.gpu, [NodeGpus(gpus, types)], "this node")
        if unfit:
            raise PreconditionError(NO_SUCH_GPU, unfit)
        return frozenset(gpu.uuid for gpu in gpus if suits(function.gpu, gpu, types))

    def _pledge(self, spec: InstanceSpec) -> None:
        """Promise host memory to an instance that shares its GPU, before it starts: the images of all must fit."""
        declared = self._declared_bytes(spec.function)
        if declared is not None:
            self.memory.pledge(spec.uid, declared)

    def _declared_bytes(self, function: FunctionSpec) -> int | None:
        """The VRAM that a sharer of GPUs declares; 0 = none declared: it is measured after the start. None = the
        function shares no GPU."""
        shared = self._settings.per_gpu > 1 and function.gpu.count
        return function.gpu.memory_bytes * function.gpu.count if shared else None

    def _freezable(self, function: FunctionSpec) -> bool:
        return function.idle.mode is not IdleMode.NEVER and not self._settings.freeze_unavailable

    def _add(self, record: InstanceRecord, state: InstanceState) -> Actor:
        spec, function = record.spec, record.spec.function
        new = state is InstanceState.STARTING
        meter = self._meters.open(spec.uid, function, state, unbilled=new, same_process=not new)
        instance = Instance(
            spec.uid,
            freezable=self._freezable(function),
            freeze_after_ns=function.idle.freeze_after_ns,
            min_awake_ns=function.idle.min_awake_ns,
            movable=self._settings.migrate and bool(function.gpu.count),
            state=state,
        )
        actor = Actor(
            record,
            instance,
            self.context,
            meter=meter,
            broker=self.broker,
            listener=self,
            max_waiting=min(self._settings.max_waiting, function.queue_length),
            executor_of=lambda actor: self._new_executor(actor, record),
        )
        self.actors[spec.uid] = actor
        self.queues.setdefault(function.name, FunctionQueue(self._settings.max_waiting)).add(actor.gate)
        if spec.request_id:
            self._by_request[spec.request_id] = spec.uid
        return actor

    def _new_executor(self, actor: Actor, record: InstanceRecord) -> InstanceExecutor:
        executor = self.executors[actor.uid] = InstanceExecutor(actor, record, self.context)
        return executor

    def adopt(self, record: InstanceRecord, state: InstanceState, size: ImageSize = UNMEASURED) -> Actor:
        """Recovery: add an instance of an earlier agent, in this state. A RUNNING one holds its GPUs; `size` is that of
        its image if it is FROZEN, else of its VRAM."""
        holds = state is InstanceState.RUNNING
        self.broker.apply(allocator_events.Adopt(record.spec.uid, record.gpu_uuids, holds))
        actor = self._add(record, state)
        actor.adopt(size.bytes, sees_all_gpus=record.handle is None or record.handle.sees_all_gpus)
        frozen = state is InstanceState.FROZEN
        self.memory.recovered(actor.uid, self._declared_bytes(actor.function), size, frozen=frozen)
        return actor

    # ---- following ----------------------------------------------------------------------------------------------

    def state_changed(self, actor: Actor, old: InstanceState, new: InstanceState, at: int) -> None:
        """Update meters, history and reports; clean up after an end."""
        self._meters.changed(actor.uid, new)
        self._events.add(
            actor.uid,
            f"instance.{new.value.lower()}",
            actor.instance.message if new.terminal else "",
            function=actor.function.name,
            was=old.value,
            **({"reason": actor.instance.reason} if actor.instance.reason else {}),
        )
        for listener in self.listeners:
            listener.state_changed(actor, old, new, at)
        if new.terminal:
            task = asyncio.create_task(self._clean_up(actor), name=f"clean up {actor.uid}")
            self._endings.add(task)
            task.add_done_callback(self._endings.discard)

    def fitness_changed(self, actor: Actor) -> None:
        for listener in self.listeners:
            listener.fitness_changed(actor)

    def load_changed(self, actor: Actor) -> None:
        for listener in self.listeners:
            listener.load_changed(actor)

    def gpus_held(self, actor: Actor) -> None:
        """The instance holds its GPUs now: billing of a cold start begins."""
        uuids = actor.instance.gpus
        model = self.broker.inventory[uuids[0]].model if uuids else ""
        self._meters.placed(actor.uid, model, uuids)
        if actor.state is InstanceState.STARTING:
            self._meters.changed(actor.uid, InstanceState.STARTING)

    async def _clean_up(self, actor: Actor) -> None:
        """After an end: wait until its GPUs are released, delete the record, keep the newest ended instances."""
        try:
            async with asyncio.timeout(END_TIMEOUT_S):
                await actor.ended.wait()
        except TimeoutError:
            self._events.add(actor.uid, "instance.end_stuck", f"not cleaned up after {END_TIMEOUT_S:g} s")
        await self.broker.unassign(actor.uid)
        self.ended[actor.uid] = actor
        self._forget(actor.uid, keep_request=True)
        while len(self.ended) > ENDED_KEPT:
            _, oldest = self.ended.popitem(last=False)
            self._by_request.pop(oldest.spec.request_id, None)
        await self._forget_record(actor.uid)
        self.fitness_changed(actor)

    def _pids_of(self, actor: Actor) -> set[int]:
        executor = self.executors.get(actor.uid)
        return executor.known_pids if executor is not None else set()

    def _forget(self, uid: str, *, keep_request: bool = False) -> None:
        actor = self.actors.pop(uid, None)
        self.executors.pop(uid, None)
        self.memory.forget(uid)
        if actor is None:
            return
        if self.queues[actor.function.name].remove(actor.gate):
            del self.queues[actor.function.name]
        if not keep_request:
            self._by_request.pop(actor.spec.request_id, None)

    # ---- ending -------------------------------------------------------------------------------------------------

    async def stop_all(self, grace_ns: int, timeout_s: float) -> None:
        """Stop all instances with the agent: each drains for at most `grace_ns`, then is told to end. Instances that
        have not ended after `timeout_s` are killed; returns `END_TIMEOUT_S` later at the latest."""
        self.draining = True
        if self._creating:
            await asyncio.wait(list(self._creating.values()))  # bounded by the store's deadline
        for force, wait_s in ((False, timeout_s), (True, END_TIMEOUT_S)):
            living = list(self.actors.values())
            for actor in living:
                message = "the agent stops, and on_stop says stop"
                actor.handle(ev.StopAsked(grace_ns, force, "AGENT_STOPPED", message))
            ends = [asyncio.ensure_future(actor.ended.wait()) for actor in living]
            if ends:
                _, late = await asyncio.wait(ends, timeout=wait_s)
                for end in late:
                    end.cancel()

    async def close(self) -> None:
        """The agent stops, its instances stay: end the operations under way and stop watching."""
        self.draining = True
        for actor in self.actors.values():
            actor.close()
        if self._creating:
            await asyncio.wait(list(self._creating.values()))  # bounded by the store's deadline
        await asyncio.gather(*(executor.close() for executor in list(self.executors.values())))
        if self._endings:
            # Their executors have ended; the next agent does the rest.
            await asyncio.wait(self._endings, timeout=CLOSE_TIMEOUT_S)
        for task in self._endings:
            task.cancel()
        await asyncio.gather(*self._endings, return_exceptions=True)
        await self.broker.close()
        self.memory.close()
