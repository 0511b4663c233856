"""The gateway: takes a client's request through the queue to an instance, and its answer back.

A request is dispatched again only if no byte of it can have reached an instance: the connection to the node failed, or
its agent answered `x-hibernode-refused` or went away before a start notice. Bodies up to `KEPT_BODY_BYTES` are kept for
that; larger ones stay with the client until the agent's 100 Continue, which comes with the grant.

A client's own `x-fc-*` and `x-hibernode-*` headers are dropped; the gateway sets those that the ingress gets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import assert_never

from agent.core.dispatch.events import Dispatch, RefusalReason, Refuse
from agent.core.errors import (
    DeadlineError,
    ExhaustedError,
    HibernodeError,
    InstanceError,
    InvalidArgumentError,
    NotFoundError,
    UnavailableError,
)
from agent.core.provisioning.problem import Problem
from agent.core.traffic import Traffic
from agent.core.types import MILLISECOND_NS, SECOND_NS
from agent.http import header_filter as rules
from agent.http import hop_headers
from agent.http.errors import ClientGoneError, status_and_code
from agent.http.exchange import Exchange
from agent.http.forward import ForwardResult, forward
from agent.http.message import Header, RequestHead, ResponseHead
from agent.http.pool import Pool
from agent.http.relay import RelayOutcome
from agent.http.request_ids import RequestIds
from agent.http.upstream import BROKEN
from agent.log import get_logger
from agent.ports import Clock
from agent.scheduler.functions.catalog import Catalog
from agent.scheduler.functions.deployed import Deployed
from agent.scheduler.gateway.dispatching import DispatchLoop, Ticket
from agent.scheduler.gateway.ingress_pools import EXHAUSTED
from agent.scheduler.gateway.routes import INVOKE, Route, Router, method_not_allowed
from agent.scheduler.gateway.traffic import TrafficTable

KEPT_BODY_BYTES = 64 * 1024
"""Bodies up to this size are read before the request is queued, so that they can be sent again."""
ANSWER_SLACK_S = 10.0
"""Added to the queue and function timeouts, which the agent enforces: the gateway only cuts off a stuck agent."""

_START_FAILURES = {
    "FUNCTION_NOT_STARTED": "FUNCTION_NOT_STARTED",
    "START_FAILED": "FUNCTION_NOT_STARTED",
    "HEALTH_CHECK_FAILED": "FUNCTION_NOT_STARTED",
    "COMMAND_NOT_FOUND": "FUNCTION_NOT_STARTED",
    "IMAGE_NOT_FOUND": "FUNCTION_NOT_STARTED",
    "IMAGE_PULL_DENIED": "FUNCTION_NOT_STARTED",
    "VOLUME_REFUSED": "FUNCTION_NOT_STARTED",
    "INITIALIZATION_ERROR": "INITIALIZATION_ERROR",
    "INSTANCE_CRASHED": "INSTANCE_CRASHED",
    "OUT_OF_MEMORY": "INSTANCE_CRASHED",
}
"""By the reason for which an instance ended before it served: the reason that clients get (agent/docs/fc-contract.md).
Everything else, host faults included (disk, network, engine), is reported as NO_CAPACITY."""
_CUT = (RelayOutcome.UPSTREAM_FAILED_MID_BODY, RelayOutcome.TIMEOUT_MID_BODY)
_OURS_IN_ANSWERS = frozenset((b"x-fc-request-id", b"x-fc-instance-id"))
_RETRY_SOON = [(b"retry-after", b"1")]
_ANY, _STARTED = (hop_headers.ANY_INSTANCE, b"1"), (hop_headers.STARTED, b"1")
_WAITS = {(False, False): (_ANY,), (False, True): (_ANY, _STARTED), (True, False): (_STARTED,)}
"""Headers by (`Dispatch.direct_wake`, `.early`). Any instance of the function at the node will do, unless the request
wakes one. If it may wait there, a start notice is asked for: until that comes, it can be dispatched elsewhere."""
_OCTET_STREAM = (b"content-type", b"application/octet-stream")

_log = get_logger()


@dataclass(slots=True)
class GatewayCounts:
    """For the metrics: answers by status, failed dispatches by cause, and answers cut off in the middle."""

    answers: dict[int, int] = field(default_factory=dict)
    refused: int = 0
    connect_failed: int = 0
    cut: int = 0

    def answered(self, status: int) -> None:
        self.answers[status] = self.answers.get(status, 0) + 1


@dataclass(slots=True)
class _Call:
    exchange: Exchange
    request_id: str
    route: Route
    function: Deployed
    headers: list[Header]
    body: bytes | None
    traffic: Traffic
    began_ns: int
    queue_ns: int = 0
    wake_ns: int = 0


class Gateway:
    def __init__(
        self,
        clock: Clock,
        router: Router,
        catalog: Catalog,
        dispatch_loop: DispatchLoop,
        pool_of: Callable[[str], Pool | None],
        token_of: Callable[[str], bytes],
        unreachable: Callable[[str], None],
        request_ids: RequestIds,
        gpu_wait: Callable[[str], str] = lambda _: "",
    ) -> None:
        """`pool_of`, `token_of`: those of a node's ingress. `unreachable` gets a node that cannot be connected to.
        `gpu_wait`: who holds the GPU that an instance of a function waits for, or ""."""
        self._clock = clock
        self._router = router
        self._catalog = catalog
        self._dispatch_loop = dispatch_loop
        self._pool_of = pool_of
        self._token_of = token_of
        self._unreachable = unreachable
        self._request_ids = request_ids
        self._gpu_wait = gpu_wait
        self.counts = GatewayCounts()
        self.traffic = TrafficTable(lambda: [one.spec.name for one in catalog.all()])

    async def __call__(self, exchange: Exchange) -> None:
        """Answer an exchange exactly once, unless the client has left."""
        request_id = self._request_ids()
        try:
            await self._serve(exchange, request_id)
        except ClientGoneError:
            pass
        except HibernodeError as error:
            status = status_and_code(error)[0]
            self.counts.answered(status)
            await exchange.fail(error, request_id, extra=_RETRY_SOON if status == 503 else None)

    async def _serve(self, exchange: Exchange, request_id: str) -> None:
        head = exchange.head
        route = self._router.route(head)
        function = self._catalog.find(route.function)
        if function is None and route.by_host:
            function = self._catalog.find_folded(route.function)
        if function is None:
            raise _unknown(route.function)
        if route.location:
            self.counts.answered(308)
            await exchange.answer(308, [(b"location", route.location), (b"x-fc-request-id", request_id.encode())])
            return
        traffic = self.traffic.of(function.spec.name)
        traffic.invocations += 1
        try:
            await self._invoke(exchange, request_id, route, function, traffic)
        except ClientGoneError:
            traffic.left += 1
            raise
        except Exception as error:
            traffic.refused(status_and_code(error)[0], error.reason if isinstance(error, HibernodeError) else "")
            raise

    async def _invoke(
        self, exchange: Exchange, request_id: str, route: Route, function: Deployed, traffic: Traffic
    ) -> None:
        head, name, began_ns = exchange.head, function.spec.name, self._clock.monotonic_ns()
        if function.closed:
            raise UnavailableError("FUNCTION_UNREADABLE", f"{name}: {function.unreadable}", function=name)
        if route.control_path is not INVOKE and function.methods and head.method not in function.methods:
            raise method_not_allowed(head.method)
        headers = _passing_headers(head, route, exchange.peer)
        body: bytes | None = b""
        if head.has_body:
            large = head.length is not None and head.length > KEPT_BODY_BYTES
            body = None if large else await exchange.buffer_body(KEPT_BODY_BYTES)
        call = _Call(exchange, request_id, route, function, headers, body, traffic, began_ns)
        deadline_ns = self._clock.monotonic_ns() + function.spec.queue_timeout_ns
        ticket = self._dispatch_loop.arrive(name, deadline_ns)
        try:
            await self._dispatch_until_answered(call, ticket)
        finally:
            self._dispatch_loop.gone(ticket)  # no effect on a ticket that has ended

    async def _dispatch_until_answered(self, call: _Call, ticket: Ticket) -> None:
        """Dispatch the request, again if needed, until it is answered. Raises the error to answer with."""
        while True:
            outcome = ticket.outcome or await self._wait(call.exchange, ticket)
            if isinstance(outcome, Refuse):
                raise self._refusal(outcome.reason, call.function)
            pool = self._pool_of(outcome.node)
            if pool is None:
                self._unreachable(outcome.node)
                self._dispatch_loop.refused(ticket)
                continue
            result = await self._send(call, ticket, outcome, pool)
            if not self._may_redispatch(call, outcome, result):
                break
            self._dispatch_loop.refused(ticket)
        if result.outcome is RelayOutcome.COMPLETE:
            self._dispatch_loop.ended(ticket)
            status = result.head_status or 0
            self.counts.answered(status)
            call.traffic.served(status, call.began_ns, self._clock.monotonic_ns(), call.queue_ns, call.wake_ns)
            return
        self._answer_failure(call, outcome, result)

    async def _wait(self, exchange: Exchange, ticket: Ticket) -> Dispatch | Refuse:
        def left() -> None:
            self._dispatch_loop.abandon(ticket)

        exchange.on_gone(left)
        if exchange.gone:
            raise ClientGoneError
        try:
            return await self._dispatch_loop.wait(ticket)
        finally:
            exchange.off_gone(left)

    async def _send(self, call: _Call, ticket: Ticket, where: Dispatch, pool: Pool) -> ForwardResult:
        now_ns = self._clock.monotonic_ns()
        remaining_ns = max(0, ticket.deadline_ns - now_ns)
        timeout_s = (remaining_ns + call.function.spec.timeout_ns) / SECOND_NS + ANSWER_SLACK_S

        def answer_headers(answer: ResponseHead) -> list[Header] | None:
            served_by = answer.get(b"x-fc-instance-id") or where.uid.encode()
            ticket.served_by = served_by.decode("latin-1")
            headers = _answer_headers(answer, call, where, served_by)
            if where.direct_wake and headers is not None:  # `call_soon`: the client's answer goes first
                waited_ns = _ms_to_ns(answer.get(hop_headers.WAKE_MS) or b"")
                call.exchange.loop.call_soon(self._dispatch_loop.answered, ticket, waited_ns)
            return headers

        return await forward(
            call.exchange,
            pool,
            call.exchange.head.method,
            call.route.target,
            [
                *call.headers,
                (hop_headers.TOKEN, self._token_of(where.node)),
                (hop_headers.INSTANCE, where.uid.encode()),
                *_WAITS[where.direct_wake, where.early],
                (
                    hop_headers.DEADLINE_MS,
                    b"%d" % -(-remaining_ns // MILLISECOND_NS),
                ),  # rounded up, so that it passes here first
                (b"x-fc-request-id", call.request_id.encode()),
            ],
            deadline=call.exchange.loop.time() + timeout_s,
            response_filter=answer_headers,
            body=call.body,
            expect=call.body is None,
        )

    def _may_redispatch(self, call: _Call, where: Dispatch, result: ForwardResult) -> bool:
        """Whether no byte of the request has reached an instance, and the gateway still has all of it."""
        if result.outcome is RelayOutcome.CONNECT_FAILED:
            self.counts.connect_failed += 1
            if result.error is None or result.error.reason != EXHAUSTED:
                self._unreachable(where.node)
            return not call.exchange.gone
        if result.outcome is RelayOutcome.HELD and result.head is not None:
            self.counts.refused += 1
            reason = (result.head.get(hop_headers.REFUSED) or b"").decode("latin-1")
            _log.info("gateway.refused", request_id=call.request_id, uid=where.uid, node=where.node, reason=reason)
            return call.body is not None or not result.request_body_bytes
        if result.not_started and (where.direct_wake or where.early):  # it still waited there, and the agent is gone
            self.counts.connect_failed += 1
            self._unreachable(where.node)
            return not call.exchange.gone and (call.body is not None or not result.request_body_bytes)
        return False

    def _answer_failure(self, call: _Call, where: Dispatch, result: ForwardResult) -> None:
        """Raise the error to answer with; return if an answer has begun or the client has left."""
        broken = result.error is not None and result.error.reason == BROKEN
        if result.outcome is RelayOutcome.UPSTREAM_FAILED_BEFORE_HEAD and broken:
            # The agent is dying with all its connections: mark the node before the lease ends, or the next request
            # would be sent on one of them.
            self._unreachable(where.node)
        cut = result.outcome in _CUT  # then the client is gone because the gateway cut its connection
        if result.outcome is RelayOutcome.CLIENT_GONE or (call.exchange.gone and not cut):
            call.traffic.left += 1
            return
        if result.outcome is RelayOutcome.CLIENT_FAILED and result.error is not None:
            raise result.error
        _log.warning(
            "gateway.request_failed",
            request_id=call.request_id,
            function=call.function.spec.name,
            uid=where.uid,
            node=where.node,
            outcome=result.outcome.value,
            error=str(result.error),
        )
        if cut or call.exchange.head_sent:
            self.counts.cut += 1
            call.traffic.cut += 1
            return
        if result.outcome is RelayOutcome.TIMEOUT_BEFORE_HEAD:
            raise DeadlineError("FUNCTION_TIMEOUT", f"{call.function.spec.name} did not answer within its timeout")
        raise InstanceError(
            "INSTANCE_CRASHED",
            f"the instance of {call.function.spec.name}, or its node's agent, went away during the request",
            instance=where.uid,
        )

    def _refusal(self, reason: RefusalReason, function: Deployed) -> HibernodeError:
        name = function.spec.name
        match reason:
            case RefusalReason.QUEUE_FULL:
                text = f"{function.spec.queue_length} requests are already waiting for {name}; try again later"
                return ExhaustedError("QUEUE_FULL", text, function=name)
            case RefusalReason.QUEUE_TIMEOUT:
                problem = self._catalog.problem(name)
                if problem is not None and problem.none_up:
                    return _no_instance(name, problem)
                text = f"no instance of {name} became free within its queue timeout"
                if why := self._gpu_wait(name):
                    text = f"{text}: {why}"
                if problem is not None:  # those that are up are busy, and there are too few of them
                    text = f"{text}; it has fewer instances than its target ({problem.reason})"
                return DeadlineError("QUEUE_TIMEOUT", text, function=name)
            case RefusalReason.UNKNOWN_FUNCTION:
                return _unknown(name)
            case RefusalReason.STOPPING:
                return UnavailableError("SCHEDULER_STOPPING", "the scheduler is stopping; try again in a moment")
            case RefusalReason.NO_CAPACITY:
                problem = self._catalog.problem(name)
                if problem is None:
                    text = f"{name} has no instances (its target is {function.target}); raise the target"
                    return UnavailableError("NO_CAPACITY", text, function=name)
                return _no_instance(name, problem)
        assert_never(reason)


def _passing_headers(head: RequestHead, route: Route, peer: str) -> list[Header]:
    """The headers for the ingress that are the same for any instance. Raises InvalidArgumentError."""
    kind = head.get(b"x-fc-invocation-type")
    if kind is not None and kind.lower() != b"sync":
        if kind.lower() == b"async":
            raise InvalidArgumentError("UNSUPPORTED", "asynchronous invocation is not supported; send Sync")
        raise InvalidArgumentError("INVOCATION_TYPE_INVALID", "x-fc-invocation-type must be Sync")
    log_type = head.get(b"x-fc-log-type")
    if log_type is not None and log_type.lower() not in (b"none", b"tail"):
        raise InvalidArgumentError("LOG_TYPE_INVALID", "x-fc-log-type must be None or Tail")
    headers = rules.request_headers(head.headers)
    if route.control_path is INVOKE:
        headers = [header for header in headers if header[0] != b"content-type"]
        headers.append(_OCTET_STREAM)
    headers.append((hop_headers.CONTROL_PATH, route.control_path))
    headers.append((hop_headers.CLIENT_IP, peer.encode()))
    if log_type is not None and log_type.lower() == b"tail":
        headers.append((b"x-fc-log-type", b"Tail"))
    return headers


def _answer_headers(answer: ResponseHead, call: _Call, where: Dispatch, served_by: bytes) -> list[Header] | None:
    """Make the client's headers from those of an ingress's answer; None for a refusal, which the client never sees.

    x-hibernode-queue-ms is the whole wait, here and at the agent; x-hibernode-wake-ms is the part spent on a wake.
    """
    headers = rules.hop_answer_headers(answer.headers)
    kept: list[Header] = []
    queue_ns, wake_ns = where.queued_ns, where.wake_ns
    for name, value in headers:
        if not name.startswith(b"x-"):
            kept.append((name, value))
        elif name.startswith(hop_headers.PREFIX):
            if name == hop_headers.REFUSED:
                return None
            if name == hop_headers.WAKE_MS:
                waited_ns = _ms_to_ns(value)  # at the agent, for the wake
                wake_ns += waited_ns
                queue_ns += waited_ns
            elif name == hop_headers.QUEUE_MS:
                queue_ns += _ms_to_ns(value)
        elif name not in _OURS_IN_ANSWERS:
            kept.append((name, value))
    call.queue_ns, call.wake_ns = queue_ns, wake_ns
    kept.append((b"x-fc-request-id", call.request_id.encode()))
    kept.append((b"x-fc-instance-id", served_by))
    if queue_ns:
        kept.append((hop_headers.QUEUE_MS, _ms(queue_ns)))
    if wake_ns:
        kept.append((hop_headers.WAKE_MS, _ms(wake_ns)))
    return kept


def _ms(ns: int) -> bytes:
    return b"%.3f" % (ns / MILLISECOND_NS)


def _ms_to_ns(value: bytes) -> int:
    whole, _, rest = value.partition(b".")
    if not (whole.isdigit() and len(value) <= 16 and (not rest or rest.isdigit())):
        return 0
    return int(float(value) * MILLISECOND_NS)


def _no_instance(name: str, problem: Problem) -> HibernodeError:
    """The answer to a request for a function without an instance: a failed start is its own fault, any other reason is
    the platform's."""
    if problem.reason in _START_FAILURES:
        return InstanceError(_START_FAILURES[problem.reason], problem.message, function=name)
    text = f"{name} has no instance: {problem.reason}: {problem.message}"
    return UnavailableError("NO_CAPACITY", text, function=name)


def _unknown(name: str) -> NotFoundError:
    text = f"no function {name[:64]!r} is deployed; `hibernode functions` lists them"
    return NotFoundError("FUNCTION_NOT_FOUND", text)
