"""The provisioner: keeps as many instances as wanted, by asking agents to create and stop them.

`core/provisioning/reconcile.py` decides from what the fleet reports; this drives it, one round after every change.
Creates are idempotent (request_id), so a call whose answer was lost is simply made again. An instance is retired at the
dispatcher before its agent is asked to drain it, so that nothing new reaches it.

An update creates first where GPUs have room, and else stops the old one instance's worth at a time. Instances on a
drained node go as those of an older revision do, but only for a place elsewhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import replace
from typing import Any

from agent.core.dispatch.events import Event, InstanceRetired
from agent.core.dispatch.model import NodeStanding
from agent.core.errors import DeadlineError, HibernodeError, NotFoundError
from agent.core.provisioning.placement import NodeView, Occupant, Placed, Placement, Unplaceable, gives_way, place
from agent.core.provisioning.reconcile import (
    Create,
    DesiredState,
    ObservedInstance,
    ReconcilePlan,
    Stop,
    parse_request_id,
    plan,
)
from agent.core.types import SECOND_NS, InstanceState
from agent.log import get_logger
from agent.ports import Clock
from agent.scheduler.fleet.agent_channels import AgentChannels
from agent.scheduler.fleet.fleet import Fleet
from agent.scheduler.fleet.node_views import node_views
from agent.scheduler.functions.catalog import Catalog, Deployed
from agent.scheduler.functions.provision_state import HAS_ENDED, RETRY_NS, ProvisionState
from agent.v1.instance_service_pb2 import CreateInstanceRequest, StopInstanceRequest
from agent.v1.types_pb2 import Instance
from agent.wire.convert_enums import state_from_proto

CREATE_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 180.0
"""Of one call; where requests are still in flight by then, the agent goes on draining by itself."""
STOP_GRACE_NS = 86_400 * SECOND_NS
"""Draining never cuts a request: each has the function's own timeout, a day at most, and the agent sees to that."""
ROUND_S = 5.0
"""A round at least so often, whatever was missed."""
PAUSE_S = 0.02
"""Between rounds at least so long, and ten times what a round took: a large fleet that changes all the time costs a
tenth of a core at the most."""
_log = get_logger()


class Provisioner:
    """Runs rounds until cancelled. `poke` asks for one soon."""

    def __init__(
        self, clock: Clock, catalog: Catalog, fleet: Fleet, links: AgentChannels, tell: Callable[[Event], None]
    ) -> None:
        self._clock = clock
        self._catalog = catalog
        self._fleet = fleet
        self._links = links
        self._tell = tell
        self._progress: dict[str, ProvisionState] = {}
        self._poked = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._round_views: dict[str, NodeView] | None = None

    def poke(self) -> None:
        """Something changed."""
        self._poked.set()

    async def run(self) -> None:
        """Rounds until cancelled; then nothing is under way any more."""
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
        """Look at every function once; returns when (monotonic ns) to look again at the latest."""
        now = self._clock.monotonic_ns()
        again = now + int(ROUND_S * SECOND_NS)
        present = self._present(now)
        self._round_views = None  # made when the first create needs a place
        functions = self._catalog.all()
        for function in functions:
            try:
                again = min(again, await self._one(function, present.get(function.spec.name, {}), now))
            except HibernodeError as error:
                _log.error("provision.round_failed", function=function.spec.name, reason=error.reason)
        known = {function.spec.name for function in functions}
        known |= self._stop_orphans(present, known)
        for name in [name for name in self._progress if name not in known]:
            del self._progress[name]
        return again

    def _stop_orphans(self, present: dict[str, dict[str, ObservedInstance]], known: set[str]) -> set[str]:
        """Instances of functions that were deleted: of a node that was lost then, or of a create that came too late.

        What was never deployed here is left alone: this scheduler may be a new one, with an empty database.
        Returns their functions.
        """
        orphaned = {name for name in present if name not in known and self._catalog.was_deleted(name)}
        for name in orphaned:
            progress = self._progress.setdefault(name, ProvisionState())
            progress.stopping &= set(present[name])
            for one in present[name].values():
                if not (one.counted_out or one.state in HAS_ENDED or one.state is InstanceState.STOPPING):
                    self._begin_stop(progress, Stop(one.uid, one.node))
        return orphaned

    # ---- one function -----------------------------------------------------------------------------------------

    async def _one(self, function: Deployed, reported: dict[str, ObservedInstance], now: int) -> int:
        name = function.spec.name
        progress = self._progress.setdefault(name, ProvisionState())
        progress.follow_deploys(function.spec.revision, self._catalog.deploys(name))
        alive = progress.learn(reported, self._fleet, now)
        here = [replace(one, state=InstanceState.STOPPING) if one.uid in progress.stopping else one for one in alive]
        wanted = DesiredState(name, function.spec.revision, function.target)
        settled = self._fleet.settled()
        todo = plan(wanted, here, progress.tries, frozenset(progress.under_way), settled, now)
        for stop in todo.stops:
            self._begin_stop(progress, stop)
        self._take_back(progress, alive)
        unplaceable = self._create_all(function, progress, todo, here)
        self._catalog.set_problem(name, progress.problem(todo, unplaceable))
        left = [one for one in alive if not one.counted_out]
        if function.deleting and settled and not (left or progress.under_way or progress.answered):
            await self._catalog.forget(name)
        waits = [
            todo.again_at_ns or now + RETRY_NS if unplaceable or todo.again_at_ns else now + int(ROUND_S * SECOND_NS)
        ]
        waits += [due for _, due in progress.answered.values()]
        return min(waits)

    # ---- creating ---------------------------------------------------------------------------------------------

    def _create_all(
        self, function: Deployed, progress: ProvisionState, todo: ReconcilePlan, here: list[ObservedInstance]
    ) -> Unplaceable | None:
        """Begin what has a place. Else why there is none, unless an older instance goes in its favour."""
        if not todo.creates:
            return None
        views = self._views()
        for create in todo.creates:
            asked = views.get(progress.unsure.get(create.request_id.ordinal, ""))
            if asked is not None and not asked.unavailable:
                outcome: Placement = Placed(asked.name)
            else:
                outcome = place(function.spec, views.values())
            if isinstance(outcome, Unplaceable):
                waits = self._makes_room(function, progress, todo, here, views.values(), outcome)
                return None if waits else outcome
            views[outcome.node] = views[outcome.node].with_instance(function.spec)
            progress.under_way[create.request_id.ordinal] = outcome.node
            self._spawn(self._create(function, progress, create, outcome.node))
        return None

    def _views(self) -> dict[str, NodeView]:
        """The nodes as they are in this round, what it has asked of them included."""
        if self._round_views is None:
            functions = {one.spec.name: one.spec for one in self._catalog.all()}
            pending = [
                (node, functions[name])
                for name, progress in self._progress.items()
                if name in functions
                for node in progress.pending()
            ]
            self._round_views = {view.name: view for view in node_views(self._fleet, pending, functions)}
        return self._round_views

    def _makes_room(
        self,
        function: Deployed,
        progress: ProvisionState,
        todo: ReconcilePlan,
        here: list[ObservedInstance],
        views: Iterable[NodeView],
        why: Unplaceable,
    ) -> bool:
        """Where only what older instances take up is missing, one create's worth of them is stopped at a time. Whether
        that, or an earlier such stop, is what the create waits for."""
        old = [one for one in here if one.made_by.revision != progress.revision and not one.scheduling.drains]
        if any(one.state is InstanceState.STOPPING and not one.counted_out for one in old):
            return True
        uids = gives_way(function.spec, views, (Occupant(one.uid, one.node, one.gpus) for one in todo.may_give_way))
        if not uids or todo.coming:
            return bool(uids)
        serving = progress.serving(here)
        if why.reason == "HOST_MEMORY_SHORT" and serving <= progress.gave_way:
            return False  # one has gone already, and what that freed was not enough: the others stay
        progress.gave_way = serving
        for one in todo.may_give_way:
            if one.uid in uids:
                self._begin_stop(progress, Stop(one.uid, one.node))
        return True

    async def _create(self, function: Deployed, progress: ProvisionState, create: Create, node: str) -> None:
        made_by, ordinal = create.request_id, create.request_id.ordinal
        request = CreateInstanceRequest(request_id=str(made_by), spec=function.message)
        instance: Instance | None = None
        error: HibernodeError | None = None
        try:
            channel = self._links.channel(node)
            answer = await channel.call(channel.instances.CreateInstance, request, CREATE_TIMEOUT_S)
            instance = answer.instance
            state_from_proto(instance.state)  # what can't be read is as good as no answer
        except HibernodeError as caught:
            instance, error = None, caught
        finally:
            if progress.revision == made_by.revision:
                progress.under_way.pop(ordinal, None)
        now = self._clock.monotonic_ns()
        if progress.revision == made_by.revision:
            progress.unsure.pop(ordinal, None)
            if instance is not None:
                progress.created(made_by, instance, node, self._fleet, now, self._clock.wall_ns())
            elif error is not None:
                progress.not_created(made_by, error, node, now)
        self.poke()

    # ---- stopping ---------------------------------------------------------------------------------------------

    def _begin_stop(self, progress: ProvisionState, stop: Stop) -> None:
        if stop.uid in progress.stopping:
            return
        progress.stopping.add(stop.uid)
        progress.retired.add(stop.uid)
        self._tell(InstanceRetired(stop.uid))
        self._spawn(self._stop(progress, stop))

    def _take_back(self, progress: ProvisionState, alive: list[ObservedInstance]) -> None:
        """A stop failed, and meanwhile nobody wants it any more: the instance serves on."""
        for one in alive:
            if one.uid in progress.retired - progress.stopping and one.state is not InstanceState.STOPPING:
                progress.retired.discard(one.uid)
                self._tell(InstanceRetired(one.uid, retired=False))

    async def _stop(self, progress: ProvisionState, stop: Stop) -> None:
        _log.info("provision.stopping", uid=stop.uid, node=stop.node)
        request = StopInstanceRequest(uid=stop.uid, grace_ns=STOP_GRACE_NS)
        try:
            channel = self._links.channel(stop.node)
            await channel.call(channel.instances.StopInstance, request, STOP_TIMEOUT_S)
        except NotFoundError:
            pass  # it has ended, which is what was wanted
        except DeadlineError:
            _log.info("provision.draining", uid=stop.uid, node=stop.node)
            progress.stopping.discard(stop.uid)
        except HibernodeError as error:
            _log.warning("provision.stop_failed", uid=stop.uid, node=stop.node, reason=error.reason)
            await asyncio.sleep(RETRY_NS / SECOND_NS)
            progress.stopping.discard(stop.uid)
        self.poke()

    # ---- the rest ---------------------------------------------------------------------------------------------

    def _present(self, now: int) -> dict[str, dict[str, ObservedInstance]]:
        """Instances made by a scheduler, by function and uid, those that ended lately included."""
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
                counted_out=node.standing is NodeStanding.LOST,
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
