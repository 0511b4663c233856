"""The interceptor of all gRPC calls: authentication, a default deadline, and translation of failures.

These are one interceptor because their order matters: the caller is authenticated before its request is parsed, and
every later failure is answered through `status.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Awaitable, Callable
from typing import Any, NoReturn, Protocol, TypeVar, cast

import grpc
from google.protobuf.message import DecodeError
from grpc import aio

from agent.core.errors import DeadlineError, HibernodeError, InvalidArgumentError, PermissionDeniedError
from agent.log import get_logger
from agent.wire.limits import DEFAULT_DEADLINE_S
from agent.wire.status import to_grpc_status
from agent.wire.tokens import SOCKET_PRINCIPAL, Principal, Role, TokenTable, set_caller

HEALTH_CHECK = "/grpc.health.v1.Health/Check"
HEALTH_WATCH = "/grpc.health.v1.Health/Watch"

# Health/Check needs no token; a Watch does, because it holds a stream for as long as the caller likes.
OPEN_METHODS = frozenset({HEALTH_CHECK})
# The only methods of the scheduler that accept a node's token.
NODE_METHODS = frozenset(
    {"/agent.v1.SchedulerService/ReportLoad", "/agent.v1.UsageService/UploadUsageWindows"},
)
# Methods without a deadline, besides bidirectional streams.
ENDLESS_METHODS = frozenset({HEALTH_WATCH})

ACCEPTED = "hibernode-accepted"
"""Header that tells the caller of a bidirectional stream, before its first message, that it may send."""

_log = get_logger()
_Answer = TypeVar("_Answer")


class CallContext(Protocol):
    """The part of grpc.aio's servicer context that the guard uses."""

    def peer(self) -> str: ...
    def time_remaining(self) -> float | None: ...
    def invocation_metadata(self) -> tuple[tuple[str, str | bytes], ...] | None: ...
    async def abort_with_status(self, status: grpc.Status) -> NoReturn: ...
    async def write(self, message: Any) -> None: ...
    async def send_initial_metadata(self, initial_metadata: tuple[tuple[str, str], ...]) -> None: ...


async def accept_stream(context: CallContext) -> None:
    """Let the caller of a bidirectional stream send. The method calls it once it refuses no more without reading."""
    await context.send_initial_metadata(((ACCEPTED, "1"),))


class CallGuard(aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    """Authenticates the caller, limits a call without a deadline, and translates errors.

    A peer on the unix socket is trusted: the socket's mode and group decide who may connect. An unexpected exception
    is logged once, with its traceback, and answered as INTERNAL without its text.
    """

    def __init__(self, tokens: TokenTable, default_deadline_s: float = DEFAULT_DEADLINE_S) -> None:
        self._tokens = tokens
        self._default_deadline_s = default_deadline_s

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler: grpc.RpcMethodHandler[Any, Any] | None = await continuation(handler_call_details)
        if handler is None:  # no such method: gRPC answers UNIMPLEMENTED
            return None
        return self._guarded(handler_call_details.method, handler)

    def _guarded(self, method: str, handler: grpc.RpcMethodHandler[Any, Any]) -> Any:
        """`handler` with the guard around its behaviour, whichever of gRPC's four kinds it is."""
        both_ways = bool(handler.request_streaming and handler.response_streaming)
        endless = method in ENDLESS_METHODS or both_ways
        behaviour = cast(
            Callable[[Any, CallContext], Any],
            handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream,
        )

        parse = _parser(handler.request_deserializer)
        # A stream's messages are parsed when the behaviour reads them. A single request would be parsed by gRPC before
        # its caller is authenticated, so gRPC passes bytes and the guard parses.
        grpc_decode, decode = (parse, _unchanged) if handler.request_streaming else (None, parse)

        async def answer_one(request: Any, context: CallContext) -> Any:
            return await self._run(method, context, lambda: behaviour(decode(request), context), endless)

        async def answer_many(request: Any, context: CallContext) -> None:
            await self._run(method, context, lambda: _write_all(behaviour(decode(request), context), context), endless)

        make, wrapped = _same_kind(handler, answer_one, answer_many)
        return make(wrapped, grpc_decode, handler.response_serializer)

    async def _run(
        self,
        method: str,
        context: CallContext,
        body: Callable[[], Awaitable[_Answer]],
        endless: bool,
    ) -> _Answer:
        unbounded = endless or context.time_remaining() is not None
        limit = asyncio.timeout(None if unbounded else self._default_deadline_s)
        try:
            self._admit(method, context)
            async with limit:
                return await body()
        except (aio.AbortError, asyncio.CancelledError):
            raise
        except HibernodeError as error:
            failure = error
        except Exception as error:
            failure = self._unexpected(method, error, overdue=limit.expired())
        return await context.abort_with_status(to_grpc_status(failure))

    def _admit(self, method: str, context: CallContext) -> None:
        """Sets the caller of this call. Raises UnauthenticatedError or PermissionDeniedError."""
        if method in OPEN_METHODS:
            return
        principal = self._principal(context)
        if principal.role is Role.NODE and method not in NODE_METHODS:
            message = f"node {principal.name} may only report its load and usage; use an operator's token"
            raise PermissionDeniedError("OPERATOR_TOKEN_NEEDED", message, node=principal.name)
        set_caller(principal)

    def _principal(self, context: CallContext) -> Principal:
        if context.peer().startswith("unix:"):
            return SOCKET_PRINCIPAL
        return self._tokens.authenticate(context.invocation_metadata() or ())

    def _unexpected(self, method: str, error: Exception, overdue: bool) -> HibernodeError:
        if overdue and isinstance(error, TimeoutError):
            message = f"the call set no deadline and took longer than {self._default_deadline_s:g} s; set one"
            return DeadlineError("DEADLINE_EXCEEDED", message)
        _log.error("grpc.call_failed", method=method, error=type(error).__name__, exc_info=error)
        # A plain HibernodeError, of no subclass, is sent as INTERNAL.
        return HibernodeError("INTERNAL", "the daemon failed unexpectedly; its log says how")


def _unchanged(request: Any) -> Any:
    return request


def _parser(parse: Callable[[bytes], Any] | None) -> Callable[[bytes], Any]:
    """`parse`, with InvalidArgumentError for invalid bytes in place of gRPC's UNKNOWN and a traceback in the log."""

    def parsed(data: bytes) -> Any:
        try:
            return parse(data) if parse is not None else data
        except DecodeError:
            raise InvalidArgumentError(
                "MESSAGE_MALFORMED", "the request is not a message of this call; is the caller of another version?"
            ) from None

    return parsed


async def _write_all(answers: AsyncIterable[Any] | Awaitable[None], context: CallContext) -> None:
    """Sends what a streaming behaviour yields; awaits one that writes by itself.

    Closes the generator here, in the call's own task, not whenever the garbage collector finds it.
    """
    if not isinstance(answers, AsyncIterable):
        await answers
        return
    try:
        async for answer in answers:
            await context.write(answer)
    finally:
        close = getattr(answers, "aclose", None)
        if close is not None:
            await close()


def _same_kind(handler: grpc.RpcMethodHandler[Any, Any], one: Any, many: Any) -> tuple[Callable[..., Any], Any]:
    """The constructor for a handler of the same kind, and the behaviour of the two that fits it."""
    match handler.request_streaming, handler.response_streaming:
        case False, False:
            return grpc.unary_unary_rpc_method_handler, one
        case False, True:
            return grpc.unary_stream_rpc_method_handler, many
        case True, False:
            return grpc.stream_unary_rpc_method_handler, one
        case _:
            return grpc.stream_stream_rpc_method_handler, many
