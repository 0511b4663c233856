"""The server end to end, on a loopback port and a unix socket: authentication, errors, limits, addresses."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
import uvloop
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from structlog.testing import capture_logs

from agent.core.errors import (
    ConfigError,
    DeadlineError,
    ExhaustedError,
    HibernodeError,
    NotFoundError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
    UnavailableError,
    UnsupportedError,
)
from agent.v1 import node_service_pb2, types_pb2
from agent.v1.instance_service_pb2 import CreateInstanceRequest, GetInstanceLogsRequest, GetInstanceRequest
from agent.v1.scheduler_service_pb2 import ListNodesRequest, ReportLoadRequest
from agent.wire.clients import DaemonChannel, LoadStream
from agent.wire.limits import MAX_MESSAGE_BYTES
from agent.wire.server import GrpcServer, Services
from agent.wire.tokens import TokenTable, bearer
from tests.wire.daemon import NODE_TOKEN, OPERATOR_TOKEN, SECRET, Daemon, running

T = 10.0


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[Daemon]:
    async with running(tmp_path) as started:
        yield started


@pytest.fixture
async def operator(daemon: Daemon) -> AsyncIterator[DaemonChannel]:
    async with DaemonChannel(daemon.tcp, OPERATOR_TOKEN) as channel:
        yield channel


async def whoami(channel: DaemonChannel) -> str:
    response = await channel.call(channel.instances.GetInstance, GetInstanceRequest(uid="whoami"), T)
    return response.instance.uid


# ---- authentication --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "reason"),
    [("", "TOKEN_MISSING"), ("a-guess-that-is-long-enough", "TOKEN_UNKNOWN"), (OPERATOR_TOKEN[:-1], "TOKEN_UNKNOWN")],
)
async def test_tcp_without_the_right_token_is_refused(daemon: Daemon, token: str, reason: str) -> None:
    async with DaemonChannel(daemon.tcp, token) as channel:
        with pytest.raises(UnauthenticatedError) as refused:
            await whoami(channel)
    assert refused.value.reason == reason
    assert not daemon.instances.called.is_set()
    assert not token or token not in str(refused.value)


@pytest.mark.parametrize(
    ("token", "code"),
    [("", grpc.StatusCode.UNAUTHENTICATED), (OPERATOR_TOKEN, grpc.StatusCode.INVALID_ARGUMENT)],
    ids=["nobody", "operator"],
)
async def test_bytes_are_parsed_only_for_authenticated_callers(
    daemon: Daemon, token: str, code: grpc.StatusCode
) -> None:
    async with aio.insecure_channel(daemon.tcp) as channel:
        call = channel.unary_unary("/agent.v1.InstanceService/GetInstance", _as_it_is, _as_it_is)
        with capture_logs() as logs, pytest.raises(aio.AioRpcError) as refused:
            await call(b"\xff" * 100, timeout=T, metadata=bearer(token) if token else ())
    assert refused.value.code() is code
    assert logs == []
    assert not daemon.instances.called.is_set()


async def test_stream_of_invalid_bytes_ends(daemon: Daemon) -> None:
    async with aio.insecure_channel(daemon.tcp) as channel:
        report = channel.stream_stream("/agent.v1.SchedulerService/ReportLoad", _as_it_is, _as_it_is)
        stream = report(iter([b"\xff" * 100]), timeout=T, metadata=bearer(NODE_TOKEN))
        with capture_logs() as logs:
            assert await stream.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert logs == []


def _as_it_is(data: bytes) -> bytes:
    return data


async def test_token_identifies_the_caller(operator: DaemonChannel) -> None:
    assert await whoami(operator) == "olga"


async def test_a_malformed_credential_is_refused(daemon: Daemon, operator: DaemonChannel) -> None:
    twice = (*bearer(OPERATOR_TOKEN), *bearer(OPERATOR_TOKEN))
    for metadata in (twice, (("authorization", OPERATOR_TOKEN),), (("authorization", "Basic b2xnYTo="),)):
        with pytest.raises(aio.AioRpcError) as refused:
            await operator.instances.GetInstance(GetInstanceRequest(uid="whoami"), timeout=T, metadata=metadata)
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert not daemon.instances.called.is_set()


async def test_the_unix_socket_needs_no_token(daemon: Daemon) -> None:
    async with DaemonChannel(daemon.unix) as channel:
        assert await whoami(channel) == "unix-socket"


@pytest.mark.parametrize(("group", "mode"), [(None, 0o600), (os.getgid(), 0o660)], ids=["own", "group's"])
async def test_the_socket_is_closed_to_other_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: int | None, mode: int
) -> None:
    monkeypatch.setattr("agent.wire.server._socket_group", lambda: group)
    async with running(tmp_path) as daemon:
        status = daemon.socket.stat()
    assert stat.S_ISSOCK(status.st_mode)
    assert (stat.S_IMODE(status.st_mode), status.st_gid) == (mode, os.getgid())


async def test_node_token_allows_only_reports(daemon: Daemon) -> None:
    async with DaemonChannel(daemon.tcp, NODE_TOKEN) as node:
        with pytest.raises(PermissionDeniedError) as refused:
            await whoami(node)
        assert refused.value.reason == "OPERATOR_TOKEN_NEEDED"
        with pytest.raises(PermissionDeniedError):
            await node.call(node.scheduler.ListNodes, ListNodesRequest(), T)
        stream = node.report_load()
        await stream.send(ReportLoadRequest(epoch=1, sequence=1))
        answer = await stream.receive()
        assert answer is not None
        assert (answer.node, answer.acknowledged_sequence) == ("node-7", 1)
        stream.close()


async def test_operator_cannot_report_for_a_node(operator: DaemonChannel) -> None:
    stream = operator.report_load()
    with pytest.raises(PermissionDeniedError) as refused:
        await stream.receive()
    assert refused.value.reason == "NODE_TOKEN_NEEDED"


async def test_health_needs_no_token_and_follows_the_daemon(daemon: Daemon) -> None:
    async with DaemonChannel(daemon.tcp) as nobody:

        async def says(service: str) -> int:
            request = health_pb2.HealthCheckRequest(service=service)
            status: int = (await nobody.health.Check(request, timeout=T)).status
            return status

        serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
        for service in ("", "agent.v1.InstanceService"):
            assert await says(service) == not_serving
        await daemon.server.set_serving(True)
        for service in ("", "agent.v1.InstanceService", "agent.v1.SchedulerService"):
            assert await says(service) == serving
        await daemon.server.set_serving(False)
        assert await says("") == not_serving


async def test_health_watch_needs_a_token(daemon: Daemon) -> None:
    async with aio.insecure_channel(daemon.tcp) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        with pytest.raises(aio.AioRpcError) as refused:
            await health.Watch(health_pb2.HealthCheckRequest(), timeout=T).read()
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=T, metadata=bearer(OPERATOR_TOKEN))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        await daemon.server.set_serving(True)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()


async def test_reflection_needs_a_token_and_lists_the_services(daemon: Daemon) -> None:
    question = reflection_pb2.ServerReflectionRequest(list_services="")
    async with aio.insecure_channel(daemon.tcp) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        with pytest.raises(aio.AioRpcError) as refused:
            await stub.ServerReflectionInfo(iter([question]), timeout=T).read()
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        call = stub.ServerReflectionInfo(iter([question]), timeout=T, metadata=bearer(OPERATOR_TOKEN))
        listed = {service.name for service in (await call.read()).list_services_response.service}
    assert {"agent.v1.InstanceService", "agent.v1.SchedulerService", "grpc.health.v1.Health"} <= listed


# ---- errors --------------------------------------------------------------------------------------


async def test_error_arrives_as_raised(operator: DaemonChannel) -> None:
    with pytest.raises(PreconditionError) as refused:
        await operator.call(operator.instances.GetInstance, GetInstanceRequest(uid="busy"), T)
    assert refused.value.reason == "INSTANCE_BUSY"
    assert refused.value.message == "i-1 has 2 requests; try again"
    assert refused.value.metadata == {"in_flight": "2", "uid": "i-1"}


async def test_unexpected_error_is_logged_once_and_not_sent(operator: DaemonChannel) -> None:
    with capture_logs() as logs, pytest.raises(HibernodeError) as failed:
        await operator.call(operator.instances.GetInstance, GetInstanceRequest(uid="broken"), T)
    assert (type(failed.value), failed.value.reason) == (HibernodeError, "INTERNAL")
    assert SECRET not in str(failed.value)
    assert [(log["event"], log["error"]) for log in logs] == [("grpc.call_failed", "RuntimeError")]


async def test_servicers_own_timeout_is_not_the_calls_deadline(operator: DaemonChannel) -> None:
    with capture_logs() as logs, pytest.raises(HibernodeError) as failed:
        await operator.call(operator.instances.GetInstance, GetInstanceRequest(uid="impatient"), T)
    assert failed.value.reason == "INTERNAL"
    assert len(logs) == 1


async def test_stream_fails_after_its_messages(operator: DaemonChannel, daemon: Daemon) -> None:
    logs = operator.stream(operator.instances.GetInstanceLogs, GetInstanceLogsRequest(uid="rotated"), T)
    assert (await anext(logs)).data == b"Loading model\n"
    with pytest.raises(NotFoundError) as failed:
        await anext(logs)
    assert failed.value.reason == "LOG_NOT_FOUND"


async def test_abandoned_stream_ends_at_the_server(operator: DaemonChannel, daemon: Daemon) -> None:
    request = GetInstanceLogsRequest(uid="i-1", follow=True)
    logs = operator.stream(operator.instances.GetInstanceLogs, request, T)
    assert (await anext(logs)).data == b"Loading model\n"
    assert (await anext(logs)).data == b"Ready\n"
    await logs.aclose()  # type: ignore[attr-defined]  # an async generator
    await asyncio.wait_for(daemon.instances.closed_logs.wait(), T)


async def test_load_stream_reports_why_it_ended(daemon: Daemon) -> None:
    async with DaemonChannel(daemon.tcp, NODE_TOKEN) as node:
        stream = node.report_load()
        await stream.send(ReportLoadRequest(epoch=0, sequence=1))
        with pytest.raises(PreconditionError) as refused:
            await stream.receive()
        assert refused.value.reason == "EPOCH_STALE"
        with pytest.raises(PreconditionError) as again:
            await stream.send(ReportLoadRequest(epoch=0, sequence=2))
        assert again.value.reason == "EPOCH_STALE"


async def test_a_refused_stream_always_says_why(daemon: Daemon) -> None:
    """A write that meets the refusal used to fail as INTERNAL, in a quarter of the attempts."""

    async def send_all(stream: LoadStream) -> None:
        while True:
            await stream.send(ReportLoadRequest(epoch=1, sequence=1))

    reasons = set()
    async with DaemonChannel(daemon.tcp, "a-token-of-nobody-0123456789") as stranger:
        for _ in range(60):
            stream = stranger.report_load()
            with pytest.raises(HibernodeError) as caught:
                await send_all(stream)
            reasons.add((type(caught.value), caught.value.reason))
            stream.close()
    assert reasons == {(UnauthenticatedError, "TOKEN_UNKNOWN")}


async def test_unimplemented_call(operator: DaemonChannel) -> None:
    with pytest.raises(UnsupportedError) as refused:
        await operator.call(operator.nodes.GetNode, node_service_pb2.GetNodeRequest(), T)
    assert refused.value.reason == "UNIMPLEMENTED"


async def test_unreachable_daemon(tmp_path: Path) -> None:
    async with DaemonChannel(f"unix:{tmp_path}/nobody.sock") as channel:
        with pytest.raises(UnavailableError) as refused:
            await whoami(channel)
    assert refused.value.reason == "UNREACHABLE"
    assert "nobody.sock" in refused.value.message


async def test_wait_for_ready_waits_for_a_late_daemon(tmp_path: Path) -> None:
    async with DaemonChannel(f"unix:{tmp_path}/agent.sock") as channel:
        early = GetInstanceRequest(uid="whoami")
        call = asyncio.create_task(channel.call(channel.instances.GetInstance, early, T, wait_for_ready=True))
        await asyncio.sleep(0)
        async with running(tmp_path):
            assert (await call).instance.uid == "unix-socket"


# ---- limits ------------------------------------------------------------------------------------------


async def test_a_call_without_a_deadline_gets_one(tmp_path: Path) -> None:
    async with running(tmp_path, default_deadline_s=0.05) as daemon, DaemonChannel(daemon.unix) as channel:
        with pytest.raises(aio.AioRpcError) as late:
            await channel.instances.GetInstance(GetInstanceRequest(uid="stuck"))
        assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "set no deadline" in (late.value.details() or "")
        assert daemon.instances.cancelled.is_set()


async def test_a_calls_own_deadline_reaches_the_servicer(operator: DaemonChannel, daemon: Daemon) -> None:
    with pytest.raises(DeadlineError) as late:
        await operator.call(operator.instances.GetInstance, GetInstanceRequest(uid="stuck"), 0.2)
    assert late.value.reason == "DEADLINE_EXCEEDED"
    await asyncio.wait_for(daemon.instances.cancelled.wait(), T)


async def test_a_load_stream_outlives_the_default_deadline(tmp_path: Path) -> None:
    async with (
        running(tmp_path, default_deadline_s=0.05) as daemon,
        DaemonChannel(daemon.tcp, NODE_TOKEN) as node,
        DaemonChannel(daemon.unix) as other,
    ):
        stream = node.report_load()
        await stream.send(ReportLoadRequest(epoch=1, sequence=1))
        assert await stream.receive() is not None
        with pytest.raises(DeadlineError):  # the default deadline has passed once this call is answered
            await other.call(other.instances.GetInstance, GetInstanceRequest(uid="stuck"), 0.2)
        await stream.send(ReportLoadRequest(epoch=1, sequence=2))
        second = await stream.receive()
        assert second is not None
        assert second.acknowledged_sequence == 2
        stream.close()


async def test_a_message_over_the_limit_is_refused(operator: DaemonChannel) -> None:
    spec = types_pb2.FunctionSpec(name="f", environment={"BIG": "x" * MAX_MESSAGE_BYTES})
    with pytest.raises(ExhaustedError):
        await operator.call(operator.instances.CreateInstance, CreateInstanceRequest(spec=spec), T)


# ---- addresses -----------------------------------------------------------------------------------------


async def test_public_address_needs_insecure(daemon: Daemon) -> None:
    with pytest.raises(ConfigError) as refused:
        daemon.server.bind_tcp("0.0.0.0", 0)
    assert refused.value.reason == "BIND_INSECURE"


async def test_two_daemons_cannot_share_a_port(daemon: Daemon, tmp_path: Path) -> None:
    second = GrpcServer(Services(), TokenTable([]))
    with pytest.raises(UnavailableError) as refused:
        second.bind_tcp("127.0.0.1", int(daemon.tcp.rpartition(":")[2]))
    assert refused.value.reason == "BIND_FAILED"
    await second.stop(0)


async def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    async with running(tmp_path) as first:
        stale = first.socket
        kept = stale.with_name("kept.sock")
        kept.hardlink_to(stale)
    kept.rename(stale)  # as left by a killed daemon
    async with running(tmp_path) as second, DaemonChannel(second.unix) as channel:
        assert await whoami(channel) == "unix-socket"


async def test_stop_ends_health_first_and_removes_the_socket(tmp_path: Path) -> None:
    async with running(tmp_path) as daemon, DaemonChannel(daemon.unix) as channel:
        await daemon.server.set_serving(True)
        watch = channel.health.Watch(health_pb2.HealthCheckRequest(), timeout=T)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        stopping = asyncio.create_task(daemon.server.stop(T))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()
        await asyncio.wait_for(stopping, T)
        assert not (tmp_path / "agent.sock").exists()


def test_everything_works_on_uvloop(tmp_path: Path) -> None:
    async def story() -> None:
        async with (
            running(tmp_path) as daemon,
            DaemonChannel(daemon.tcp, OPERATOR_TOKEN) as tcp,
            DaemonChannel(daemon.unix) as unix,
            DaemonChannel(daemon.tcp, NODE_TOKEN) as node,
        ):
            names = await asyncio.gather(*(whoami(channel) for channel in (tcp, unix) for _ in range(20)))
            assert sorted(set(names)) == ["olga", "unix-socket"]
            stream = node.report_load()
            for sequence in range(1, 50):
                await stream.send(ReportLoadRequest(epoch=1, sequence=sequence))
                answer = await stream.receive()
                assert answer is not None
                assert answer.acknowledged_sequence == sequence
            stream.close()
            with pytest.raises(NotFoundError):
                await tcp.call(tcp.instances.GetInstance, GetInstanceRequest(uid="i-404"), T)

    uvloop.run(story())


async def test_call_on_a_closed_channel_is_unreachable(daemon: Daemon) -> None:
    """After its agent moved, a waiting call fails; its task is not cancelled."""
    channel = DaemonChannel(daemon.tcp, OPERATOR_TOKEN)
    call = asyncio.create_task(channel.call(channel.instances.GetInstance, GetInstanceRequest(uid="stuck"), T))
    await daemon.instances.called.wait()
    await channel.close()
    with pytest.raises(UnavailableError) as caught:
        await call
    assert caught.value.reason == "UNREACHABLE"


async def test_cancelled_caller_stays_cancelled(daemon: Daemon, operator: DaemonChannel) -> None:
    call = asyncio.create_task(operator.call(operator.instances.GetInstance, GetInstanceRequest(uid="stuck"), T))
    await daemon.instances.called.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
