"""The catalog of deployed functions, which the request path reads: deploy, provision, delete.

A deploy that changes the spec makes a new revision; the same content again only retries instances that were given up.
A change is durable before it takes effect. The catalog lives in memory; the store is read once, at start.

The autoscaler sets the target of a function with a schedule or policies (`set_target`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from agent.core.dispatch.events import Event, FunctionRemoved, FunctionSet
from agent.core.errors import NotFoundError, PreconditionError
from agent.core.function_rules import bounded
from agent.core.natural_order import natural_key
from agent.core.provisioning.autoscaling import MAX_TARGET, Decision, Provisioning
from agent.core.provisioning.problem import Problem
from agent.core.types import FunctionSpec
from agent.event_log import EventLog
from agent.ports import Clock
from agent.scheduler.database.store import Store
from agent.scheduler.functions.deploy_rules import Defaults, checked, checked_provision, set_idle_mode, warnings_of
from agent.scheduler.functions.deployed import Deployed, deployed_of, row_of, stored_config
from agent.v1 import types_pb2
from agent.v1.function_service_pb2 import DeployFunctionRequest, ProvisionConfig
from agent.wire.convert_function import function_from_proto, stored_function


class Catalog:
    """All functions. `apply_event` sends events to the dispatcher; `changed` is called after every change."""

    def __init__(
        self,
        clock: Clock,
        events: EventLog,
        store: Store,
        apply_event: Callable[[Event], None],
        changed: Callable[[], None],
        defaults: Defaults,
        gpu_check: Callable[[FunctionSpec, bool], list[str]] = lambda spec, runs: [],
    ) -> None:
        """`gpu_check`: see GpuCheck (gpu_check.py)."""
        self._clock = clock
        self._events = events
        self._store = store
        self._apply_event = apply_event
        self._changed = changed
        self._defaults = defaults
        self._gpu_check = gpu_check
        self._functions: dict[str, Deployed] = {}
        self._problems: dict[str, Problem] = {}
        self._deploys: dict[str, int] = {}
        self._revisions: dict[str, int] = {}
        self._folded: dict[str, frozenset[str]] = {}
        self._writing = asyncio.Lock()
        self._unconfirmed: set[str] = set()  # the store may hold their last write or the one before

    # ---- reading ----------------------------------------------------------------------------------------------

    def find(self, name: str) -> Deployed | None:
        """The function, unless it is unknown or being deleted."""
        found = self._functions.get(name)
        return None if found is None or found.deleting else found

    def find_folded(self, name: str) -> Deployed | None:
        """Like `find`, ignoring case, as host names do; None if the names of two functions differ only in case."""
        names = self._folded.get(name.lower(), ())
        found = [one for one in map(self.find, names) if one is not None]
        return found[0] if len(found) == 1 else None

    def all(self) -> list[Deployed]:
        """Every function, those being deleted included, by name."""
        return [self._functions[name] for name in sorted(self._functions, key=natural_key)]

    def was_deleted(self, name: str) -> bool:
        return name in self._revisions and name not in self._functions

    def shortage(self, name: str) -> Problem | None:
        """Why the function has fewer instances than its target."""
        return self._problems.get(name)

    def problem(self, name: str) -> Problem | None:
        """What people should know of the function: its shortage, and what can't be read of it."""
        shortage, found = self._problems.get(name), self._functions.get(name)
        trouble = None if found is None or found.deleting else found.trouble
        if shortage is None or trouble is None:
            return shortage or trouble
        return replace(shortage, message=f"{shortage.message}; {trouble.message}")

    def deploys(self, name: str) -> int:
        """How often it was deployed or provisioned since the start; each time, given-up instances are retried."""
        return self._deploys.get(name, 0)

    # ---- changing ---------------------------------------------------------------------------------------------

    async def load(self) -> None:
        """Read the store; call once, before anything else."""
        self._revisions = await self._store.revisions()
        configs = await self._store.provision_configs()
        for row in await self._store.functions():
            self._put(deployed_of(row, configs.get(row.name, b""), self._events))

    async def deploy(self, request: DeployFunctionRequest) -> tuple[Deployed, list[str]]:
        """Create or replace a function; `validate_only` changes nothing. Returns it as deployed, and warnings.

        Raises InvalidArgumentError and UnsupportedError (deploy_rules.py), PreconditionError NO_SUCH_GPU,
        UnavailableError STORE_FAILED.
        """
        message, triggers = checked(request, self._defaults)
        given = checked_provision(request.provision) if request.HasField("provision") else None
        async with self._writing:
            before = self._functions.get(message.name)
            now = self._clock.wall_ns()
            message.revision = self._next_revision(before, message)
            kept, found = _kept(before) if given is None else given
            decided = _decision(before, found, request.target)
            deployed = Deployed(
                spec=function_from_proto(message),
                message=message,
                triggers=triggers,
                methods=frozenset(method.encode() for trigger in triggers for method in trigger.methods),
                target=decided.target,
                create_wall_ns=now if before is None else before.create_wall_ns,
                update_wall_ns=now,
                default_target=request.target,
                config=kept,
                provisioning=found,
                decided_by=decided.decided_by,
            )
            warnings = self._warnings(deployed)
            if before is not None and message.name not in self._unconfirmed and _same(before, deployed):
                deployed = before
            elif not request.validate_only:
                await self._keep(deployed, None if given is None else stored_config(kept))
            if request.validate_only:
                return deployed, warnings
            return self._deployed(deployed), warnings

    async def put_provision(
        self, name: str, config: ProvisionConfig, *, validate_only: bool = False
    ) -> tuple[Deployed, list[str]]:
        """Replace a function's default target, schedule and policies. Returns the function, and warnings.

        Raises NotFoundError, InvalidArgumentError (deploy_rules.py), PreconditionError FUNCTION_UNREADABLE and
        NO_SUCH_GPU (a target needs GPUs that no node has), UnavailableError STORE_FAILED. Nothing has changed then,
        unless the message of STORE_FAILED says that the change may take effect at the next start.
        """
        bounded("default_target", config.default_target, 0, MAX_TARGET)
        kept, found = checked_provision(config)
        async with self._writing:
            before = self._known(name)
            now = self._clock.wall_ns()
            if before.spec_lost or before.closed:
                text = f"{before.unreadable}; its provisioning can be put after that"
                raise PreconditionError("FUNCTION_UNREADABLE", text, function=name)
            message = types_pb2.FunctionSpec()
            message.CopyFrom(before.message)
            set_idle_mode(message, config)
            message.revision = self._next_revision(before, message)
            decided = _decision(before, found, config.default_target)
            deployed = replace(
                before,
                spec=stored_function(message)[0],
                message=message,
                target=decided.target,
                default_target=config.default_target,
                config=kept,
                provisioning=found,
                decided_by=decided.decided_by,
                update_wall_ns=before.update_wall_ns if message.revision == before.spec.revision else now,
            )
            warnings = self._warnings(deployed)
            if not validate_only:
                if name in self._unconfirmed or not _same(before, deployed):
                    await self._keep(deployed, stored_config(kept))
                deployed = self._deployed(deployed)
            return deployed, warnings

    def set_target(self, name: str, decided: Decision) -> bool:
        """Apply what schedule and policies have decided; returns whether the target has changed."""
        found = self.find(name)
        if found is None or (found.target, found.decided_by) == (decided.target, decided.decided_by):
            return False
        self._functions[name] = replace(found, target=decided.target, decided_by=decided.decided_by)
        if bool(found.target) != bool(decided.target):
            self._announce(self._functions[name])
        return found.target != decided.target

    async def delete(self, name: str) -> None:
        """Refuse new requests and drain all instances; `forget` follows. Raises NotFoundError, UnavailableError."""
        async with self._writing:
            gone = replace(
                self._known(name),
                deleting=True,
                target=0,
                default_target=0,
                config=ProvisionConfig(),
                provisioning=Provisioning(),
                decided_by="",
            )
            await self._keep(gone, b"")
            self._put(gone)
            self._changed()

    async def forget(self, name: str) -> None:
        """Drop a deleted function whose last instance has ended."""
        async with self._writing:
            found = self._functions.get(name)
            if found is None or not found.deleting:
                return  # it was deployed again
            await self._store.delete_function(name)
            del self._functions[name]
            self._folded[name.lower()] -= {name}
            if not self._folded[name.lower()]:
                del self._folded[name.lower()]
            self._problems.pop(name, None)
            self._deploys.pop(name, None)
            self._unconfirmed.discard(name)
            self._events.info("function.deleted", function=name)

    def set_problem(self, name: str, problem: Problem | None) -> None:
        """Set why the function has fewer instances than its target; None if there is no problem."""
        found = self._functions.get(name)
        before = self._problems.get(name)
        if found is None or before == problem:
            return
        if problem is None:
            del self._problems[name]
        else:
            self._problems[name] = problem
            if before is None or before.news != problem.news:
                reason, message, attempt = problem.news
                self._events.warning(
                    "function.degraded", function=name, reason=reason, message=message, attempt=attempt
                )
        if _no_capacity_expected(before) != _no_capacity_expected(problem):
            self._announce(found)

    def _warnings(self, deployed: Deployed) -> list[str]:
        """What is accepted but looks like a mistake. Raises PreconditionError NO_SUCH_GPU."""
        name, target, found = deployed.spec.name, deployed.default_target, deployed.provisioning
        wall_ns = self._clock.wall_ns()
        about_gpus = self._gpu_check(deployed.spec, bool(target or found))
        return [*about_gpus, *warnings_of(name, target, deployed.config, found, wall_ns)]

    def _known(self, name: str) -> Deployed:
        found = self.find(name)
        if found is None:
            raise NotFoundError("FUNCTION_NOT_FOUND", f"no function {name[:64]!r}; `hibernode functions` lists them")
        return found

    async def _keep(self, deployed: Deployed, provision: bytes | None) -> None:
        """Store the function. `provision`: as for `Store.put_function`."""
        name = deployed.spec.name
        if name in self._unconfirmed:
            provision = stored_config(deployed.config)
        self._unconfirmed.add(name)
        await self._store.put_function(row_of(deployed), provision)
        self._unconfirmed.discard(name)

    def _deployed(self, deployed: Deployed) -> Deployed:
        """Make a stored deploy take effect; returns the function as it is then."""
        name, revision = deployed.spec.name, deployed.spec.revision
        # The autoscaler may have set another target while the store wrote.
        decided = _decision(self._functions.get(name), deployed.provisioning, deployed.default_target)
        deployed = replace(deployed, target=decided.target, decided_by=decided.decided_by)
        self._problems.pop(name, None)
        self._deploys[name] = self._deploys.get(name, 0) + 1
        self._put(deployed)
        self._changed()
        deployed = self._functions[name]
        self._events.info("function.deployed", function=name, revision=revision, target=deployed.target)
        return deployed

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
        self._revisions[name] = int(deployed.spec.revision)
        self._announce(deployed)

    def _announce(self, deployed: Deployed) -> None:
        spec = deployed.spec
        if deployed.deleting:
            self._apply_event(FunctionRemoved(spec.name))
            return
        expects = deployed.target > 0 and not _no_capacity_expected(self._problems.get(spec.name))
        self._apply_event(FunctionSet(spec.name, expects, spec.dispatch, spec.wake_factor, spec.queue_length))


def _no_capacity_expected(problem: Problem | None) -> bool:
    return problem is not None and problem.no_capacity_expected


def _same(before: Deployed, after: Deployed) -> bool:
    return (
        before.message == after.message
        and before.triggers == after.triggers
        and before.default_target == after.default_target
        and before.config == after.config
        and (before.spec_lost, before.closed, before.provisioning.unreadable)
        == (after.spec_lost, after.closed, after.provisioning.unreadable)
        and not before.deleting
    )


def _kept(before: Deployed | None) -> tuple[ProvisionConfig, Provisioning]:
    """The schedule and policies so far, which stay if a deploy does not mention any."""
    return (ProvisionConfig(), Provisioning()) if before is None else (before.config, before.provisioning)


def _decision(before: Deployed | None, found: Provisioning, default: int) -> Decision:
    """The target until the autoscaler's next check: with a schedule or policies the old one, as requests may wait."""
    if before is None or before.deleting or not found:
        return Decision(default)
    return Decision(before.target, before.decided_by)
