"""Traffic for facts about queues: Poisson arrivals, lognormal work with a mean of one second."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

from agent.core.types import SECOND_NS
from agent.simulator.plan import RequestOutcome, SimulatedPolicy, SimulationPlan, percentiles_s
from agent.simulator.simulation import Simulation
from agent.simulator.trace import Call

FUNCTION = "ocr"
SERVERS = 8


def calls(cv: float, load: float, count: int, seed: int) -> Iterator[Call]:
    """`count` requests for `SERVERS` servers."""
    source = random.Random(seed)
    sigma = math.sqrt(math.log(1 + cv * cv))
    at = 0.0
    for _ in range(count):
        at += source.expovariate(SERVERS * load)
        work = source.lognormvariate(-sigma * sigma / 2, sigma)
        yield Call(round(at * SECOND_NS), FUNCTION, max(1, round(work * SECOND_NS)))


def awake(policy: SimulatedPolicy, seed: int = 1) -> SimulationPlan:
    """Servers that never freeze, with unbounded queues."""
    return SimulationPlan(
        policy, SERVERS, freeze_after_ns=None, queue_length=100_000, queue_timeout_ns=3600 * SECOND_NS, seed=seed
    )


def latencies(policy: SimulatedPolicy, cv: float, load: float, count: int, runs: int) -> tuple[float, float]:
    """p50 and p99 over all runs, in seconds: the same traffic for every policy."""
    merged: list[int] = []
    for seed in range(1, runs + 1):
        outcome = Simulation(awake(policy, seed)).run([FUNCTION], calls(cv, load, count, seed))
        assert not outcome.refused
        merged += outcome.latencies_ns
    p50, p99 = percentiles_s(merged, (50, 99))
    assert p50 is not None
    assert p99 is not None
    return p50, p99


def with_freezing(plan: SimulationPlan, load: float, count: int, seed: int) -> RequestOutcome:
    """One run with freezing, cv 1."""
    return Simulation(plan).run([FUNCTION], calls(1.0, load, count, seed))
