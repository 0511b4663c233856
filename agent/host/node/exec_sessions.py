"""Runs commands inside instances (`hibernode exec`): admits them, keeps the instance awake, records them as events.

A command inside a frozen instance would hang, and so would the engine's call that starts it. So a command starts only
in an awake instance, and no freeze begins between the check of its state and the end of the command
(`Actor.exec_started`). Arguments may be secret: events name only the program and the number of arguments.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from agent.core.errors import HibernodeError, PreconditionError
from agent.core.lifecycle.instance import Instance
from agent.core.types import MILLISECOND_NS, SECOND_NS, InstanceState
from agent.event_log import EventLog
from agent.host.instance.actor import Actor
from agent.host.instance.waking import raise_if_failed
from agent.host.node.node import Node
from agent.host.node.pauses import paused_by_others
from agent.host.node.stream_limits import StreamLimits
from agent.ports import Clock, ExecSession, ExecSpec, Runtime

MAX_SESSIONS = 8
LONGEST_S = 3600.0
WAKE_TIMEOUT_NS = 60 * SECOND_NS
PROGRAM_CHARS = 200

_FROZEN = (InstanceState.FREEZING, InstanceState.FROZEN, InstanceState.WAITING_GPU, InstanceState.RESTORING)


@dataclass(slots=True)
class OpenExec:
    """A running command. The caller sets `exit_code` if it learns it."""

    session: ExecSession
    exit_code: int | None = None


class ExecSessions:
    """See the module. Call `close` when the agent stops."""

    def __init__(
        self,
        node: Node,
        runtime: Runtime,
        events: EventLog,
        clock: Clock,
        *,
        most: int = MAX_SESSIONS,
        longest_s: float = LONGEST_S,
    ) -> None:
        self._node = node
        self._runtime = runtime
        self._events = events
        self._clock = clock
        self._calls = StreamLimits("commands inside instances (`hibernode exec`)", most, longest_s)

    @asynccontextmanager
    async def open(self, uid: str, spec: ExecSpec, *, wake: bool, caller: str) -> AsyncIterator[OpenExec]:
        """Run a command inside; leaving the block ends it. With `wake`, a frozen instance is woken first.

        Raises NotFoundError; PreconditionError INSTANCE_FROZEN, EXTERNALLY_FROZEN, NOT_RUNNING, EXEC_UNAVAILABLE;
        DeadlineError WAKE_TIMEOUT; and what `raise_if_failed`, `Runtime.exec` and `StreamLimits.admit` raise.
        """
        actor = self._node.get(uid)
        async with self._calls.admit() as limit:
            inside_a_container = actor.handle_of_container is None or bool(actor.handle_of_container.container_id)
            if inside_a_container:  # else the runtime's own error says what to do
                _refuse(actor, wake=wake)
            actor.exec_started()
            try:
                if inside_a_container:
                    await self._wake(actor)
                async with self._session(actor, spec, caller, limit) as running:
                    yield running
            finally:
                actor.exec_ended()

    async def _wake(self, actor: Actor) -> None:
        if actor.instance.gate_open:
            return
        actor.wake(0, self._clock.monotonic_ns() + WAKE_TIMEOUT_NS)
        await actor.wait_until(_open_or_ended, WAKE_TIMEOUT_NS / SECOND_NS, "WAKE")
        raise_if_failed(actor)
        _refuse(actor, wake=False)

    @asynccontextmanager
    async def _session(
        self, actor: Actor, spec: ExecSpec, caller: str, limit: asyncio.Timeout
    ) -> AsyncIterator[OpenExec]:
        handle = actor.handle_of_container
        if handle is None:
            raise PreconditionError("NOT_RUNNING", f"instance {actor.uid} has no container now")
        began = self._clock.monotonic_ns()
        # Added before the start: a start that fails may still have run the command.
        self._events.add(
            actor.uid,
            "instance.exec",
            program=spec.command[0][:PROGRAM_CHARS],
            arguments=len(spec.command) - 1,
            terminal="yes" if spec.terminal else "no",
            caller=caller,
            **({"user": spec.user} if spec.user else {}),
        )
        running: OpenExec | None = None
        cut = ""
        try:
            running = OpenExec(await self._runtime.exec(handle, spec))
            yield running
        except HibernodeError as error:
            cut = error.reason
            raise
        except BaseException:
            cut = "ended by the agent" if limit.expired() else "the caller disconnected"
            raise
        finally:
            if running is not None:
                await asyncio.shield(running.session.close())
            took = (self._clock.monotonic_ns() - began) // MILLISECOND_NS
            code = {"exit_code": running.exit_code} if running is not None and running.exit_code is not None else {}
            self._events.add(actor.uid, "instance.exec_ended", cut, caller=caller, duration_ms=took, **code)

    async def close(self) -> None:
        """End the running commands and admit no more."""
        await self._calls.close()


def _refuse(actor: Actor, *, wake: bool) -> None:
    """Raise PreconditionError if no command can run now (with `wake`: not even after a wake)."""
    me, uid = actor.instance, actor.uid
    if me.state is InstanceState.RUNNING and me.paused:
        raise paused_by_others(uid)
    frozen = me.state in _FROZEN or (me.state is InstanceState.RUNNING and me.draining)
    if me.stop or not (frozen or me.state is InstanceState.RUNNING):
        state = "being stopped" if me.stop and not me.state.terminal else me.state.value
        raise PreconditionError("NOT_RUNNING", f"instance {uid} is {state}; no command can run inside")
    if frozen and not wake:
        what = "about to freeze" if me.state is InstanceState.RUNNING else "frozen"
        text = f"instance {uid} is {what} ({me.state.value}); add --wake to wake it first, which may take a GPU"
        raise PreconditionError("INSTANCE_FROZEN", text)


def _open_or_ended(me: Instance) -> bool:
    """Whether it is awake, or there is no wake to wait for."""
    return me.gate_open or me.stop or me.paused or me.state.terminal
