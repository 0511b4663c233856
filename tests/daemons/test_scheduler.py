"""The scheduler daemon as a process, with fake agents: deploy, queue, wake, crash, return."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from agent.adapters.daemon.token_file import read_token
from agent.core.errors import (
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
    UnsupportedError,
)
from agent.scheduler.database.store import Store
from agent.v1.function_service_pb2 import (
    DeleteFunctionRequest,
    DeployFunctionRequest,
    Function,
    GetFunctionRequest,
    HttpTrigger,
    ProvisionConfig,
    PutProvisionConfigRequest,
)
from agent.v1.scheduler_service_pb2 import (
    ListFleetEventsRequest,
    ListFleetInstancesRequest,
    ListNodesRequest,
    SetNodeSchedulingRequest,
)
from agent.v1.types_pb2 import Event, FunctionSpec, Instance, Node
from agent.v1.usage_service_pb2 import ListUsageRequest
from agent.wire.clients import DaemonChannel
from tests.fakes.agent_node import FakeAgentNode, echo, hold
from tests.http.rig import Wire
from tests.wire.test_convert_provision import morning

NODE_TOKEN = "credential-of-gpu-1-0123456789"
TOKENS = {"gpu-1": NODE_TOKEN, "gpu-2": "credential-of-gpu-2-0123456789"}
PATIENCE_S = 20.0
GET = b"GET /fn/ocr/ HTTP/1.1\r\nhost: g\r\n\r\n"


@dataclass
class Daemon:
    """A running scheduler process."""

    folder: Path
    process: asyncio.subprocess.Process
    endpoints: dict[str, str]
    channel: DaemonChannel

    async def ask(self, request: bytes = GET) -> tuple[int, dict[bytes, bytes], bytes]:
        host, _, port = self.endpoints["gateway"].rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        wire = Wire(reader, writer)
        try:
            await wire.send(request)
            return await wire.message()
        finally:
            wire.close()

    async def deploy(self, target: int = 2, **spec: object) -> Function:
        message = FunctionSpec(name="ocr", entrypoint=["app"], **spec)  # type: ignore[arg-type]
        request = DeployFunctionRequest(spec=message, target=target)
        answer = await self.channel.call(self.channel.functions.DeployFunction, request, 10)
        return answer.function

    async def function(self) -> Function:
        answer = await self.channel.call(self.channel.functions.GetFunction, GetFunctionRequest(name="ocr"), 10)
        return answer.function

    async def until(self, holds: Callable[[Function], bool]) -> Function:
        """Poll until the function meets the condition, as the CLI does."""
        function = await self.function()
        async with asyncio.timeout(PATIENCE_S):
            while not holds(function):
                await asyncio.sleep(0.05)
                function = await self.function()
        return function


async def start(folder: Path, extra: str = "") -> Daemon:
    state = folder / "state"
    for name, value in TOKENS.items():
        token = folder / f"{name}.token"
        if not token.exists():
            token.touch(0o600)
            token.write_text(value)
    nodes = ", ".join(f"{{name: {name}, token_file: {folder / name}.token}}" for name in TOKENS)
    config = folder / "scheduler.yaml"
    config.write_text(
        f"""
state_dir: {state}
gateway: {{port: 0}}
grpc: {{port: 0}}
admin: {{port: 0}}
nodes: [{nodes}]
report: {{suspect: 1s, lost: 2s}}
{extra}
"""
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "agent.daemons.scheduler", "--config", str(config)
    )
    endpoints = state / "endpoints.json"
    async with asyncio.timeout(PATIENCE_S):
        while not endpoints.exists() or process.returncode is not None:
            assert process.returncode is None
            await asyncio.sleep(0.02)
    found = json.loads(endpoints.read_text())
    channel = DaemonChannel(found["grpc"], read_token(Path(found["token_file"])))
    return Daemon(folder, process, found, channel)


async def end(daemon: Daemon, number: signal.Signals) -> int:
    await daemon.channel.close()
    if daemon.process.returncode is None:
        daemon.process.send_signal(number)
    async with asyncio.timeout(PATIENCE_S):
        code = await daemon.process.wait()
    (daemon.folder / "state" / "endpoints.json").unlink(missing_ok=True)
    return code


async def test_its_process_has_a_name(daemon: Daemon) -> None:
    """For `ps -e`, `top` and `pgrep hibernode`; the kernel keeps 15 characters."""
    assert psutil.Process(daemon.process.pid).name() == "hibernode-sched"


@asynccontextmanager
async def running(folder: Path) -> AsyncIterator[Daemon]:
    daemon = await start(folder)
    try:
        yield daemon
    finally:
        await end(daemon, signal.SIGKILL)


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[Daemon]:
    async with running(tmp_path) as made:
        yield made


@pytest.fixture
async def node() -> AsyncIterator[FakeAgentNode]:
    made = FakeAgentNode("gpu-1", NODE_TOKEN)
    yield made
    await made.kill()


async def events(daemon: Daemon, **only: str) -> list[Event]:
    request = ListFleetEventsRequest(page_size=1000, **only)  # type: ignore[arg-type]
    return list((await daemon.channel.call(daemon.channel.scheduler.ListFleetEvents, request, 10)).events)


def ready(function: Function) -> bool:
    return function.state == Function.STATE_READY


async def test_deploy_serve_freeze_wake_and_delete(daemon: Daemon, node: FakeAgentNode) -> None:
    await node.start(daemon.endpoints["grpc"])
    function = await daemon.deploy(environment={"KEY": "secret"})
    assert function.url == f"http://{daemon.endpoints['gateway']}/fn/ocr/"
    assert function.spec.environment["KEY"] == "***"
    await daemon.until(ready)
    assert sorted(node.created) == ["ocr/1/0/1", "ocr/1/1/1"]
    assert b"secret" in next(iter(node.instances.values())).spec, "the agent gets the real value"
    assert (await daemon.ask())[0] == 200

    for uid in node.instances:
        node.set_state(uid, Instance.STATE_FROZEN)
    await daemon.until(lambda function: function.awake == 0)
    status, headers, _ = await daemon.ask()
    assert status == 200
    assert len(node.woken) == 1, "one request, one wake"
    assert float(headers[b"x-hibernode-wake-ms"]) > 0
    assert headers[b"x-fc-instance-id"].decode() == node.woken[0]

    await daemon.channel.call(daemon.channel.functions.DeleteFunction, DeleteFunctionRequest(name="ocr"), 10)
    assert (await daemon.ask())[0] == 404
    with pytest.raises(NotFoundError):
        await daemon.until(lambda _: False)
    assert len(node.stopped) == 2


async def test_an_update_brings_the_new_revision_up_and_drains_the_old(daemon: Daemon, node: FakeAgentNode) -> None:
    node.instances_per_gpu = 2
    await node.start(daemon.endpoints["grpc"])
    await daemon.deploy()
    await daemon.until(ready)
    same = await daemon.deploy()
    assert same.spec.revision == "1", "the same content again changes nothing"
    await daemon.deploy(command=["--new"])
    await daemon.until(lambda function: ready(function) and function.current == 2 and len(node.stopped) == 2)
    assert {one.request_id for one in node.instances.values()} == {"ocr/2/0/1", "ocr/2/1/1"}


async def test_an_update_without_a_free_gpu_makes_room_first(daemon: Daemon, node: FakeAgentNode) -> None:
    await node.start(daemon.endpoints["grpc"])  # two GPUs, one instance each
    await daemon.deploy()
    await daemon.until(ready)
    await daemon.deploy(command=["--new"])
    await daemon.until(lambda function: ready(function) and len(node.stopped) == 2)
    assert {one.request_id for one in node.instances.values()} == {"ocr/2/0/1", "ocr/2/1/1"}


async def test_an_update_that_makes_room_is_not_degraded_meanwhile(daemon: Daemon, node: FakeAgentNode) -> None:
    """`deploy --wait` gives up on a degraded function; on a full node every update would be one for a moment."""
    await node.start(daemon.endpoints["grpc"])  # two GPUs, one instance each
    await daemon.deploy()
    await daemon.until(ready)
    await daemon.deploy(command=["--new"])
    function = await daemon.until(lambda function: ready(function) or function.state == Function.STATE_DEGRADED)
    assert function.current_error_reason == ""


async def test_an_instance_that_fails_is_replaced_under_a_new_attempt(daemon: Daemon, node: FakeAgentNode) -> None:
    await node.start(daemon.endpoints["grpc"])
    await daemon.deploy(target=1)
    await daemon.until(ready)
    (uid,) = node.instances
    node.set_state(uid, Instance.STATE_FAILED, "INSTANCE_CRASHED", "exited with code 1")
    await daemon.until(lambda function: "ocr/1/0/2" in node.created and ready(function))


async def test_a_function_that_no_node_can_run_gives_its_reason_at_once(daemon: Daemon, node: FakeAgentNode) -> None:
    await node.start(daemon.endpoints["grpc"])
    await daemon.deploy(image="registry.example/ocr:1")
    function = await daemon.until(lambda function: function.state == Function.STATE_DEGRADED)
    assert function.current_error_reason == "IMAGE_RUNTIME_UNAVAILABLE"
    status, _, body = await daemon.ask()
    assert status == 503
    assert "engine" in json.loads(body)["Message"]


async def test_a_dying_agent_fails_its_requests_and_the_queue_waits(daemon: Daemon, node: FakeAgentNode) -> None:
    await node.start(daemon.endpoints["grpc"])
    await daemon.deploy(target=1)
    await daemon.until(ready)
    node.ingress.default = hold(asyncio.Event())
    inside = asyncio.create_task(daemon.ask())
    await node.ingress.until_received(1)
    queued = [asyncio.create_task(daemon.ask()) for _ in range(3)]
    await daemon.until(lambda function: function.queued == 3)
    await node.kill()
    status, _, body = await inside
    assert (status, json.loads(body)["Code"]) == (502, "InstanceCrashed")
    assert not any(task.done() for task in queued)
    node.ingress.default = echo
    await node.start(daemon.endpoints["grpc"])
    assert [(await task)[0] for task in queued] == [200, 200, 200]
    assert node.created == ["ocr/1/0/1"], "the instance lived on, nothing was created"


async def test_instances_of_a_lost_node_are_replaced(daemon: Daemon, node: FakeAgentNode) -> None:
    await node.start(daemon.endpoints["grpc"])
    await daemon.deploy(target=1)
    await daemon.until(ready)
    other = FakeAgentNode("gpu-2", TOKENS["gpu-2"])
    await other.start(daemon.endpoints["grpc"])
    try:
        await node.kill()
        assert (await daemon.ask())[0] == 200, "it waited until the other node had an instance"
        assert other.created == ["ocr/1/0/2"]
        await node.start(daemon.endpoints["grpc"])
        await daemon.until(lambda function: bool(other.stopped) and ready(function))
        assert (node.stopped, list(other.instances)) == ([], []), "the older attempt stays"
    finally:
        await other.kill()


async def test_after_a_sigkill_nothing_is_created_twice(tmp_path: Path, node: FakeAgentNode) -> None:
    async with running(tmp_path) as first:
        await node.start(first.endpoints["grpc"])
        await first.deploy()
        await first.until(ready)
    await node.kill()
    async with running(tmp_path) as second:
        assert (await second.function()).target == 2
        waiting = asyncio.create_task(second.ask())
        await second.until(lambda function: function.queued == 1)
        await node.start(second.endpoints["grpc"])
        assert (await waiting)[0] == 200
        await second.until(ready)
        assert len(node.created) == 2
        nodes = (await second.channel.call(second.channel.scheduler.ListNodes, ListNodesRequest(), 10)).nodes
        assert [(one.name, one.state) for one in nodes] == [("gpu-1", Node.STATE_READY)]
        request = ListFleetInstancesRequest(function="ocr")
        fleet = await second.channel.call(second.channel.scheduler.ListFleetInstances, request, 10)
        assert {one.uid for one in fleet.instances} == set(node.instances)


async def test_a_stored_schedule_that_it_cannot_read_and_a_lost_node_are_events(
    tmp_path: Path, node: FakeAgentNode
) -> None:
    async with running(tmp_path) as first:
        await node.start(first.endpoints["grpc"])
        await first.deploy(target=1)
        config = ProvisionConfig(default_target=1, scheduled_actions=[morning(name="west", target=1)])
        request = PutProvisionConfigRequest(function="ocr", config=config)
        await first.channel.call(first.channel.functions.PutProvisionConfig, request, 10)
        await first.until(ready)
        counts = {one.name: one.count for one in await events(first, function="ocr")}
        assert counts == {"function.deployed": 2, "provision.created": 1}
        async with DaemonChannel(first.endpoints["grpc"], NODE_TOKEN) as agent:
            with pytest.raises(PermissionDeniedError):
                await agent.call(agent.scheduler.ListFleetEvents, ListFleetEventsRequest(), 10)
    store = Store(f"sqlite:///{tmp_path}/state/scheduler.db")
    await store.open()
    config.scheduled_actions[0].time_zone = "Nowhere/Land"
    await store.put_function((await store.functions())[0], config.SerializeToString())
    await store.close()

    async with running(tmp_path) as second:
        (event,) = await events(second, function="ocr")
        assert (event.name, event.level, event.attributes["function"]) == (
            "provision.not_understood",
            Event.LEVEL_ERROR,
            "ocr",
        )
        assert "'west'" in event.message
        assert "'Nowhere/Land'" in event.message
        await node.kill()
        lost: list[Event] = []
        async with asyncio.timeout(PATIENCE_S):
            while not lost:
                await asyncio.sleep(0.05)
                lost = [one for one in await events(second, node="gpu-1") if one.name == "fleet.node_lost"]
        assert (lost[0].level, int(lost[0].attributes["silent_ms"]) >= 2000) == (Event.LEVEL_WARNING, True)
        assert await events(second, node="gpu-2") == []


async def schedule(daemon: Daemon, name: str, scheduling: Node.Scheduling.ValueType) -> Node:
    request = SetNodeSchedulingRequest(name=name, scheduling=scheduling)
    return (await daemon.channel.call(daemon.channel.scheduler.SetNodeScheduling, request, 10)).node


async def test_a_drain_cuts_no_request_and_survives_a_sigkill(tmp_path: Path, node: FakeAgentNode) -> None:
    other = FakeAgentNode("gpu-2", TOKENS["gpu-2"])
    gate = asyncio.Event()
    try:
        async with running(tmp_path) as first:
            await node.start(first.endpoints["grpc"])
            await first.deploy(target=1)
            await first.until(ready)
            node.ingress.default = hold(gate)
            inside = asyncio.create_task(first.ask())
            await node.ingress.until_received(1)
            drained = await schedule(first, "gpu-1", Node.SCHEDULING_DRAINED)
            assert drained.scheduling == Node.SCHEDULING_DRAINED
            waits = await first.until(lambda function: function.current_error_reason == "NO_NODE")
            assert "node gpu-1 is drained" in waits.current_error
            assert node.stopped == [], "nothing could take its place"
            await other.start(first.endpoints["grpc"])
            await first.until(lambda function: bool(node.stopped) and ready(function))
            assert (await first.ask())[2].startswith(b"served by gpu-2-")
            gate.set()
            assert (await inside)[0] == 200
        await node.kill()
        await other.kill()
        async with running(tmp_path) as second:
            await node.start(second.endpoints["grpc"])
            await other.start(second.endpoints["grpc"])
            await second.until(ready)
            await second.deploy(target=2)
            await second.until(ready)
            assert (len(node.created), len(other.created)) == (1, 2)
            nodes = (await second.channel.call(second.channel.scheduler.ListNodes, ListNodesRequest(), 10)).nodes
            assert [one.scheduling for one in nodes] == [Node.SCHEDULING_DRAINED, Node.SCHEDULING_NORMAL]
            with pytest.raises(InvalidArgumentError, match="scheduling"):
                await schedule(second, "gpu-1", Node.SCHEDULING_UNSPECIFIED)
            with pytest.raises(NotFoundError, match="gpu-9"):
                await schedule(second, "gpu-9", Node.SCHEDULING_CORDONED)
    finally:
        await other.kill()


async def test_sigterm_lets_what_is_in_flight_end_and_exits_0(tmp_path: Path, node: FakeAgentNode) -> None:
    async with running(tmp_path) as daemon:
        await node.start(daemon.endpoints["grpc"])
        await daemon.deploy(target=1)
        await daemon.until(ready)
        gate = asyncio.Event()
        node.ingress.default = hold(gate)
        asked = [asyncio.create_task(daemon.ask()), asyncio.create_task(daemon.ask())]
        await node.ingress.until_received(1)
        await daemon.until(lambda function: function.queued == 1)
        os.kill(daemon.process.pid, signal.SIGTERM)
        gate.set()
        assert [(await one)[0] for one in asked] == [200, 200], "the one in flight and the one in the queue"
        async with asyncio.timeout(PATIENCE_S):
            assert await daemon.process.wait() == 0


async def test_a_second_scheduler_on_the_same_state_is_refused(daemon: Daemon) -> None:
    other = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "agent.daemons.scheduler",
        "--config",
        str(daemon.folder / "scheduler.yaml"),
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(PATIENCE_S):
        _, said = await other.communicate()
    assert other.returncode == 4
    assert b"STATE_DIR_IN_USE" in said


async def test_wrong_credentials_and_arguments_are_refused(daemon: Daemon) -> None:
    async with DaemonChannel(daemon.endpoints["grpc"], "x" * 32) as stranger:
        with pytest.raises(UnauthenticatedError):
            await stranger.call(stranger.scheduler.ListNodes, ListNodesRequest(), 10)
    with pytest.raises(InvalidArgumentError, match="instance_concurrency"):
        await daemon.deploy(instance_concurrency=500)
    with pytest.raises(InvalidArgumentError, match="FC_"):
        await daemon.deploy(environment={"FC_REGION": "x"})
    with pytest.raises(InvalidArgumentError, match="target"):
        await daemon.deploy(target=-1)
    jwt = HttpTrigger(name="http", auth_type=HttpTrigger.AUTH_TYPE_JWT)
    request = DeployFunctionRequest(spec=FunctionSpec(name="ocr", entrypoint=["app"]), target=1, triggers=[jwt])
    with pytest.raises(UnsupportedError, match="verifier"):
        await daemon.channel.call(daemon.channel.functions.DeployFunction, request, 10)


async def test_metrics_and_readiness(daemon: Daemon) -> None:
    host, _, port = daemon.endpoints["admin"].rpartition(":")
    for path, expected in (("/readyz", b"ready"), ("/healthz", b"ok"), ("/metrics", b"hibernode_nodes")):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(f"GET {path} HTTP/1.0\r\nhost: {host}\r\n\r\n".encode())
        async with asyncio.timeout(PATIENCE_S):
            answer = await reader.read()
        writer.close()
        assert b" 200 " in answer
        assert expected in answer


async def test_a_bad_token_file_and_a_bad_price_book_do_not_keep_the_scheduler_down(
    tmp_path: Path, node: FakeAgentNode
) -> None:
    """The node is out, costs are refused with the reason; functions and the other node work."""
    bad = tmp_path / "gpu-2.token"
    bad.touch(0o600)
    bad.write_text("two tokens")
    book = tmp_path / "prices.yaml"
    book.write_text("prices: [")
    daemon = await start(tmp_path, f"price_book: {book}")
    try:
        await daemon.deploy(1)
        await node.start(daemon.endpoints["grpc"])
        await daemon.until(ready)
        assert (await daemon.ask())[0] == 200
        with pytest.raises(PreconditionError, match="Usage is collected meanwhile") as caught:
            await daemon.channel.call(daemon.channel.usage.ListUsage, ListUsageRequest(), 10)
        assert caught.value.reason == "PRICE_BOOK_INVALID"
        (event,) = await events(daemon, node="gpu-2")
        assert (event.name, event.attributes["nodes_out"]) == ("node.token_unusable", "gpu-2")
        assert "gpu-2.token" in event.message
        assert "two tokens" not in str(event)
    finally:
        await end(daemon, signal.SIGKILL)
