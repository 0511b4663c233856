"""Bad input to real daemons: each gets its documented error and leaves nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import yaml

from agent.core.errors import PermissionDeniedError, UnauthenticatedError
from agent.v1 import function_service_pb2 as functions_pb
from agent.v1 import instance_service_pb2 as instances_pb
from agent.wire.clients import DaemonChannel
from tests.e2e.bad_world import BadInputStack, running_world
from tests.e2e.raw_http import ask_raw, connection, error_code
from tests.e2e.stack import CALL_S, echo

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]

GOOD = "ocr"
CUT_BODY_BYTES = 200_000


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world() -> AsyncIterator[BadInputStack]:
    async with running_world(gpus=2) as made:
        await made.stack.deploy(echo(GOOD), target=1)
        yield made


# ---- configuration and s.yaml -----------------------------------------------------------------------------------


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


@pytest.mark.parametrize(
    ("daemon", "config", "expected"),
    [
        ("agent", {"gpu": {"instances_per_gpus": 2}}, "gpu.instances_per_gpus: unknown key; did you mean"),
        ("agent", {"ingres": {"port": 1}}, "ingres: unknown key; did you mean ingress?"),
        ("agent", {"gpu": {"instances_per_gpu": "two"}}, "gpu.instances_per_gpu: expected a whole number"),
        ("agent", {"queue": {"timeout": "fast"}}, "queue.timeout"),
        ("scheduler", {"gateway": {"tls": True}}, "gateway.tls: unknown key"),
        ("scheduler", {"nodes": [{"name": "a", "token": "t"}]}, "nodes[0].token: unknown key"),
    ],
)
async def test_daemon_names_an_unknown_key(tmp_path: Path, daemon: str, config: dict[str, Any], expected: str) -> None:
    state, file = tmp_path / "state", tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"state_dir": str(state), **config}))
    command = [sys.executable, "-m", f"agent.daemons.{daemon}", "--config", str(file)]
    ended = run(*command)
    assert ended.returncode == 2, ended.stderr
    assert expected in ended.stderr
    assert str(file) in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not state.exists(), "nothing was made"


GOOD_PROPS = {
    "functionName": "from-file",
    "runtime": "custom-container",
    "timeout": 60,
    "gpuConfig": {"gpuType": "fc.gpu.tesla.1", "gpuMemorySize": 1024},
    "customContainerConfig": {"image": "registry.example/ocr:1", "port": 9000},
}


def s_yaml(path: Path, **props: object) -> Path:
    resources = {"ocr": {"component": "fc3", "props": {**GOOD_PROPS, **props}}}
    path.write_text(yaml.safe_dump({"edition": "3.0.0", "name": "app", "resources": resources}))
    return path


@pytest.mark.parametrize(
    ("props", "expected"),
    [
        ({"timeout": "a minute"}, "resources.ocr.props.timeout"),
        ({"instanceConcurrency": [1]}, "resources.ocr.props.instanceConcurrency"),
        ({"environmentVariables": "A=b"}, "resources.ocr.props.environmentVariables"),
        ({"hibernode": {"freezeAftr": "1s"}}, "resources.ocr.props.hibernode.freezeAftr"),
    ],
)
async def test_wrong_type_in_s_yaml_is_refused_with_its_key(
    world: BadInputStack, tmp_path: Path, props: dict[str, object], expected: str
) -> None:
    ended = world.hibernode("deploy", "-t", str(s_yaml(tmp_path / "s.yaml", **props)))
    assert ended.returncode == 2, ended.stderr
    assert expected in ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stdout == ""
    listed = json.loads(world.hibernode("functions", "--output", "json").stdout)
    assert "from-file" not in [function["name"] for function in listed["functions"]]


@pytest.mark.parametrize(
    ("gpu", "there_is"),
    [
        ({"gpuType": "fc.gpu.tesla.1", "gpuMemorySize": 16384}, "the largest is Emulated T4 with 1 GiB"),
        ({"gpuType": "H100", "gpuMemorySize": 1024}, "it has Emulated T4"),
    ],
)
async def test_a_gpu_that_the_fleet_does_not_have_is_refused_at_the_deploy(
    world: BadInputStack, tmp_path: Path, gpu: dict[str, object], there_is: str
) -> None:
    file = s_yaml(tmp_path / "s.yaml", gpuConfig=gpu)
    ended = world.hibernode("deploy", "-t", str(file), "--target", "1")
    assert (ended.returncode, "NO_SUCH_GPU" in ended.stderr) == (4, True), ended.stderr
    assert there_is in ended.stderr
    assert "from-file" not in await world.functions()


async def test_image_function_needs_a_container_engine(world: BadInputStack, tmp_path: Path) -> None:
    file = s_yaml(tmp_path / "s.yaml")
    ended = world.hibernode("deploy", "-t", str(file), "--target", "1", "--wait", "--timeout", "20s")
    assert ended.returncode == 4, ended.stderr
    assert "IMAGE_RUNTIME_UNAVAILABLE" in ended.stderr
    answer = await world.stack.ask("from-file", "/")
    assert (answer.status, error_code(answer.body, answer.headers)) == (503, "NoCapacity")
    assert b"container engine" in answer.body
    assert world.hibernode("functions", "rm", "from-file").returncode == 0


# ---- requests ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "request_line",
    ["GET /fn/nobody/ HTTP/1.1", "POST /2023-03-30/functions/nobody/invocations HTTP/1.1", "GET /elsewhere HTTP/1.1"],
)
async def test_request_to_an_unknown_function(world: BadInputStack, request_line: str) -> None:
    answer = await ask_raw(world.stack.gateway, f"{request_line}\r\nhost: gw\r\nconnection: close\r\n\r\n".encode())
    assert (answer.status, answer.code) == (404, "FunctionNotFound")


async def test_unknown_function_by_host_name(world: BadInputStack) -> None:
    request = b"GET / HTTP/1.1\r\nhost: nobody.localhost\r\nconnection: close\r\n\r\n"
    answer = await ask_raw(world.stack.gateway, request)
    assert (answer.status, answer.code) == (404, "FunctionNotFound")


async def test_asynchronous_invocation_is_unsupported(world: BadInputStack) -> None:
    answer = await world.stack.ask(GOOD, "/", method="POST", headers={"X-Fc-Invocation-Type": "Async"})
    assert (answer.status, error_code(answer.body, answer.headers)) == (400, "InvalidArgument")
    assert b"asynchronous invocation is not supported" in answer.body


AMBIGUOUS = {
    "two lengths": (400, b"content-length: 2\r\ncontent-length: 3\r\n\r\nabc"),
    "a length and chunks": (400, b"content-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"),
    "a chunk without a size": (400, b"transfer-encoding: chunked\r\n\r\nxyz\r\nabc\r\n0\r\n\r\n"),
    "a folded header": (400, b"x-long: one\r\n two\r\n\r\n"),
    "a bare line feed": (400, b"x-one: 1\nx-two: 2\r\n\r\n"),
    "headers over 8 KB": (400, b"x-long: " + b"h" * 9000 + b"\r\n\r\n"),
    "a body over 32 MB": (413, b"content-length: 33554433\r\n\r\n"),
}


@pytest.mark.parametrize("what", AMBIGUOUS)
async def test_ambiguous_or_oversized_request_is_refused(world: BadInputStack, what: str) -> None:
    status, rest = AMBIGUOUS[what]
    answer = await ask_raw(world.stack.gateway, f"POST /fn/{GOOD}/ HTTP/1.1\r\nhost: gw\r\n".encode() + rest)
    assert answer.status == status, answer.body
    assert answer.code in ("InvalidArgument", "RequestEntityTooLarge")


async def test_path_over_4_kib(world: BadInputStack) -> None:
    answer = await ask_raw(world.stack.gateway, f"GET /fn/{GOOD}/{'p' * 5000} HTTP/1.1\r\nhost: gw\r\n\r\n".encode())
    assert (answer.status, answer.code) == (400, "InvalidArgument")


CUT = {
    "kept at the gateway": b"content-length: 1000\r\n\r\n" + b"b" * 100,
    "in a chunk": b"transfer-encoding: chunked\r\n\r\n3e8\r\n" + b"b" * 100,
    "before the first byte": b"content-length: 1000\r\n\r\n",
    "large, not asked for yet": f"content-length: {CUT_BODY_BYTES}\r\n\r\n".encode() + b"b" * 1000,
}


@pytest.mark.parametrize("where", CUT)
async def test_truncated_body_leaves_nothing(world: BadInputStack, where: str) -> None:
    before = (await world.instance(GOOD)).uid
    async with connection(world.stack.gateway) as (_, writer):
        writer.write(f"POST /fn/{GOOD}/ HTTP/1.1\r\nhost: gw\r\n".encode() + CUT[where])
        await writer.drain()
    answer = await world.stack.ask(GOOD, "/", method="POST", data=b"whole")
    assert (answer.status, answer.body, answer.instance) == (200, b"whole", before)
    await world.until_inside(GOOD, 0)


async def test_body_truncated_inside_the_instance_frees_its_slot(world: BadInputStack) -> None:
    before = (await world.instance(GOOD)).uid
    async with connection(world.stack.gateway) as (_, writer):
        head = f"POST /fn/{GOOD}/ HTTP/1.1\r\nhost: gw\r\ncontent-length: {CUT_BODY_BYTES}\r\n\r\n"
        writer.write(head.encode() + b"b" * (CUT_BODY_BYTES - 1))
        await writer.drain()
        await world.until_inside(GOOD, 1)
    await world.until_inside(GOOD, 0)
    answer = await world.stack.ask(GOOD, "/", method="POST", data=b"whole")
    assert (answer.status, answer.body, answer.instance) == (200, b"whole", before)


SPOOFED = (
    b"X-Fc-Request-Id: mine",
    b"x_fc_request_id: mine",
    b"X_Fc-Account_Id: root",
    b"x-fc-security-token: mine",
    b"X-FC-CONTROL-PATH: /invoke",
    b"x-fc-function-memory: 999999",
    b"X-Hibernode-Instance: other",
    b"x_hibernode_token: guess",
    b"X-HIBERNODE-Deadline-Ms: 0",
    b"x-hibernode-client-ip: 8.8.8.8",
    b"Connection: close, x-fc-request-id, x-fc-function-name, x-hibernode-token, x-hibernode-instance",
)
SEEN_OF_OURS = {
    "x-fc-request-id", "x-fc-control-path", "x-fc-client-ip", "x-fc-function-name", "x-fc-function-handler",
    "x-fc-function-memory", "x-fc-function-timeout", "x-fc-region", "x-fc-account-id", "x-fc-qualifier",
    "x-fc-version-id", "x-fc-retry-count",
}  # fmt: skip


async def test_spoofed_headers_never_reach_the_instance(world: BadInputStack) -> None:
    head = b"\r\n".join((f"GET /fn/{GOOD}/headers HTTP/1.1".encode(), b"host: gw", b"x-mine: kept", *SPOOFED))
    answer = await ask_raw(world.stack.gateway, head + b"\r\n\r\n")
    assert answer.status == 200, answer.body
    seen: dict[str, str] = json.loads(answer.body)
    ours = {name for name in seen if name.replace("_", "-").startswith(("x-fc-", "x-hibernode-"))}
    assert ours == SEEN_OF_OURS, "no more, and none that Connection could remove"
    assert seen["x-fc-request-id"] == answer.headers["x-fc-request-id"] != "mine"
    assert seen["x-fc-control-path"] == "/http-invoke"
    assert seen["x-fc-client-ip"] == "127.0.0.1"
    assert seen["x-fc-function-name"] == GOOD
    assert seen["x-fc-function-memory"] == "512"
    assert seen["x-fc-account-id"] == "0"
    assert seen["x-mine"] == "kept"
    assert "guess" not in answer.body.decode()
    assert not [name for name in answer.headers if name.startswith("x-hibernode-") and not name.endswith("-ms")]


# ---- tokens -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", ["", "x-hibernode-token: wrong\r\n", "authorization: Bearer {token}\r\n"])
async def test_ingress_requires_the_nodes_token(world: BadInputStack, header: str) -> None:
    token = (world.stack.folder / "agent" / "token").read_text().strip()
    uid = (await world.instance(GOOD)).uid
    head = f"GET / HTTP/1.1\r\nhost: n\r\nx-hibernode-instance: {uid}\r\n{header.format(token=token)}"
    answer = await ask_raw(world.endpoint("agent", "ingress"), f"{head}connection: close\r\n\r\n".encode())
    assert answer.status == 401
    assert answer.code in ("TokenMissing", "TokenUnknown")


@pytest.mark.parametrize("daemon", ["agent", "scheduler"])
@pytest.mark.parametrize("token", ["", "a-token-that-nobody-knows"])
async def test_grpc_requires_a_token(world: BadInputStack, daemon: str, token: str) -> None:
    async with DaemonChannel(world.endpoint(daemon, "grpc"), token) as channel:
        call: Callable[[], Any] = {
            "agent": lambda: channel.call(channel.instances.ListInstances, instances_pb.ListInstancesRequest(), CALL_S),
            "scheduler": lambda: channel.call(
                channel.functions.ListFunctions, functions_pb.ListFunctionsRequest(), CALL_S
            ),
        }[daemon]
        with pytest.raises(UnauthenticatedError) as refused:
            await call()
    assert refused.value.reason == ("TOKEN_UNKNOWN" if token else "TOKEN_MISSING")
    assert not token or token not in refused.value.message


async def test_node_token_is_not_an_operators(world: BadInputStack) -> None:
    token = (world.stack.folder / "agent" / "token").read_text().strip()
    async with DaemonChannel(world.endpoint("scheduler", "grpc"), token) as channel:
        with pytest.raises(PermissionDeniedError) as refused:
            await channel.call(channel.functions.DeleteFunction, functions_pb.DeleteFunctionRequest(name=GOOD), CALL_S)
    assert refused.value.reason == "OPERATOR_TOKEN_NEEDED"
    assert (await world.functions())[GOOD].target == 1


async def test_logs_contain_no_tokens(world: BadInputStack) -> None:
    for daemon in ("agent", "scheduler"):
        assert f"{daemon}.ready" in world.stack.log_of(daemon), "the log is not empty"
        token = (world.stack.folder / daemon / "token").read_text().strip()
        assert not [name for name in ("agent", "scheduler", "driver") if token in world.stack.log_of(name)]
