"""The gateway over real sockets: routes, headers, the queue, and when a request may be sent again."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent.core.dispatch.events import InstanceReported, NodeReported, WakeAnswered
from agent.core.provisioning.problem import Problem
from agent.core.types import MILLISECOND_NS, InstanceState
from agent.http.exchange import Exchange
from tests.fakes.agent_node import FakeIngress, Received, die_in_the_middle, hold, refuse, refuse_before_body, vanish
from tests.scheduler.gateway.rig import TOKEN, GatewayRig, gateway_rig

GET = b"GET /fn/ocr/read?page=2 HTTP/1.1\r\nhost: gateway\r\n\r\n"


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[GatewayRig]:
    async with gateway_rig(str(tmp_path), "n1", "n2") as made:
        await made.deploy()
        yield made


def code(body: bytes) -> str:
    answer = json.loads(body)
    assert set(answer) == {"RequestId", "Code", "Message"}
    return str(answer["Code"])


# ---- routes and headers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_line", "host", "target", "control"),
    [
        ("PUT /a/b?c=d", "ocr.localhost:8600", "/a/b?c=d", "/http-invoke"),
        ("PUT /a/b?c=d", "ocr.LOCALHOST", "/a/b?c=d", "/http-invoke"),
        ("PUT /fn/ocr/a/b?c=d", "gateway", "/a/b?c=d", "/http-invoke"),
        ("PUT /fn/ocr", "gateway", "/", "/http-invoke"),
        ("PUT /fn/ocr?c=d", "gateway", "/?c=d", "/http-invoke"),
        ("POST /2023-03-30/functions/ocr/invocations?qualifier=LATEST", "gateway", "/invoke", "/invoke"),
    ],
)
async def test_three_routes_lead_to_a_function(
    rig: GatewayRig, request_line: str, host: str, target: str, control: str
) -> None:
    rig.instance("i1")
    raw = f"{request_line} HTTP/1.1\r\nhost: {host}\r\ncontent-type: text/x\r\ncontent-length: 2\r\n\r\nhi".encode()
    status, _, body = await rig.ask(raw)
    assert (status, body) == (200, b"hi")
    (received,) = rig.ingresses["n1"].received
    assert received.target == target
    assert received.get("x-hibernode-control-path") == control
    expected = "application/octet-stream" if control == "/invoke" else "text/x"
    assert received.get("content-type") == expected


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(
    ("target", "location"),
    [
        ("/fn/ocr", b"/fn/ocr/"),
        ("/fn/ocr?", b"/fn/ocr/?"),
        ("/fn/ocr?page=2&next=/a/b", b"/fn/ocr/?page=2&next=/a/b"),
        ("http://gateway/fn/ocr?c=d", b"/fn/ocr/?c=d"),
    ],
)
async def test_a_page_without_the_last_slash_is_redirected(
    rig: GatewayRig, method: str, target: str, location: bytes
) -> None:
    """Else the page's relative links would lead to `/fn/`. No instance is asked, and none is needed."""
    wire = await rig.wire()
    await wire.send(f"{method} {target} HTTP/1.1\r\nhost: gateway\r\n\r\n".encode())
    status, headers, body = await wire.message(bodyless=method == "HEAD")
    assert (status, headers[b"location"], body) == (308, location, b"")
    assert headers[b"x-fc-request-id"]
    assert rig.gateway.traffic.of("ocr").invocations == 0
    await wire.send(f"{method} /fn/nobody HTTP/1.1\r\nhost: gateway\r\n\r\n".encode())
    assert (await wire.message(bodyless=method == "HEAD"))[0] == 404, "the connection goes on, and no name is made up"


async def test_a_host_name_without_a_path_is_no_prefix(rig: GatewayRig) -> None:
    rig.instance("i1")
    assert (await rig.ask(b"GET /fn/ocr HTTP/1.1\r\nhost: ocr.localhost\r\n\r\n"))[0] == 200


async def test_a_host_name_has_no_case_and_a_function_s_name_does(rig: GatewayRig) -> None:
    """Browsers fold host names: `Face-ID` must be reachable as face-id.localhost, yet not by the wrong path."""
    await rig.deploy("Face-ID", target=0)
    for host, status in (("face-id.localhost", 503), ("FACE-ID.localhost.:8600", 503), ("Face-ID.localhost:", 503)):
        asked = await rig.ask(f"GET / HTTP/1.1\r\nhost: {host}\r\n\r\n".encode())
        assert asked[0] == status, "found, though it has no instance"
    assert (await rig.ask(b"GET /fn/face-id/ HTTP/1.1\r\nhost: g\r\n\r\n"))[0] == 404
    await rig.deploy("FACE-id", target=0)
    assert (await rig.ask(b"GET / HTTP/1.1\r\nhost: face-id.localhost\r\n\r\n"))[0] == 404, "either could be meant"
    assert (await rig.ask(b"GET / HTTP/1.1\r\nhost: Face-ID.localhost\r\n\r\n"))[0] == 503


async def test_headers_to_the_ingress_and_to_the_client(rig: GatewayRig) -> None:
    rig.instance("i1")
    status, headers, _ = await rig.ask(GET)
    assert status == 200
    (received,) = rig.ingresses["n1"].received
    assert received.get("x-hibernode-token") == TOKEN.decode()
    assert received.get("x-hibernode-instance") == "i1"
    assert 59_000 < int(received.get("x-hibernode-deadline-ms") or 0) <= 60_000
    assert received.get("x-hibernode-client-ip") == "127.0.0.1"
    assert received.get("x-fc-request-id") == headers[b"x-fc-request-id"].decode()
    assert headers[b"x-fc-instance-id"] == b"i1"
    assert headers[b"x-fc-status"] == b"200"
    assert not [name for name in headers if name.startswith(b"x-hibernode-")], "neither the hop's own nor empty times"


async def test_spoofed_headers_are_dropped_and_authorization_passes(rig: GatewayRig) -> None:
    rig.instance("i1")
    spoofed = (
        b"GET /fn/ocr/ HTTP/1.1\r\nhost: g\r\nX-Fc-Request-Id: mine\r\nX_FC_Account_Id: root\r\n"
        b"x-hibernode-instance: other\r\nX-HIBERNODE_Token: guess\r\nauthorization: Bearer app\r\n"
        b"connection: x-hibernode-token, x-fc-request-id\r\n\r\n"
    )
    assert (await rig.ask(spoofed))[0] == 200
    (received,) = rig.ingresses["n1"].received
    folded = [name.lower().replace(b"_", b"-") for name, _ in received.headers]
    assert len(folded) == len(set(folded)), "one of ours came twice"
    assert b"x-fc-account-id" not in folded
    assert received.uid == "i1"
    assert received.get("x-hibernode-token") == TOKEN.decode()
    assert received.get("authorization") == "Bearer app"


@pytest.mark.parametrize(
    ("raw", "status", "expected"),
    [
        (b"GET /fn/nobody/ HTTP/1.1\r\nhost: g\r\n\r\n", 404, "FunctionNotFound"),
        (b"GET / HTTP/1.1\r\nhost: nobody.localhost\r\n\r\n", 404, "FunctionNotFound"),
        (b"GET / HTTP/1.1\r\nhost: g\r\n\r\n", 404, "FunctionNotFound"),
        (b"GET /2023-03-30/functions/ocr/invocations HTTP/1.1\r\nhost: g\r\n\r\n", 405, "MethodNotAllowed"),
        (b"GET /fn/ocr/ HTTP/1.1\r\nhost: g\r\nx-fc-invocation-type: Async\r\n\r\n", 400, "InvalidArgument"),
        (b"GET /fn/ocr/ HTTP/1.1\r\nhost: g\r\nx-fc-log-type: All\r\n\r\n", 400, "InvalidArgument"),
    ],
)
async def test_invalid_requests_get_an_error(rig: GatewayRig, raw: bytes, status: int, expected: str) -> None:
    rig.instance("i1")
    got, _, body = await rig.ask(raw)
    assert (got, code(body)) == (status, expected)
    assert rig.dispatch_loop.open_requests == 0


async def test_methods_a_trigger_leaves_out_are_405(rig: GatewayRig) -> None:
    await rig.deploy("strict", methods=("POST",))
    status, _, body = await rig.ask(b"GET /fn/strict/ HTTP/1.1\r\nhost: g\r\n\r\n")
    assert (status, code(body)) == (405, "MethodNotAllowed")


# ---- the queue ------------------------------------------------------------------------------------------------


async def test_a_request_waits_for_the_wake_and_reports_it(rig: GatewayRig) -> None:
    rig.apply(InstanceReported("x", "llm", "n1", InstanceState.RUNNING, gpus=("g0",)))
    rig.apply(InstanceReported("i1", "ocr", "n1", InstanceState.FROZEN, gpus=("g0",)))
    asked = asyncio.create_task(rig.ask(GET))
    await rig.until(lambda: rig.wakes, "the wake")
    rig.apply(WakeAnswered("i1"))
    status, headers, _ = await asked
    assert status == 200
    assert float(headers[b"x-hibernode-queue-ms"]) >= float(headers[b"x-hibernode-wake-ms"]) > 0


async def test_full_queue_is_429_with_retry_after(rig: GatewayRig) -> None:
    await rig.deploy(queue_length=1)
    waiting = asyncio.create_task(rig.ask(GET))
    await rig.until(rig.queued, "one waits")
    status, headers, body = await rig.ask(GET)
    assert (status, code(body)) == (429, "ResourceExhausted")
    assert int(headers[b"retry-after"]) >= 1
    rig.instance("i1")
    assert (await waiting)[0] == 200


async def test_a_queued_request_is_504_at_its_queue_timeout(rig: GatewayRig) -> None:
    await rig.deploy(queue_timeout_ns=30 * MILLISECOND_NS)
    status, _, body = await rig.ask(GET)
    assert (status, code(body)) == (504, "QueueTimeout")
    assert rig.queued() == 0


@pytest.mark.parametrize(
    ("reason", "status", "expected"),
    [("NO_FREE_GPU", 503, "NoCapacity"), ("FUNCTION_NOT_STARTED", 502, "FunctionNotStarted")],
)
async def test_a_request_that_waited_in_vain_gets_the_known_reason(
    rig: GatewayRig, reason: str, status: int, expected: str
) -> None:
    await rig.deploy(queue_timeout_ns=30 * MILLISECOND_NS)
    rig.catalog.set_problem("ocr", Problem(reason, "the reason for people", none_up=True))
    found, _, body = await rig.ask(GET)
    assert (found, code(body)) == (status, expected)
    assert b"the reason for people" in body


async def test_a_queue_timeout_names_why_there_are_too_few_instances(rig: GatewayRig) -> None:
    await rig.deploy(queue_timeout_ns=30 * MILLISECOND_NS)
    rig.catalog.set_problem("ocr", Problem("NO_FREE_GPU", "Logs: secret"))
    status, _, body = await rig.ask(GET)
    assert (status, code(body)) == (504, "QueueTimeout")
    assert b"NO_FREE_GPU" in body
    assert b"secret" not in body, "only a function's own failure to start is quoted"


async def test_a_queue_timeout_names_who_holds_the_gpu(rig: GatewayRig) -> None:
    await rig.deploy(queue_timeout_ns=30 * MILLISECOND_NS)
    rig.gpu_waits["ocr"] = "its GPU is held by i2 of chat, RUNNING for 75 s"
    status, _, body = await rig.ask(GET)
    assert (status, code(body)) == (504, "QueueTimeout")
    assert b"within its queue timeout: its GPU is held by i2 of chat, RUNNING for 75 s" in body


async def test_target_zero_is_503(rig: GatewayRig) -> None:
    await rig.deploy("idle", target=0)
    status, _, body = await rig.ask(b"GET /fn/idle/ HTTP/1.1\r\nhost: g\r\n\r\n")
    assert (status, code(body)) == (503, "NoCapacity")


@pytest.mark.parametrize(
    ("reason", "status", "expected"),
    [
        ("INITIALIZATION_ERROR", 502, "InitializationError"),
        ("FUNCTION_NOT_STARTED", 502, "FunctionNotStarted"),
        ("START_FAILED", 502, "FunctionNotStarted"),
        ("OUT_OF_MEMORY", 502, "InstanceCrashed"),
        ("COMMAND_NOT_FOUND", 502, "FunctionNotStarted"),
        ("IMAGE_PULL_DENIED", 502, "FunctionNotStarted"),
        ("DISK_FULL", 503, "NoCapacity"),
        ("IMAGE_RUNTIME_UNAVAILABLE", 503, "NoCapacity"),
    ],
)
async def test_a_function_without_expected_capacity_refuses_with_its_reason(
    rig: GatewayRig, reason: str, status: int, expected: str
) -> None:
    waiting = asyncio.create_task(rig.ask(GET))
    await rig.until(rig.queued, "it is queued while capacity is expected")
    rig.catalog.set_problem("ocr", Problem(reason, "the reason for people", no_capacity_expected=True))
    for answer in (await waiting, await rig.ask(GET)):
        assert (answer[0], code(answer[2])) == (status, expected)
        assert b"the reason for people" in answer[2]


async def test_a_client_that_leaves_the_queue_frees_its_place(rig: GatewayRig) -> None:
    wire = await rig.wire()
    await wire.send(GET)
    await rig.until(rig.queued, "it waits")
    wire.close()
    await rig.until(lambda: not rig.queued(), "its place is free")
    rig.instance("i1")
    assert rig.ingresses["n1"].received == []


async def test_a_client_that_leaves_during_its_request_gives_the_lease_back(rig: GatewayRig) -> None:
    rig.instance("i1")
    ingress = rig.ingresses["n1"]
    ingress.script.append(hold(asyncio.Event()))
    wire = await rig.wire()
    await wire.send(GET)
    await ingress.until_received(1)
    assert rig.dispatcher.leased("i1") == 1
    wire.close()
    await rig.until(lambda: not rig.dispatcher.leased("i1"), "the lease is back")
    async with asyncio.timeout(10):
        await ingress.left.wait()  # and the connection to the instance is closed
    assert (await rig.ask(GET))[0] == 200


async def test_a_stopping_scheduler_refuses_queued_requests_and_finishes_the_others(rig: GatewayRig) -> None:
    rig.instance("i1")
    go = asyncio.Event()
    rig.ingresses["n1"].script.append(hold(go))
    inside = asyncio.create_task(rig.ask(GET))
    await rig.ingresses["n1"].until_received(1)
    waiting = asyncio.create_task(rig.ask(GET))
    await rig.until(rig.queued, "the second one waits")
    assert rig.dispatch_loop.close() == 1
    status, headers, body = await waiting
    assert (status, code(body), headers[b"retry-after"]) == (503, "SchedulerStopping", b"1")
    assert (await rig.ask(GET))[0] == 503, "later requests are refused at once"
    go.set()
    assert (await inside)[0] == 200
    assert rig.dispatch_loop.open_requests == 0


# ---- once more, or never again --------------------------------------------------------------------------------


async def test_a_refused_request_goes_to_another_instance(rig: GatewayRig) -> None:
    rig.instance("i1")
    rig.instance("i2", node="n2")
    for ingress in rig.ingresses.values():
        ingress.script.append(refuse("INSTANCE_STOPPING"))
    asked = asyncio.create_task(rig.ask(b"POST /fn/ocr/ HTTP/1.1\r\nhost: g\r\ncontent-length: 4\r\n\r\nbody"))
    await rig.ingresses["n1"].until_received(1)
    await rig.ingresses["n2"].until_received(1)
    await rig.until(rig.queued, "both refused, it waits again")
    rig.apply(NodeReported("n1"))
    status, headers, body = await asked
    assert (status, body, headers[b"x-fc-instance-id"]) == (200, b"body", b"i1")
    assert b"x-hibernode-refused" not in headers


async def test_a_dead_node_is_suspect_and_its_request_waits(rig: GatewayRig) -> None:
    rig.instance("i1")
    ingress = rig.ingresses["n1"]
    await ingress.kill()
    asked = asyncio.create_task(rig.ask(GET))
    await rig.until(lambda: rig.suspects, "the node is suspect")
    assert rig.queued() == 1
    await ingress.start(ingress.port)
    rig.apply(NodeReported("n1"))
    assert (await asked)[0] == 200
    assert len(ingress.received) == 1


async def test_requests_inside_a_dying_agent_are_502_and_never_sent_again(rig: GatewayRig) -> None:
    rig.instance("i1")
    rig.instance("i2", node="n2")
    for ingress in rig.ingresses.values():
        ingress.default = vanish
    status, _, body = await rig.ask(GET)
    assert (status, code(body)) == (502, "InstanceCrashed")
    assert sum(len(ingress.received) for ingress in rig.ingresses.values()) == 1
    assert rig.dispatcher.leased("i1") == rig.dispatcher.leased("i2") == 0


async def test_a_queued_request_is_not_sent_to_an_agent_that_just_died(rig: GatewayRig) -> None:
    """All connections to that agent are dead, though the gateway has read the end of one only."""
    rig.instance("i1")
    ingress = rig.ingresses["n1"]
    ingress.script.append(vanish)
    first, second = asyncio.create_task(rig.ask(GET)), asyncio.create_task(rig.ask(GET))
    await rig.until(lambda: rig.suspects, "the node is suspect")
    assert rig.queued() == 1
    rig.apply(NodeReported("n1"))
    assert sorted([(await first)[0], (await second)[0]]) == [200, 502]
    assert len(ingress.received) == 2


async def test_an_answer_that_is_not_http_is_502_and_not_the_nodes_fault(rig: GatewayRig) -> None:
    """Otherwise one function's answers would take its node from all others."""
    rig.instance("i1")

    async def babbles(ingress: FakeIngress, exchange: Exchange, received: Received) -> None:
        exchange._connection.transport.write(b"HTTP/1.1 200 OK\r\nno colon here\r\n\r\n")
        exchange.abort()

    rig.ingresses["n1"].script.append(babbles)
    assert (await rig.ask(GET))[0] == 502
    assert rig.suspects == []
    assert (await rig.ask(GET))[0] == 200


async def test_a_half_answer_is_cut_not_completed(rig: GatewayRig) -> None:
    rig.instance("i1")
    seen = asyncio.Event()
    rig.ingresses["n1"].script.append(die_in_the_middle(seen))
    wire = await rig.wire()
    await wire.send(GET)
    status, headers = await wire.head()
    assert status == 200
    seen.set()
    assert len(await wire.rest()) < int(headers[b"content-length"])
    await rig.until(lambda: not rig.dispatcher.leased("i1"), "the lease is back")


async def test_a_large_body_stays_with_the_client_until_an_instance_takes_it(rig: GatewayRig) -> None:
    rig.instance("i1")
    ingress = rig.ingresses["n1"]
    ingress.script.append(refuse_before_body("GATE_CLOSED"))
    body = bytes(range(256)) * 1024  # 256 KiB
    wire = await rig.wire()
    head = b"POST /fn/ocr/ HTTP/1.1\r\nhost: g\r\nexpect: 100-continue\r\ncontent-length: %d\r\n\r\n" % len(body)
    await wire.send(head)
    await rig.until(rig.queued, "refused once, waiting again")
    rig.apply(NodeReported("n1"))
    assert (await wire.head())[0] == 100
    await wire.send(body)
    status, _, answer = await wire.message()
    assert (status, answer) == (200, body)
    assert len(ingress.received) == 2


async def test_a_large_chunked_body_without_expect_arrives_whole(rig: GatewayRig) -> None:
    rig.instance("i1")
    piece = b"x" * 32768
    wire = await rig.wire()
    await wire.send(b"POST /fn/ocr/ HTTP/1.1\r\nhost: g\r\ntransfer-encoding: chunked\r\n\r\n")
    for _ in range(5):
        await wire.send(b"8000\r\n" + piece + b"\r\n")
    await wire.send(b"0\r\n\r\n")
    status, _, answer = await wire.message()
    assert (status, answer) == (200, piece * 5)


async def test_one_connection_serves_many_requests(rig: GatewayRig) -> None:
    rig.instance("i1")
    wire = await rig.wire()
    for _ in range(20):
        await wire.send(GET)
        assert (await wire.message())[0] == 200
    assert rig.dispatch_loop.open_requests == 0
    assert rig.gateway.counts.answers == {200: 20}
