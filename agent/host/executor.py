"""Runs the operations of one instance, one at a time, and posts each result back as an event.

An operation never decides what comes next: it does its work against the ports, within deadlines, and answers
Succeeded, Refused (rolled back) or Broken (unknown). An exception nobody foresaw is Broken, never silence.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import assert_never

from agent.core import lifecycle_events as ev
from agent.core.errors import HibernodeError, InstanceError, PreconditionError
from agent.core.lifecycle import CANCELLED, PRE_FREEZE_FAILED
from agent.core.types import SECOND_NS, Exit, Handle
from agent.host import hooks
from agent.host.actor import Actor
from agent.host.events import EventLog
from agent.host.health import HealthProbe
from agent.host.memory_desk import MemoryDesk
from agent.http.client import Pool
from agent.http.errors import RequestIds
from agent.http.limits import UpstreamLimits
from agent.log import get_logger
from agent.ports import Clock, Freezer, FreezeResult, InstanceRecord, InstanceStore, Outcome, Runtime, StartSpec

LOG_TAIL_BYTES = 2048
KILL_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class Shell:
    """What every executor of a node shares."""

    clock: Clock
    runtime: Runtime
    freezer: Freezer
    memory: MemoryDesk
    store: InstanceStore
    events: EventLog
    request_ids: RequestIds
    ready_timeout_s: float
    stop_timeout_s: float
    environment: Mapping[str, str]


class InstanceExecutor:
    """Implements `actor.Executor` for one actor. `record` is what the store holds of it."""

    def __init__(self, actor: Actor, record: InstanceRecord, shell: Shell) -> None:
        self._actor = actor
        self._shell = shell
        self.record = record
        self.known_pids: set[int] = set()
        self._task: asyncio.Task[None] | None = None
        self._watch: asyncio.Task[None] | None = None
        self._exit: Exit | None = None
        self._cancel_gen = -1
        self._cancelled = asyncio.Event()
        self._health = HealthProbe(actor)
        self._log = get_logger()

    # ---- the port -----------------------------------------------------------------------------------------------

    def run(self, op: ev.Op, gen: int) -> None:
        """Start `op` as soon as the operation before it has ended."""
        self._cancelled.clear()
        self._task = asyncio.create_task(self._after(self._task, op, gen), name=f"{op.value} {self._actor.uid}")

    def ask_cancel(self, gen: int) -> None:
        """The LOCK of generation `gen` may end early."""
        self._cancel_gen = gen
        self._cancelled.set()

    async def close(self) -> None:
        """The agent goes away and leaves the instance: let the operation under way end, stop watching."""
        await self._health.pause()
        if self._task is not None:
            await asyncio.wait([self._task], timeout=self._shell.stop_timeout_s)
        for task in (self._task, self._watch):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        if self._actor.pool is not None:
            self._actor.pool.close()

    async def _after(self, earlier: asyncio.Task[None] | None, op: ev.Op, gen: int) -> None:
        if earlier is not None:
            await asyncio.wait([earlier])
        try:
            await self._dispatch(op, gen)
        except HibernodeError as error:
            self._actor.handle(ev.Broken(gen, error.reason, error.message))
        except Exception as error:
            self._log.exception("instance.operation_crashed", instance=self._actor.uid, operation=op.value)
            self._actor.handle(ev.Broken(gen, "INTERNAL", f"{op.value} failed unexpectedly: {type(error).__name__}"))

    async def _dispatch(self, op: ev.Op, gen: int) -> None:
        match op:
            case ev.Op.START:
                await self._start(gen)
            case ev.Op.LOCK:
                await self._lock(gen)
            case ev.Op.CHECKPOINT:
                await self._checkpoint(gen)
            case ev.Op.UNLOCK:
                await self._unlock(gen)
            case ev.Op.WAKE:
                await self._wake(gen)
            case ev.Op.STOP:
                await self._stop(gen)
            case ev.Op.DESTROY:
                await self._end(gen)
            case _:
                assert_never(op)

    # ---- start --------------------------------------------------------------------------------------------------

    async def _start(self, gen: int) -> None:
        actor, shell = self._actor, self._shell
        spec = StartSpec(actor.spec, self._environment(), actor.instance.gpus)
        handle = await shell.runtime.start(spec)
        self.adopt(handle)
        await self.save("STARTED")
        deadline = asyncio.get_running_loop().time() + shell.ready_timeout_s
        try:
            await hooks.wait_until_listening(handle.host, handle.port, deadline, lambda: self._exit is not None)
            pool = actor.pool
            assert pool is not None
            await hooks.initialize(pool, actor.function, shell.request_ids())
            await self._first_probe(pool)
        except HibernodeError as error:
            tail = shell.runtime.read_log(handle, LOG_TAIL_BYTES).decode(errors="replace").strip()
            raise InstanceError(error.reason, f"{error.message} Logs: {tail or '(none)'}") from error
        await self.save("READY")
        await self._note_vram(handle)
        self._health.resume()
        actor.handle(ev.Succeeded(gen))

    async def _first_probe(self, pool: Pool) -> None:
        check = self._actor.function.health_check
        if check is None:
            return
        await asyncio.sleep(check.initial_delay_ns / SECOND_NS)  # what the user's configuration asks for
        if not await hooks.probe(pool, self._actor.function, check):
            raise InstanceError("HEALTH_CHECK_FAILED", f"the first GET {check.path} did not answer 200 to 399 in time")

    def _environment(self) -> dict[str, str]:
        function = self._actor.function
        gpus = ",".join(self._actor.instance.gpus)
        return {
            **self._shell.environment,
            **dict(function.environment),
            "CUDA_VISIBLE_DEVICES": gpus,
            "NVIDIA_VISIBLE_DEVICES": gpus or "void",
            "FC_FUNCTION_NAME": function.name,
            "FC_FUNCTION_HANDLER": function.handler,
            "FC_FUNCTION_MEMORY_SIZE": str(function.memory_bytes >> 20),
            "FC_REGION": function.region,
            "FC_INSTANCE_ID": self._actor.uid,
        }

    def adopt(self, handle: Handle) -> None:
        """This container is ours from now on: data path, exit watch."""
        self._actor.handle_of_container = handle
        self._actor.pool = Pool(handle.host, handle.port, UpstreamLimits())
        self.record = replace(self.record, handle=handle)
        self._watch = asyncio.create_task(self._watch_exit(handle), name=f"watch {handle.uid}")

    async def _watch_exit(self, handle: Handle) -> None:
        self._exit = ended = await self._shell.runtime.wait(handle)
        if ended.oom_killed:
            reason, how = "OUT_OF_MEMORY", "was killed for running out of memory"
        elif ended.signal:
            reason, how = "INSTANCE_CRASHED", f"was ended by signal {ended.signal}"
        else:
            reason, how = "INSTANCE_CRASHED", f"exited with code {ended.code}"
        self._actor.handle(ev.Exited(reason, f"the container's main process {how}. {ended.message}".strip()))

    def resume_health(self) -> None:
        """Recovery: the instance was found RUNNING."""
        self._health.resume()

    # ---- freeze -------------------------------------------------------------------------------------------------

    async def _lock(self, gen: int) -> None:
        actor, shell, handle = self._actor, self._shell, self._handle()
        await self._health.pause()
        try:
            await self._pre_freeze(gen)
            await self._note_vram(handle)
            shell.memory.reserve(handle, actor.figures.vram_bytes)
        except PreconditionError as error:
            shell.memory.restored(actor.uid)
            self._health.resume()
            actor.handle(ev.Refused(gen, error.reason, error.message))
            return
        self._settle(gen, await shell.freezer.lock(handle))

    async def _pre_freeze(self, gen: int) -> None:
        """GET /pre-freeze: 4xx is noted and the freeze goes on, 5xx replaces the instance; a cancel ends it."""
        hook, pool = self._actor.function.hooks.pre_freeze, self._actor.pool
        if hook is not None and pool is not None:
            call = asyncio.create_task(
                hooks.call_hook(pool, self._actor.function, hook, b"GET", "/pre-freeze", self._shell.request_ids())
            )
            cancelled = asyncio.create_task(self._cancelled.wait())
            await asyncio.wait([call, cancelled], return_when=asyncio.FIRST_COMPLETED)
            cancelled.cancel()
            call.cancel()
            results = await asyncio.gather(call, cancelled, return_exceptions=True)
            self._judge_pre_freeze(results[0])
            pool.retire()
        if self._cancel_gen == gen:
            raise PreconditionError(CANCELLED, "a request arrived before the checkpoint began")

    def _judge_pre_freeze(self, result: int | BaseException) -> None:
        match result:
            case int() if result >= 500:
                raise PreconditionError(PRE_FREEZE_FAILED, f"GET /pre-freeze answered {result}")
            case int() if result >= 400:
                self._shell.events.add(self._actor.uid, "instance.pre_freeze_failed", f"answered {result}")
            case HibernodeError():
                self._shell.events.add(self._actor.uid, "instance.pre_freeze_failed", result.message)
            case _:
                pass

    async def _checkpoint(self, gen: int) -> None:
        result = await self._shell.freezer.checkpoint(self._handle())
        if result.outcome is Outcome.OK:
            self._shell.memory.took(self._actor.uid, result.image_bytes)
            self._actor.figures.image_bytes = result.image_bytes
            self._actor.figures.freezes += 1
        self._settle(gen, result)

    async def _unlock(self, gen: int) -> None:
        result = await self._shell.freezer.unlock(self._handle())
        self._shell.memory.restored(self._actor.uid)
        if result.outcome is Outcome.OK:
            self._health.resume()
        self._settle(gen, result)

    async def _wake(self, gen: int) -> None:
        actor, shell = self._actor, self._shell
        began = shell.clock.monotonic_ns()
        result = await shell.freezer.wake(self._handle(), {})
        if result.outcome is Outcome.OK:
            shell.memory.restored(actor.uid)
            actor.figures.wakes += 1
            actor.figures.last_wake_ns = shell.clock.monotonic_ns() - began
            actor.figures.last_wake_driver_ns = result.driver_ns
            actor.figures.wake_estimate_ns = _moving_average(actor.figures.wake_estimate_ns, actor.figures.last_wake_ns)
            actor.figures.image_bytes = 0
            self._health.resume()
        self._settle(gen, result)

    def _settle(self, gen: int, result: FreezeResult) -> None:
        match result.outcome:
            case Outcome.OK:
                self._actor.handle(ev.Succeeded(gen))
            case Outcome.REFUSED:
                if self._actor.instance.op in (ev.Op.LOCK, ev.Op.CHECKPOINT):
                    self._shell.memory.restored(self._actor.uid)
                    self._health.resume()
                self._actor.handle(ev.Refused(gen, result.reason, result.message))
            case Outcome.BROKEN:
                self._actor.handle(ev.Broken(gen, result.reason, result.message))
            case _:
                assert_never(result.outcome)

    # ---- end ----------------------------------------------------------------------------------------------------

    async def _stop(self, gen: int) -> None:
        """/pre-stop, TERM, KILL, in that order, each only if the one before left something; frozen: KILL at once."""
        actor, shell, handle = self._actor, self._shell, self._actor.handle_of_container
        await self._health.pause()
        await self._try_save("STOPPING")
        if handle is not None and self._exit is None:
            if actor.instance.stop_force:
                if actor.function.hooks.pre_stop is not None:
                    shell.events.add(actor.uid, "instance.pre_stop_skipped", "stopped without waking or by force")
            else:
                await self._pre_stop()
                await shell.runtime.terminate(handle)
                if self._watch is not None:
                    await asyncio.wait([self._watch], timeout=shell.stop_timeout_s)
        await self._end(gen)

    async def _pre_stop(self) -> None:
        hook, pool = self._actor.function.hooks.pre_stop, self._actor.pool
        if hook is None or pool is None:
            return
        try:
            status = await hooks.call_hook(
                pool, self._actor.function, hook, b"GET", "/pre-stop", self._shell.request_ids()
            )
        except HibernodeError as error:
            self._shell.events.add(self._actor.uid, "instance.pre_stop_failed", error.message)
            return
        if status >= 400:
            self._shell.events.add(self._actor.uid, "instance.pre_stop_failed", f"answered {status}")

    async def _end(self, gen: int) -> None:
        """Kill and clean up whatever is left; the uid is never used again."""
        actor, shell, handle = self._actor, self._shell, self._actor.handle_of_container
        await self._health.pause()
        if handle is not None:
            await self._kill(handle)
            shell.freezer.forget(handle)
        shell.memory.forget(actor.uid)
        if actor.pool is not None:
            actor.pool.close()
        await self._try_save("ENDED")
        actor.handle(ev.Succeeded(gen))
        actor.ended.set()

    async def _kill(self, handle: Handle) -> None:
        """What survives every attempt keeps its GPU cordoned (no proof of release) and is told about."""
        runtime, message = self._shell.runtime, ""
        for _ in range(KILL_ATTEMPTS):
            try:
                self.known_pids |= set(await runtime.pids(handle))
                await runtime.kill(handle)
                await runtime.destroy(handle)
            except HibernodeError as error:
                message = error.message
            else:
                return
        self._shell.events.add(self._actor.uid, "instance.kill_failed", message)

    # ---- small things -------------------------------------------------------------------------------------------

    def _handle(self) -> Handle:
        handle = self._actor.handle_of_container
        if handle is None:
            raise InstanceError("NO_CONTAINER", "the instance has no container")
        return handle

    async def _note_vram(self, handle: Handle) -> None:
        self._actor.figures.vram_bytes = await self._shell.freezer.vram_bytes(handle)
        self.known_pids = set(await self._shell.runtime.pids(handle))

    async def _try_save(self, phase: str) -> None:
        """As `save`; an end goes on without the store: recovery finds the container gone."""
        try:
            await self.save(phase)
        except HibernodeError as error:
            self._shell.events.add(self._actor.uid, "store.failed", error.message, phase=phase)

    async def save(self, phase: str) -> None:
        """Make the record's phase durable. Raises UnavailableError STORE_FAILED."""
        instance = self._actor.instance
        self.record = replace(
            self.record,
            phase=phase,
            gpu_uuids=self._actor.gpu_uuids,
            end_reason=instance.reason,
            end_message=instance.message,
        )
        await self._shell.store.put_instance(self.record)


def _moving_average(old_ns: int, new_ns: int) -> int:
    return new_ns if not old_ns else (3 * old_ns + new_ns) // 4
