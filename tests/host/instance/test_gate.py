"""The admission gate: every grant is given back exactly once."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest

from agent.core.errors import DeadlineError, ExhaustedError, UnavailableError
from agent.host.instance.gate import AdmissionGate, FunctionQueue
from tests.fakes.clock import FakeClock


@dataclass
class Edges:
    """Meter and owner of a gate: records the edges."""

    seen: list[str] = field(default_factory=list)
    inside: int = 0

    def request_began(self, at: int) -> None:
        self.inside += 1

    def request_ended(self, at: int) -> None:
        self.inside -= 1

    def first_request_started(self) -> None:
        self.seen.append("busy")

    def last_request_ended(self) -> None:
        self.seen.append("quiet")

    def waiters_appeared(self) -> None:
        self.seen.append("wanted")

    def waiters_gone(self) -> None:
        self.seen.append("unwanted")


def a_gate(*, is_open: bool, concurrency: int = 1, max_waiting: int = 2) -> tuple[AdmissionGate[Edges], Edges]:
    edges = Edges()
    gate = AdmissionGate(concurrency, max_waiting, FakeClock(), edges, edges)
    if is_open:
        gate.set_open(True)
        edges.seen.clear()
    return gate, edges


async def test_queued_request_that_ends_in_its_first_turn_is_metered_in_order() -> None:
    """In the wrong order it would be billed for ever, and its instance would never freeze."""
    gate, edges = a_gate(is_open=False)
    queue: FunctionQueue[Edges] = FunctionQueue(10)
    queue.add(gate)
    metered = []

    def fails_at_once(owner: Edges) -> None:
        metered.append(edges.inside)
        gate.leave()

    gate.set_open(True)
    gate.unhealthy = True
    ticket = asyncio.get_running_loop().create_future()
    queue._tickets[ticket] = fails_at_once
    edges.seen.clear()
    gate.set_healthy(True)
    assert (metered, edges.inside, gate.in_flight) == ([1], 0, 0)
    assert edges.seen == ["busy", "quiet"]


def queued(gate: AdmissionGate[Edges], timeout_s: float = 10.0) -> tuple[asyncio.Future[None], asyncio.Task[None]]:
    ticket = gate.try_enter()
    assert ticket is not None
    return ticket, asyncio.ensure_future(gate.wait(ticket, timeout_s))


async def test_owner_is_called_only_at_edges() -> None:
    gate, edges = a_gate(is_open=True, concurrency=2)
    assert gate.try_enter() is None
    assert gate.try_enter() is None
    gate.leave()
    gate.leave()
    assert edges.seen == ["busy", "quiet"]
    assert edges.inside == 0


async def test_slot_passed_on_is_no_edge() -> None:
    gate, edges = a_gate(is_open=True)
    gate.try_enter()
    _, waiting = queued(gate)
    gate.leave()
    await waiting
    assert edges.seen == ["busy"]
    gate.leave()
    assert edges.seen == ["busy", "quiet"]


async def test_waiters_at_a_closed_gate_are_granted_when_it_opens() -> None:
    gate, edges = a_gate(is_open=False, concurrency=2, max_waiting=3)
    tasks = [queued(gate)[1] for _ in range(3)]
    assert edges.seen == ["wanted"]
    gate.set_open(True)
    assert (gate.in_flight, gate.waiting) == (2, 1)
    assert edges.seen == ["wanted", "busy", "unwanted"]
    await asyncio.gather(*tasks[:2])
    gate.leave()
    await tasks[2]


async def test_full_gate_refuses_at_once() -> None:
    gate, _ = a_gate(is_open=False, max_waiting=1)
    _, waiting = queued(gate)
    with pytest.raises(ExhaustedError) as caught:
        gate.try_enter()
    assert caught.value.reason == "QUEUE_FULL"
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)


async def test_closing_gate_reports_remaining_waiters() -> None:
    gate, edges = a_gate(is_open=True)
    gate.try_enter()
    _, waiting = queued(gate)
    gate.set_open(False)
    assert edges.seen == ["busy", "wanted"]
    gate.leave()
    assert edges.seen == ["busy", "wanted", "quiet"]
    assert gate.waiting == 1, "a closed gate hands nothing on"
    gate.set_open(True)
    await waiting


async def test_queue_timeout_removes_the_ticket() -> None:
    gate, edges = a_gate(is_open=False)
    _, waiting = queued(gate, timeout_s=0.001)
    with pytest.raises(DeadlineError) as caught:
        await waiting
    assert caught.value.reason == "QUEUE_TIMEOUT"
    assert gate.waiting == 0
    assert edges.seen == ["wanted", "unwanted"]


async def test_cancelled_caller_frees_its_place() -> None:
    gate, edges = a_gate(is_open=False)
    ticket, waiting = queued(gate)
    await asyncio.sleep(0)
    ticket.set_exception(UnavailableError("CLIENT_GONE", "left"))
    with pytest.raises(UnavailableError):
        await waiting
    assert edges.seen == ["wanted", "unwanted"]


async def test_a_grant_that_crosses_the_callers_end_is_given_back() -> None:
    gate, edges = a_gate(is_open=False)
    _, waiting = queued(gate)
    await asyncio.sleep(0)
    gate.set_open(True)
    waiting.cancel()  # in the same turn: the ticket is granted, but its waiter is cancelled
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert (gate.in_flight, edges.inside) == (0, 0)
    assert edges.seen[-1] == "quiet"


async def test_a_ticket_that_is_dead_already_is_passed_over() -> None:
    gate, edges = a_gate(is_open=False)
    dead, first = queued(gate)
    _, second = queued(gate)
    await asyncio.sleep(0)
    dead.set_exception(UnavailableError("CLIENT_GONE", "left"))  # its waiter has not run yet
    gate.set_open(True)
    await second
    assert gate.in_flight == 1
    with pytest.raises(UnavailableError):
        await first
    assert (gate.in_flight, edges.inside) == (1, 1)


async def test_refuse_all_refuses_every_waiter() -> None:
    gate, edges = a_gate(is_open=False)
    tasks = [queued(gate)[1] for _ in range(2)]
    await asyncio.sleep(0)
    gate.refuse_all(lambda: UnavailableError("INSTANCE_STOPPING", "bye"))
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert [getattr(answer, "reason", "") for answer in answers] == ["INSTANCE_STOPPING"] * 2
    assert edges.seen == ["wanted", "unwanted"]
