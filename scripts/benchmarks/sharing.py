"""Six functions on two GPUs under skewed traffic: the longest wait against its bound, swaps with and without minAwake.

Open-loop Poisson arrivals from a seed, equal for both phases of one run; the n-th function gets 1/n of the traffic.
Instances freeze only when the GPU allocator orders it, so each wake is a swap. A request's wait is its time without its
own work. Bound: sharers x (max_hold + longest request + freeze + wake), with the slowest driver calls of the run as
freeze and wake, which is stricter than their complete times.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from agent.core.types import MILLISECOND_NS, SECOND_NS
from agent.emulated.oplog import OpRecord
from agent.examples.echo.__main__ import expected_answer
from scripts.benchmarks._spread import machine, summary
from tests.e2e.stack import Stack, echo, running_stack

FUNCTIONS = 6
GPUS = 2
SHARERS = FUNCTIONS // GPUS
MAX_HOLD_MS = 500
MIN_AWAKE_MS = 200
LONG_EVERY = 10
"""One request in ten works for LONG_MS; the others only read device memory."""
LONG_MS = 60


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request: its time after the start, its function and its number."""

    at_s: float
    function: int
    number: int

    @property
    def work_ms(self) -> int:
        return LONG_MS if self.number % LONG_EVERY == 0 else 0


@dataclass(slots=True)
class Phase:
    """Results of the arrivals under one policy."""

    name: str
    waits_ms: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    swaps: int = 0
    freeze_ms: float = 0.0
    wake_ms: float = 0.0
    frozen_calls: int = 0

    @property
    def bound_ms(self) -> float:
        return SHARERS * (MAX_HOLD_MS + LONG_MS + self.freeze_ms + self.wake_ms)

    def as_json(self) -> dict[str, Any]:
        requests = len(self.waits_ms) + len(self.failed)
        return {
            "requests": requests,
            "failed": len(self.failed),
            "failures": self.failed[:5],
            "wait_ms": summary(self.waits_ms),
            "bound_ms": round(self.bound_ms, 1),
            "within_bound": bool(self.waits_ms) and max(self.waits_ms) <= self.bound_ms,
            "swaps": self.swaps,
            "swaps_per_request": round(self.swaps / requests, 4),
            "calls_on_frozen_processes": self.frozen_calls,
        }


def arrivals(requests: int, rate: float, seed: int) -> list[Arrival]:
    """A Poisson stream with functions drawn by Zipf's law."""
    source = random.Random(seed)
    weights = [1 / (n + 1) for n in range(FUNCTIONS)]
    at_s, found = 0.0, []
    for number in range(requests):
        at_s += source.expovariate(rate)
        (function,) = source.choices(range(FUNCTIONS), weights)
        found.append(Arrival(at_s, function, number))
    return found


async def run_phase(stack: Stack, name: str, min_awake_ms: int, plan: Sequence[Arrival]) -> Phase:
    """Deploys the functions, replays the plan, and removes them."""
    phase = Phase(name)
    names = [f"{name}-{n}" for n in range(FUNCTIONS)]
    for function in names:
        spec = echo(function)
        idle = replace(spec.idle, freeze_after_ns=600 * SECOND_NS, min_awake_ns=min_awake_ms * MILLISECOND_NS)
        await stack.deploy(replace(spec, idle=idle), target=1)
    with stack.driver() as driver:
        seen = driver.oplog()
        since = seen[-1].seq if seen else 0
        start = time.monotonic()
        await asyncio.gather(*(_send(stack, phase, names[one.function], one, start) for one in plan))
        records = driver.oplog(since)
        phase.frozen_calls = driver.frozen_calls()
    phase.swaps = sum(record.op == "restore" and record.result == 0 for record in records)
    phase.freeze_ms = _slowest(records, "lock") + _slowest(records, "checkpoint")
    phase.wake_ms = _slowest(records, "restore") + _slowest(records, "unlock")
    await stack.remove_functions(names)
    return phase


def _slowest(records: Sequence[OpRecord], op: str) -> float:
    return max((record.us for record in records if record.op == op), default=0) / 1000


async def _send(stack: Stack, phase: Phase, function: str, one: Arrival, start: float) -> None:
    await asyncio.sleep(start + one.at_s - time.monotonic())
    path = f"/sleep?ms={LONG_MS}" if one.work_ms else f"/answer?n={one.number}"
    try:
        answer = await stack.ask(function, path)
    except Exception as error:  # the run counts failures of any kind
        phase.failed.append(f"{one.number}: {error!r}")
        return
    if answer.status != 200:
        phase.failed.append(f"{one.number}: {answer.status} {answer.body[:120]!r}")
    elif not one.work_ms and answer.body.decode() != expected_answer(one.number):
        phase.failed.append(f"{one.number}: a wrong answer")
    else:
        phase.waits_ms.append((answer.ended_ns - answer.began_ns) / MILLISECOND_NS - one.work_ms)


async def measure(requests: int, rate: float, seed: int) -> dict[str, Any]:
    """Runs both phases on one stack and returns the object that --json prints."""
    plan = arrivals(requests, rate, seed)
    settings = {"instances_per_gpu": SHARERS, "max_hold": f"{MAX_HOLD_MS}ms"}
    async with running_stack("--gpus", str(GPUS), "--gib", "1", "--profile", "580", gpu_settings=settings) as stack:
        phases = []
        for name, min_awake_ms in (("eager", 0), ("calm", MIN_AWAKE_MS)):
            progress(f"{name}: minAwake {min_awake_ms} ms, {requests} requests at {rate:g}/s")
            phases.append(await run_phase(stack, name, min_awake_ms, plan))
    eager, calm = phases
    return {
        "benchmark": "sharing",
        "machine": machine(),
        "functions": FUNCTIONS,
        "gpus": GPUS,
        "max_hold_ms": MAX_HOLD_MS,
        "rate": rate,
        "seed": seed,
        "without_min_awake": eager.as_json(),
        "with_min_awake": {"min_awake_ms": MIN_AWAKE_MS, **calm.as_json()},
        "swaps_ratio": round(calm.swaps / eager.swaps, 3) if eager.swaps else None,
        "met": all(not phase.failed and phase.as_json()["within_bound"] for phase in phases),
    }


def progress(text: str) -> None:
    print(f"sharing: {text}", file=sys.stderr, flush=True)


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    rows = [f"{FUNCTIONS} functions on {GPUS} GPUs, max_hold {MAX_HOLD_MS} ms, {result['rate']:g} requests/s"]
    for title, key in (("minAwake 0", "without_min_awake"), (f"minAwake {MIN_AWAKE_MS} ms", "with_min_awake")):
        one = result[key]
        wait = one["wait_ms"]
        rows.append(
            f"{title:<16} {one['requests']} requests, {one['failed']} failed; wait p50 {wait['p50']:.0f} ms, p99 "
            f"{wait['p99']:.0f}, longest {wait['max']:.0f} (bound {one['bound_ms']:.0f}); "
            f"{one['swaps_per_request']} swaps per request"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench sharing", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--requests", type=int, default=3000, help="requests in each phase (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=40.0, help="requests per second (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the arrivals (default: %(default)s)")
    args = parser.parse_args()
    if args.requests < FUNCTIONS or args.rate <= 0:
        parser.error(f"--requests must be {FUNCTIONS} or more, --rate more than 0")
    result = asyncio.run(measure(args.requests, args.rate, args.seed))
    print(json.dumps(result) if args.json else table(result))


if __name__ == "__main__":
    main()
