"""The provisioner: asks agents to create and stop instances until each function has its target.

`core/provisioning/reconcile.py` decides from what the fleet reports; the provisioner runs a round after every change.
Creates are idempotent (request_id), so a call whose answer was lost is repeated. An instance is retired at the
dispatcher before its agent drains it, so that it gets no new requests.

An update creates first if GPUs have room; else older instances give way to one new one at a time. Instances on a
drained node are replaced like those of an older revision, but only by instances elsewhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import replace
from typing import Any

from agent.core.dispatch.events import Event, InstanceRetired
from agent.core.dispatch.model import NodeStanding
from agent.core.errors import (
    DeadlineError,
    HibernodeError,
    InvalidArgumentError,
    NotFoundError,
    UnavailableError,
)
from agent.core.provisioning.model import ObservedInstance, parse_request_id
from agent.core.provisioning.placement import (
    NodeView,
    Occupant,
    Placed,
    Placement,
    Unplaceable,
    instances_to_stop,
    place,
)
from agent.core.provisioning.reconcile import Create, DesiredState, ReconcilePlan, Stop, plan
from agent.core.types import SECOND_NS, InstanceState, StopCause
from agent.event_log import EventLog
from agent.ports import Clock
from agent.scheduler.fleet.agent_channels import AgentChannels
from agent.scheduler.fleet.fleet import Fleet
from agent.scheduler.fleet.node_views import node_views
from agent.scheduler.functions.catalog import Catalog
from agent.scheduler.functions.deployed import Deployed
from agent.scheduler.functions.provision_state import HAS_ENDED, RETRY_NS, ProvisionState
from agent.v1.instance_service_pb2 import CreateInstanceRequest, StopInstanceRequest
from agent.v1.types_pb2 import Instance
from agent.wire.convert_enums import state_from_proto, stop_cause_to_proto

CREATE_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 180.0
"""Limit of one call; if requests are still in flight then, the agent goes on draining by itself."""
STOP_GRACE_NS = 86_400 * SECOND_NS
"""Draining never cuts a request: the agent ends each at the function's own timeout, a day at most."""
ROUND_S = 5.0
"""Longest time between rounds."""
PAUSE_S = 0.02
"""Shortest pause between rounds. A pause also lasts at least ten times as long as the round before it, so that a large
fleet that keeps changing costs a tenth of a core at most."""


class Provisioner:
    """Runs rounds until cancelled. `poke` asks for one soon."""

    def __init__(
        self,
        clock: Clock,
        events: EventLog,
        catalog: Catalog,
        fleet: Fleet,
        channels: AgentChannels,
        apply_event: Callable[[Event], None],
    ) -> None:
        self._clock = clock
        self._events = events
        self._catalog = catalog
        self._fleet = fleet
        self._channels = channels
        self._apply_event = apply_event
        self._states: dict[str, ProvisionState] = {}
        self._poked = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._round_views: dict[str, NodeView] | None = None

    def poke(self) -> None:
        self._poked.set()

    async def run(self) -> None:
        """Run rounds until cancelled, then cancel the calls in progress."""
        try:
            while True:
                self._poked.clear()
                began_ns = self._clock.monotonic_ns()
                again_ns = await self.round()
                took_s = (self._clock.monotonic_ns() - began_ns) / SECOND_NS
                await asyncio.sleep(max(PAUSE_S, 10 * took_s))
                wait_s = min(ROUND_S, max(0.01, (again_ns - self._clock.monotonic_ns()) / SECOND_NS))
                try:
                    async with asyncio.timeout(wait_s):
                        await self._poked.wait()
                except TimeoutError:
                    pass
        finally:
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def round(self) -> int:
        """Reconcile every function once; returns when (monotonic ns) the next round is due."""
        now = self._clock.monotonic_ns()
        again = now + int(ROUND_S * SECOND_NS)
        observed = self._observed(now)
        self._round_views = None  # computed when the first create is placed
        functions = self._catalog.all()
        for function in functions:
            try:
                again = min(again, await self._one(function, observed.get(function.spec.name, {}), now))
            except HibernodeError as error:
                self._events.error("provision.round_failed", function=function.spec.name, reason=error.reason)
        known = {function.spec.name for function in functions}
        known |= self._stop_orphans(observed, known)
        for name in [name for name in self._states if name not in known]:
            del self._states[name]
        return again

    def _stop_orphans(self, observed: dict[str, dict[str, ObservedInstance]], known: set[str]) -> set[str]:
        """Stop what deleted functions left: instances whose node was lost at that time or whose create came late.

        Functions never deployed here are left alone: this may be a new scheduler with an empty database. Returns the
        names of the deleted functions.
        """
        orphaned = {name for name in observed if name not in known and self._catalog.was_deleted(name)}
        for name in orphaned:
            state = self._states.setdefault(name, ProvisionState(name, self._events))
            state.stopping &= set(observed[name])
            for one in observed[name].values():
                if not (one.on_lost_node or one.state in HAS_ENDED or one.state is InstanceState.STOPPING):
                    self._begin_stop(state, Stop(one.uid, one.node, StopCause.FUNCTION_DELETED))
        return orphaned

    # ---- one function -----------------------------------------------------------------------------------------

    async def _one(self, function: Deployed, reported: dict[str, ObservedInstance], now: int) -> int:
        name = function.spec.name
        state = self._states.setdefault(name, ProvisionState(name, self._events))
        if function.spec_lost and not function.deleting:
            return now + int(ROUND_S * SECOND_NS)  # its instances can't be made again, and so they must not go
        state.follow_deploys(function.spec.revision, self._catalog.deploys(name))
        alive = state.update(reported, self._fleet, now, self._clock.wall_ns())
        here = [replace(one, state=InstanceState.STOPPING) if one.uid in state.stopping else one for one in alive]
        desired = DesiredState(name, function.spec.revision, function.target, function.deleting)
        all_reported = self._fleet.all_reported()
        todo = plan(desired, here, state.attempts, frozenset(state.creating), all_reported, now)
        for stop in todo.stops:
            self._begin_stop(state, stop)
        self._unretire(state, alive)
        unplaceable = self._create_all(function, state, todo, here)
        self._catalog.set_problem(name, state.problem(todo, unplaceable, here, now))
        left = [one for one in alive if not one.on_lost_node]
        if function.deleting and all_reported and not (left or state.creating or state.unreported):
            await self._catalog.forget(name)
        again = todo.again_at_ns or now + (RETRY_NS if unplaceable else int(ROUND_S * SECOND_NS))
        return min([again, *(due for _, due in state.unreported.values())])

    # ---- creating ---------------------------------------------------------------------------------------------

    def _create_all(
        self, function: Deployed, state: ProvisionState, todo: ReconcilePlan, here: list[ObservedInstance]
    ) -> Unplaceable | None:
        """Start the creates that have a place. Returns why one has none, unless an older instance gives way to it."""
        if not todo.creates:
            return None
        views = self._views()
        for create in todo.creates:
            asked_before = views.get(state.unanswered.get(create.request_id.ordinal, ""))
            if asked_before is not None and not asked_before.unavailable:
                outcome: Placement = Placed(asked_before.name)
            else:
                outcome = place(function.spec, views.values())
            if isinstance(outcome, Unplaceable):
                waits = self._make_room(function, state, todo, here, views.values(), outcome)
                return None if waits else outcome
            views[outcome.node] = views[outcome.node].with_instance(function.spec)
            state.creating[create.request_id.ordinal] = outcome.node
            self._spawn(self._create(function, state, create, outcome.node))
        return None

    def _views(self) -> dict[str, NodeView]:
        """The nodes in this round, with the instances that no agent has reported yet."""
        if self._round_views is None:
            functions = {one.spec.name: one.spec for one in self._catalog.all()}
            pending = [
                (node, functions[name])
                for name, state in self._states.items()
                if name in functions
                for node in state.pending()
            ]
            self._round_views = {view.name: view for view in node_views(self._fleet, pending, functions)}
        return self._round_views

    def _make_room(
        self,
        function: Deployed,
        state: ProvisionState,
        todo: ReconcilePlan,
        here: list[ObservedInstance],
        views: Iterable[NodeView],
        why: Unplaceable,
    ) -> bool:
        """Stop older instances if that makes room for a create, for one create at a time. Returns whether the create
        waits for such a stop, now begun or an earlier one."""
        old = [one for one in here if one.made_by.revision != state.revision and not one.scheduling.drains]
        if any(one.state is InstanceState.STOPPING and not one.on_lost_node for one in old):
            return True
        occupants = (Occupant(one.uid, one.node, one.gpus) for one in todo.may_give_way)
        uids = instances_to_stop(function.spec, views, occupants)
        if not uids or todo.coming_up or state.creating:  # creating: also a create of this very round
            return bool(uids)
        serving = state.serving(here)
        if why.reason == "HOST_MEMORY_SHORT" and serving <= state.serving_at_stop:
            return False  # an older one has gone already, and the memory it freed was not enough
        state.serving_at_stop = serving
        for one in todo.may_give_way:
            if one.uid in uids:
                self._begin_stop(state, Stop(one.uid, one.node, StopCause.REPLACED))
        return True

    async def _create(self, function: Deployed, state: ProvisionState, create: Create, node: str) -> None:
        made_by, ordinal = create.request_id, create.request_id.ordinal
        request = CreateInstanceRequest(request_id=str(made_by), spec=function.message)
        instance: Instance | None = None
        error: HibernodeError | None = None
        try:
            channel = self._channels.channel(node)
            answer = await channel.call(channel.instances.CreateInstance, request, CREATE_TIMEOUT_S)
            instance = _readable(answer.instance)
        except HibernodeError as caught:
            error = caught
        finally:
            if state.revision == made_by.revision:
                state.creating.pop(ordinal, None)
        now, wall_ns = self._clock.monotonic_ns(), self._clock.wall_ns()
        if state.revision == made_by.revision:
            state.unanswered.pop(ordinal, None)
            if instance is not None:
                state.created(made_by, instance, node, self._fleet, now, wall_ns)
            elif error is not None:
                state.not_created(made_by, error, node, now, wall_ns)
        self.poke()

    # ---- stopping ---------------------------------------------------------------------------------------------

    def _begin_stop(self, state: ProvisionState, stop: Stop) -> None:
        if stop.uid in state.stopping:
            return
        state.stopping.add(stop.uid)
        state.retired.add(stop.uid)
        self._apply_event(InstanceRetired(stop.uid))
        self._spawn(self._stop(state, stop))

    def _unretire(self, state: ProvisionState, alive: list[ObservedInstance]) -> None:
        """Let an instance serve again if its stop has failed and is not needed any more."""
        for one in alive:
            if one.uid in state.retired - state.stopping and one.state is not InstanceState.STOPPING:
                state.retired.discard(one.uid)
                self._apply_event(InstanceRetired(one.uid, retired=False))

    async def _stop(self, state: ProvisionState, stop: Stop) -> None:
        self._events.info(
            "provision.stopping", about=state.function, uid=stop.uid, node=stop.node, cause=stop.cause.value
        )
        request = StopInstanceRequest(uid=stop.uid, grace_ns=STOP_GRACE_NS, cause=stop_cause_to_proto(stop.cause))
        try:
            channel = self._channels.channel(stop.node)
            await channel.call(channel.instances.StopInstance, request, STOP_TIMEOUT_S)
        except NotFoundError:
            pass  # it has ended already
        except DeadlineError:
            self._events.info("provision.draining", about=state.function, uid=stop.uid, node=stop.node)
            state.stopping.discard(stop.uid)
        except HibernodeError as error:
            about = state.function
            self._events.warning(
                "provision.stop_failed", about=about, uid=stop.uid, node=stop.node, reason=error.reason
            )
            await asyncio.sleep(RETRY_NS / SECOND_NS)
            state.stopping.discard(stop.uid)
        self.poke()

    # ---- observing --------------------------------------------------------------------------------------------

    def _observed(self, now: int) -> dict[str, dict[str, ObservedInstance]]:
        """Instances created by a scheduler, by function and uid, recently ended ones included."""
        found: dict[str, dict[str, ObservedInstance]] = {}
        for node, load in self._fleet.instances():
            made_by = parse_request_id(load.request_id)
            if made_by is None or made_by.function != load.function:
                continue
            requests = load.in_flight + load.waiting
            found.setdefault(made_by.function, {})[load.uid] = ObservedInstance(
                uid=load.uid,
                node=node.name,
                made_by=made_by,
                state=state_from_proto(load.state),
                on_lost_node=node.standing is NodeStanding.LOST,
                scheduling=self._fleet.scheduling(node.name),
                unsteady=node.standing is not NodeStanding.READY or not load.healthy,
                requests=requests,
                idle_ns=0 if requests else now - node.idle_since.get(load.uid, now),
                gpus=tuple(load.gpu_uuids),
            )
        return found

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _readable(instance: Instance) -> Instance:
    """An instance that was created. Raises UnavailableError if its state is one of another version: it exists, so it is
    asked for again, and no second one is made."""
    try:
        state_from_proto(instance.state)
    except InvalidArgumentError as error:
        raise UnavailableError(error.reason, f"instance {instance.uid}: {error.message}") from error
    return instance
