"""LOCK, CHECKPOINT, UNLOCK and WAKE of one instance: each works on the ports and returns its answer.

Until the driver's lock nothing has happened to the instance, so a failure before it is Refused, never Broken: a driver
library that does not answer for a moment must not cost an instance.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import assert_never

from agent.core.errors import HibernodeError, PreconditionError, UnavailableError
from agent.core.gpus.device_map import device_map
from agent.core.lifecycle import events as ev
from agent.core.lifecycle.machine import CANCELLED, PRE_FREEZE_FAILED
from agent.core.types import Handle
from agent.host.instance import hooks
from agent.host.instance.actor import Actor
from agent.host.instance.context import InstanceContext, unless_cancelled
from agent.host.instance.health import HealthProbe
from agent.http.pool import Pool
from agent.ports import FreezeResult, Outcome

CONNECT_AHEAD_S = 1.0
CONNECT_AFTER_S = 0.0015
"""The connection is opened this long after a wake has begun. Until the driver's restore the wake needs this loop, and
NVML's thread needs the GIL: a handshake at that time costs the wake 0.4 ms. During the restore the loop is idle."""


class FreezeOperations:
    """The freeze and wake operations. No health check runs in a frozen instance: the last has ended before the lock.

    - `note_vram`: measures the instance's VRAM before a freeze.
    - `save_placement`: makes its GPUs durable before a freeze. NVML can't tell where a frozen instance was; it can for
      an awake one, so a wake on other GPUs waits for no disk.
    """

    def __init__(
        self,
        actor: Actor,
        context: InstanceContext,
        health: HealthProbe,
        note_vram: Callable[[Handle], Awaitable[None]],
        save_placement: Callable[[], Awaitable[None]],
    ) -> None:
        self._actor = actor
        self._context = context
        self._health = health
        self._note_vram = note_vram
        self._save_placement = save_placement

    async def lock(self, handle: Handle, gen: int, cancel: asyncio.Event) -> ev.Event:
        """/pre-freeze, the reservation of host memory, the driver's lock. `cancel` counts until the reservation."""
        actor, context = self._actor, self._context
        await self._health.pause()
        try:
            problem = context.store_problem()
            if problem:
                raise UnavailableError("STORE_FAILED", f"nothing is frozen while the store fails: {problem}")
            await self._save_placement()
            await self._pre_freeze(cancel)
            await self._note_vram(handle)
            if cancel.is_set():
                raise PreconditionError(CANCELLED, "the freeze was cancelled before the driver's lock")
            await context.memory.reserve(handle, actor.figures.vram_bytes)
        except HibernodeError as error:
            self._resume()
            return ev.Refused(gen, error.reason, error.message)
        except OSError as error:  # its /proc and cgroup files vanish while it ends
            self._resume()
            return ev.Refused(gen, "HOST_MEMORY_UNKNOWN", f"the instance's memory can't be read: {error}")
        result = await context.freezer.lock(handle)
        if result.outcome is Outcome.REFUSED:
            self._resume()
        return _answer(gen, result)

    async def _pre_freeze(self, cancel: asyncio.Event) -> None:
        """GET /pre-freeze: after 4xx or no answer the freeze goes on, with an event; 5xx replaces the instance."""
        hook, pool = self._actor.function.hooks.pre_freeze, self._actor.pool
        if hook is None or pool is None:
            return
        call = hooks.call_hook(pool, self._actor.function, hook, b"GET", "/pre-freeze", self._context.request_ids())
        try:
            status = await unless_cancelled(call, cancel)
        except PreconditionError:
            raise
        except HibernodeError as error:
            self._context.events.add(self._actor.uid, "instance.pre_freeze_failed", error.message)
            return
        finally:
            pool.retire()  # the hook's own connection must not stay open during the freeze
        if status >= 500:
            raise PreconditionError(PRE_FREEZE_FAILED, f"GET /pre-freeze answered {status}")
        if status >= 400:
            self._context.events.add(self._actor.uid, "instance.pre_freeze_failed", f"answered {status}")

    def _resume(self) -> None:
        self._context.memory.restored(self._actor.uid)
        if not self._actor.state.terminal:
            self._health.resume()

    async def checkpoint(self, handle: Handle, gen: int) -> ev.Event:
        """Checkpoint, then freeze the cgroup. Follows `lock`."""
        result = await self._context.freezer.checkpoint(handle)
        match result.outcome:
            case Outcome.OK:
                self._context.memory.took(self._actor.uid, result.image_bytes)
                self._actor.note_freeze(result.image_bytes)
                self._health.reset()
            case Outcome.REFUSED:
                self._resume()
            case Outcome.BROKEN:
                pass
        return _answer(gen, result)

    async def unlock(self, handle: Handle, gen: int) -> ev.Event:
        """Undo `lock`."""
        result = await self._context.freezer.unlock(handle)
        if result.outcome is Outcome.OK:
            self._resume()
        return _answer(gen, result)

    async def wake(self, handle: Handle, gen: int) -> ev.Event:
        """Thaw, restore, unlock, verify; meanwhile open the connection that the first request needs."""
        actor, context = self._actor, self._context
        began = context.clock.monotonic_ns()
        old, new = actor.gpu_uuids, actor.instance.gpus
        gpu_map = device_map(old, new, context.gpu_models)
        connecting = asyncio.create_task(_connect_ahead(actor.pool), name=f"connect {actor.uid}")
        try:
            result = await context.freezer.wake(handle, gpu_map, new)
        finally:
            connecting.cancel()
        if result.outcome is not Outcome.OK and actor.pool is not None:
            actor.pool.retire()
        if result.outcome is Outcome.OK:
            if gpu_map:
                actor.set_gpus(new)
                context.events.add(actor.uid, "instance.moved", gpus=",".join(new), was=",".join(old))
            actor.note_wake(context.clock.monotonic_ns() - began, result.driver_ns)
            self._resume()
        return _answer(gen, result)

    async def prepare_kill(self, handle: Handle) -> None:
        """Lock and checkpoint an instance that was restored before, if the host has the memory: killing a restored
        process can hang the host (agent/docs/facts/gpu-checkpoint.md, section 7)."""
        actor, context = self._actor, self._context
        if not (actor.figures.wakes or actor.adopted):
            return
        with suppress(HibernodeError, OSError):
            await context.memory.reserve(handle, actor.figures.vram_bytes)
            await context.freezer.prepare_kill(handle)


async def _connect_ahead(pool: Pool | None) -> None:
    """Connect while the server is still frozen: the kernel accepts. If this fails, the first request connects."""
    if pool is not None:
        await asyncio.sleep(CONNECT_AFTER_S)
        with suppress(HibernodeError):
            await pool.prepare(CONNECT_AHEAD_S)


def _answer(gen: int, result: FreezeResult) -> ev.Event:
    match result.outcome:
        case Outcome.OK:
            return ev.Succeeded(gen)
        case Outcome.REFUSED:
            return ev.Refused(gen, result.reason, result.message)
        case Outcome.BROKEN:
            return ev.Broken(gen, result.reason, result.message)
        case _:
            assert_never(result.outcome)
