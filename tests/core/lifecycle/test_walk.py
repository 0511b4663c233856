"""Random walks over both step functions at once, with every invariant checked after every move."""

from __future__ import annotations

from collections import Counter

import pytest

from agent.core.types import InstanceState
from tests.core.lifecycle.world import World

SEEDS = range(40)
MOVES = 1_500


@pytest.mark.parametrize("seed", SEEDS)
def test_four_instances_share_two_gpus_through_every_misfortune(seed: int) -> None:
    world = World(seed, gpus=2, members=4, concurrency=1 + seed % 3, max_waiting=5, per_gpu=2)
    for _ in range(MOVES):
        world.move(faults=0.05)
        world.check()
    world.settle()
    assert sum(world.ended.values()) == world.requests, "each request is answered exactly once"


@pytest.mark.parametrize("seed", SEEDS)
def test_movable_instances_share_three_gpus_through_every_misfortune(seed: int) -> None:
    world = World(seed, gpus=3, members=6, concurrency=1 + seed % 3, max_waiting=5, per_gpu=2, migrate=True)
    for _ in range(MOVES):
        world.move(faults=0.05)
        world.check()
    world.settle()
    assert sum(world.ended.values()) == world.requests, "each request is answered exactly once"


@pytest.mark.parametrize("seed", range(12))
def test_without_faults_nobody_is_refused_and_nobody_fails(seed: int) -> None:
    world = World(seed, gpus=2, members=6, concurrency=2, max_waiting=10_000, per_gpu=3)
    for _ in range(MOVES):
        world.move(faults=0.0)
        world.check()
    world.settle()
    assert world.ended["refused"] == world.ended["crashed"] == world.ended["full"] == 0
    states = Counter(member.instance.state for member in world.members.values())
    assert not states[InstanceState.FAILED]


def test_the_walks_reach_every_transition_worth_walking() -> None:
    seen: Counter[str] = Counter()
    for seed in range(60):
        world = World(seed, gpus=2, members=5, concurrency=2, max_waiting=5, per_gpu=3)
        world.traffic = 0.1 if seed % 2 else 1.0
        for _ in range(800):
            world.move(faults=0.2)
        seen += world.seen
    for transition in (
        "STARTING->RUNNING", "STARTING->FAILED", "RUNNING->FREEZING", "FREEZING->FROZEN", "FREEZING->RUNNING",
        "FREEZING->FAILED", "FROZEN->WAITING_GPU", "WAITING_GPU->RESTORING", "WAITING_GPU->FROZEN",
        "RESTORING->RUNNING", "RESTORING->FAILED", "RUNNING->STOPPING", "STOPPING->STOPPED", "RUNNING->FAILED",
        "FROZEN->STOPPING", "WAITING_GPU->FAILED", "ask freeze", "ask drain", "unservable",
    ):  # fmt: skip
        assert seen[transition], f"no walk went through {transition}"
