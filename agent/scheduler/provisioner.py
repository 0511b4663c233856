"""The provisioner: keeps as many instances as wanted, by asking agents to create and stop them.

`core/provision.py` decides from what the fleet reports; this drives it, one round after every change. Creates are
idempotent (request_id), so a call whose answer was lost is simply made again. An instance is retired at the dispatcher
before its agent is asked to drain it, so that nothing new reaches it.

Thin: an update creates first where GPUs have room and else stops one old instance at a time; scale-in goes by ordinal.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any

from agent.core.dispatch_events import Event, InstanceRetired
from agent.core.errors import (
    ConflictError,
    DeadlineError,
    ExhaustedError,
    HibernodeError,
    NotFoundError,
    UnavailableError,
)
from agent.core.leases import Standing
from agent.core.placement import Placed, Placement, Unplaceable, place
from agent.core.provision import (
    Create,
    Plan,
    Present,
    RequestId,
    Stop,
    Tries,
    Wanted,
    came_up,
    failed,
    parse_request_id,
    passed_over,
    plan,
)
from agent.core.types import SECOND_NS, InstanceState
from agent.log import get_logger
from agent.ports import Clock
from agent.scheduler.fleet import Fleet
from agent.scheduler.functions import Catalog, Deployed, Problem
from agent.scheduler.links import Links
from agent.scheduler.node_views import node_views
from agent.v1.instance_service_pb2 import CreateInstanceRequest, StopInstanceRequest
from agent.v1.types_pb2 import Instance
from agent.wire.convert_enums import state_from_proto
from agent.wire.convert_time import time_from_proto

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
RETRY_NS = 2 * SECOND_NS
"""After a create that the agent could not take now, or a stop that failed."""
REPORT_DUE_NS = 15 * SECOND_NS
"""An instance created but never reported by then counts as ended."""
OLD_NS = 60 * SECOND_NS
"""A create answered with an instance that has ended and is older than this found one of a former life."""
HOPELESS = frozenset({"IMAGE_RUNTIME_UNAVAILABLE", "NO_MATCHING_NODE"})
FULL = frozenset({"NO_FREE_GPU", "HOST_MEMORY_SHORT"})
"""What an older revision's instance takes up, and gives way with."""
_ENDED = (InstanceState.STOPPED, InstanceState.FAILED)

_log = get_logger()


@dataclass(slots=True, eq=False)
class _Progress:
    """What is known of one function beyond the fleet's table. Ordinals are those of `revision`.

    `unsure`: the node of a create without an answer, by ordinal: it is asked again there, or there might be two.
    `retired`: what the dispatcher was told to leave alone.
    """

    revision: str = ""
    deploys: int = 0
    tries: dict[int, Tries] = field(default_factory=dict)
    under_way: dict[int, str] = field(default_factory=dict)
    unsure: dict[int, str] = field(default_factory=dict)
    answered: dict[str, tuple[Present, int]] = field(default_factory=dict)
    alive: dict[str, RequestId] = field(default_factory=dict)
    stopping: set[str] = field(default_factory=set)
    retired: set[str] = field(default_factory=set)
    last_failure: Problem | None = None


class Provisioner:
    """Runs rounds until cancelled. `poke` asks for one soon."""

    def __init__(
        self, clock: Clock, catalog: Catalog, fleet: Fleet, links: Links, tell: Callable[[Event], None]
    ) -> None:
        self._clock = clock
        self._catalog = catalog
        self._fleet = fleet
        self._links = links
        self._tell = tell
        self._progress: dict[str, _Progress] = {}
        self._poked = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

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
        present = self._present()
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

    def _stop_orphans(self, present: dict[str, dict[str, Present]], known: set[str]) -> set[str]:
        """Instances of functions that were deleted: of a node that was lost then, or of a create that came too late.

        What was never deployed here is left alone: this scheduler may be a new one, with an empty database.
        Returns their functions.
        """
        orphaned = {name for name in present if name not in known and self._catalog.was_deleted(name)}
        for name in orphaned:
            progress = self._progress.setdefault(name, _Progress())
            progress.stopping &= set(present[name])
            for one in present[name].values():
                if not (one.counted_out or one.state in _ENDED or one.state is InstanceState.STOPPING):
                    self._begin_stop(progress, Stop(one.uid, one.node))
        return orphaned

    # ---- one function -----------------------------------------------------------------------------------------

    async def _one(self, function: Deployed, reported: dict[str, Present], now: int) -> int:
        name = function.spec.name
        progress = self._progress.setdefault(name, _Progress())
        self._follow_deploys(progress, function)
        alive = self._learn(progress, reported, now)
        here = [replace(one, state=InstanceState.STOPPING) if one.uid in progress.stopping else one for one in alive]
        wanted = Wanted(name, function.spec.revision, function.target)
        settled = self._fleet.settled()
        todo = plan(wanted, here, progress.tries, frozenset(progress.under_way), settled, now)
        for stop in todo.stops:
            self._begin_stop(progress, stop)
        self._take_back(progress, alive)
        unplaceable = self._create_all(function, progress, todo)
        self._catalog.set_problem(name, self._problem(function, progress, here, unplaceable))
        left = [one for one in alive if not one.counted_out]
        if function.deleting and settled and not (left or progress.under_way or progress.answered):
            await self._catalog.forget(name)
        waits = [
            todo.again_at_ns or now + RETRY_NS if unplaceable or todo.again_at_ns else now + int(ROUND_S * SECOND_NS)
        ]
        waits += [due for _, due in progress.answered.values()]
        return min(waits)

    def _follow_deploys(self, progress: _Progress, function: Deployed) -> None:
        if progress.revision != function.spec.revision:
            progress.revision, progress.tries = function.spec.revision, {}
            progress.under_way, progress.unsure, progress.last_failure = {}, {}, None
        deploys = self._catalog.deploys(function.spec.name)
        if progress.deploys != deploys:
            progress.deploys, progress.last_failure = deploys, None
            progress.tries = {ordinal: Tries(tried.attempt) for ordinal, tried in progress.tries.items()}

    def _learn(self, progress: _Progress, reported: dict[str, Present], now: int) -> list[Present]:
        """Who lives, those included whose create was answered before their first report; who came up, who ended."""
        for uid in [uid for uid in progress.answered if uid in reported]:
            del progress.answered[uid]
        alive = {uid: one for uid, one in reported.items() if one.state not in _ENDED}
        for uid, (one, due) in list(progress.answered.items()):
            if now < due and self._fleet.last_words(uid) is None:
                alive[uid] = one
            else:
                del progress.answered[uid]
                self._ended(progress, one.made_by, uid, now)
        for uid, made_by in progress.alive.items():
            if uid not in alive and uid not in progress.retired:
                self._ended(progress, made_by, uid, now)
        progress.stopping &= alive.keys()
        progress.retired &= alive.keys()
        progress.alive = {uid: one.made_by for uid, one in alive.items()}
        for one in alive.values():
            if one.serving and one.made_by.revision == progress.revision:
                ordinal = one.made_by.ordinal
                progress.tries[ordinal] = came_up(progress.tries.get(ordinal, Tries()), one.made_by.attempt)
        return list(alive.values())

    def _ended(self, progress: _Progress, made_by: RequestId, uid: str, now: int) -> None:
        if made_by.revision != progress.revision:
            return
        progress.tries[made_by.ordinal] = failed(progress.tries.get(made_by.ordinal, Tries()), made_by.attempt, now)
        load = self._fleet.instance(uid) or self._fleet.last_words(uid)
        reason = (load.state_reason if load is not None else "") or "INSTANCE_ENDED"
        message = (load.state_message if load is not None else "") or f"instance {made_by} ended"
        progress.last_failure = Problem(reason, message, hopeless=False)
        _log.warning("provision.instance_ended", request_id=str(made_by), uid=uid, reason=reason)

    def _problem(
        self, function: Deployed, progress: _Progress, here: list[Present], unplaceable: Unplaceable | None
    ) -> Problem | None:
        have = {
            one.made_by.ordinal
            for one in here
            if one.made_by.revision == progress.revision and one.state is not InstanceState.STOPPING
        }
        missing = [ordinal for ordinal in range(function.target) if ordinal not in have]
        if not missing:
            return None
        gives_way = any(one.made_by.revision != progress.revision and not one.counted_out for one in here)
        if unplaceable is not None and not (unplaceable.reason in FULL and gives_way):
            return Problem(unplaceable.reason, unplaceable.message, unplaceable.reason in HOPELESS)
        failure = progress.last_failure
        if failure is None:
            return None
        given_up = all(progress.tries.get(ordinal, Tries()).given_up for ordinal in missing)
        return replace(failure, hopeless=given_up or failure.reason in HOPELESS)

    # ---- creating ---------------------------------------------------------------------------------------------

    def _create_all(self, function: Deployed, progress: _Progress, todo: Plan) -> Unplaceable | None:
        if not todo.creates:
            return None
        taken = [(node, one.spec.gpu.count) for one in self._catalog.all() for node in self._pending(one.spec.name)]
        gpus = {one.spec.name: one.spec.gpu.count for one in self._catalog.all()}
        views = {view.name: view for view in node_views(self._fleet, taken, gpus)}
        for create in todo.creates:
            asked = views.get(progress.unsure.get(create.request_id.ordinal, ""))
            if asked is not None:
                outcome: Placement = Placed(asked.name)
            else:
                outcome = place(function.spec, views.values())
            if isinstance(outcome, Placed):
                views[outcome.node] = views[outcome.node].with_instance(function.spec)
                progress.under_way[create.request_id.ordinal] = outcome.node
                self._spawn(self._create(function, progress, create, outcome.node))
                continue
            if outcome.reason in FULL and todo.makes_room is not None and not progress.stopping:
                self._begin_stop(progress, todo.makes_room)
            return outcome
        return None

    def _pending(self, name: str) -> list[str]:
        """Nodes of instances that count and that no agent has reported yet."""
        progress = self._progress.get(name)
        if progress is None:
            return []
        return [*progress.under_way.values(), *(one.node for one, _ in progress.answered.values())]

    async def _create(self, function: Deployed, progress: _Progress, create: Create, node: str) -> None:
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
                self._created(progress, made_by, instance, node, now)
            elif error is not None:
                self._not_created(progress, made_by, error, node, now)
        self.poke()

    def _created(self, progress: _Progress, made_by: RequestId, instance: Instance, node: str, now: int) -> None:
        state = state_from_proto(instance.state)
        _log.info("provision.created", request_id=str(made_by), uid=instance.uid, node=node)
        tried = progress.tries.get(made_by.ordinal, Tries())
        if state in _ENDED:
            old = self._clock.wall_ns() - time_from_proto(instance.create_time) > OLD_NS
            progress.tries[made_by.ordinal] = (passed_over if old else failed)(tried, made_by.attempt, now)
            progress.last_failure = Problem(instance.state_reason, instance.state_message, hopeless=False)
            return
        progress.tries[made_by.ordinal] = replace(tried, attempt=max(tried.attempt, made_by.attempt))
        if self._fleet.instance(instance.uid) is None:
            one = Present(instance.uid, node, made_by, InstanceState.STARTING)
            progress.answered[instance.uid] = (one, now + REPORT_DUE_NS)

    def _not_created(self, progress: _Progress, made_by: RequestId, error: HibernodeError, node: str, now: int) -> None:
        tried = progress.tries.get(made_by.ordinal, Tries())
        if isinstance(error, UnavailableError | DeadlineError | ExhaustedError):
            # Perhaps it was made: the same request_id again finds out, where it was asked.
            if not isinstance(error, ExhaustedError):
                progress.unsure[made_by.ordinal] = node
            progress.tries[made_by.ordinal] = replace(tried, not_before_ns=now + RETRY_NS)
        elif isinstance(error, ConflictError):
            progress.tries[made_by.ordinal] = passed_over(tried, made_by.attempt, now)
        else:
            progress.tries[made_by.ordinal] = failed(tried, made_by.attempt, now)
        progress.last_failure = Problem(error.reason, error.message, hopeless=False)
        _log.warning("provision.create_failed", request_id=str(made_by), node=node, reason=error.reason)

    # ---- stopping ---------------------------------------------------------------------------------------------

    def _begin_stop(self, progress: _Progress, stop: Stop) -> None:
        if stop.uid in progress.stopping:
            return
        progress.stopping.add(stop.uid)
        progress.retired.add(stop.uid)
        self._tell(InstanceRetired(stop.uid))
        self._spawn(self._stop(progress, stop))

    def _take_back(self, progress: _Progress, alive: list[Present]) -> None:
        """A stop failed, and meanwhile nobody wants it any more: the instance serves on."""
        for one in alive:
            if one.uid in progress.retired - progress.stopping and one.state is not InstanceState.STOPPING:
                progress.retired.discard(one.uid)
                self._tell(InstanceRetired(one.uid, retired=False))

    async def _stop(self, progress: _Progress, stop: Stop) -> None:
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

    def _present(self) -> dict[str, dict[str, Present]]:
        """Instances made by a scheduler, by function and uid, those that ended lately included."""
        found: dict[str, dict[str, Present]] = {}
        for node, load in self._fleet.instances():
            made_by = parse_request_id(load.request_id)
            if made_by is None or made_by.function != load.function:
                continue
            state = state_from_proto(load.state)
            one = Present(load.uid, node.name, made_by, state, node.standing is Standing.LOST)
            found.setdefault(made_by.function, {})[load.uid] = one
        return found

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
