"""Calls to a daemon over one channel: with a deadline and the token; failures are raised as `HibernodeError`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Generic, TypeAlias, TypeVar, cast

import grpc
from grpc import aio
from grpc_health.v1 import health_pb2_grpc

from agent.core.errors import HibernodeError, UnavailableError
from agent.v1 import (
    function_service_pb2_grpc,
    instance_service_pb2_grpc,
    node_service_pb2_grpc,
    scheduler_service_pb2_grpc,
    usage_service_pb2_grpc,
)
from agent.v1.instance_service_pb2 import ExecInstanceRequest, ExecInstanceResponse
from agent.v1.scheduler_service_pb2 import ReportLoadRequest, ReportLoadResponse
from agent.wire.addresses import check_target
from agent.wire.interceptors import ACCEPTED
from agent.wire.limits import MAX_MESSAGE_BYTES
from agent.wire.status import DETAILS_KEY, from_rpc_error, translated_errors
from agent.wire.tokens import bearer

if TYPE_CHECKING:
    from agent.v1.function_service_pb2_grpc import FunctionServiceAsyncStub
    from agent.v1.instance_service_pb2_grpc import InstanceServiceAsyncStub
    from agent.v1.node_service_pb2_grpc import NodeServiceAsyncStub
    from agent.v1.scheduler_service_pb2_grpc import SchedulerServiceAsyncStub
    from agent.v1.usage_service_pb2_grpc import UsageServiceAsyncStub

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")
_EOF = aio.EOF  # type: ignore[attr-defined]  # the stubs are older

ACCEPT_S = 5.0
"""Longest wait for a daemon to accept a stream. One of an older version says nothing before its first answer."""

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),  # for a host that is gone: TCP_USER_TIMEOUT
    ("grpc.http2.ping_timeout_ms", 5_000),  # for a process that hangs; else a minute
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # The scheduler suspects an agent after 3 s of silence: a restarted peer must be found again well within that.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 500),
    # No proxy from the environment, and no back-off shared with another channel.
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
    # Only callers decide what is sent again, and when.
    ("grpc.enable_retries", 0),
)


class DaemonChannel:
    """A channel to one daemon, with a stub for each service it may have. For one event loop.

    `target` is `host:port` or `unix:/path`. The first call connects; a lost connection is opened again, with a back-off
    of at most a second.
    """

    def __init__(self, target: str, token: str = "", insecure: bool = False) -> None:
        """Raises ConfigError TARGET_INSECURE if `token` would travel in the clear to another machine."""
        if token:
            check_target(target, tls=False, insecure=insecure)
        self.target = target
        self._metadata = bearer(token) if token else ()
        self._channel = aio.insecure_channel(target, options=CHANNEL_OPTIONS)
        self.instances: InstanceServiceAsyncStub = instance_service_pb2_grpc.InstanceServiceStub(self._channel)
        self.nodes: NodeServiceAsyncStub = node_service_pb2_grpc.NodeServiceStub(self._channel)
        self.scheduler: SchedulerServiceAsyncStub = scheduler_service_pb2_grpc.SchedulerServiceStub(self._channel)
        self.functions: FunctionServiceAsyncStub = function_service_pb2_grpc.FunctionServiceStub(self._channel)
        self.usage: UsageServiceAsyncStub = usage_service_pb2_grpc.UsageServiceStub(self._channel)
        self.health = health_pb2_grpc.HealthStub(self._channel)

    async def __aenter__(self) -> DaemonChannel:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"DaemonChannel({self.target})"

    async def call(
        self,
        method: aio.UnaryUnaryMultiCallable[_Request, _Response],
        request: _Request,
        timeout_s: float,
        wait_for_ready: bool = False,
    ) -> _Response:
        """The answer to one call, within `timeout_s`. Raises the daemon's `HibernodeError`, and UnavailableError
        UNREACHABLE if there is no daemon (with `wait_for_ready` only at the deadline)."""
        try:
            with translated_errors(self.target):
                return await method(request, timeout=timeout_s, metadata=self._metadata, wait_for_ready=wait_for_ready)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # This task was not cancelled: gRPC cancels calls in flight when their channel is closed.
            text = f"the connection to {self.target} was closed during the call; try again"
            raise UnavailableError("UNREACHABLE", text, target=self.target) from None

    async def stream(
        self, method: aio.UnaryStreamMultiCallable[_Request, _Response], request: _Request, timeout_s: float
    ) -> AsyncIterator[_Response]:
        """The answers to one call, all within `timeout_s`. Leaving the loop ends the call."""
        with translated_errors(self.target):
            call = method(request, timeout=timeout_s, metadata=self._metadata)
            try:
                async for response in call:
                    yield response
            finally:
                call.cancel()

    def report_load(self) -> LoadStream:
        """Opens this agent's load stream to the scheduler."""
        return TwoWayStream(self.scheduler.ReportLoad(None, metadata=self._metadata), self.target)

    def exec_instance(self) -> ExecStream:
        """Opens a stream for a command inside an instance."""
        return TwoWayStream(self.instances.ExecInstance(None, metadata=self._metadata), self.target)

    async def close(self) -> None:
        """Closes the channel and cancels calls in flight."""
        await self._channel.close(None)


class TwoWayStream(Generic[_Request, _Response]):
    """A bidirectional stream; one task at a time may send, one receive. It has no deadline: the channel's keepalive
    notices a dead peer within 15 s, and `close` ends it.

    Nothing is sent before the daemon has accepted the stream: if the status of a refusal arrives during a write, gRPC's
    library replaces it by INTERNAL, and the reason is lost.
    """

    def __init__(self, call: aio.StreamStreamCall[_Request, _Response], target: str) -> None:
        self._call = call
        self._target = target
        self._accepted = False

    async def send(self, message: _Request) -> None:
        """Returns once flow control has accepted the message. Raises the error that ended the stream."""
        if not self._accepted:
            await self._wait_until_accepted()
        try:
            await self._call.write(message)
        except aio.AioRpcError as error:
            trailers = cast(Sequence[tuple[str, str | bytes]], error.trailing_metadata() or ())
            by_library = error.code() is grpc.StatusCode.INTERNAL and DETAILS_KEY not in dict(trailers)
            if by_library:  # the stream ended during the write
                raise self._ended() from error
            raise from_rpc_error(error, self._target) from error
        except asyncio.InvalidStateError as error:
            raise await self._ended_by() from error

    async def receive(self) -> _Response | None:
        """The next message; None once the peer has ended the stream without an error."""
        with translated_errors(self._target):
            message = await self._call.read()
        return None if message is _EOF else cast(_Response, message)

    def close(self) -> None:
        """Ends the stream at once."""
        self._call.cancel()

    async def _wait_until_accepted(self) -> None:
        """Raises the error with which the daemon refuses the stream."""
        try:
            async with asyncio.timeout(ACCEPT_S):
                headers = await self._call.initial_metadata()
        except TimeoutError:
            pass
        else:
            if ACCEPTED not in headers:
                raise await self._ended_by()
        self._accepted = True

    def _ended(self) -> UnavailableError:
        return UnavailableError("STREAM_ENDED", f"{self._target} ended the stream; open it again")

    async def _ended_by(self) -> HibernodeError:
        """The error that ended the stream, once gRPC knows it."""
        code = await self._call.code()
        if code is grpc.StatusCode.OK:
            return self._ended()
        metadata = await self._call.trailing_metadata()
        details = await self._call.details()
        return from_rpc_error(aio.AioRpcError(code, aio.Metadata(), metadata, details, None), self._target)


LoadStream: TypeAlias = TwoWayStream[ReportLoadRequest, ReportLoadResponse]
ExecStream: TypeAlias = TwoWayStream[ExecInstanceRequest, ExecInstanceResponse]
