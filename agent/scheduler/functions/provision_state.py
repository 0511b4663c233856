"""What is known of one function's instances beyond the fleet's table: attempts, calls under way, what is being stopped.

`ProvisionState` is told what calls came to and what the fleet reports, and keeps the books that
`core/provisioning/reconcile.py` decides from. It makes no calls.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from agent.core.errors import ConflictError, DeadlineError, ExhaustedError, HibernodeError, UnavailableError
from agent.core.provisioning.placement import Unplaceable
from agent.core.provisioning.reconcile import (
    Attempts,
    ObservedInstance,
    ReconcilePlan,
    RequestId,
    came_up,
    failed,
    passed_over,
)
from agent.core.types import SECOND_NS, InstanceState
from agent.log import get_logger
from agent.scheduler.fleet.fleet import Fleet
from agent.scheduler.functions.catalog import Problem
from agent.v1.types_pb2 import Instance
from agent.wire.convert_enums import state_from_proto
from agent.wire.convert_time import time_from_proto

RETRY_NS = 2 * SECOND_NS
"""After a create that the agent could not take now, or a stop that failed."""
REPORT_DUE_NS = 15 * SECOND_NS
"""An instance created but never reported by then counts as ended."""
OLD_NS = 60 * SECOND_NS
"""A create answered with an instance that has ended and is older than this found one of a former life."""
HOPELESS = frozenset({"IMAGE_RUNTIME_UNAVAILABLE", "NO_MATCHING_NODE"})
HAS_ENDED = (InstanceState.STOPPED, InstanceState.FAILED)

_log = get_logger()


@dataclass(slots=True, eq=False)
class ProvisionState:
    """Ordinals are those of `revision`.

    `unsure`: the node of a create without an answer, by ordinal: it is asked again there, or there might be two.
    `answered`: created and not reported yet, each with the time by which it must be. `retired`: what the dispatcher
    was told to leave alone. `gave_way`: how many of the revision served when an older instance was last stopped for
    them; -1 = none was.
    """

    revision: str = ""
    deploys: int = 0
    tries: dict[int, Attempts] = field(default_factory=dict)
    under_way: dict[int, str] = field(default_factory=dict)
    unsure: dict[int, str] = field(default_factory=dict)
    answered: dict[str, tuple[ObservedInstance, int]] = field(default_factory=dict)
    alive: dict[str, RequestId] = field(default_factory=dict)
    stopping: set[str] = field(default_factory=set)
    retired: set[str] = field(default_factory=set)
    last_failure: Problem | None = None
    gave_way: int = -1

    def follow_deploys(self, revision: str, deploys: int) -> None:
        """Another revision begins anew; a deploy of the same lets what was given up be tried again."""
        if self.revision != revision:
            self.revision, self.tries = revision, {}
            self.under_way, self.unsure, self.last_failure, self.gave_way = {}, {}, None, -1
        if self.deploys != deploys:
            self.deploys, self.last_failure, self.gave_way = deploys, None, -1
            self.tries = {ordinal: Attempts(tried.attempt) for ordinal, tried in self.tries.items()}

    def learn(self, reported: dict[str, ObservedInstance], fleet: Fleet, now: int) -> list[ObservedInstance]:
        """Who lives, those included whose create was answered before their first report; who came up, who ended."""
        for uid in [uid for uid in self.answered if uid in reported]:
            del self.answered[uid]
        alive = {uid: one for uid, one in reported.items() if one.state not in HAS_ENDED}
        for uid, (one, due) in list(self.answered.items()):
            if now < due and fleet.last_words(uid) is None:
                alive[uid] = replace(one, scheduling=fleet.scheduling(one.node))
            else:
                del self.answered[uid]
                self._ended(one.made_by, uid, fleet, now)
        for uid, made_by in self.alive.items():
            if uid not in alive and uid not in self.retired:
                self._ended(made_by, uid, fleet, now)
        self.stopping &= alive.keys()
        self.retired &= alive.keys()
        self.alive = {uid: one.made_by for uid, one in alive.items()}
        for one in alive.values():
            if one.serving and one.made_by.revision == self.revision:
                ordinal = one.made_by.ordinal
                self.tries[ordinal] = came_up(self.tries.get(ordinal, Attempts()), one.made_by.attempt)
        return list(alive.values())

    def serving(self, here: list[ObservedInstance]) -> int:
        """How many of the revision have come up."""
        return sum(one.serving and one.made_by.revision == self.revision for one in here)

    def created(self, made_by: RequestId, instance: Instance, node: str, fleet: Fleet, now: int, wall_ns: int) -> None:
        """A create was answered."""
        state = state_from_proto(instance.state)
        _log.info("provision.created", request_id=str(made_by), uid=instance.uid, node=node)
        tried = self.tries.get(made_by.ordinal, Attempts())
        if state in HAS_ENDED:
            old = wall_ns - time_from_proto(instance.create_time) > OLD_NS
            self.tries[made_by.ordinal] = (passed_over if old else failed)(tried, made_by.attempt, now)
            self.last_failure = Problem(instance.state_reason, instance.state_message, hopeless=False)
            return
        self.tries[made_by.ordinal] = replace(tried, attempt=max(tried.attempt, made_by.attempt))
        if fleet.instance(instance.uid) is None:
            one = ObservedInstance(instance.uid, node, made_by, InstanceState.STARTING)
            self.answered[instance.uid] = (one, now + REPORT_DUE_NS)

    def not_created(self, made_by: RequestId, error: HibernodeError, node: str, now: int) -> None:
        """A create failed, or nobody knows what became of it."""
        tried = self.tries.get(made_by.ordinal, Attempts())
        if isinstance(error, ExhaustedError) or error.reason == "HOST_MEMORY_SHORT":
            # Its host is full, which is no fault of the function's and may pass.
            self.tries[made_by.ordinal] = replace(tried, not_before_ns=now + RETRY_NS)
        elif isinstance(error, UnavailableError | DeadlineError):
            # Perhaps it was made: the same request_id again finds out, where it was asked.
            self.unsure[made_by.ordinal] = node
            self.tries[made_by.ordinal] = replace(tried, not_before_ns=now + RETRY_NS)
        elif isinstance(error, ConflictError):
            self.tries[made_by.ordinal] = passed_over(tried, made_by.attempt, now)
        else:
            self.tries[made_by.ordinal] = failed(tried, made_by.attempt, now)
        self.last_failure = Problem(error.reason, error.message, hopeless=False)
        _log.warning("provision.create_failed", request_id=str(made_by), node=node, reason=error.reason)

    def problem(self, todo: ReconcilePlan, unplaceable: Unplaceable | None) -> Problem | None:
        """Why there are fewer than wanted; None if there are not, or if it is only a matter of time."""
        if not todo.missing:
            return None
        if unplaceable is not None:
            return Problem(unplaceable.reason, unplaceable.message, unplaceable.reason in HOPELESS)
        failure = self.last_failure
        if failure is None:
            return None
        given_up = all(self.tries.get(ordinal, Attempts()).given_up for ordinal in todo.missing)
        return replace(failure, hopeless=given_up or failure.reason in HOPELESS)

    def pending(self) -> list[str]:
        """Nodes of instances that count and that no agent has reported yet."""
        return [*self.under_way.values(), *(one.node for one, _ in self.answered.values())]

    def _ended(self, made_by: RequestId, uid: str, fleet: Fleet, now: int) -> None:
        if made_by.revision != self.revision:
            return
        self.tries[made_by.ordinal] = failed(self.tries.get(made_by.ordinal, Attempts()), made_by.attempt, now)
        load = fleet.instance(uid) or fleet.last_words(uid)
        reason = (load.state_reason if load is not None else "") or "INSTANCE_ENDED"
        message = (load.state_message if load is not None else "") or f"instance {made_by} ended"
        self.last_failure = Problem(reason, message, hopeless=False)
        _log.warning("provision.instance_ended", request_id=str(made_by), uid=uid, reason=reason)
