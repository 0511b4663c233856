"""What is deployed: the table the request path reads, and the one way to change it.

A deploy that changes the spec is a new revision; the same content again changes nothing. A change is durable before
it is in effect. The table lives in memory; the store is read once, at the start.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace

from agent.core.dispatch_events import Event, FunctionRemoved, FunctionSet
from agent.core.errors import NotFoundError
from agent.core.types import FunctionSpec
from agent.log import get_logger
from agent.ports import Clock
from agent.scheduler.deploy_rules import Defaults, checked, warnings_of
from agent.scheduler.store import FunctionRow, Store
from agent.v1 import types_pb2
from agent.v1.function_service_pb2 import DeployFunctionRequest, Function, HttpTrigger
from agent.wire.convert_function import function_from_proto

_log = get_logger()


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a function has fewer instances than wanted. `hopeless`: waiting will not help, only a change will."""

    reason: str
    message: str
    hopeless: bool


@dataclass(frozen=True, slots=True)
class Deployed:
    """One function as it stands. `message` is the whole spec with its secrets, for agents only; `spec` its core.
    `methods`: allowed by its triggers, empty = all."""

    spec: FunctionSpec
    message: types_pb2.FunctionSpec
    triggers: tuple[HttpTrigger, ...]
    methods: frozenset[bytes]
    target: int
    create_wall_ns: int
    update_wall_ns: int
    deleting: bool = False

    def __repr__(self) -> str:
        return f"Deployed({self.spec.name!r}, revision={self.spec.revision}, target={self.target})"


class Catalog:
    """All functions. `tell` takes the dispatcher's events, `changed` is called after every change."""

    def __init__(
        self,
        clock: Clock,
        store: Store,
        tell: Callable[[Event], None],
        changed: Callable[[], None],
        defaults: Defaults,
    ) -> None:
        self._clock = clock
        self._store = store
        self._tell = tell
        self._changed = changed
        self._defaults = defaults
        self._functions: dict[str, Deployed] = {}
        self._problems: dict[str, Problem] = {}
        self._deploys: dict[str, int] = {}
        self._revisions: dict[str, int] = {}
        self._folded: dict[str, frozenset[str]] = {}
        self._writing = asyncio.Lock()

    # ---- reading ----------------------------------------------------------------------------------------------

    def find(self, name: str) -> Deployed | None:
        """The function, unless it is unknown or being deleted."""
        found = self._functions.get(name)
        return None if found is None or found.deleting else found

    def find_folded(self, name: str) -> Deployed | None:
        """As `find`, whatever the case of `name`, for host names have none; None where two functions differ by it."""
        names = self._folded.get(name.lower(), ())
        found = [one for one in map(self.find, names) if one is not None]
        return found[0] if len(found) == 1 else None

    def all(self) -> list[Deployed]:
        """Every function, those being deleted included, by name."""
        return [self._functions[name] for name in sorted(self._functions)]

    def was_deleted(self, name: str) -> bool:
        """It was deployed here, lately or long ago, and is no more."""
        return name in self._revisions and name not in self._functions

    def problem(self, name: str) -> Problem | None:
        """What keeps the function from its target."""
        return self._problems.get(name)

    def deploys(self, name: str) -> int:
        """How often it was deployed, the same again included: a deploy is how given-up instances are tried again."""
        return self._deploys.get(name, 0)

    # ---- changing ---------------------------------------------------------------------------------------------

    async def load(self) -> None:
        """Read the store; call once, before anything else."""
        self._revisions = await self._store.revisions()
        for row in await self._store.functions():
            self._put(_of_row(row))

    async def deploy(self, request: DeployFunctionRequest) -> tuple[Deployed, list[str]]:
        """Create or replace a function; with `validate_only` only say what would come of it. Also warnings.

        Raises InvalidArgumentError and its kind (deploy_rules.py), UnavailableError STORE_FAILED.
        """
        message, triggers = checked(request, self._defaults)
        warnings = warnings_of(request)
        async with self._writing:
            before = self._functions.get(message.name)
            now = self._clock.wall_ns()
            message.revision = self._next_revision(before, message)
            deployed = Deployed(
                spec=function_from_proto(message),
                message=message,
                triggers=triggers,
                methods=frozenset(method.encode() for trigger in triggers for method in trigger.methods),
                target=request.target,
                create_wall_ns=now if before is None else before.create_wall_ns,
                update_wall_ns=now,
            )
            if before is not None and _same(before, deployed):
                deployed = before
            elif not request.validate_only:
                await self._store.put_function(_row(deployed))
            if not request.validate_only:
                self._problems.pop(message.name, None)
                self._deploys[message.name] = self._deploys.get(message.name, 0) + 1
                self._put(deployed)
                name, spec = message.name, deployed.spec
                _log.info("function.deployed", function=name, revision=spec.revision, target=deployed.target)
                self._changed()
        return deployed, warnings

    async def delete(self, name: str) -> None:
        """Begin to delete: nothing new is accepted, its instances drain, then `forget`. Raises NotFoundError."""
        async with self._writing:
            found = self.find(name)
            if found is None:
                raise NotFoundError("FUNCTION_NOT_FOUND", f"no function {name!r}; `hibernode functions` lists them")
            gone = replace(found, deleting=True, target=0)
            await self._store.put_function(_row(gone))
            self._put(gone)
            self._changed()

    async def forget(self, name: str) -> None:
        """The last instance of a deleted function has ended."""
        async with self._writing:
            found = self._functions.get(name)
            if found is None or not found.deleting:
                return  # deployed again meanwhile
            await self._store.delete_function(name)
            del self._functions[name]
            self._folded[name.lower()] -= {name}
            if not self._folded[name.lower()]:
                del self._folded[name.lower()]
            self._problems.pop(name, None)
            self._deploys.pop(name, None)
            _log.info("function.deleted", function=name)

    def set_problem(self, name: str, problem: Problem | None) -> None:
        """Provisioning found out why the target is not reached, or reached it."""
        found = self._functions.get(name)
        before = self._problems.get(name)
        if found is None or before == problem:
            return
        if problem is None:
            del self._problems[name]
        else:
            self._problems[name] = problem
            _log.warning("function.degraded", function=name, reason=problem.reason, message=problem.message)
        if (before is not None and before.hopeless) != (problem is not None and problem.hopeless):
            self._announce(found)

    def _next_revision(self, before: Deployed | None, message: types_pb2.FunctionSpec) -> str:
        if before is not None:
            message.revision = before.spec.revision
            if message == before.message:
                return before.spec.revision
        return str(self._revisions.get(message.name, 0) + 1)

    def _put(self, deployed: Deployed) -> None:
        name = deployed.spec.name
        self._functions[name] = deployed
        self._folded[name.lower()] = self._folded.get(name.lower(), frozenset()) | {name}
        self._revisions[deployed.spec.name] = int(deployed.spec.revision)
        self._announce(deployed)

    def _announce(self, deployed: Deployed) -> None:
        spec = deployed.spec
        if deployed.deleting:
            self._tell(FunctionRemoved(spec.name))
            return
        problem = self._problems.get(spec.name)
        hope = deployed.target > 0 and (problem is None or not problem.hopeless)
        self._tell(FunctionSet(spec.name, hope, spec.dispatch, spec.wake_factor, spec.queue_length))


def _same(before: Deployed, after: Deployed) -> bool:
    return (
        before.message == after.message
        and before.triggers == after.triggers
        and before.target == after.target
        and not before.deleting
    )


def _row(deployed: Deployed) -> FunctionRow:
    return FunctionRow(
        name=deployed.spec.name,
        revision=int(deployed.spec.revision),
        spec=deployed.message.SerializeToString(deterministic=True),
        target=deployed.target,
        triggers=Function(triggers=deployed.triggers).SerializeToString(deterministic=True),
        create_wall_ns=deployed.create_wall_ns,
        update_wall_ns=deployed.update_wall_ns,
        deleting=deployed.deleting,
    )


def _of_row(row: FunctionRow) -> Deployed:
    message = types_pb2.FunctionSpec.FromString(row.spec)
    triggers = tuple(Function.FromString(row.triggers).triggers)
    return Deployed(
        spec=function_from_proto(message),
        message=message,
        triggers=triggers,
        methods=frozenset(method.encode() for trigger in triggers for method in trigger.methods),
        target=row.target,
        create_wall_ns=row.create_wall_ns,
        update_wall_ns=row.update_wall_ns,
        deleting=row.deleting,
    )
