"""Time added to a request by a wake, without the driver's own time, against a container's unpause by Docker.

One instance of the example `echo` on the emulated driver is left to freeze, and then called through the gateway by one
blocking client, many times. In between, in the same run, a container is paused and unpaused. Both sides rest equally
long before each measurement, so that caches are equally cold.

    added = the request's total time - the driver's own time for that wake - a request to the same instance awake

The driver's own time is that of the calls on the instance's process in the emulated driver's log (restore, unlock,
get-state). The time of a request awake is the median of requests right after each wake. Promise
(agent/docs/specification.md): added p50 <= 0.25 x and p99 <= 0.5 x of unpause. Exit status 0 whether it is met or not.

Both checkpointers are measured alternately, each with its own driver, scheduler and agent: the workers that call the
driver's API (`gpu.checkpointer: driver`, to which the promise applies) and the cuda-checkpoint program (`utility`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

from agent.core.types import MILLISECOND_NS
from agent.emulated.control import EmulatedDriver
from agent.v1 import types_pb2
from agent.v1.instance_service_pb2 import ListInstancesRequest
from agent.wire.clients import DaemonChannel
from scripts.benchmarks._client import Client, TimedAnswer
from scripts.benchmarks._docker_engine import NoDocker, PausedContainer, paused_container
from scripts.benchmarks._spread import machine, ratio, row, summary
from tests.e2e.stack import echo, running_stack, until

PROMISE = {"p50": 0.25, "p99": 0.5}
PERCENT = {"p50": 50.0, "p99": 99.0}
WORKER, UTILITY = "driver", "utility"
"""The values of `gpu.checkpointer`."""
FUNCTION = "bench"
FREEZE_AFTER_NS = 50 * MILLISECOND_NS
REST_S = 0.04
"""Rest after everything is frozen or paused, so that its work has ended and caches are cold."""
AWAKE_REQUESTS = 4
MAX_AWAKE = 20
"""Most consecutive requests that find the instance awake before the benchmark fails."""


@dataclass(slots=True)
class Samples:
    """Times of one checkpointer in milliseconds, one per repetition (`awake`: several)."""

    total: list[float] = field(default_factory=list)
    driver: list[float] = field(default_factory=list)
    gateway_wait: list[float] = field(default_factory=list)
    agent_wake: list[float] = field(default_factory=list)
    awake: list[float] = field(default_factory=list)

    def added(self) -> list[float]:
        awake = median(self.awake)
        return [total - driver - awake for total, driver in zip(self.total, self.driver, strict=True)]

    def stages(self) -> dict[str, list[float]]:
        """The parts of `added`: gateway and agent before the wake, the wake itself, the request after it."""
        awake = median(self.awake)
        rows = list(zip(self.total, self.driver, self.gateway_wait, self.agent_wake, strict=True))
        return {
            "ask_agent": [wait - wake for _, _, wait, wake in rows],
            "agent_wake": [wake - driver for _, driver, _, wake in rows],
            "first_request": [total - wait - awake for total, _, wait, _ in rows],
        }

    def as_json(self) -> dict[str, Any]:
        return {
            "total_ms": summary(self.total),
            "driver_ms": summary(self.driver),
            "awake_request_ms": summary(self.awake),
            "added_ms": summary(self.added()),
            "added_stages_ms": {name: summary(values) for name, values in self.stages().items()},
        }


class Bench:
    """One checkpointer on a running stack; `samples` has its measurements."""

    def __init__(self, client: Client, channel: DaemonChannel, driver: EmulatedDriver) -> None:
        self.samples = Samples()
        self._client = client
        self._channel = channel
        self._driver = driver
        self._seen = 0

    async def wake(self) -> None:
        """Lets the instance freeze, measures a request that wakes it, and requests while it is awake."""
        for _ in range(MAX_AWAKE):
            await self._frozen()
            await asyncio.sleep(REST_S)
            answer = self._client.request()
            if answer.wake_ms:
                break
        else:
            raise RuntimeError("no request found the instance frozen")
        samples = self.samples
        samples.awake.extend(a.took_ms for _ in range(AWAKE_REQUESTS) if not (a := self._client.request()).wake_ms)
        samples.total.append(answer.took_ms)
        samples.gateway_wait.append(answer.wake_ms)
        samples.driver.append(self._driver_ms(answer))
        samples.agent_wake.append((await self._instance()).last_wake.total_ns / MILLISECOND_NS)

    def check(self) -> None:
        """Raises RuntimeError if the measurements are invalid."""
        if self._driver.frozen_calls():
            raise RuntimeError("the driver was called for a frozen process: the measurements are invalid")

    def _driver_ms(self, answer: TimedAnswer) -> float:
        """The driver's own time for the wake that this request waited for."""
        records = self._driver.oplog(self._seen)
        if records:
            self._seen = records[-1].seq
        mine = [r for r in records if r.pid == answer.body["pid"] and answer.began_ns <= r.at_ns <= answer.ended_ns]
        if not any(r.op == "restore" for r in mine):
            raise RuntimeError("the driver's log does not show the restore that the request waited for")
        return sum(r.us for r in mine) / 1000

    async def _instance(self) -> types_pb2.Instance:
        answer = await self._channel.call(self._channel.instances.ListInstances, ListInstancesRequest(), 10.0)
        return answer.instances[0]

    async def _frozen(self) -> None:
        async def frozen() -> bool:
            return (await self._instance()).state == types_pb2.Instance.STATE_FROZEN

        await until("the instance is frozen", frozen)


@asynccontextmanager
async def running_bench(checkpointer: str) -> AsyncIterator[Bench]:
    """Runs driver, scheduler and agent with one instance."""
    agent = {"log_format": "json"}  # as in production
    gpu = {"checkpointer": checkpointer}
    async with running_stack(
        "--gpus", "1", "--gib", "1", "--profile", "580", agent_settings=agent, gpu_settings=gpu
    ) as stack:
        spec = echo(FUNCTION)
        await stack.deploy(replace(spec, idle=replace(spec.idle, freeze_after_ns=FREEZE_AFTER_NS)), target=1)
        client = Client(stack.gateway, FUNCTION)
        try:
            async with stack.channel("agent") as channel:
                with stack.driver() as driver:
                    bench = Bench(client, channel, driver)
                    yield bench
                    bench.check()
        finally:
            client.close()
        await stack.remove_functions([FUNCTION])


def progress(text: str) -> None:
    print(f"wake: {text}", file=sys.stderr, flush=True)


async def measure(repetitions: int, warm_up: int, checkpointers: Sequence[str]) -> dict[str, Any]:
    """Runs the benchmark and returns the object that --json prints."""
    async with AsyncExitStack() as resources:
        rival, why_not = None, ""
        try:
            progress("looking for a Docker Engine")
            rival = resources.enter_context(paused_container())
        except NoDocker as error:
            why_not = str(error)
            progress(f"no Docker Engine: {why_not}")
        progress("starting driver, scheduler and agent")
        benches = {name: await resources.enter_async_context(running_bench(name)) for name in checkpointers}
        progress(f"{warm_up} wakes to warm up, {repetitions} to measure")
        await _repeat(benches, rival, warm_up)
        for bench in benches.values():
            bench.samples = Samples()
        unpause = await _repeat(benches, rival, repetitions)
        return report({name: bench.samples for name, bench in benches.items()}, unpause, rival, why_not)


async def _repeat(benches: Mapping[str, Bench], rival: PausedContainer | None, count: int) -> list[float]:
    """Measures all in turns; returns the times of unpause in ms."""
    unpause: list[float] = []
    for number in range(1, count + 1):
        for bench in benches.values():
            await bench.wake()
        if rival is not None:
            await asyncio.sleep(REST_S)
            unpause.append(rival.unpause_ns() / MILLISECOND_NS)
            rival.pause()
        if number % 25 == 0:
            progress(f"{number} of {count} wakes")
    return unpause


def report(
    samples: Mapping[str, Samples], unpause: Sequence[float], rival: PausedContainer | None, why_not: str
) -> dict[str, Any]:
    worker = samples[WORKER]
    ratios = {name: ratio(worker.added(), unpause, at) for name, at in PERCENT.items()} if rival else {}
    utility = samples.get(UTILITY)
    return {
        "benchmark": "wake",
        "repetitions": len(worker.total),
        "machine": machine(),
        **worker.as_json(),
        "docker": {"engine": rival.version, "where": rival.where} if rival else {"missing": why_not},
        "unpause_ms": summary(unpause) if rival else None,
        "ratio": {name: found.as_json() for name, found in ratios.items()} or None,
        "promise": PROMISE,
        "met": all(ratios[name].value <= bound for name, bound in PROMISE.items()) if ratios else None,
        "utility": None if utility is None else _against_utility(worker, utility),
    }


def _against_utility(worker: Samples, utility: Samples) -> dict[str, Any]:
    """The measurements with the cuda-checkpoint program, and the ratio of its `added` to the worker's."""
    times = {name: ratio(utility.added(), worker.added(), at) for name, at in PERCENT.items()}
    return {**utility.as_json(), "added_by_worker": {name: found.as_json() for name, found in times.items()}}


LINES = (
    ("request to a frozen instance", "total_ms"),
    ("- the driver's own time", "driver_ms"),
    ("- a request while awake", "awake_request_ms"),
    ("= added by gateway + agent", "added_ms"),
)
STAGES = {
    "ask_agent": "  gateway and agent, before",
    "agent_wake": "  agent's wake",
    "first_request": "  first request",
}


def table(result: Mapping[str, Any]) -> str:
    """The result as text, with times in ms."""
    rows = [f"{result['repetitions']} wakes, times in ms", row("", ("p50", "p99", "p25", "p75", "min", "max"))]
    rows.extend(_figures(result))
    if result["unpause_ms"] is not None:
        rows.append(row("unpause by the Docker Engine", result["unpause_ms"].values()))
    if result["utility"] is not None:
        rows.extend(("", "with the cuda-checkpoint program, in the same run", *_figures(result["utility"])))
    rows.append("")
    if result["utility"] is not None:
        for name, found in result["utility"]["added_by_worker"].items():
            rows.append(f"added with the program / with the worker, {name}: {_interval(found)}")
    if result["ratio"] is None:
        rows.append(f"Promise not checked: no Docker Engine to compare with ({result['docker']['missing']}).")
        return "\n".join(rows)
    for name, bound in PROMISE.items():
        found = result["ratio"][name]
        verdict = "met" if found["value"] <= bound else "not met"
        rows.append(f"added / unpause, {name}: {_interval(found)}; promised {bound}: {verdict}")
    rows.append(f"Docker {result['docker']['engine']}, {result['docker']['where']}")
    return "\n".join(rows)


def _figures(found: Mapping[str, Any]) -> list[str]:
    rows = [row(text, found[key].values()) for text, key in LINES]
    rows.extend(row(STAGES[name], figures.values()) for name, figures in found["added_stages_ms"].items())
    return rows


def _interval(found: Mapping[str, float]) -> str:
    return f"{found['value']:.3f} (95 % interval {found['low']:.3f} to {found['high']:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench wake", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--repetitions", type=int, default=200, help="wakes to measure (default: %(default)s)")
    parser.add_argument("--warm-up", type=int, default=20, help="wakes before measuring (default: %(default)s)")
    parser.add_argument("--no-utility", action="store_true", help="skip the cuda-checkpoint program")
    args = parser.parse_args()
    if args.repetitions < 1 or args.warm_up < 0:
        parser.error("--repetitions must be 1 or more, --warm-up 0 or more")
    checkpointers = (WORKER,) if args.no_utility else (WORKER, UTILITY)
    result = asyncio.run(measure(args.repetitions, args.warm_up, checkpointers))
    print(json.dumps(result) if args.json else table(result))


if __name__ == "__main__":
    main()
