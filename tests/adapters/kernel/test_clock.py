"""Tests the real clock, and the fake that tests move by hand."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest
import uvloop

from agent.adapters.kernel.clock import SystemClock
from agent.core.types import MILLISECOND_NS, SECOND_NS
from agent.ports import Clock
from tests.fakes.clock import FakeClock


@pytest.mark.real_time
@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_a_timer_never_fires_early(new_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    async def fire_ten() -> list[int]:
        clock: Clock = SystemClock()
        fired = []
        for step in range(10):
            at_ns = clock.monotonic_ns() + MILLISECOND_NS + step * 130_000  # fractions of a millisecond: loops round
            done = asyncio.Event()
            clock.call_at(at_ns, done.set)
            await asyncio.wait_for(done.wait(), 10)
            fired.append(clock.monotonic_ns() - at_ns)
        return fired

    with asyncio.Runner(loop_factory=new_loop) as runner:
        assert min(runner.run(fire_ten())) >= 0


async def test_timer_in_the_past_fires_in_the_next_iteration() -> None:
    done = asyncio.Event()
    SystemClock().call_at(0, done.set)
    assert not done.is_set()
    await asyncio.wait_for(done.wait(), 10)


async def test_a_cancelled_timer_does_not_fire() -> None:
    clock = SystemClock()
    fired: list[str] = []
    doomed = clock.call_at(clock.monotonic_ns() + MILLISECOND_NS, lambda: fired.append("doomed"))
    later = asyncio.Event()
    clock.call_at(clock.monotonic_ns() + 5 * MILLISECOND_NS, later.set)
    doomed.cancel()
    doomed.cancel()
    await asyncio.wait_for(later.wait(), 10)
    assert fired == []


@pytest.mark.real_time
def test_wall_time_is_system_time() -> None:
    assert abs(SystemClock().wall_ns() - time.time_ns()) < SECOND_NS


def test_the_fake_fires_in_order_and_at_each_timers_own_time() -> None:
    clock = FakeClock(mono_ns=0)
    story: list[tuple[str, int]] = []

    def tell(name: str) -> Any:
        return lambda: story.append((name, clock.monotonic_ns()))

    clock.call_at(30, tell("freeze"))
    clock.call_at(10, tell("probe"))
    clock.call_at(10, tell("seal"))

    def arm_another() -> None:
        clock.call_at(25, tell("armed by a callback"))

    clock.call_at(20, arm_another)
    clock.call_at(15, tell("cancelled")).cancel()
    clock.advance(29)
    assert story == [("probe", 10), ("seal", 10), ("armed by a callback", 25)]
    assert clock.next_timer_ns == 30
    clock.advance(1)
    assert story[-1] == ("freeze", 30)
    assert clock.next_timer_ns is None


def test_the_fake_wall_clock_can_be_set_alone() -> None:
    clock = FakeClock(mono_ns=5, wall_ns=1000)
    clock.step_wall(-400)
    assert (clock.monotonic_ns(), clock.wall_ns()) == (5, 600)
    clock.advance(10)
    assert (clock.monotonic_ns(), clock.wall_ns()) == (15, 610)
