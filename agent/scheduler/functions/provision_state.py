"""What provisioning knows of a function's instances beyond the fleet's reports: attempts, and calls in progress.

`core/provisioning/reconcile.py` decides from it. Nothing here makes a call.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace

from agent.core.errors import ConflictError, DeadlineError, ExhaustedError, HibernodeError, UnavailableError
from agent.core.provisioning.model import ObservedInstance, RequestId
from agent.core.provisioning.placement import Unplaceable
from agent.core.provisioning.problem import Obstacle, Problem, problem_of
from agent.core.provisioning.reconcile import Attempts, Failure, ReconcilePlan, came_up, failed, skipped
from agent.core.types import SECOND_NS, InstanceState
from agent.event_log import EventLog
from agent.scheduler.fleet.fleet import Fleet
from agent.v1.types_pb2 import Instance
from agent.wire.convert_enums import state_from_proto
from agent.wire.convert_time import time_from_proto

RETRY_NS = 2 * SECOND_NS
"""Wait after a create that the agent could not execute now or did not answer, or a stop that failed."""
REPORT_DUE_NS = 15 * SECOND_NS
"""A created instance that is not reported within this time counts as ended."""
OLD_NS = 60 * SECOND_NS
"""If a create is answered with an ended instance older than this, an earlier run of the scheduler created it."""
HAS_ENDED = (InstanceState.STOPPED, InstanceState.FAILED)


@dataclass(slots=True, eq=False)
class ProvisionState:
    """What is known of one function. Ordinals are those of `revision`.

    - `creating`: node of each create in progress, by ordinal.
    - `unanswered`: node of each unanswered create, by ordinal. It is repeated there: elsewhere it could be made twice.
    - `unreported`: instances created and not reported yet, each with the time by which it must be.
    - `stopping`: stops in progress; `retired`: instances that get no new requests.
    - `alive`: its instances in the last round.
    - `refused`: why a host last refused a create without a fault of the function; None once a create succeeds.
    - `obstacle`: why a create has no place, since when.
    - `serving_at_stop`: how many of `revision` served when an older instance last gave way to them; -1 if none has.
    """

    function: str
    events: EventLog
    revision: str = ""
    deploys: int = 0
    attempts: defaultdict[int, Attempts] = field(default_factory=lambda: defaultdict(Attempts))
    creating: dict[int, str] = field(default_factory=dict)
    unanswered: dict[int, str] = field(default_factory=dict)
    unreported: dict[str, tuple[ObservedInstance, int]] = field(default_factory=dict)
    alive: dict[str, ObservedInstance] = field(default_factory=dict)
    stopping: set[str] = field(default_factory=set)
    retired: set[str] = field(default_factory=set)
    refused: Unplaceable | None = None
    obstacle: Obstacle | None = None
    serving_at_stop: int = -1

    def follow_deploys(self, revision: str, deploys: int) -> None:
        """Start from nothing for another revision; after each deploy, retry the ordinals that were given up."""
        if self.revision != revision:
            self.revision = revision
            self.attempts.clear()
            self.creating, self.unanswered = {}, {}
            self.refused, self.obstacle, self.serving_at_stop = None, None, -1
        if self.deploys != deploys:
            self.deploys, self.refused, self.obstacle, self.serving_at_stop = deploys, None, None, -1
            self.attempts.update({ordinal: Attempts(tried.attempt) for ordinal, tried in self.attempts.items()})

    def update(
        self, reported: dict[str, ObservedInstance], fleet: Fleet, now: int, wall_ns: int
    ) -> list[ObservedInstance]:
        """Note which instances came up and which ended. Returns those alive, created but unreported ones included."""
        for uid in [uid for uid in self.unreported if uid in reported]:
            del self.unreported[uid]
        alive = {uid: one for uid, one in reported.items() if one.state not in HAS_ENDED}
        for uid, (one, due) in list(self.unreported.items()):
            if now < due and fleet.last_report(uid) is None:
                alive[uid] = replace(one, scheduling=fleet.scheduling(one.node))
            else:
                del self.unreported[uid]
                self._ended(one, fleet, now, wall_ns)
        for uid, one in self.alive.items():
            if uid not in alive and uid not in self.retired:
                self._ended(one, fleet, now, wall_ns)
        self.stopping &= alive.keys()
        self.retired &= alive.keys()
        self.alive = alive
        for one in alive.values():
            if one.serving and one.made_by.revision == self.revision:
                ordinal = one.made_by.ordinal
                self.attempts[ordinal] = came_up(self.attempts[ordinal], one.made_by.attempt)
        return list(alive.values())

    def serving(self, here: list[ObservedInstance]) -> int:
        return sum(one.serving and one.made_by.revision == self.revision for one in here)

    def created(self, made_by: RequestId, instance: Instance, node: str, fleet: Fleet, now: int, wall_ns: int) -> None:
        state = state_from_proto(instance.state)
        self.events.info("provision.created", about=self.function, request_id=str(made_by), uid=instance.uid, node=node)
        tried = self.attempts[made_by.ordinal]
        self.refused = None
        if state in HAS_ENDED:
            if wall_ns - time_from_proto(instance.create_time) > OLD_NS:
                self.attempts[made_by.ordinal] = skipped(tried, made_by.attempt, now)
            else:
                failure = Failure(instance.state_reason, instance.state_message, wall_ns, node, instance.uid)
                self.attempts[made_by.ordinal] = failed(tried, made_by.attempt, now, failure)
            return
        self.attempts[made_by.ordinal] = replace(tried, attempt=max(tried.attempt, made_by.attempt))
        if fleet.instance(instance.uid) is None:
            one = ObservedInstance(instance.uid, node, made_by, InstanceState.STARTING)
            self.unreported[instance.uid] = (one, now + REPORT_DUE_NS)

    def not_created(self, made_by: RequestId, error: HibernodeError, node: str, now: int, wall_ns: int) -> None:
        """Note a create that failed or whose outcome is unknown."""
        tried = self.attempts[made_by.ordinal]
        if isinstance(error, ExhaustedError) or error.reason == "HOST_MEMORY_SHORT":
            # The host is full, which does not count as a failure of the function.
            self.attempts[made_by.ordinal] = replace(tried, not_before_ns=now + RETRY_NS)
            self.refused = Unplaceable(error.reason, error.message)
        elif isinstance(error, UnavailableError | DeadlineError):
            # The instance may exist: repeating the request_id on that node finds out.
            self.unanswered[made_by.ordinal] = node
            self.attempts[made_by.ordinal] = replace(tried, not_before_ns=now + RETRY_NS)
            self.refused = Unplaceable(error.reason, error.message)
        elif isinstance(error, ConflictError):
            self.attempts[made_by.ordinal] = skipped(tried, made_by.attempt, now)
        else:
            failure = Failure(error.reason, error.message, wall_ns, node)
            self.attempts[made_by.ordinal] = failed(tried, made_by.attempt, now, failure)
        about, reason = self.function, error.reason
        self.events.warning("provision.create_failed", about=about, request_id=str(made_by), node=node, reason=reason)

    def problem(
        self, todo: ReconcilePlan, unplaceable: Unplaceable | None, here: list[ObservedInstance], now: int
    ) -> Problem | None:
        """Why there are fewer instances than the target; None if there are enough, or nothing has failed."""
        if not todo.missing:
            self.refused = None
        unplaceable = unplaceable or self.refused
        if unplaceable is None or not todo.missing:
            self.obstacle = None
        else:
            same = self.obstacle is not None and self.obstacle.reason == unplaceable.reason
            since = self.obstacle.since_ns if self.obstacle is not None and same else now
            self.obstacle = Obstacle(unplaceable.reason, unplaceable.message, since)
        starting = {
            one.made_by.ordinal
            for one in here
            if one.made_by.revision == self.revision and one.state is InstanceState.STARTING and not one.on_lost_node
        }
        none_up = not any(one.serving for one in here)
        return problem_of(todo.missing, starting | self.creating.keys(), self.attempts, self.obstacle, none_up, now)

    def pending(self) -> list[str]:
        """Nodes of instances that no agent has reported yet."""
        return [*self.creating.values(), *(one.node for one, _ in self.unreported.values())]

    def _ended(self, one: ObservedInstance, fleet: Fleet, now: int, wall_ns: int) -> None:
        made_by, uid = one.made_by, one.uid
        if made_by.revision != self.revision:
            return
        load = fleet.instance(uid) or fleet.last_report(uid)
        reason = (load.state_reason if load is not None else "") or "INSTANCE_ENDED"
        message = (load.state_message if load is not None else "") or f"instance {made_by} ended"
        failure = Failure(reason, message, wall_ns, one.node, uid)
        self.attempts[made_by.ordinal] = failed(self.attempts[made_by.ordinal], made_by.attempt, now, failure)
        about = self.function
        self.events.warning("provision.instance_ended", about=about, request_id=str(made_by), uid=uid, reason=reason)
