"""A deployed function, and how it is stored and read again.

What was accepted once is not checked again when it is read: the rules may be another version's by now. What can't be
read changes nothing: the function keeps its row, its instances and its target, other functions are not touched, and
`trouble` says what to do.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from google.protobuf.message import DecodeError

from agent.core.function_rules import MAX_TIMEOUT_NS
from agent.core.provisioning.autoscaling import MAX_TARGET, Provisioning, Unreadable
from agent.core.provisioning.problem import Problem
from agent.core.types import FunctionSpec
from agent.event_log import EventLog
from agent.scheduler.database.store import FunctionRow
from agent.v1 import types_pb2
from agent.v1.function_service_pb2 import Function, HttpTrigger, ProvisionConfig
from agent.wire.convert_function import function_from_proto, stored_function
from agent.wire.convert_provision import ALWAYS, stored_provisioning

_AUTH_TYPES = (HttpTrigger.AUTH_TYPE_UNSPECIFIED, HttpTrigger.AUTH_TYPE_ANONYMOUS)


@dataclass(frozen=True, slots=True)
class Deployed:
    """A deployed function.

    - `message`: the whole spec with its secrets, for agents only; `spec`: the same for the core.
    - `methods`: those that its triggers allow; empty means all.
    - `target`: how many instances it should have now, `decided_by` an action or policy ("": by `default_target`).
    - `config`: schedule and policies as they were put; `provisioning`: the same, parsed.
    - `unreadable`: what of its stored spec or triggers can't be read, "" if all can. `spec_lost`: nothing of the spec
      can, so its instances are left as they are. `closed`: nor can it be told who may call it.
    """

    spec: FunctionSpec
    message: types_pb2.FunctionSpec
    triggers: tuple[HttpTrigger, ...]
    methods: frozenset[bytes]
    target: int
    create_wall_ns: int
    update_wall_ns: int
    deleting: bool = False
    default_target: int = 0
    config: ProvisionConfig = field(default_factory=ProvisionConfig)
    provisioning: Provisioning = field(default_factory=Provisioning)
    decided_by: str = ""
    unreadable: str = ""
    spec_lost: bool = False
    closed: bool = False

    def __repr__(self) -> str:
        return f"Deployed({self.spec.name!r}, revision={self.spec.revision}, target={self.target})"

    @property
    def trouble(self) -> Problem | None:
        """What of the stored function can't be read, and what that leads to."""
        if self.unreadable:
            return Problem("FUNCTION_UNREADABLE", self.unreadable)
        lost = self.provisioning.unreadable
        if not lost:
            return None
        others = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
        return Problem(
            "PROVISION_UNREADABLE",
            f"{lost[0].problem}{others}; it counts with the last target until the scheduler, started again, can read "
            "it, or until the provisioning is put again",
        )


def row_of(deployed: Deployed) -> FunctionRow:
    """The function to store, without its schedule and policies."""
    return FunctionRow(
        name=deployed.spec.name,
        revision=int(deployed.spec.revision),
        spec=deployed.message.SerializeToString(deterministic=True),
        target=deployed.default_target,
        triggers=Function(triggers=deployed.triggers).SerializeToString(deterministic=True),
        create_wall_ns=deployed.create_wall_ns,
        update_wall_ns=deployed.update_wall_ns,
        deleting=deployed.deleting,
    )


def stored_config(config: ProvisionConfig) -> bytes:
    """Schedule and policies to store."""
    return config.SerializeToString(deterministic=True)


def deployed_of(row: FunctionRow, stored: bytes, events: EventLog) -> Deployed:
    """The stored function. `stored`: its schedule and policies, b"" if it has none. Never raises."""
    message, spec, problem, spec_lost = _spec_of(row)
    triggers, closed = _triggers_of(row)
    if closed and not problem:
        problem = "its triggers can't be read, so that all calls are refused"
    config, provisioning = _provision_of(stored)
    found = Deployed(
        spec=spec,
        message=message,
        triggers=triggers,
        methods=frozenset(method.encode() for trigger in triggers for method in trigger.methods),
        target=row.target,
        create_wall_ns=row.create_wall_ns,
        update_wall_ns=row.update_wall_ns,
        deleting=row.deleting,
        default_target=row.target,
        config=config,
        provisioning=provisioning,
        unreadable=f"the stored function: {problem}; deploy it again, or update the scheduler" if problem else "",
        spec_lost=spec_lost,
        closed=closed,
    )
    if found.unreadable:
        events.error("function.not_understood", function=row.name, message=found.unreadable)
    for one in provisioning.unreadable:
        events.error("provision.not_understood", function=row.name, message=one.problem)
    return found


def _spec_of(row: FunctionRow) -> tuple[types_pb2.FunctionSpec, FunctionSpec, str, bool]:
    """Message and spec, what can't be read of them, and whether that is all."""
    try:
        message = types_pb2.FunctionSpec.FromString(row.spec)
    except DecodeError:
        message = types_pb2.FunctionSpec()
    if (message.name, message.revision) == (row.name, str(row.revision)):
        return message, *stored_function(message), False
    # Its instances go on serving. Each agent enforces the timeout that it was given, the gateway only cuts stuck ones.
    stub = types_pb2.FunctionSpec(name=row.name, revision=str(row.revision), timeout_ns=MAX_TIMEOUT_NS)
    problem = "its spec is damaged, so that its instances are neither replaced nor stopped"
    return stub, function_from_proto(stub), problem, True


def _triggers_of(row: FunctionRow) -> tuple[tuple[HttpTrigger, ...], bool]:
    """The triggers, and whether it can't be told from them who may call the function: then all calls are refused."""
    try:
        triggers = tuple(Function.FromString(row.triggers).triggers)
    except DecodeError:
        return (), True
    return triggers, any(trigger.auth_type not in _AUTH_TYPES for trigger in triggers)


def _provision_of(stored: bytes) -> tuple[ProvisionConfig, Provisioning]:
    try:
        config = ProvisionConfig.FromString(stored)
    except DecodeError:
        lost = Unreadable("", ALWAYS, MAX_TARGET, "the stored schedule and policies are damaged")
        return ProvisionConfig(), Provisioning(unreadable=(lost,))
    return config, stored_provisioning(config)
