"""Random walks over life cycle and GPU allocator, with every invariant checked after every move."""

from __future__ import annotations

from collections import Counter

import pytest

from agent.core.types import InstanceState
from tests.core.lifecycle.simulated_node import SimulatedNode

SEEDS = range(40)
MOVES = 1_500


@pytest.mark.parametrize("seed", SEEDS)
def test_four_instances_share_two_gpus_despite_faults(seed: int) -> None:
    node = SimulatedNode(seed, gpus=2, members=4, concurrency=1 + seed % 3, max_waiting=5, per_gpu=2)
    for _ in range(MOVES):
        node.move(faults=0.05)
        node.check()
    node.finish_all()
    assert sum(node.ended.values()) == node.requests, "each request is answered exactly once"


@pytest.mark.parametrize("seed", SEEDS)
def test_movable_instances_share_three_gpus_despite_faults(seed: int) -> None:
    node = SimulatedNode(seed, gpus=3, members=6, concurrency=1 + seed % 3, max_waiting=5, per_gpu=2, migrate=True)
    for _ in range(MOVES):
        node.move(faults=0.05)
        node.check()
    node.finish_all()
    assert sum(node.ended.values()) == node.requests, "each request is answered exactly once"


@pytest.mark.parametrize("seed", range(12))
def test_without_faults_no_request_is_refused_and_no_instance_fails(seed: int) -> None:
    node = SimulatedNode(seed, gpus=2, members=6, concurrency=2, max_waiting=10_000, per_gpu=3)
    for _ in range(MOVES):
        node.move(faults=0.0)
        node.check()
    node.finish_all()
    assert node.ended["refused"] == node.ended["crashed"] == node.ended["full"] == 0
    states = Counter(member.instance.state for member in node.members.values())
    assert not states[InstanceState.FAILED]


def test_the_walks_reach_every_transition_worth_walking() -> None:
    seen: Counter[str] = Counter()
    for seed in range(60):
        node = SimulatedNode(seed, gpus=2, members=5, concurrency=2, max_waiting=5, per_gpu=3)
        node.traffic = 0.1 if seed % 2 else 1.0
        for _ in range(800):
            node.move(faults=0.2)
            node.check()
        seen += node.seen
    for transition in (
        "STARTING->RUNNING", "STARTING->FAILED", "RUNNING->FREEZING", "FREEZING->FROZEN", "FREEZING->RUNNING",
        "FREEZING->FAILED", "FROZEN->WAITING_GPU", "WAITING_GPU->RESTORING", "WAITING_GPU->FROZEN",
        "RESTORING->RUNNING", "RESTORING->FAILED", "RUNNING->STOPPING", "STOPPING->STOPPED", "RUNNING->FAILED",
        "FROZEN->STOPPING", "WAITING_GPU->FAILED", "ask freeze", "ask drain", "unservable",
    ):  # fmt: skip
        assert seen[transition], f"no walk went through {transition}"
