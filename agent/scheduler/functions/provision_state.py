"""What provisioning knows of a function's instances beyond the fleet's reports: attempts, and calls in progress.

`core/provisioning/reconcile.py` decides from it. Nothing here makes a call.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace

from agent.core.errors import ConflictError, DeadlineError, ExhaustedError, HibernodeError, UnavailableError
from agent.core.provisioning.model import ObservedInstance, RequestId
from agent.core.provisioning.placement import Unplaceable
from agent.core.provisioning.reconcile import Attempts, ReconcilePlan, came_up, failed, skipped
from agent.core.types import SECOND_NS, InstanceState
from agent.log import get_logger
from agent.scheduler.fleet.fleet import Fleet
from agent.scheduler.functions.deployed import Problem
from agent.v1.types_pb2 import Instance
from agent.wire.convert_enums import state_from_proto
from agent.wire.convert_time import time_from_proto

RETRY_NS = 2 * SECOND_NS
"""Wait after a create that the agent could not execute now or did not answer, or a stop that failed."""
REPORT_DUE_NS = 15 * SECOND_NS
"""A created instance that is not reported within this time counts as ended."""
OLD_NS = 60 * SECOND_NS
"""If a create is answered with an ended instance older than this, an earlier run of the scheduler created it."""
NO_CAPACITY_REASONS = frozenset({"IMAGE_RUNTIME_UNAVAILABLE", "NO_MATCHING_NODE"})
HAS_ENDED = (InstanceState.STOPPED, InstanceState.FAILED)

_log = get_logger()


@dataclass(slots=True, eq=False)
class ProvisionState:
    """What is known of one function. Ordinals are those of `revision`.

    - `creating`: node of each create in progress, by ordinal.
    - `unanswered`: node of each unanswered create, by ordinal. It is repeated there: elsewhere it could be made twice.
    - `unreported`: instances created and not reported yet, each with the time by which it must be.
    - `stopping`: stops in progress; `retired`: instances that get no new requests.
    - `serving_at_stop`: how many of `revision` served when an older instance last gave way to them; -1 if none has.
    """

    revision: str = ""
    deploys: int = 0
    attempts: defaultdict[int, Attempts] = field(default_factory=lambda: defaultdict(Attempts))
    creating: dict[int, str] = field(default_factory=dict)
    unanswered: dict[int, str] = field(default_factory=dict)
    unreported: dict[str, tuple[ObservedInstance, int]] = field(default_factory=dict)
    alive: dict[str, RequestId] = field(default_factory=dict)
    stopping: set[str] = field(default_factory=set)
    retired: set[str] = field(default_factory=set)
    last_failure: Problem | None = None
    serving_at_stop: int = -1

    def follow_deploys(self, revision: str, deploys: int) -> None:
        """Start from nothing for another revision; after each deploy, retry the ordinals that were given up."""
        if self.revision != revision:
            self.revision = revision
            self.attempts.clear()
            self.creating, self.unanswered, self.last_failure, self.serving_at_stop = {}, {}, None, -1
        if self.deploys != deploys:
            self.deploys, self.last_failure, self.serving_at_stop = deploys, None, -1
            self.attempts.update({ordinal: Attempts(tried.attempt) for ordinal, tried in self.attempts.items()})

    def update(self, reported: dict[str, ObservedInstance], fleet: Fleet, now: int) -> list[ObservedInstance]:
        """Note which instances came up and which ended. Returns those alive, created but unreported ones included."""
        for uid in [uid for uid in self.unreported if uid in reported]:
            del self.unreported[uid]
        alive = {uid: one for uid, one in reported.items() if one.state not in HAS_ENDED}
        for uid, (one, due) in list(self.unreported.items()):
            if now < due and fleet.last_report(uid) is None:
                alive[uid] = replace(one, scheduling=fleet.scheduling(one.node))
            else:
                del self.unreported[uid]
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
                self.attempts[ordinal] = came_up(self.attempts[ordinal], one.made_by.attempt)
        return list(alive.values())

    def serving(self, here: list[ObservedInstance]) -> int:
        return sum(one.serving and one.made_by.revision == self.revision for one in here)

    def created(self, made_by: RequestId, instance: Instance, node: str, fleet: Fleet, now: int, wall_ns: int) -> None:
        state = state_from_proto(instance.state)
        _log.info("provision.created", request_id=str(made_by), uid=instance.uid, node=node)
        tried = self.attempts[made_by.ordinal]
        if state in HAS_ENDED:
            old = wall_ns - time_from_proto(instance.create_time) > OLD_NS
            self.attempts[made_by.ordinal] = (skipped if old else failed)(tried, made_by.attempt, now)
            self.last_failure = Problem(instance.state_reason, instance.state_message)
            return
        self.attempts[made_by.ordinal] = replace(tried, attempt=max(tried.attempt, made_by.attempt))
        if fleet.instance(instance.uid) is None:
            one = ObservedInstance(instance.uid, node, made_by, InstanceState.STARTING)
            self.unreported[instance.uid] = (one, now + REPORT_DUE_NS)

    def not_created(self, made_by: RequestId, error: HibernodeError, node: str, now: int) -> None:
        """Note a create that failed or whose outcome is unknown."""
        tried = self.attempts[made_by.ordinal]
        if isinstance(error, ExhaustedError) or error.reason == "HOST_MEMORY_SHORT":
            # The host is full, which does not count as a failure of the function.
            self.attempts[made_by.ordinal] = replace(tried, not_before_ns=now + RETRY_NS)
        elif isinstance(error, UnavailableError | DeadlineError):
            # The instance may exist: repeating the request_id on that node finds out.
            self.unanswered[made_by.ordinal] = node
            self.attempts[made_by.ordinal] = replace(tried, not_before_ns=now + RETRY_NS)
        elif isinstance(error, ConflictError):
            self.attempts[made_by.ordinal] = skipped(tried, made_by.attempt, now)
        else:
            self.attempts[made_by.ordinal] = failed(tried, made_by.attempt, now)
        self.last_failure = Problem(error.reason, error.message)
        _log.warning("provision.create_failed", request_id=str(made_by), node=node, reason=error.reason)

    def problem(self, todo: ReconcilePlan, unplaceable: Unplaceable | None) -> Problem | None:
        """Why there are fewer instances than the target; None if there are enough, or nothing has failed."""
        if not todo.missing:
            return None
        if unplaceable is not None:
            return Problem(unplaceable.reason, unplaceable.message, unplaceable.reason in NO_CAPACITY_REASONS)
        failure = self.last_failure
        if failure is None:
            return None
        given_up = all(self.attempts[ordinal].given_up for ordinal in todo.missing)
        return replace(failure, no_capacity_expected=given_up or failure.reason in NO_CAPACITY_REASONS)

    def pending(self) -> list[str]:
        """Nodes of instances that no agent has reported yet."""
        return [*self.creating.values(), *(one.node for one, _ in self.unreported.values())]

    def _ended(self, made_by: RequestId, uid: str, fleet: Fleet, now: int) -> None:
        if made_by.revision != self.revision:
            return
        self.attempts[made_by.ordinal] = failed(self.attempts[made_by.ordinal], made_by.attempt, now)
        load = fleet.instance(uid) or fleet.last_report(uid)
        reason = (load.state_reason if load is not None else "") or "INSTANCE_ENDED"
        message = (load.state_message if load is not None else "") or f"instance {made_by} ended"
        self.last_failure = Problem(reason, message)
        _log.warning("provision.instance_ended", request_id=str(made_by), uid=uid, reason=reason)
