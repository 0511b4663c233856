"""Every row of the matrix, on real processes: nobody hangs, nothing stays locked, no GPU is held by nobody."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.faults.matrix import ROWS, End, Row, table
from tests.faults.world import STATE, FaultWorld, Reply, running_fault_world

DOCUMENT = Path(__file__).parents[2] / "agent" / "docs" / "internals" / "driver-faults.md"

in_one_loop = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world() -> AsyncIterator[FaultWorld]:
    async with running_fault_world("580") as it:
        yield it


def name(row: Row) -> str:
    return f"{row.phase.value}: {row.fault}"


@in_one_loop
@pytest.mark.parametrize("row", [row for row in ROWS if row.profile == "580"], ids=name)
async def test_a_fault(world: FaultWorld, row: Row) -> None:
    await strike(world, row)


async def test_faults_of_older_drivers() -> None:
    older = [row for row in ROWS if row.profile != "580"]
    assert {row.profile for row in older} == {"570"}
    async with running_fault_world("570") as world:
        for row in older:
            await strike(world, row)


async def strike(world: FaultWorld, row: Row) -> None:
    """Bring the instance there, let the fault strike, send a request that has to wait, and look at everybody."""
    try:
        uid, reply = await (_freeze(world, row) if row.phase.of_freeze else _wake(world, row))
        end = await world.settled(uid)
        told = f"{end.state_reason} {end.state_message}\n{await world.history(uid)}"
    finally:
        world.heal()
    assert row.request.startswith(reply.how), f"{reply}\n{told}"
    assert end.state == (STATE.STATE_FAILED if row.end is End.DIES else STATE.STATE_RUNNING), told
    assert row.reason in told
    await world.nothing_is_left_half_way()
    assert len(world.driver.take_frozen_calls()) <= row.frozen_calls
    if row.end is not End.DIES:
        await world.goes_on(uid)
        assert (await world.ask(uid)).how == "answered", "and it lives on"
    cordoned = [gpu.cordoned_reason for gpu in (await world.stack.node()).gpus if gpu.cordoned_reason]
    assert not cordoned, "what was lost with the instance is free again"


async def _freeze(world: FaultWorld, row: Row) -> tuple[str, Reply]:
    """The request comes once the freeze has begun and, where the driver is at fault, the fault has struck."""
    uid = await world.awake(row.environment)
    await row.plan(world, uid)
    driver_is_at_fault = bool(world.driver.faults())
    freeze = asyncio.create_task(world.freeze(uid))
    await world.struck()
    await asyncio.gather(*world.follow_ups)
    world.follow_ups.clear()
    if not driver_is_at_fault or row.end is End.SLEEPS:
        await freeze
    if row.end is End.SLEEPS:
        assert freeze.result() == "", "it is frozen all the same"
    reply = await world.ask(uid)
    refusal = await freeze
    if row.end is End.LIVES:
        assert row.reason in refusal
    return uid, reply


async def _wake(world: FaultWorld, row: Row) -> tuple[str, Reply]:
    uid = await world.asleep(row.environment)
    await row.plan(world, uid)
    return uid, await world.ask(uid)


def test_the_matrix_is_as_long_as_the_faults_are_many() -> None:
    assert len(ROWS) >= 25
    assert len({name(row) for row in ROWS}) == len(ROWS)


def test_the_document_shows_the_matrix() -> None:
    assert table() in DOCUMENT.read_text(), "put the output of tests.faults.matrix.table() there"
