"""FunctionService: deploy, look, delete."""

from __future__ import annotations

from agent.api.paging import page
from agent.core.dispatch import Dispatcher
from agent.core.errors import NotFoundError
from agent.core.leases import Standing
from agent.scheduler.fleet import ENDED, Fleet
from agent.scheduler.functions import Catalog, Deployed
from agent.v1 import function_service_pb2 as pb
from agent.v1 import function_service_pb2_grpc
from agent.v1.types_pb2 import Instance
from agent.wire.convert_function import function_to_proto
from agent.wire.convert_time import time_to_proto

_AWAKE = (Instance.STATE_RUNNING, Instance.STATE_FREEZING)
_COMING_OR_GOING = (Instance.STATE_STARTING, Instance.STATE_STOPPING, *ENDED)


class FunctionServicer(function_service_pb2_grpc.FunctionServiceServicer):
    """Translates and hands on; errors become statuses in the wire's call guard."""

    def __init__(self, catalog: Catalog, fleet: Fleet, dispatcher: Dispatcher, gateway_url: str) -> None:
        """`gateway_url` without a slash at its end."""
        self._catalog = catalog
        self._fleet = fleet
        self._dispatcher = dispatcher
        self._gateway_url = gateway_url

    async def DeployFunction(self, request: pb.DeployFunctionRequest, context: object) -> pb.DeployFunctionResponse:
        """Create or replace; answers once it is stored, not once its instances are up."""
        deployed, warnings = await self._catalog.deploy(request)
        return pb.DeployFunctionResponse(function=self._show(deployed), warnings=warnings)

    async def GetFunction(self, request: pb.GetFunctionRequest, context: object) -> pb.GetFunctionResponse:
        """One function, one being deleted included."""
        for deployed in self._catalog.all():
            if deployed.spec.name == request.name:
                return pb.GetFunctionResponse(function=self._show(deployed))
        text = f"no function {request.name[:64]!r}; `hibernode functions` lists them"
        raise NotFoundError("FUNCTION_NOT_FOUND", text)

    async def ListFunctions(self, request: pb.ListFunctionsRequest, context: object) -> pb.ListFunctionsResponse:
        """By name."""
        shown, token = page(self._catalog.all(), request.page_size, request.page_token)
        return pb.ListFunctionsResponse(functions=[self._show(one) for one in shown], next_page_token=token)

    async def DeleteFunction(self, request: pb.DeleteFunctionRequest, context: object) -> pb.DeleteFunctionResponse:
        """Answers once nothing new is accepted; the instances drain in their own time."""
        await self._catalog.delete(request.name)
        return pb.DeleteFunctionResponse()

    def _show(self, deployed: Deployed) -> pb.Function:
        name = deployed.spec.name
        loads = [
            load
            for node, load in self._fleet.instances()
            if load.function == name and node.standing is not Standing.LOST  # counted out, and replaced elsewhere
        ]
        up = [load for load in loads if load.state not in _COMING_OR_GOING]
        current = [load for load in up if load.revision == deployed.spec.revision]
        problem = self._catalog.problem(name)
        if deployed.deleting:
            state = pb.Function.STATE_DELETING
        elif len(current) >= deployed.target:
            state = pb.Function.STATE_READY
        else:
            state = pb.Function.STATE_PROVISIONING if problem is None else pb.Function.STATE_DEGRADED
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
        )
