"""Commands inside instances: who may run one now, what keeps the instance awake meanwhile, and what is kept of it.

A command inside a frozen instance would hang, and so would the engine's call that starts it. So nobody gets inside but
of an awake one, and from the look at its state until the command has ended no freeze begins (`Actor.enter`). What the
command was given may be secret: of that only the program's name and the number of arguments are kept.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from agent.core.errors import HibernodeError, PreconditionError
from agent.core.lifecycle.instance import Instance
from agent.core.types import MILLISECOND_NS, SECOND_NS, InstanceState
from agent.host.instance.actor import Actor
from agent.host.instance.events import EventLog
from agent.host.instance.waking import raise_if_failed
from agent.host.node.node import Node
from agent.host.node.pauses import paused_by_others
from agent.host.node.stream_limits import StreamLimits
from agent.ports import Clock, ExecSession, ExecSpec, Runtime

MAX_SESSIONS = 8
LONGEST_S = 3600.0
WAKE_TIMEOUT_NS = 60 * SECOND_NS
PROGRAM_CHARS = 200

_ASLEEP = (InstanceState.FREEZING, InstanceState.FROZEN, InstanceState.WAITING_GPU, InstanceState.RESTORING)


@dataclass(slots=True)
class OpenExec:
    """A command under way. Whoever runs it says how it ended, if he gets to know."""

    session: ExecSession
    exit_code: int | None = None


class ExecSessions:
    """See the module. `close` when the agent leaves."""

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
    async def visit(self, uid: str, spec: ExecSpec, *, wake: bool, caller: str) -> AsyncIterator[OpenExec]:
        """Run a command inside; leaving the block ends it. With `wake` a sleeper is woken first.

        Raises NotFoundError; PreconditionError INSTANCE_FROZEN, EXTERNALLY_FROZEN, NOT_RUNNING, EXEC_UNAVAILABLE;
        DeadlineError WAKE_TIMEOUT; what the runtime raises; and as `StreamLimits.one` does.
        """
        actor = self._node.get(uid)
        async with self._calls.one() as limit:
            inside_a_container = actor.handle_of_container is None or bool(actor.handle_of_container.container_id)
            if inside_a_container:  # else the runtime says what to do instead, whatever the state
                _refuse(actor, wake=wake)
            actor.enter()
            try:
                if inside_a_container:
                    await self._be_awake(actor)
                async with self._session(actor, spec, caller, limit) as visit:
                    yield visit
            finally:
                actor.leave()

    async def _be_awake(self, actor: Actor) -> None:
        if actor.instance.gate_open:
            return
        actor.wake(0, self._clock.monotonic_ns() + WAKE_TIMEOUT_NS)
        await actor.wait_until(_open_or_lost, WAKE_TIMEOUT_NS / SECOND_NS, "WAKE")
        raise_if_failed(actor)
        _refuse(actor, wake=False)

    @asynccontextmanager
    async def _session(
        self, actor: Actor, spec: ExecSpec, caller: str, limit: asyncio.Timeout
    ) -> AsyncIterator[OpenExec]:
        handle = actor.handle_of_container
        if handle is None:
            raise PreconditionError("NOT_RUNNING", f"instance {actor.uid} has no container (any more)")
        began = self._clock.monotonic_ns()
        # Before it begins: whatever becomes of the start, it may have run.
        self._events.add(
            actor.uid,
            "instance.exec",
            program=spec.command[0][:PROGRAM_CHARS],
            arguments=len(spec.command) - 1,
            terminal="yes" if spec.terminal else "no",
            caller=caller,
            **({"user": spec.user} if spec.user else {}),
        )
        visit: OpenExec | None = None
        cut = ""
        try:
            visit = OpenExec(await self._runtime.exec(handle, spec))
            yield visit
        except HibernodeError as error:
            cut = error.reason
            raise
        except BaseException:
            cut = "cut short by the agent" if limit.expired() else "the caller has left"
            raise
        finally:
            if visit is not None:
                await asyncio.shield(visit.session.close())
            took = (self._clock.monotonic_ns() - began) // MILLISECOND_NS
            how = {"exit_code": visit.exit_code} if visit is not None and visit.exit_code is not None else {}
            self._events.add(actor.uid, "instance.exec_ended", cut, caller=caller, duration_ms=took, **how)

    async def close(self) -> None:
        """The agent leaves: commands under way are ended, none begins."""
        await self._calls.close()


def _refuse(actor: Actor, *, wake: bool) -> None:
    """Raises PreconditionError where no command may be run now, not even after a wake if that is asked for."""
    me, uid = actor.instance, actor.uid
    if me.state is InstanceState.RUNNING and me.paused:
        raise paused_by_others(uid)
    asleep = me.state in _ASLEEP or (me.state is InstanceState.RUNNING and me.draining)
    if me.stop or not (asleep or me.state is InstanceState.RUNNING):
        state = "being stopped" if me.stop and not me.state.terminal else me.state.value
        raise PreconditionError("NOT_RUNNING", f"instance {uid} is {state}; nothing can be run inside")
    if asleep and not wake:
        text = f"instance {uid} is asleep ({me.state.value}); add --wake to wake it first, which may take a GPU"
        raise PreconditionError("INSTANCE_FROZEN", text)


def _open_or_lost(me: Instance) -> bool:
    """It is awake, or a wake can't help any more."""
    return me.gate_open or me.stop or me.paused or me.state.terminal
