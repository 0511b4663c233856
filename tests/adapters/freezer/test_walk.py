"""Random walks: faults at any call of several freezes and wakes of one to three processes.

OK means that all are in the promised state and place, REFUSED that all are as before; BROKEN ends the walk. No call
about a frozen target, everything ends in time, and every pidfd is closed.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest

from agent.core.types import GIB
from agent.ports import CudaOp, CudaState, FreezeResult, FreezerState, Outcome
from tests.adapters.freezer.world import FreezerRig
from tests.fakes.checkpointer import Fault
from tests.fakes.gpus import gpu

SEEDS = 120
OPERATIONS_A_WALK = 12
DEADLINE_S = 10.0
SWAP = {gpu(0).uuid: gpu(1).uuid, gpu(1).uuid: gpu(0).uuid}
CODES = [1, 2, 304, 401, 600, 800, 801, 999]


def some_fault(dice: random.Random, pids: list[int]) -> Fault:
    op = dice.choice(list(CudaOp))
    pid = dice.choice([0, *pids])
    kind = dice.choice(["code", "code", "done", "stale", "hang", "late", "at once", "stuck", "dies", "failed"])
    match kind:
        case "code":
            return Fault(op, dice.choice(CODES), pid=pid)
        case "done":
            return Fault(op, dice.choice(CODES), executes=True, pid=pid)
        case "stale":
            return Fault(op, stale=True, pid=pid)
        case "hang":
            return Fault(op, hang=True, pid=pid)
        case "late" if op is not CudaOp.STATE:
            return Fault(op, later=True, pid=pid)
        case "at once":
            return Fault(op, hang=True, executes=True, pid=pid)
        case "stuck":
            return Fault(op, stuck=True, pid=pid)
        case "dies":
            return Fault(op, dies=True, pid=pid)
        case _:
            pass
    return Fault(CudaOp.CHECKPOINT if op is CudaOp.STATE else op, 304, leaves=CudaState.FAILED, pid=pid)


Place = tuple[frozenset[CudaState], frozenset[str], FreezerState]


class Walk:
    """One instance's life, recorded in `story`."""

    def __init__(self, world: FreezerRig, dice: random.Random) -> None:
        self.world = world
        self.dice = dice
        self.sleeping = False
        self.broken = False
        self.story: list[str] = []

    def place(self) -> Place:
        processes = self.world.driver.processes.values()
        states, gpus = (frozenset(p.state for p in processes), frozenset(p.gpu_uuid for p in processes))
        return states, gpus, self.world.cgroups.now

    async def step(self) -> None:
        pids = list(self.world.driver.processes)
        self.world.driver.faults = [some_fault(self.dice, pids) for _ in range(self.dice.choice([0, 0, 1, 1, 2, 4]))]
        self.story.append(str(self.world.driver.faults))
        short = self.dice.random() < 0.1
        self.world.gpus.reserved_bytes = 16 * GIB if short else 0
        if self.sleeping:
            await self.wake()
        else:
            await self.freeze()
        self.story.append(str(self.place()))
        assert self.world.driver.frozen_calls == [], self.story

    async def freeze(self) -> None:
        _, gpus, threads = before = self.place()
        freezer, handle = self.world.freezer, self.world.handle
        result = await self.ask("lock", lambda: freezer.lock(handle))
        if result.outcome is Outcome.OK:
            self.expect((frozenset({CudaState.LOCKED}), gpus, threads))
            cancelled = self.dice.random() < 0.2
            then = freezer.unlock if cancelled else freezer.checkpoint
            result = await self.ask(then.__name__, lambda: then(handle))
            if result.outcome is Outcome.OK and not cancelled:
                self.sleeping = True
                self.expect((frozenset({CudaState.CHECKPOINTED}), gpus, FreezerState.FROZEN))
                return
        if result.outcome is not Outcome.BROKEN:
            self.expect(before)

    async def wake(self) -> None:
        states, gpus, threads = self.place()
        gpu_map = SWAP if self.dice.random() < 0.4 else {}
        result = await self.ask("wake", lambda: self.world.freezer.wake(self.world.handle, gpu_map))
        match result.outcome:
            case Outcome.OK:
                self.sleeping = False
                there = frozenset(gpu_map.get(uuid, uuid) for uuid in gpus)
                self.expect((frozenset({CudaState.RUNNING}), there, FreezerState.THAWED))
            case Outcome.REFUSED:
                self.expect((states, gpus, threads))
            case Outcome.BROKEN:
                pass

    async def ask(self, name: str, operation: Callable[[], Awaitable[FreezeResult]]) -> FreezeResult:
        async with asyncio.timeout(DEADLINE_S):
            result = await operation()
        self.story.append(f"{name}: {result.outcome.value} {result.reason}")
        self.broken = result.outcome is Outcome.BROKEN
        return result

    def expect(self, place: Place) -> None:
        """Checks the living ones: a helper that ended before its lock is not frozen with the rest."""
        states, gpus, threads = self.place()
        if states:
            assert (states, gpus, threads) == place, "\n".join(self.story)


@pytest.mark.parametrize("seed", range(SEEDS))
async def test_random_walk(world: FreezerRig, seed: int) -> None:
    dice = random.Random(seed)
    world.driver.hang_s = 0.001
    for _ in range(dice.randrange(3)):
        world.add_process()
    before = open_pidfds()
    walk = Walk(world, dice)
    for _ in range(OPERATIONS_A_WALK):
        if walk.broken or not world.driver.processes:
            break
        await walk.step()
    await world.freezer.prepare_kill(world.handle)
    world.freezer.forget(world.handle)
    others = asyncio.all_tasks() - {asyncio.current_task()}
    await asyncio.gather(*others, return_exceptions=True)
    assert open_pidfds() == before


def open_pidfds() -> int:
    """Counts pidfds only: the garbage collector may close an earlier test's loop at any time."""
    count = 0
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # that of the listing itself
            count += "pidfd" in os.readlink(f"/proc/self/fd/{number}")
    return count
