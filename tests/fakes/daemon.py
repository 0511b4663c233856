"""`python -m tests.fakes.daemon HOME`: an agent, a scheduler and a gateway that tell a fixed story to clients.

Real servers on real sockets (agent/wire), a home as daemons leave it (endpoints.json, token), no GPU and no
instances. A page holds at most two entries, so that clients must turn pages. The name of an instance or a function says
how it behaves. "ready" on stdout; ends with stdin. tests/contract/test_agent_api.py and test_scheduler_api.py hold it
to what real daemons do.
"""

# ruff: noqa: N802 - the names of servicers' methods come from the protos

from __future__ import annotations

import asyncio
import base64
import json
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

from agent.core.errors import InvalidArgumentError, NotFoundError
from agent.core.function_rules import bounded
from agent.core.provisioning.autoscaling import MAX_TARGET, Provisioning, ScalingPolicy
from agent.scheduler.functions.deploy_rules import Defaults, checked, checked_provision, set_idle_mode, warnings_of
from agent.v1 import function_service_pb2 as fn
from agent.v1 import function_service_pb2_grpc as fn_grpc
from agent.v1 import types_pb2
from agent.v1 import usage_service_pb2 as usage
from agent.v1 import usage_service_pb2_grpc as usage_grpc
from agent.wire.convert_function import function_from_proto, function_to_proto
from agent.wire.server import GrpcServer, Services
from agent.wire.tokens import Principal, Role, TokenTable
from tests.fakes.fleet_story import NODE, Fleet, page
from tests.fakes.node_story import WINDOWS, Instances, Nodes

TOKEN = "operator-token-0123456789"


class Functions(fn_grpc.FunctionServiceServicer):
    """Remembers what is deployed. `slow` gets ready at the second look, `hopeless` never, `late` stays on its way,
    `cramped` wants more than it has."""

    def __init__(self, gateway: str, event: Callable[..., None]) -> None:
        """`event`: notes one of the scheduler's events."""
        self._gateway = gateway
        self._event = event
        self._known: dict[str, fn.Function] = {}
        self._specs: dict[str, types_pb2.FunctionSpec] = {}
        self._configs: dict[str, fn.ProvisionConfig] = {}

    async def DeployFunction(self, request: fn.DeployFunctionRequest, context: Any) -> fn.DeployFunctionResponse:
        message, triggers = checked(request, Defaults())
        name = message.name
        config = request.provision if request.HasField("provision") else self._configs.get(name, fn.ProvisionConfig())
        kept, found = checked_provision(config)
        before = self._known.get(name)
        changed = before is not None and self._specs[name] != message
        revision = (int(before.spec.revision) if before else 1) + changed
        made = fn.Function(name=name, spec=_shown(message, revision), triggers=triggers)
        made.default_target = request.target
        made.target = _decided(found, request.target)[0]
        made.state = fn.Function.STATE_PROVISIONING if made.target else fn.Function.STATE_READY
        made.url = f"http://{self._gateway}/fn/{name}/"
        if name == "cramped":
            made.current_error_reason, made.current_error = "NO_FREE_GPU", "node gpu-host-2 has no free GPU"
        if not request.validate_only:
            self._known[name], self._specs[name], self._configs[name] = made, message, kept
            self._event("function.deployed", function=name, revision=str(revision), target=str(made.target))
        warnings = warnings_of(name, request.target, kept, found, time.time_ns())
        return fn.DeployFunctionResponse(function=made, warnings=warnings)

    async def PutProvisionConfig(
        self, request: fn.PutProvisionConfigRequest, context: Any
    ) -> fn.PutProvisionConfigResponse:
        bounded("default_target", request.config.default_target, 0, MAX_TARGET)
        kept, found = checked_provision(request.config)
        function = fn.Function()
        function.CopyFrom(self._find(request.function))
        message = types_pb2.FunctionSpec()
        message.CopyFrom(self._specs[function.name])
        set_idle_mode(message, request.config)
        changed = message != self._specs[function.name]
        function.spec.CopyFrom(_shown(message, int(function.spec.revision) + changed))
        function.default_target = request.config.default_target
        function.target = function.current = _decided(found, function.default_target)[0]
        if not request.validate_only:
            self._known[function.name], self._specs[function.name] = function, message
            self._configs[function.name] = kept
        warnings = warnings_of(function.name, function.default_target, kept, found, time.time_ns())
        return fn.PutProvisionConfigResponse(provision=_provision(function, kept), warnings=warnings)

    async def ListProvisionConfigs(
        self, request: fn.ListProvisionConfigsRequest, context: Any
    ) -> fn.ListProvisionConfigsResponse:
        found = [
            _provision(one, self._configs[name])
            for name, one in sorted(self._known.items())
            if request.function in ("", name) and (one.target or one.default_target or self._configs[name].ByteSize())
        ]
        items, token = page(found, request)
        return fn.ListProvisionConfigsResponse(provisions=items, next_page_token=token)

    async def DeleteProvisionConfig(
        self, request: fn.DeleteProvisionConfigRequest, context: Any
    ) -> fn.DeleteProvisionConfigResponse:
        await self.PutProvisionConfig(fn.PutProvisionConfigRequest(function=request.function), context)
        return fn.DeleteProvisionConfigResponse()

    async def GetFunction(self, request: fn.GetFunctionRequest, context: Any) -> fn.GetFunctionResponse:
        found = self._find(request.name)
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
        items, token = page(sorted(self._known.values(), key=lambda one: one.name), request)
        return fn.ListFunctionsResponse(functions=items, next_page_token=token)

    async def DeleteFunction(self, request: fn.DeleteFunctionRequest, context: Any) -> fn.DeleteFunctionResponse:
        self._find(request.name)
        del self._known[request.name]
        return fn.DeleteFunctionResponse()

    def _find(self, name: str) -> fn.Function:
        found = self._known.get(name)
        if found is None:
            raise NotFoundError("FUNCTION_NOT_FOUND", f"no function {name!r}; `hibernode functions` lists them")
        return found


def _shown(message: types_pb2.FunctionSpec, revision: int) -> types_pb2.FunctionSpec:
    """Without its secrets."""
    made = function_to_proto(function_from_proto(message))
    made.revision = str(revision)
    return made


def _decided(found: Provisioning, default_target: int) -> tuple[int, str]:
    """The target, and the policy it comes from: an active policy asks for its least, and no traffic wants more."""
    active = [(one.min_capacity, one.name) for one in found.policies if _is_active(one)]
    return max(active, default=(default_target, ""))


def _is_active(policy: ScalingPolicy) -> bool:
    return policy.window.start_ns <= time.time_ns() < policy.window.end_ns


def _provision(function: fn.Function, kept: fn.ProvisionConfig) -> fn.Provision:
    never_sleeps = function.spec.idle_policy.mode == types_pb2.IdlePolicy.MODE_NEVER
    _, found = checked_provision(kept)
    made = fn.Provision(function=function.name, config=kept, target=function.target, current=function.current)
    made.config.default_target = function.default_target
    made.config.always_allocate_gpu = made.always_allocate_gpu = never_sleeps
    made.decided_by = _decided(found, function.default_target)[1]
    for one in found.policies:
        made.policies.add(name=one.name, active=_is_active(one), target=one.min_capacity, metric=0.125)
    return made


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


_NAMED = {
    usage.ListUsageRequest.GROUPING_UNSPECIFIED: ("function",),
    usage.ListUsageRequest.GROUPING_FUNCTION: ("function",),
    usage.ListUsageRequest.GROUPING_INSTANCE: ("instance_uid", "function", "node"),
    usage.ListUsageRequest.GROUPING_NODE: ("node",),
    usage.ListUsageRequest.GROUPING_GPU_MODEL: (),
}
_SUMMED = ("window_count", "active_ns", "idle_ns", "invocations")
_SUMMED_TEXTS = ("gpu_active_gib_s", "gpu_idle_gib_s", "vcpu_active_s", "vcpu_idle_s", "memory_gib_s", "disk_gib_s")
_COSTS = ("cost", "always_on_cost")


class Usage(usage_grpc.UsageServiceServicer):
    """One instance on gpu-host-1 of each function."""

    async def ListUsage(self, request: usage.ListUsageRequest, context: Any) -> usage.ListUsageResponse:
        named = _NAMED.get(request.grouping)
        if named is None:
            raise InvalidArgumentError("USAGE_GROUP_UNKNOWN", "this scheduler doesn't know that grouping")
        here = request.node in ("", NODE.name) and request.gpu_model in ("", "Emulated T4")
        rows = [row for row in ROWS if here and request.function in ("", row.function)]
        follow, _, after = request.page_token.rpartition("/")
        if request.include_windows and follow:
            request.page_token = after
            windows, token = page(
                [one for one in WINDOWS if any(row.function == one.function for row in rows)], request
            )
            return usage.ListUsageResponse(windows=windows, next_page_token=f"windows/{token}" if token else "")
        groups: dict[tuple[str, ...], list[usage.UsageRow]] = {}
        for row in rows:
            values = {"function": row.function, "instance_uid": f"i-{row.function}", "node": NODE.name}
            groups.setdefault(tuple(values[name] for name in named), []).append(row)
        shown, token = page([_summed(named, key, group) for key, group in groups.items()], request)
        return usage.ListUsageResponse(
            rows=shown,
            next_page_token=token or ("windows/" if request.include_windows else ""),
            total_cost=_sum_of_texts(rows, "cost"),
            total_always_on_cost=_sum_of_texts(rows, "always_on_cost"),
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
        instances = sum(request.function in ("", row.function) for row in ROWS)
        total = usage.UsageReconciliation(instance_count=instances, window_count=10 * instances)
        for one in found:
            if request.function in ("", one.function):
                one.instance_uid, one.node, one.instance_count, one.window_count = f"i-{one.function}", "gpu-1", 1, 10
                total.gap_count += one.gap_count
                total.gap_ns += one.gap_ns
                total.estimated_count += one.estimated_count
                total.estimated_ns += one.estimated_ns
                yield usage.ReconcileUsageResponse(instance=one)
        yield usage.ReconcileUsageResponse(total=total)


def _summed(named: Sequence[str], values: Sequence[str], rows: Sequence[usage.UsageRow]) -> usage.UsageRow:
    sums: dict[str, Any] = {name: sum(getattr(row, name) for row in rows) for name in _SUMMED}
    sums.update({name: _sum_of_texts(rows, name) for name in (*_SUMMED_TEXTS, *_COSTS)})
    sums.update(zip(named, values, strict=True))
    return usage.UsageRow(gpu_model="Emulated T4", factors=FACTORS, **sums)


def _sum_of_texts(rows: Iterable[usage.UsageRow], name: str) -> str:
    return str(sum((Decimal(getattr(row, name)) for row in rows), Decimal(0)))


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


@asynccontextmanager
async def daemons(home: Path) -> AsyncIterator[None]:
    """Agent, scheduler and gateway, of which `home` tells."""
    gateway = ThreadingHTTPServer(("127.0.0.1", 0), Gateway)
    Thread(target=gateway.serve_forever, args=(0.01,), daemon=True).start()
    where = f"127.0.0.1:{gateway.server_address[1]}"
    tokens = TokenTable([(TOKEN, Principal("olga", Role.OPERATOR))])
    instances, nodes = Instances(), Nodes()
    agent = GrpcServer(Services(instances=instances, nodes=nodes), tokens)
    fleet, billed = Fleet(), Usage()  # type: ignore[abstract]  # what only agents call is UNIMPLEMENTED
    scheduler = GrpcServer(Services(scheduler=fleet, functions=Functions(where, fleet.event), usage=billed), tokens)
    _endpoints(home, "agent", grpc=f"127.0.0.1:{agent.bind_tcp('127.0.0.1', 0)}", socket=str(home / "agent.sock"))
    agent.bind_unix(str(home / "agent.sock"))
    _endpoints(home, "scheduler", grpc=f"127.0.0.1:{scheduler.bind_tcp('127.0.0.1', 0)}", gateway=where)
    for server in (agent, scheduler):
        await server.start()
        await server.set_serving(True)
    try:
        yield
    finally:
        for server in (agent, scheduler):
            await server.stop(0)
        gateway.shutdown()
        gateway.server_close()


async def serve(home: Path) -> None:
    """Serves until stdin ends."""
    async with daemons(home):
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1])))
