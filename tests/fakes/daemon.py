"""`python -m tests.fakes.daemon HOME`: an agent, a scheduler and a gateway that tell a fixed story to clients.

Real servers on real sockets (agent/wire), a home as daemons leave it (endpoints.json, token), no GPU and no
instances. Pages hold two entries at most, so that clients have to turn them. What a uid or a function is called says
how it behaves. "ready" on stdout; ends with stdin.
"""

# ruff: noqa: N802 - the names of servicers' methods come from the protos

from __future__ import annotations

import asyncio
import base64
import json
import sys
from collections.abc import AsyncIterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

from agent.core.errors import InvalidArgumentError, NotFoundError, PreconditionError
from agent.v1 import function_service_pb2 as fn
from agent.v1 import function_service_pb2_grpc as fn_grpc
from agent.v1 import instance_service_pb2 as inst
from agent.v1 import instance_service_pb2_grpc as inst_grpc
from agent.v1 import node_service_pb2 as node
from agent.v1 import node_service_pb2_grpc as node_grpc
from agent.v1 import types_pb2
from agent.v1 import usage_service_pb2 as usage
from agent.v1 import usage_service_pb2_grpc as usage_grpc
from agent.wire.server import GrpcServer, Services
from agent.wire.tokens import Principal, Role, TokenTable
from tests.fakes.exec_story import exec_story
from tests.fakes.fleet_story import CREATED, ENDED, GIB, INSTANCES, NODE, Fleet, State, instance, page

TOKEN = "operator-token-0123456789"


class Instances(inst_grpc.InstanceServiceServicer):
    """i-busy can't be frozen, i-stuck never answers, i-evil says things that steer terminals."""

    async def ListInstances(self, request: inst.ListInstancesRequest, context: Any) -> inst.ListInstancesResponse:
        all_of_them = [*INSTANCES, *(ENDED if request.include_ended else [])]
        found = [one for one in all_of_them if request.function in ("", one.function)]
        items, token = page(found, request.page_token)
        return inst.ListInstancesResponse(instances=items, next_page_token=token)

    async def GetInstance(self, request: inst.GetInstanceRequest, context: Any) -> inst.GetInstanceResponse:
        return inst.GetInstanceResponse(instance=self._find(request.uid))

    async def FreezeInstance(self, request: inst.FreezeInstanceRequest, context: Any) -> inst.FreezeInstanceResponse:
        if request.uid == "i-busy":
            raise PreconditionError("INSTANCE_BUSY", "i-busy has 2 requests in it; wait for them", uid="i-busy")
        found = types_pb2.Instance()
        found.CopyFrom(self._find(request.uid))
        found.state = State.STATE_FROZEN
        return inst.FreezeInstanceResponse(instance=found)

    async def WakeInstance(self, request: inst.WakeInstanceRequest, context: Any) -> inst.WakeInstanceResponse:
        if request.uid == "i-stuck":
            await asyncio.Event().wait()
        return inst.WakeInstanceResponse(instance=self._find(request.uid), free_slots=1)

    async def StopInstance(self, request: inst.StopInstanceRequest, context: Any) -> inst.StopInstanceResponse:
        found = types_pb2.Instance()
        found.CopyFrom(self._find(request.uid))
        found.state = State.STATE_STOPPED
        return inst.StopInstanceResponse(instance=found)

    async def CreateInstance(self, request: inst.CreateInstanceRequest, context: Any) -> inst.CreateInstanceResponse:
        if not request.request_id:
            raise InvalidArgumentError("REQUEST_ID_INVALID", "request_id must have 1 to 200 characters")
        failed = request.spec.name == "broken" and request.wait
        made = instance("i-new", request.spec.name, State.STATE_FAILED if failed else State.STATE_STARTING)
        made.request_id = request.request_id
        made.spec.CopyFrom(request.spec)
        if failed:
            made.state_reason, made.state_message = "FUNCTION_NOT_STARTED", "port 9000 never answered"
        return inst.CreateInstanceResponse(instance=made)

    async def GetInstanceLogs(
        self, request: inst.GetInstanceLogsRequest, context: Any
    ) -> AsyncIterator[inst.GetInstanceLogsResponse]:
        self._find(request.uid)
        yield inst.GetInstanceLogsResponse(data=b"Loading model\n")
        yield inst.GetInstanceLogsResponse(data=b"\xff not UTF-8\n")
        if request.follow:
            yield inst.GetInstanceLogsResponse(data=f"the last {request.tail_bytes} bytes\n".encode())
            if request.uid == "i-run":
                await asyncio.Event().wait()

    def ExecInstance(
        self, request_iterator: AsyncIterator[inst.ExecInstanceRequest], context: Any
    ) -> AsyncIterator[inst.ExecInstanceResponse]:
        return exec_story(request_iterator, lambda uid: self._find(uid).state == State.STATE_FROZEN)

    async def ListEvents(self, request: inst.ListEventsRequest, context: Any) -> inst.ListEventsResponse:
        names = ("instance.created", "instance.running", "instance.frozen")
        found = [
            types_pb2.Event(time=CREATED, instance_uid="i-cold", name=name, attributes={"driver_ns": "12"})
            for name in names
            if request.instance_uid in ("", "i-cold") and not request.HasField("since")
        ]
        items, token = page(found, request.page_token)
        return inst.ListEventsResponse(events=items, next_page_token=token)

    def _find(self, uid: str) -> types_pb2.Instance:
        if uid == "i-evil":
            return instance(uid, "evil", State.STATE_RUNNING, state_message="\x1b]0;owned\x07\x1b[2J")
        for one in (*INSTANCES, *ENDED):
            if one.uid == uid:
                return one
        raise NotFoundError("INSTANCE_NOT_FOUND", f"no instance {uid!r} on this node; `hibernode ps` lists them")


WINDOWS = [
    types_pb2.UsageWindow(
        instance_uid="i-cold",
        seq=seq,
        function="ocr",
        state=State.STATE_RUNNING,
        gpu_count=1,
        gpu_memory_bytes=8 * GIB,
        start_mono_ns=seq * 60_000_000_000,
        end_mono_ns=(seq + 1) * 60_000_000_000,
        active_ns=20_000_000_000,
        idle_ns=40_000_000_000,
        invocations=4,
        sealed=seq < 2,
    )
    for seq in range(3)
]


class Nodes(node_grpc.NodeServiceServicer):
    async def GetNode(self, request: node.GetNodeRequest, context: Any) -> node.GetNodeResponse:
        return node.GetNodeResponse(node=NODE)

    async def ListUsageWindows(
        self, request: node.ListUsageWindowsRequest, context: Any
    ) -> node.ListUsageWindowsResponse:
        items, token = page(WINDOWS, request.page_token)
        return node.ListUsageWindowsResponse(windows=items, next_page_token=token)


class Functions(fn_grpc.FunctionServiceServicer):
    """Remembers what is deployed. `slow` gets ready at the second look, `hopeless` never, `late` stays on its way,
    `cramped` wants more than it has."""

    def __init__(self, gateway: str) -> None:
        self._gateway = gateway
        self._known: dict[str, fn.Function] = {}
        self._provisions: dict[str, fn.Provision] = {}

    async def DeployFunction(self, request: fn.DeployFunctionRequest, context: Any) -> fn.DeployFunctionResponse:
        made = fn.Function(name=request.spec.name, spec=request.spec, triggers=request.triggers, target=request.target)
        made.default_target = request.target
        made.spec.revision = "1"
        made.state = fn.Function.STATE_PROVISIONING
        made.url = f"http://{self._gateway}/fn/{made.name}/"
        if made.name == "cramped":
            made.current_error_reason, made.current_error = "NO_FREE_GPU", "node gpu-host-2 has no free GPU"
        warnings = [] if request.target else ["target is 0: it answers 503 NoCapacity"]
        if not request.validate_only:
            self._known[made.name] = made
        return fn.DeployFunctionResponse(function=made, warnings=warnings)

    async def PutProvisionConfig(
        self, request: fn.PutProvisionConfigRequest, context: Any
    ) -> fn.PutProvisionConfigResponse:
        """Repeats what it was sent; a policy asks for its least."""
        if request.function == "nobody":
            raise NotFoundError("FUNCTION_NOT_FOUND", "no function 'nobody' is deployed")
        policies = request.config.target_tracking_policies
        target = max((one.min_capacity for one in policies), default=request.config.default_target)
        made = fn.Provision(function=request.function, config=request.config, target=target, current=target)
        for one in policies:
            made.policies.add(name=one.name, active=True, target=one.min_capacity, metric=0.125)
            made.decided_by = one.name
        if not request.validate_only:
            self._provisions[request.function] = made
        return fn.PutProvisionConfigResponse(provision=made, warnings=["window ended"] if policies else [])

    async def ListProvisionConfigs(
        self, request: fn.ListProvisionConfigsRequest, context: Any
    ) -> fn.ListProvisionConfigsResponse:
        found = [one for name, one in sorted(self._provisions.items()) if request.function in ("", name)]
        items, token = page(found, request.page_token)
        return fn.ListProvisionConfigsResponse(provisions=items, next_page_token=token)

    async def DeleteProvisionConfig(
        self, request: fn.DeleteProvisionConfigRequest, context: Any
    ) -> fn.DeleteProvisionConfigResponse:
        if self._provisions.pop(request.function, None) is None:
            raise NotFoundError("FUNCTION_NOT_FOUND", f"no function {request.function!r} is deployed")
        return fn.DeleteProvisionConfigResponse()

    async def GetFunction(self, request: fn.GetFunctionRequest, context: Any) -> fn.GetFunctionResponse:
        found = self._known.get(request.name)
        if found is None:
            raise NotFoundError("FUNCTION_NOT_FOUND", f"no function {request.name!r} is deployed")
        answer = fn.GetFunctionResponse(function=found)
        if request.name == "hopeless":
            answer.function.state = fn.Function.STATE_DEGRADED
            answer.function.current_error_reason = "IMAGE_RUNTIME_UNAVAILABLE"
            answer.function.current_error = "no node runs images"
        elif request.name != "late":
            found.state = fn.Function.STATE_READY
            found.current = found.target
        return answer

    async def ListFunctions(self, request: fn.ListFunctionsRequest, context: Any) -> fn.ListFunctionsResponse:
        items, token = page(sorted(self._known.values(), key=lambda one: one.name), request.page_token)
        return fn.ListFunctionsResponse(functions=items, next_page_token=token)

    async def DeleteFunction(self, request: fn.DeleteFunctionRequest, context: Any) -> fn.DeleteFunctionResponse:
        await self.GetFunction(fn.GetFunctionRequest(name=request.name), context)
        del self._known[request.name]
        return fn.DeleteFunctionResponse()


FACTORS = usage.PriceFactors(
    gpu_active="2.1", gpu_idle="0.5", vcpu_active="1", vcpu_idle="0", memory="0.15", disk="0.05", invocation="0.0075"
)
ROWS = [
    usage.UsageRow(
        function=name,
        gpu_model="Emulated T4",
        window_count=3,
        active_ns=60_000_000_000,
        idle_ns=120_000_000_000,
        invocations=12,
        gpu_active_gib_s="480",
        gpu_idle_gib_s="960",
        vcpu_active_s="21",
        vcpu_idle_s="42",
        memory_gib_s="90",
        disk_gib_s="90",
        cost="1527.09",  # 480*2.1 + 960*0.5 + 21*1 + 90*0.15 + 90*0.05 + 12*0.0075
        always_on_cost="3105.09",
        factors=FACTORS,
    )
    for name in ("chat", "ocr", "tts")
]


class Usage(usage_grpc.UsageServiceServicer):
    async def ListUsage(self, request: usage.ListUsageRequest, context: Any) -> usage.ListUsageResponse:
        rows, token = page([row for row in ROWS if request.function in ("", row.function)], request.page_token)
        windows = [one for one in WINDOWS if any(row.function == one.function for row in rows)]
        return usage.ListUsageResponse(
            rows=rows,
            next_page_token=token,
            windows=windows if request.include_windows else [],
            total_cost="4581.27",
            total_always_on_cost="9315.27",
            unit="CU",
        )

    async def ReconcileUsage(
        self, request: usage.ReconcileUsageRequest, context: Any
    ) -> AsyncIterator[usage.ReconcileUsageResponse]:
        """`chat` has a gap, `ocr` only an estimate, all others nothing."""
        gap = usage.UsageFinding(kind=usage.UsageFinding.KIND_GAP, seq=7, duration_ns=1_500_000_000)
        found = [
            usage.UsageReconciliation(function="chat", gap_count=6, gap_ns=9_000_000_000, findings=[gap] * 6),
            usage.UsageReconciliation(function="ocr", estimated_count=1, estimated_ns=1),
        ]
        total = usage.UsageReconciliation(instance_count=3, window_count=30)
        for one in found:
            if request.function in ("", one.function):
                one.instance_uid, one.node, one.instance_count, one.window_count = f"i-{one.function}", "gpu-1", 1, 10
                total.gap_count += one.gap_count
                total.gap_ns += one.gap_ns
                total.estimated_count += one.estimated_count
                yield usage.ReconcileUsageResponse(instance=one)
        yield usage.ReconcileUsageResponse(total=total)


LOG = base64.b64encode(b"FC Invoke Start RequestId: 1-67a59f35\n\x1b]0;owned\x07page 1\n").decode()
"""What an instance printed, with something in it that would steer a terminal."""
REFUSALS = {"nowhere": (404, "FunctionNotFound"), "full": (429, "ResourceExhausted"), "none": (503, "NoCapacity")}


class Gateway(BaseHTTPRequestHandler):
    """`echo` answers with the request; `nowhere`, `full` and `nocapacity` as a gateway refuses; `sick` fails itself."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        name = self.path.split("/")[3 if self.path.startswith("/2023-03-30") else 2]
        if name in REFUSALS:
            status, code = REFUSALS[name]
            said = {"RequestId": "1-67a59f35", "Code": code, "Message": f"{name} is refused"}
            self._answer(status, json.dumps(said).encode())
        elif name == "sick":
            self._answer(500, b"Traceback\n", ("x-fc-instance-id", "i-run"))
        elif name == "cut":
            self.send_response(200)
            self.send_header("content-length", "100")
            self.end_headers()
            self.wfile.write(b"half")
            self.close_connection = True
        else:
            asked = {"method": self.command, "path": self.path, "body": body.decode(), "headers": dict(self.headers)}
            log = [("x-fc-log-result", LOG)] if self.headers.get("x-fc-log-type") == "Tail" else []
            self._answer(200, json.dumps(asked).encode(), ("x-fc-instance-id", "i-run"), *log)

    do_POST = do_GET  # noqa: N815 - the base class's naming

    def _answer(self, status: int, body: bytes, *headers: tuple[str, str]) -> None:
        self.send_response(status)
        for name, value in (("x-fc-request-id", "1-67a59f35"), *headers):
            self.send_header(name, value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        pass


def _endpoints(home: Path, daemon: str, **found: str) -> None:
    folder = home / daemon
    folder.mkdir(parents=True)
    (folder / "token").write_text(f"{TOKEN}\n")
    (folder / "token").chmod(0o600)
    document = {**found, "token_file": str(folder / "token")}
    (folder / "endpoints.json").write_text(json.dumps(document))


async def serve(home: Path) -> None:
    """Serves until stdin ends."""
    gateway = ThreadingHTTPServer(("127.0.0.1", 0), Gateway)
    Thread(target=gateway.serve_forever, daemon=True).start()
    where = f"127.0.0.1:{gateway.server_address[1]}"
    tokens = TokenTable([(TOKEN, Principal("olga", Role.OPERATOR))])
    instances, nodes = Instances(), Nodes()
    agent = GrpcServer(Services(instances=instances, nodes=nodes), tokens)
    fleet, billed = Fleet(), Usage()  # type: ignore[abstract]  # what only agents call is UNIMPLEMENTED
    scheduler = GrpcServer(Services(scheduler=fleet, functions=Functions(where), usage=billed), tokens)
    _endpoints(home, "agent", grpc=f"127.0.0.1:{agent.bind_tcp('127.0.0.1', 0)}", socket=str(home / "agent.sock"))
    agent.bind_unix(str(home / "agent.sock"))
    _endpoints(home, "scheduler", grpc=f"127.0.0.1:{scheduler.bind_tcp('127.0.0.1', 0)}", gateway=where)
    for server in (agent, scheduler):
        await server.start()
        await server.set_serving(True)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.read)
    for server in (agent, scheduler):
        await server.stop(0)


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1])))
