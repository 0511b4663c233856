"""Runs the operations of one instance, one at a time, and posts each result as an event.

An operation does not decide what comes next: it works on the ports, within deadlines, and answers Succeeded, Refused
(rolled back) or Broken (state unknown). An exception becomes Broken.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace
from typing import assert_never

from agent.core.errors import HibernodeError, InstanceError, PreconditionError
from agent.core.function_rules import HOST_IMAGE
from agent.core.instance_record import InstanceRecord, RecordPhase
from agent.core.lifecycle import events as ev
from agent.core.lifecycle.machine import CANCELLED
from agent.core.types import SECOND_NS, Exit, Handle
from agent.host.instance import hooks
from agent.host.instance.actor import Actor
from agent.host.instance.context import InstanceContext, unless_cancelled
from agent.host.instance.freezing import FreezeOperations
from agent.host.instance.health import HealthProbe
from agent.http.limits import UpstreamLimits
from agent.http.pool import Pool
from agent.log import get_logger
from agent.ports import StartSpec

LOG_TAIL_BYTES = 2048
KILL_ATTEMPTS = 3
LISTEN_CHECK_S = 5.0
"""Pause between two looks at what a starting instance listens on."""


class InstanceExecutor:
    """Implements `actor.Executor` for one actor.

    - `record`: the instance's record as the store has it.
    - `known_pids`: its host pids as last listed, for the proof that its GPUs are free.
    """

    def __init__(self, actor: Actor, record: InstanceRecord, context: InstanceContext) -> None:
        self._actor = actor
        self._context = context
        self.record = record
        self.known_pids: set[int] = set()
        self._task: asyncio.Task[None] | None = None
        self._watch: asyncio.Task[None] | None = None
        self._exit: Exit | None = None
        self._op: ev.Operation | None = None
        self._gen = -1
        self._cancel = asyncio.Event()
        self._closed = False
        self._health = HealthProbe(actor)
        self._freezing = FreezeOperations(actor, context, self._health, self._note_vram, self._save_placement)
        self._log = get_logger()

    # ---- actor.Executor ---------------------------------------------------------------------------------------------

    def run(self, op: ev.Operation, gen: int) -> None:
        """Start `op` once the operation before it has ended. DESTROY cancels that one."""
        if self._closed:
            return
        if op is ev.Operation.DESTROY:
            self._cancel.set()
        self._op, self._gen, self._cancel = op, gen, asyncio.Event()
        work = self._after(self._task, op, gen, self._cancel)
        self._task = asyncio.create_task(work, name=f"{op.value} {self._actor.uid}")

    def ask_cancel(self, gen: int) -> None:
        """The operation of generation `gen` may end early (see `AskCancel`)."""
        if gen == self._gen:
            self._cancel.set()

    async def close(self) -> None:
        """The agent stops and the instance stays: let the operation under way end, then stop watching.

        LOCK is asked to end early. PREPARE and START are cancelled: the next agent begins the start anew.
        """
        await self._health.pause()
        if self._op is ev.Operation.LOCK:
            self._cancel.set()
        try:
            async with asyncio.timeout(self._context.stop_timeout_s):
                beginning = (ev.Operation.PREPARE, ev.Operation.START)
                while self._task is not None and not self._task.done() and self._op not in beginning:
                    await asyncio.wait([self._task])  # the operation that follows is another task
        except TimeoutError:
            self._log.warning("instance.operation_abandoned", instance=self._actor.uid, operation=str(self._op))
        self._closed = True
        for task in (self._task, self._watch):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        await self._health.pause()
        if self._actor.pool is not None:
            self._actor.pool.close()

    async def _after(
        self, earlier: asyncio.Task[None] | None, op: ev.Operation, gen: int, cancel: asyncio.Event
    ) -> None:
        if earlier is not None and not earlier.done():
            handle = self._actor.handle_of_container
            if op is ev.Operation.DESTROY and handle is not None:
                await self._kill(handle)  # ends whatever the earlier operation waits for
            await asyncio.wait([earlier])  # every operation has its own deadlines
        try:
            answer = await self._dispatch(op, gen, cancel)
        except HibernodeError as error:
            answer = ev.Broken(gen, error.reason, error.message)
        except Exception as error:
            self._log.exception("instance.operation_crashed", instance=self._actor.uid, operation=op.value)
            answer = ev.Broken(gen, "INTERNAL", f"{op.value} failed unexpectedly: {type(error).__name__}")
        self._actor.handle(answer)

    async def _dispatch(self, op: ev.Operation, gen: int, cancel: asyncio.Event) -> ev.Event:
        match op:
            case ev.Operation.PREPARE:
                return await self._prepare(gen, cancel)
            case ev.Operation.START:
                return await self._start(gen, cancel)
            case ev.Operation.LOCK:
                return await self._freezing.lock(self._handle(), gen, cancel)
            case ev.Operation.CHECKPOINT:
                return await self._freezing.checkpoint(self._handle(), gen)
            case ev.Operation.UNLOCK:
                return await self._freezing.unlock(self._handle(), gen)
            case ev.Operation.WAKE:
                return await self._freezing.wake(self._handle(), gen)
            case ev.Operation.STOP:
                return await self._stop(gen, cancel)
            case ev.Operation.DESTROY:
                return await self._end(gen)
            case _:
                assert_never(op)

    # ---- start --------------------------------------------------------------------------------------------------

    async def _prepare(self, gen: int, cancel: asyncio.Event) -> ev.Event:
        work = self._context.runtime.prepare(self._actor.function, self._actor.set_progress)
        try:
            await unless_cancelled(work, cancel)
        except HibernodeError as error:
            if error.reason == CANCELLED:
                return ev.Refused(gen, CANCELLED, "the pull was cancelled")
            raise
        self._actor.set_progress("waiting for a GPU" if self._actor.function.gpu.count else "")
        return ev.Succeeded(gen)

    async def _start(self, gen: int, cancel: asyncio.Event) -> ev.Event:
        actor, context = self._actor, self._context
        # The driver restores on other GPUs only processes that can see every GPU of the host.
        movable = bool(actor.instance.gpus) and actor.instance.movable
        gpus = actor.instance.gpus
        spec = StartSpec(actor.spec, self._environment(), gpus, all_gpus=movable, gpu_numbers=context.gpu_numbers(gpus))
        actor.set_progress("starting")
        handle = await context.runtime.start(spec)
        actor.set_gpus(actor.instance.gpus)
        self._attach(handle)
        await self.save(RecordPhase.STARTED)
        try:
            await unless_cancelled(self._warm_up(handle), cancel)
        except HibernodeError as error:
            if error.reason == CANCELLED:
                return ev.Refused(gen, CANCELLED, "the start was cancelled")
            reason, message = error.reason, error.message
            if self._exit is not None:  # its exit explains more than a missing answer
                reason = "OUT_OF_MEMORY" if self._exit.oom_killed else reason
                message = f"{message}; its exit: {_how_it_ended(self._exit)}"
            raise InstanceError(reason, f"{message.rstrip('.')}. {await self._log_tail(handle)}") from error
        await self.save(RecordPhase.READY)
        try:
            await self._note_vram(handle)
        except PreconditionError as error:  # HOST_MEMORY_SHORT: a sharer that could never be frozen for the others
            raise InstanceError(
                error.reason, f"{error.message}; with a gpuMemorySize in its s.yaml this is checked before the start"
            ) from error
        except HibernodeError as error:  # measured again before each freeze
            self._log.warning("instance.vram_unknown", instance=actor.uid, reason=error.reason)
        self._health.resume()
        actor.set_progress("")
        return ev.Succeeded(gen)

    async def _warm_up(self, handle: Handle) -> None:
        """Wait for readiness, call /initialize, run the first health check."""
        actor, context = self._actor, self._context
        deadline = asyncio.get_running_loop().time() + context.ready_timeout_s
        await self._wait_for_server(handle, deadline)
        pool = actor.pool
        assert pool is not None
        actor.set_progress("initializing")
        await hooks.initialize(pool, actor.function, context.request_ids())
        await self._first_probe(pool)

    async def _wait_for_server(self, handle: Handle, deadline: float) -> None:
        """Wait until it listens on its port. Meanwhile progress, and a failure's message, name the ports that it does
        listen on, which are the mistake most often made."""
        seen = ""

        async def look() -> None:
            nonlocal seen
            with suppress(OSError, HibernodeError):
                seen = ", ".join(await self._context.runtime.listening(handle)) or seen

        async def watch() -> None:
            while True:
                await asyncio.sleep(LISTEN_CHECK_S)
                await look()
                if seen:
                    self._actor.set_progress(f"{waits}; it listens on {seen}")

        waits = f"waiting for its server on port {handle.port}"
        self._actor.set_progress(waits)
        watching = asyncio.create_task(watch(), name=f"ports {handle.uid}")
        try:
            await hooks.wait_until_listening(handle.host, handle.port, deadline, lambda: self._exit is not None)
        except InstanceError as error:
            await look()
            if not seen:
                raise
            raise InstanceError(error.reason, f"{error.message} It listens on {seen} instead.") from error
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    async def _log_tail(self, handle: Handle) -> str:
        try:
            tail = (await self._context.runtime.read_log(handle, LOG_TAIL_BYTES)).decode(errors="replace").strip()
        except (OSError, HibernodeError):
            tail = ""
        return f"Logs: {tail or '(none)'}"

    async def _first_probe(self, pool: Pool) -> None:
        check = self._actor.function.health_check
        if check is None:
            return
        await asyncio.sleep(check.initial_delay_ns / SECOND_NS)  # as the function's configuration asks
        if not hooks.is_healthy(await hooks.probe(pool, self._actor.function, check)):
            raise InstanceError("HEALTH_CHECK_FAILED", f"the first GET {check.path} did not answer 200 to 399 in time")

    def _environment(self) -> dict[str, str]:
        function = self._actor.function
        return {
            **self._context.environment,
            "FC_FUNCTION_NAME": function.name,
            "FC_FUNCTION_HANDLER": function.handler,
            "FC_FUNCTION_MEMORY_SIZE": str(function.memory_bytes >> 20),
            "FC_REGION": function.region,
            "FC_ACCOUNT_ID": hooks.ACCOUNT_ID,
            "FC_INSTANCE_ID": self._actor.uid,
            **({} if function.image == HOST_IMAGE else {"FC_FUNC_CODE_PATH": hooks.CODE_PATH}),
        }

    def adopt(self, record: InstanceRecord, handle: Handle, pids: set[int], *, awake: bool) -> None:
        """Recovery: take over a container that an earlier agent started. `record` is the one on disk."""
        self.record, self.known_pids = record, pids
        self._attach(handle)
        if awake:
            self._health.resume()

    def _attach(self, handle: Handle) -> None:
        """Open the data path to the container, and watch for its exit."""
        self._actor.attach_container(handle, Pool(handle.host, handle.port, UpstreamLimits()))
        self.record = replace(self.record, handle=handle)
        self._watch = asyncio.create_task(self._watch_exit(handle), name=f"watch {handle.uid}")

    async def _watch_exit(self, handle: Handle) -> None:
        try:
            self._exit = ended = await self._context.runtime.wait(handle)
        except Exception as error:
            self._log.exception("instance.watch_crashed", instance=self._actor.uid)
            self._actor.handle(ev.Exited("INTERNAL", f"its exit can't be watched any more: {type(error).__name__}"))
            return
        reason = "OUT_OF_MEMORY" if ended.oom_killed else "INSTANCE_CRASHED"
        message = f"the container's main process ended: {_how_it_ended(ended)}"
        if self._actor.instance.op is ev.Operation.START:
            reason = reason if ended.oom_killed else "FUNCTION_NOT_STARTED"
            message = f"{message.rstrip('.')}. {await self._log_tail(handle)}"
        self._actor.handle(ev.Exited(reason, message))

    # ---- end ----------------------------------------------------------------------------------------------------

    async def _stop(self, gen: int, cancel: asyncio.Event) -> ev.Event:
        """/pre-stop, TERM, KILL, in that order, each only if something is left; with `stop_force` KILL at once."""
        actor, handle = self._actor, self._actor.handle_of_container
        await self._health.pause()
        await self._try_save(RecordPhase.STOPPING)
        if handle is not None and self._exit is None:
            if not actor.instance.stop_force:
                try:
                    await unless_cancelled(self._terminate(handle), cancel)
                except HibernodeError as error:
                    self._context.events.add(actor.uid, "instance.stop_cut_short", error.message)
            elif actor.function.hooks.pre_stop is not None:
                text = "the stop was forced, or the instance could not answer"
                self._context.events.add(actor.uid, "instance.pre_stop_skipped", text)
            if await self._context.runtime.alive(handle) and not actor.instance.paused:
                await self._freezing.prepare_kill(handle)
        return await self._end(gen)

    async def _terminate(self, handle: Handle) -> None:
        await self._pre_stop()
        await self._context.runtime.terminate(handle)
        if self._watch is not None:
            await asyncio.wait([self._watch], timeout=self._context.stop_timeout_s)

    async def _pre_stop(self) -> None:
        hook, pool = self._actor.function.hooks.pre_stop, self._actor.pool
        if hook is None or pool is None:
            return
        try:
            status = await hooks.call_hook(
                pool, self._actor.function, hook, b"GET", "/pre-stop", self._context.request_ids()
            )
        except HibernodeError as error:
            self._context.events.add(self._actor.uid, "instance.pre_stop_failed", error.message)
            return
        if status >= 400:
            self._context.events.add(self._actor.uid, "instance.pre_stop_failed", f"answered {status}")

    async def _end(self, gen: int) -> ev.Event:
        """Kill and clean up whatever is left."""
        actor, context, handle = self._actor, self._context, self._actor.handle_of_container
        try:
            await self._health.pause()
            if handle is not None:
                await self._kill(handle)
                context.freezer.forget(handle)
            context.memory.forget(actor.uid)
            if actor.pool is not None:
                actor.pool.close()
            await self._try_save(RecordPhase.ENDED)
        finally:
            actor.ended.set()
        return ev.Succeeded(gen)

    async def _kill(self, handle: Handle) -> None:
        """Kill and remove. If an instance survives every attempt, its GPUs are cordoned for lack of proof."""
        runtime, message = self._context.runtime, ""
        for _ in range(KILL_ATTEMPTS):
            try:
                self.known_pids |= set(await runtime.pids(handle))
                await runtime.kill(handle)
                await self._context.remove(handle)
            except HibernodeError as error:
                message = error.message
            except OSError as error:
                message = str(error)
            else:
                return
        self._context.events.add(self._actor.uid, "instance.kill_failed", message)

    # ---- helpers -------------------------------------------------------------------------------------------

    def _handle(self) -> Handle:
        handle = self._actor.handle_of_container
        if handle is None:
            raise InstanceError("NO_CONTAINER", "the instance has no container")
        return handle

    async def _note_vram(self, handle: Handle) -> None:
        self._actor.note_vram(await self._context.freezer.vram_bytes(handle))
        self.known_pids = set(await self._context.runtime.pids(handle))
        self._context.memory.measured(self._actor.uid, self._actor.figures.vram_bytes)

    async def _save_placement(self) -> None:
        if self.record.gpu_uuids != self._actor.gpu_uuids:
            await self.save(self.record.phase)

    async def _try_save(self, phase: RecordPhase) -> None:
        """`save`, but it never fails: a stop goes on without the store, as recovery would find the container gone."""
        try:
            await self.save(phase)
        except HibernodeError as error:
            self._context.events.add(self._actor.uid, "store.failed", error.message, phase=phase.value)

    async def save(self, phase: RecordPhase) -> None:
        """Make `phase` and the GPUs durable. Raises UnavailableError STORE_FAILED."""
        self.record = replace(self.record, phase=phase, gpu_uuids=self._actor.gpu_uuids)
        await self._context.store.put_instance(self.record)


def _how_it_ended(exit_: Exit) -> str:
    if exit_.message:
        return exit_.message
    if exit_.oom_killed:
        return "killed for running out of memory"
    return f"killed by signal {exit_.signal}" if exit_.signal else f"exited with code {exit_.code}"
