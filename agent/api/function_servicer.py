"""FunctionService of the scheduler: functions and their provisioning."""

from __future__ import annotations

from collections import Counter

from agent.api.paging import page
from agent.core.dispatch.dispatcher import Dispatcher
from agent.core.dispatch.model import NodeStanding
from agent.core.errors import NotFoundError
from agent.core.natural_order import natural_key
from agent.core.provisioning.problem import NextTry, Problem
from agent.core.provisioning.reconcile import MAX_ATTEMPTS
from agent.core.types import IdleMode
from agent.ports import Clock
from agent.scheduler.fleet.fleet import ENDED, Fleet
from agent.scheduler.functions.autoscaler import Autoscaler
from agent.scheduler.functions.catalog import Catalog
from agent.scheduler.functions.deployed import Deployed
from agent.v1 import function_service_pb2 as pb
from agent.v1 import function_service_pb2_grpc
from agent.v1.scheduler_service_pb2 import InstanceLoad
from agent.v1.types_pb2 import Instance
from agent.wire.convert_function import function_to_proto
from agent.wire.convert_time import time_to_proto

_NEXT_TRIES = {
    NextTry.UNDER_WAY: pb.StartFailure.NEXT_TRY_UNDER_WAY,
    NextTry.SCHEDULED: pb.StartFailure.NEXT_TRY_SCHEDULED,
    NextTry.WAITING: pb.StartFailure.NEXT_TRY_WAITING,
    NextTry.GIVEN_UP: pb.StartFailure.NEXT_TRY_GIVEN_UP,
}
_AWAKE = (Instance.STATE_RUNNING, Instance.STATE_FREEZING)
_COMING_OR_GOING = (Instance.STATE_STARTING, Instance.STATE_STOPPING, *ENDED)


class FunctionServicer(function_service_pb2_grpc.FunctionServiceServicer):
    """Delegates to the catalog; `wire.interceptors` turns errors into statuses."""

    def __init__(
        self,
        clock: Clock,
        catalog: Catalog,
        fleet: Fleet,
        dispatcher: Dispatcher,
        scaler: Autoscaler,
        gateway_url: str,
    ) -> None:
        """`gateway_url`: without a trailing slash."""
        self._clock = clock
        self._catalog = catalog
        self._fleet = fleet
        self._dispatcher = dispatcher
        self._scaler = scaler
        self._gateway_url = gateway_url

    async def DeployFunction(self, request: pb.DeployFunctionRequest, context: object) -> pb.DeployFunctionResponse:
        """Creates or replaces a function; answers once it is stored, not once its instances run."""
        deployed, warnings = await self._catalog.deploy(request)
        return pb.DeployFunctionResponse(function=self._show(deployed), warnings=warnings)

    async def GetFunction(self, request: pb.GetFunctionRequest, context: object) -> pb.GetFunctionResponse:
        """One function, even one that is being deleted."""
        for deployed in self._catalog.all():
            if deployed.spec.name == request.name:
                return pb.GetFunctionResponse(function=self._show(deployed))
        text = f"no function {request.name[:64]!r}; `hibernode functions` lists them"
        raise NotFoundError("FUNCTION_NOT_FOUND", text)

    async def ListFunctions(self, request: pb.ListFunctionsRequest, context: object) -> pb.ListFunctionsResponse:
        """All functions, by name."""
        shown, token = page(self._catalog.all(), request.page_size, request.page_token)
        return pb.ListFunctionsResponse(functions=[self._show(one) for one in shown], next_page_token=token)

    async def DeleteFunction(self, request: pb.DeleteFunctionRequest, context: object) -> pb.DeleteFunctionResponse:
        """Answers once no new request is accepted; the instances drain afterwards."""
        await self._catalog.delete(request.name)
        return pb.DeleteFunctionResponse()

    async def PutProvisionConfig(
        self, request: pb.PutProvisionConfigRequest, context: object
    ) -> pb.PutProvisionConfigResponse:
        """Answers once the config is stored and the target decided, not once the instances have followed."""
        deployed, warnings = await self._catalog.put_provision(
            request.function, request.config, validate_only=request.validate_only
        )
        return pb.PutProvisionConfigResponse(provision=self._provision(deployed), warnings=warnings)

    async def ListProvisionConfigs(
        self, request: pb.ListProvisionConfigsRequest, context: object
    ) -> pb.ListProvisionConfigsResponse:
        """The config of one function, or of all that have a target, a schedule or a policy, by name."""
        found = [
            one
            for one in self._catalog.all()
            if not one.deleting
            and (one.target or one.default_target or one.provisioning)
            and request.function in ("", one.spec.name)
        ]
        shown, token = page(found, request.page_size, request.page_token)
        return pb.ListProvisionConfigsResponse(
            provisions=[self._provision(one) for one in shown], next_page_token=token
        )

    async def DeleteProvisionConfig(
        self, request: pb.DeleteProvisionConfigRequest, context: object
    ) -> pb.DeleteProvisionConfigResponse:
        """Sets target 0, no schedule and no policy; the instances drain afterwards."""
        await self._catalog.put_provision(request.function, pb.ProvisionConfig())
        return pb.DeleteProvisionConfigResponse()

    def _up(self, name: str) -> list[InstanceLoad]:
        """Instances of a function, awake or frozen."""
        return [
            load
            for node, load in self._fleet.instances()
            if load.function == name
            and node.standing is not NodeStanding.LOST  # no longer counted, and replaced on other nodes
            and load.state not in _COMING_OR_GOING
        ]

    def _provision(self, deployed: Deployed) -> pb.Provision:
        name = deployed.spec.name
        never_sleeps = deployed.spec.idle.mode is IdleMode.NEVER
        config = pb.ProvisionConfig()
        config.CopyFrom(deployed.config)
        config.default_target = deployed.default_target
        config.always_allocate_gpu = never_sleeps
        problem = self._catalog.problem(name)
        return pb.Provision(
            function=name,
            config=config,
            target=deployed.target,
            current=len(self._up(name)),
            current_error="" if problem is None else problem.message,
            current_error_reason="" if problem is None else problem.reason,
            always_allocate_gpu=never_sleeps,
            decided_by=deployed.decided_by,
            last_failure=self._last_failure(problem),
            policies=[
                pb.Provision.PolicyState(
                    name=one.name,
                    active=one.active,
                    target=one.target,
                    metric=None if one.metric is None else float(one.metric),
                )
                for one in self._scaler.states(name)
            ],
        )

    def _show(self, deployed: Deployed) -> pb.Function:
        name = deployed.spec.name
        up = self._up(name)
        current = [load for load in up if load.revision == deployed.spec.revision]
        problem = self._catalog.problem(name)
        if deployed.deleting:
            state = pb.Function.STATE_DELETING
        elif len(current) >= deployed.target:
            state = pb.Function.STATE_READY
        else:
            short = self._catalog.shortage(name) is not None
            state = pb.Function.STATE_DEGRADED if short else pb.Function.STATE_PROVISIONING
        return pb.Function(
            name=name,
            spec=function_to_proto(deployed.spec),
            triggers=deployed.triggers,
            target=deployed.target,
            current=len(up),
            current_error="" if problem is None else problem.message,
            current_error_reason="" if problem is None else problem.reason,
            state=state,
            url=f"{self._gateway_url}/fn/{name}/",
            create_time=time_to_proto(deployed.create_wall_ns),
            update_time=time_to_proto(deployed.update_wall_ns),
            queued=self._dispatcher.queue_state(name).queued,
            awake=sum(load.state in _AWAKE for load in up),
            default_target=deployed.default_target,
            last_failure=self._last_failure(problem),
            running=_running(up),
        )

    def _last_failure(self, problem: Problem | None) -> pb.StartFailure | None:
        if problem is None or problem.last is None:
            return None
        last, failure = problem.last, problem.last.failure
        shown = pb.StartFailure(
            reason=failure.reason,
            message=failure.message,
            time=time_to_proto(failure.wall_ns),
            node=failure.node,
            uid=failure.uid,
            attempt=last.attempt,
            max_attempts=MAX_ATTEMPTS,
            next_try=_NEXT_TRIES[last.next_try],
        )
        if last.next_try is NextTry.SCHEDULED:
            wait_ns = last.next_ns - self._clock.monotonic_ns()
            shown.next_try_time.CopyFrom(time_to_proto(self._clock.wall_ns() + max(0, wait_ns)))
        return shown


def _running(up: list[InstanceLoad]) -> list[pb.RunningRevision]:
    """The instances by revision, the newest revision first."""
    counts = Counter(load.revision for load in up)
    newest = sorted(counts, key=natural_key, reverse=True)
    return [pb.RunningRevision(revision=revision, current=counts[revision]) for revision in newest]
