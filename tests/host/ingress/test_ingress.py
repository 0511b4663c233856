"""The ingress over real sockets: authentication, the instance's and the client's view, and nothing left behind."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import pytest

from agent.core.types import MILLISECOND_NS, SECOND_NS, Exit, InstanceState
from agent.host.ingress.ingress import Ingress
from agent.host.instance.actor import Actor
from agent.http.exchange import Exchange
from agent.http.limits import Limits
from agent.http.request_ids import RequestIds
from agent.http.server import serve
from tests.host.rig import OCR, NodeRig, eventually, hangs, node_rig, until
from tests.http.rig import Wire, close_clients, connect

S = InstanceState
TOKEN = "node-token-0123456789"
Headers = dict[bytes, bytes]


@dataclass
class Door:
    """An ingress in front of a `NodeRig`, and a client for it."""

    rig: NodeRig
    ingress: Ingress
    port: int

    def head(self, actor: Actor | str, *more: str, method: str = "POST", path: str = "/ocr") -> bytes:
        uid = actor if isinstance(actor, str) else actor.uid
        lines = [f"{method} {path} HTTP/1.1", "host: ocr.localhost", f"x-hibernode-token: {TOKEN}"]
        lines += [f"x-hibernode-instance: {uid}", "content-length: 0", *more]
        return "\r\n".join(lines).encode() + b"\r\n\r\n"

    async def send(self, actor: Actor | str, *more: str) -> Wire:
        wire = await connect(self.port)
        await wire.send(self.head(actor, *more))
        return wire

    async def ask(self, actor: Actor | str, *more: str) -> tuple[int, Headers, bytes]:
        """One request on a connection of its own."""
        wire = await self.send(actor, *more)
        answer = await wire.message()
        wire.close()
        return answer


@asynccontextmanager
async def a_door() -> AsyncIterator[Door]:
    async with node_rig(per_gpu=2) as rig:
        ingress = Ingress(rig.node, rig.clock, [TOKEN], RequestIds(lambda: 1, lambda bits: 2))
        ingress.open = True
        faults: list[BaseException] = []
        server = await serve(
            ingress,
            "127.0.0.1",
            0,
            Limits(),
            request_ids=lambda: "1-0-0-0",
            on_fault=lambda error, _: faults.append(error),
        )
        try:
            yield Door(rig, ingress, server.port)
        finally:
            await close_clients()
            await server.close(0.0)
        assert not faults, faults
        for actor in [*rig.node.actors.values(), *rig.node.ended.values()]:
            assert (actor.gate.in_flight, actor.gate.waiting) == (0, 0), "a slot was not given back"
        assert rig.billing.health.unmatched_ends == 0


def code(answer: tuple[int, Headers, bytes]) -> tuple[int, str, bytes | None]:
    status, headers, body = answer
    return status, json.loads(body)["Code"], headers.get(b"x-hibernode-refused")


async def test_request_passes_and_the_answer_names_the_instance() -> None:
    async with a_door() as door:
        actor = await door.rig.running(replace(OCR, instance_concurrency=4))
        status, headers, body = await door.ask(actor, "x-fc-request-id: 1-67a59f35-150c1267-f381ba1c085c")
        assert (status, body) == (200, b"done")
        assert headers[b"x-fc-request-id"] == b"1-67a59f35-150c1267-f381ba1c085c"
        assert headers[b"x-fc-instance-id"] == actor.uid.encode()
        assert b"x-hibernode-wake-ms" not in headers


async def test_instance_sees_the_agents_context_headers_not_the_clients() -> None:
    async with a_door() as door:
        actor = await door.rig.running()
        await door.ask(
            actor,
            "X-Fc-Function-Name: somebody-else",
            "x_fc_function_memory: 1",
            "X-Fc-Access-Key-Id: stolen",
            "X-Hibernode-Anything: 1",
            "x_hibernode_token: 1",
            "x-hibernode-control-path: /invoke",
            "x-hibernode-client-ip: 203.0.113.9",
            "authorization: Bearer the-clients-own",
            "connection: x-fc-function-name, x-fc-request-id, keep-alive",
            "x-own: kept",
        )
        seen = door.rig.app.requests[-1].headers
        names = [name for name, _ in seen]
        assert len(names) == len(set(names))
        headers = dict(seen)
        assert headers[b"x-fc-function-name"] == b"ocr"
        assert headers[b"x-fc-function-memory"] == b"512"
        assert headers[b"x-fc-control-path"] == b"/invoke"
        assert headers[b"x-fc-client-ip"] == b"203.0.113.9"
        assert headers[b"authorization"] == b"Bearer the-clients-own"
        assert headers[b"x-own"] == b"kept"
        assert headers[b"x-fc-request-id"].startswith(b"1-")
        assert not [n for n in names if n.startswith(b"x-hibernode") or b"_" in n or b"access-key" in n]


async def test_instance_cannot_forge_the_agents_headers() -> None:
    async def spiteful(exchange: Exchange) -> None:
        ours = [(b"x-fc-request-id", b"mine"), (b"x-hibernode-refused", b"AGAIN"), (b"x-fc-instance-id", b"mine")]
        await exchange.answer(404, [*ours, (b"x-fc-status", b"404"), (b"server", b"evil")], b"")

    async with a_door() as door:
        actor = await door.rig.running()
        door.rig.app.answers["/ocr"] = spiteful
        status, headers, _ = await door.ask(actor)
        assert (status, headers[b"x-fc-status"], headers[b"x-fc-instance-id"]) == (404, b"404", actor.uid.encode())
        assert b"x-hibernode-refused" not in headers
        assert b"server" not in headers


@pytest.mark.parametrize("given", ["", "wrong-token-0123456789", "nöde"])
async def test_request_without_the_token_is_refused(given: str) -> None:
    async with a_door() as door:
        actor = await door.rig.running()
        wire = await connect(door.port)
        line = f"x-hibernode-token: {given}\r\n" if given else ""
        await wire.send(f"GET /ocr HTTP/1.1\r\nhost: h\r\n{line}x-hibernode-instance: {actor.uid}\r\n\r\n".encode())
        status, _, body = await wire.message()
        assert status in (400, 401)
        assert actor.uid.encode() not in body
        assert door.rig.app.paths() == []


async def test_an_unknown_instance_and_a_missing_one() -> None:
    async with a_door() as door:
        assert code(await door.ask("i-nobody")) == (404, "InstanceNotFound", b"INSTANCE_NOT_FOUND")
        assert code(await door.ask("")) == (400, "InvalidArgument", b"INSTANCE_MISSING")


@pytest.mark.parametrize("value", ["soon", "-5", "1e3", "99999999999"])
async def test_a_deadline_that_is_no_number_is_refused(value: str) -> None:
    async with a_door() as door:
        actor = await door.rig.running()
        answer = await door.ask(actor, f"x-hibernode-deadline-ms: {value}")
        assert code(answer) == (400, "InvalidArgument", b"DEADLINE_INVALID")


async def test_a_request_id_that_could_do_harm_is_replaced() -> None:
    async with a_door() as door:
        actor = await door.rig.running()
        _, headers, _ = await door.ask(actor, "x-fc-request-id: \xe9vil id")
        assert headers[b"x-fc-request-id"].startswith(b"1-00000001-")


async def test_before_recovery_and_while_stopping_requests_may_go_elsewhere() -> None:
    async with a_door() as door:
        actor = await door.rig.running()
        door.ingress.open = False
        assert code(await door.ask(actor)) == (503, "NodeRecovering", b"NODE_RECOVERING")
        door.ingress.leaving = True
        assert code(await door.ask(actor)) == (503, "AgentStopping", b"AGENT_STOPPING")


async def test_frozen_instance_wakes_for_a_request_and_reports_the_wake_time() -> None:
    async with a_door() as door:
        actor = await door.rig.frozen()
        door.rig.freezer.hold("wake")
        asking = asyncio.create_task(door.ask(actor))
        await door.rig.freezer.entered("wake")
        assert door.rig.app.paths() == []
        door.rig.clock.advance(120 * MILLISECOND_NS)
        door.rig.freezer.release("wake")
        status, headers, _ = await asking
        assert (status, headers[b"x-hibernode-wake-ms"]) == (200, b"120.000")


async def test_a_busy_instance_queues_and_says_how_long() -> None:
    async with a_door() as door:
        actor = await door.rig.running()
        go = asyncio.Event()

        async def held(exchange: Exchange) -> None:
            await go.wait()
            await exchange.answer(200, [], b"done")

        door.rig.app.answers["/ocr"] = held
        first = asyncio.create_task(door.ask(actor))
        await door.rig.app.until_asked("/ocr")
        second = asyncio.create_task(door.ask(actor))
        await eventually(lambda: actor.gate.waiting == 1)
        door.rig.clock.advance(7 * MILLISECOND_NS)
        go.set()
        assert b"x-hibernode-queue-ms" not in (await first)[1]
        assert (await second)[1][b"x-hibernode-queue-ms"] == b"7.000"


async def test_the_queue_timeout_is_a_504_that_never_reached_the_instance() -> None:
    async with a_door() as door:
        actor = await door.rig.frozen()
        door.rig.freezer.hold("wake")
        answer = await door.ask(actor, "x-hibernode-deadline-ms: 10")
        assert code(answer) == (504, "QueueTimeout", b"QUEUE_TIMEOUT")
        door.rig.freezer.release("wake")
        await until(actor, S.RUNNING)
        assert door.rig.app.paths() == []


async def test_a_full_queue_is_a_429() -> None:
    async with a_door() as door:
        actor = await door.rig.frozen(replace(OCR, queue_length=1))
        door.rig.freezer.hold("wake")
        first = asyncio.create_task(door.ask(actor))
        await eventually(lambda: actor.gate.waiting == 1)
        answer = await door.ask(actor)
        assert code(answer) == (429, "ResourceExhausted", b"QUEUE_FULL")
        assert answer[1][b"retry-after"] == b"1"
        door.rig.freezer.release("wake")
        assert (await first)[0] == 200


async def test_client_that_leaves_while_queued_frees_its_place() -> None:
    async with a_door() as door:
        actor = await door.rig.frozen()
        door.rig.freezer.hold("wake")
        wire = await door.send(actor)
        await eventually(lambda: actor.gate.waiting == 1)
        wire.reset()
        await eventually(lambda: actor.gate.waiting == 0)
        door.rig.freezer.release("wake")
        await until(actor, S.RUNNING)
        assert door.rig.app.paths() == []


async def test_client_that_leaves_in_the_middle_frees_the_slot() -> None:
    async with a_door() as door:
        actor = await door.rig.running()
        left = asyncio.Event()

        async def waits(exchange: Exchange) -> None:
            exchange.on_gone(left.set)
            await left.wait()

        door.rig.app.answers["/ocr"] = waits
        wire = await door.send(actor)
        await door.rig.app.until_asked("/ocr")
        wire.reset()
        await asyncio.wait_for(left.wait(), 5)
        await eventually(lambda: actor.gate.in_flight == 0)


async def test_crash_is_a_502_that_is_not_repeated() -> None:
    async def crashes(exchange: Exchange) -> None:
        left = asyncio.Event()
        exchange.on_gone(left.set)
        exchange.abort()
        await left.wait()

    async with a_door() as door:
        actor = await door.rig.running()
        door.rig.app.answers["/ocr"] = crashes
        assert code(await door.ask(actor)) == (502, "InstanceCrashed", None)


async def test_refused_connection_counts_as_not_reached() -> None:
    async with a_door() as door:
        actor = await door.rig.running()
        assert actor.pool is not None
        actor.pool.close()
        assert code(await door.ask(actor)) == (502, "InstanceCrashed", b"CONNECT_FAILED")


async def test_exit_fails_requests_inside_and_refuses_queued_ones() -> None:
    async with a_door() as door:
        actor = await door.rig.running()
        door.rig.app.answers["/ocr"] = hangs
        inside = asyncio.create_task(door.ask(actor))
        await door.rig.app.until_asked("/ocr")
        waiting = asyncio.create_task(door.ask(actor))
        await eventually(lambda: actor.gate.waiting == 1)
        door.rig.runtime.exit(actor.uid, Exit(code=1))
        assert code(await inside) == (502, "InstanceCrashed", None)
        assert code(await waiting)[2] == b"INSTANCE_CRASHED"


async def test_a_timeout_returns_the_slot_and_two_in_a_row_replace_the_instance() -> None:
    async with a_door() as door:
        actor = await door.rig.running(replace(OCR, timeout_ns=30 * MILLISECOND_NS))
        door.rig.app.answers["/ocr"] = hangs
        assert code(await door.ask(actor)) == (504, "FunctionTimeout", None)
        assert actor.state is S.RUNNING
        assert code(await door.ask(actor)) == (504, "FunctionTimeout", None)
        await eventually(lambda: actor.uid in door.rig.node.ended)
        assert actor.instance.reason == "INSTANCE_UNRESPONSIVE"


async def test_answer_in_between_resets_the_count_of_timeouts() -> None:
    async with a_door() as door:
        actor = await door.rig.running(replace(OCR, timeout_ns=30 * MILLISECOND_NS))
        for answer in (hangs, 200, hangs):
            door.rig.app.answers["/ocr"] = answer
            await door.ask(actor)
        assert actor.state is S.RUNNING


async def test_the_active_time_is_the_union_of_the_requests() -> None:
    async with a_door() as door:
        actor = await door.rig.running(replace(OCR, instance_concurrency=2))
        go = asyncio.Event()

        async def held(exchange: Exchange) -> None:
            await go.wait()
            await exchange.answer(200, [], b"")

        door.rig.app.answers["/ocr"] = held
        asking = [asyncio.create_task(door.ask(actor)) for _ in range(2)]
        await door.rig.app.until_asked("/ocr", times=2)
        door.rig.clock.advance(3 * SECOND_NS)
        go.set()
        await asyncio.gather(*asking)
        await eventually(lambda: actor.gate.in_flight == 0)
        door.rig.clock.advance(5 * SECOND_NS)
        active, idle, _ = door.rig.billing.totals(actor.uid)
        assert (active, idle) == (3 * SECOND_NS, 5 * SECOND_NS)


async def test_an_instance_that_is_being_stopped_takes_nobody() -> None:
    from agent.core.lifecycle.events import StopAsked

    async with a_door() as door:
        actor = await door.rig.running()
        door.rig.runtime.containers[actor.uid].heeds_term = False
        actor.handle(StopAsked(SECOND_NS))
        assert code(await door.ask(actor))[2] == b"INSTANCE_STOPPING"


async def test_the_scheduler_may_ask_for_a_wake_and_gets_the_free_slots() -> None:
    async with a_door() as door:
        actor = await door.rig.frozen(replace(OCR, instance_concurrency=3))
        wire = await connect(door.port)
        await wire.send(door.head(actor, "x-hibernode-wake-hold-ms: 2000", path="/hibernode/wake"))
        status, headers, _ = await wire.message()
        assert (status, headers[b"x-hibernode-free-slots"]) == (200, b"3")
        assert actor.state is S.RUNNING
        assert door.rig.app.paths() == [], "the instance hears nothing of it"


@pytest.mark.parametrize("hold", ["soon", "-1", "601000"])
async def test_a_wake_with_a_hold_that_is_none_is_refused(hold: str) -> None:
    async with a_door() as door:
        actor = await door.rig.frozen()
        wire = await connect(door.port)
        await wire.send(door.head(actor, f"x-hibernode-wake-hold-ms: {hold}", path="/hibernode/wake"))
        assert code(await wire.message()) == (400, "InvalidArgument", b"HOLD_INVALID")
        assert str(actor.state) == str(S.FROZEN)


async def test_that_path_without_the_header_is_the_functions_own() -> None:
    async with a_door() as door:
        actor = await door.rig.running()
        wire = await connect(door.port)
        await wire.send(door.head(actor, path="/hibernode/wake"))
        assert (await wire.message())[0] == 200
        assert door.rig.app.paths() == ["/hibernode/wake"]
