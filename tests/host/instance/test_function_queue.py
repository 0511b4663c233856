"""Requests that any instance of a function may serve: the first to free takes the oldest, and none is lost."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from agent.core.lifecycle.events import StopAsked
from agent.core.types import SECOND_NS, InstanceState
from agent.http.exchange import Exchange
from tests.host.ingress.test_ingress import Door, a_door, code
from tests.host.rig import OCR, eventually, until
from tests.http.rig import Wire, connect

ANY = "x-hibernode-any-instance: 1"
NOTICE = "x-hibernode-started: 1"


class Slow:
    """The server inside the instances: each request waits until it is let go, by the number of its arrival."""

    def __init__(self) -> None:
        self.inside: list[asyncio.Event] = []

    async def __call__(self, exchange: Exchange) -> None:
        go = asyncio.Event()
        self.inside.append(go)
        await exchange.buffer_body(1 << 20)
        await go.wait()
        await exchange.answer(200, [], b"done")


async def busy_pair(door: Door) -> tuple[Slow, list[str], list[Wire]]:
    """Two instances of one function with a request in each; their uids."""
    slow = Slow()
    pair = [await door.rig.running(), await door.rig.running()]
    door.rig.app.answers["/ocr"] = slow
    wires = []
    for number, actor in enumerate(pair):
        wires.append(await door.send(actor, ANY))
        await door.rig.app.until_asked("/ocr", number + 1)
    return slow, [actor.uid for actor in pair], wires


async def test_a_free_sibling_serves_where_the_named_one_is_busy() -> None:
    async with a_door() as door:
        busy, idle = await door.rig.running(), await door.rig.running()
        slow = Slow()
        door.rig.app.answers["/ocr"] = slow
        first = await door.send(busy, ANY)
        await door.rig.app.until_asked("/ocr")
        second = await door.send(busy, ANY)
        await door.rig.app.until_asked("/ocr", 2)
        for go in slow.inside:
            go.set()
        assert (await first.message())[1][b"x-fc-instance-id"] == busy.uid.encode()
        assert (await second.message())[1][b"x-fc-instance-id"] == idle.uid.encode()


async def test_request_for_one_instance_waits_for_that_instance() -> None:
    async with a_door() as door:
        busy = await door.rig.running()
        await door.rig.running()
        slow = Slow()
        door.rig.app.answers["/ocr"] = slow
        await door.send(busy)
        await door.rig.app.until_asked("/ocr")
        second = await door.send(busy)
        await eventually(lambda: busy.gate.waiting == 1)
        slow.inside[0].set()
        await door.rig.app.until_asked("/ocr", 2)
        slow.inside[1].set()
        assert (await second.message())[1][b"x-fc-instance-id"] == busy.uid.encode()


async def test_first_instance_to_free_takes_the_oldest_request() -> None:
    async with a_door() as door:
        slow, (named, other), _ = await busy_pair(door)
        queue = door.rig.node.queues["ocr"]
        older = await door.send(named, ANY)
        await eventually(lambda: queue.waiting == 1)
        younger = await door.send(named, ANY)
        await eventually(lambda: queue.waiting == 2)
        slow.inside[1].set()
        await door.rig.app.until_asked("/ocr", 3)
        slow.inside[2].set()
        _, headers, _ = await older.message()
        assert headers[b"x-fc-instance-id"] == other.encode()
        await door.rig.app.until_asked("/ocr", 4)
        slow.inside[3].set()
        slow.inside[0].set()
        assert (await younger.message())[1][b"x-fc-instance-id"] == other.encode()


async def test_start_notice_is_sent_before_the_request_reaches_the_instance() -> None:
    async with a_door() as door:
        slow, (named, _), _ = await busy_pair(door)
        wire = await door.send(named, ANY, NOTICE)
        await eventually(lambda: door.rig.node.queues["ocr"].waiting == 1)
        assert len(door.rig.app.requests) == 2
        slow.inside[0].set()
        assert await wire.until(b"\r\n\r\n") == b"HTTP/1.1 102 Processing\r\n\r\n"
        await door.rig.app.until_asked("/ocr", 3)
        slow.inside[1].set()
        slow.inside[2].set()
        assert (await wire.message())[2] == b"done"


async def test_request_of_a_client_that_left_is_not_served() -> None:
    async with a_door() as door:
        slow, (named, _), wires = await busy_pair(door)
        queue = door.rig.node.queues["ocr"]
        wire = await door.send(named, ANY)
        await eventually(lambda: queue.waiting == 1)
        wire.reset()
        await eventually(lambda: queue.waiting == 0)
        for go in slow.inside:
            go.set()
        for served in wires:
            await served.message()
        assert len(door.rig.app.requests) == 2


async def test_unhealthy_last_instance_refuses_queued_requests() -> None:
    async with a_door() as door:
        slow = Slow()
        ill = await door.rig.running()
        door.rig.app.answers["/ocr"] = slow
        first = await door.send(ill, ANY)
        await door.rig.app.until_asked("/ocr")
        wire = await door.send(ill, ANY)
        await eventually(lambda: door.rig.node.queues["ocr"].waiting == 1)
        ill.set_healthy(False)
        status, headers, _ = await wire.message()
        assert (status, headers[b"x-hibernode-refused"]) == (503, b"NO_INSTANCE_AWAKE")
        slow.inside[0].set()
        assert (await first.message())[2] == b"done"


async def test_queued_request_with_a_broken_body_takes_no_slot_and_no_bill() -> None:
    async with a_door() as door:
        slow = Slow()
        busy = await door.rig.running()
        door.rig.app.answers["/ocr"] = slow
        first = await door.send(busy, ANY)
        await door.rig.app.until_asked("/ocr")
        broken = await connect(door.port)
        head = door.head(busy, ANY, "transfer-encoding: chunked")
        await broken.send(head.replace(b"content-length: 0\r\n", b""))
        await eventually(lambda: door.rig.node.queues["ocr"].waiting == 1)
        await broken.send(b"ZZ\r\n")
        slow.inside[0].set()
        await first.message()
        assert (await broken.message())[0] == 400
        await eventually(lambda: busy.gate.in_flight == 0)
        assert not busy.instance.busy
        assert door.rig.billing.health.unmatched_ends == 0


async def test_time_in_the_queue_is_bounded_by_the_deadline() -> None:
    async with a_door() as door:
        slow, (named, _), _ = await busy_pair(door)
        assert code(await door.ask(named, ANY, "x-hibernode-deadline-ms: 20")) == (
            504,
            "QueueTimeout",
            b"QUEUE_TIMEOUT",
        )
        for go in slow.inside:
            go.set()


async def test_queued_requests_are_refused_when_the_last_instance_stops() -> None:
    async with a_door() as door:
        slow, (named, other), _ = await busy_pair(door)
        queue = door.rig.node.queues["ocr"]
        wire = await door.send(named, ANY)
        await eventually(lambda: queue.waiting == 1)
        actors = [door.rig.node.actors[uid] for uid in (named, other)]
        for actor in actors:
            actor.handle(StopAsked(60 * SECOND_NS))
        status, headers, _ = await wire.message()
        assert (status, headers[b"x-hibernode-refused"]) == (503, b"NO_INSTANCE_AWAKE")
        for go in slow.inside:
            go.set()
        for actor in actors:
            await until(actor, InstanceState.STOPPED)
        await eventually(lambda: "ocr" not in door.rig.node.queues)  # removed with its last instance


async def test_unhealthy_instance_takes_no_queued_request_until_it_recovers() -> None:
    async with a_door() as door:
        slow, (named, _), wires = await busy_pair(door)
        queue = door.rig.node.queues["ocr"]
        sick = door.rig.node.actors[named]
        wire = await door.send(named, ANY)
        await eventually(lambda: queue.waiting == 1)
        sick.set_healthy(False)
        slow.inside[0].set()
        await wires[0].message()
        assert (queue.waiting, sick.gate.in_flight) == (1, 0)
        sick.set_healthy(True)
        await door.rig.app.until_asked("/ocr", 3)
        slow.inside[1].set()
        slow.inside[2].set()
        assert (await wire.message())[1][b"x-fc-instance-id"] == named.encode()


async def test_frozen_instance_is_woken_by_a_request_that_names_it() -> None:
    async with a_door() as door:
        actor = await door.rig.frozen(replace(OCR, instance_concurrency=1))
        wire = await door.send(actor, ANY)
        _, headers, _ = await wire.message()
        assert headers[b"x-fc-instance-id"] == actor.uid.encode()
        assert actor.state is InstanceState.RUNNING
