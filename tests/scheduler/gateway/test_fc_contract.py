"""Function Compute's contract at the gateway, clause by clause (agent/docs/facts/function-compute.md)."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent.core.provisioning.problem import Problem
from tests.fakes.agent_node import FakeIngress, Received
from tests.http.rig import Wire
from tests.scheduler.gateway.rig import GatewayRig, gateway_rig

DATE = b"Sun, 06 Nov 1994 08:49:37 GMT"
REQUEST_ID = re.compile(rb"1-[0-9a-f]{8}-[0-9a-f]{8}-[0-9a-f]{12}")


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[GatewayRig]:
    async with gateway_rig(str(tmp_path), "n1") as made:
        await made.deploy()
        yield made


def request(*lines: str, line: str = "GET /fn/ocr/") -> bytes:
    return "\r\n".join((f"{line} HTTP/1.1", "host: g", *lines)).encode() + b"\r\n\r\n"


def padded(total: int) -> bytes:
    """A request whose header lines have so many bytes together, line ends included."""
    host = len("host: g\r\n")
    return request("x: " + "y" * (total - host - len("x: \r\n")))


@pytest.mark.parametrize(
    ("raw", "status", "code"),
    [
        (padded(8192), 200, ""),
        (padded(8193), 400, "InvalidArgument"),
        (request(line="GET /fn/ocr/" + "a" * (4096 - len("/fn/ocr/"))), 200, ""),
        (request(line="GET /fn/ocr/" + "a" * (4097 - len("/fn/ocr/"))), 400, "InvalidArgument"),
        (request(line="GET /fn/ocr/?" + "a" * 4096), 400, "InvalidArgument"),
        (request("content-length: 33554432", "expect: 100-continue", line="POST /fn/ocr/"), 100, ""),
        (request("content-length: 33554433", line="POST /fn/ocr/"), 413, "RequestEntityTooLarge"),
        (request("x-fc-invocation-type: Sync"), 200, ""),
        (request("x-fc-invocation-type: async"), 400, "InvalidArgument"),
        (request("x-fc-invocation-type: Later"), 400, "InvalidArgument"),
        (request("x-fc-log-type: None"), 200, ""),
        (request("x-fc-log-type: Head"), 400, "InvalidArgument"),
        (request(line="GET /fn/nobody/"), 404, "FunctionNotFound"),
    ],
)
async def test_limits_of_a_request(rig: GatewayRig, raw: bytes, status: int, code: str) -> None:
    rig.instance("i1")
    wire: Wire = await rig.wire()
    await wire.send(raw)
    got, headers = await wire.head()
    assert got == status
    if got == 100:
        return
    body = await wire.exactly(int(headers[b"content-length"]))
    if code:
        assert json.loads(body)["Code"] == code
        assert json.loads(body)["RequestId"].encode() == headers[b"x-fc-request-id"]
        assert rig.ingresses["n1"].received == []
    assert REQUEST_ID.fullmatch(headers[b"x-fc-request-id"])
    assert headers[b"date"] == DATE
    assert b"server" not in headers


async def test_asynchronous_calls_are_refused_by_name(rig: GatewayRig) -> None:
    _, _, body = await rig.ask(request("x-fc-invocation-type: Async", "x-fc-async-task-id: t1"))
    assert "asynchronous invocation is not supported" in json.loads(body)["Message"]


@pytest.mark.parametrize(("given", "passed"), [("Tail", "Tail"), ("tail", "Tail"), ("None", None)])
async def test_the_log_type_is_passed_on_and_the_log_comes_back(
    rig: GatewayRig, given: str, passed: str | None
) -> None:
    rig.instance("i1")
    rig.ingresses["n1"].more_headers = [(b"x-fc-log-result", b"bG9n")]
    _, headers, _ = await rig.ask(request(f"x-fc-log-type: {given}", "x-fc-async-task-id: t1"))
    assert headers[b"x-fc-log-result"] == b"bG9n"
    (received,) = rig.ingresses["n1"].received
    assert received.get("x-fc-log-type") == passed
    assert received.get("x-fc-async-task-id") is None


async def test_an_answer_keeps_the_functions_headers_but_none_of_ours(rig: GatewayRig) -> None:
    async def fails(ingress: FakeIngress, exchange: object, received: Received) -> None:
        headers = [(b"x-fc-status", b"404"), (b"date", b"yesterday"), (b"keep-alive", b"timeout=5")]
        await exchange.answer(404, headers, b"no text found")  # type: ignore[attr-defined]

    rig.instance("i1")
    rig.ingresses["n1"].script.append(fails)
    status, headers, body = await rig.ask(request())
    assert (status, body, headers[b"x-fc-status"], headers[b"date"]) == (404, b"no text found", b"404", DATE)
    assert b"keep-alive" not in headers


@pytest.mark.parametrize(
    ("reason", "kind"),
    [("INITIALIZATION_ERROR", b"InitializationError"), ("HEALTH_CHECK_FAILED", b"FunctionNotStarted")],
)
async def test_a_start_that_failed_reaches_the_client(rig: GatewayRig, reason: str, kind: bytes) -> None:
    waiting = asyncio.create_task(rig.ask(request()))
    await rig.until(rig.queued, "it is queued while capacity is expected")
    rig.catalog.set_problem("ocr", Problem(reason, "POST /initialize answered 500", no_capacity_expected=True))
    status, headers, _ = await waiting
    assert (status, headers[b"x-fc-error-type"]) == (502, kind)


async def test_the_answer_to_garbage_has_a_date_too(rig: GatewayRig) -> None:
    status, headers, _ = await rig.ask(b"GARBAGE\r\n\r\n")
    assert (status, headers[b"date"]) == (400, DATE)
