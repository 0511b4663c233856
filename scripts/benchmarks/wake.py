"""What a request to a frozen instance costs beyond the driver, against unpause by the Docker Engine API.

One instance of the example `echo` on the emulated driver. Again and again it is left to freeze and then asked through
the gateway by one blocking client; in between, in the same run, a container is paused and unpaused.

    added = the request's total time - the driver's own time for that wake - a request to the same instance awake

The driver's own time is the emulated driver's log of the calls made on the instance's process meanwhile (restore,
unlock, get-state); a request awake is the median of those made right after each wake. Promise (DESIGN section 11):
added p50 <= 0.25 x and p99 <= 0.5 x of unpause. Exit status 0 whether it is met or not: it is a measurement.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

from agent.core.types import MILLISECOND_NS
from agent.emulated.control import EmulatedDriver
from agent.v1 import types_pb2
from agent.v1.instance_service_pb2 import ListInstancesRequest
from agent.wire.clients import DaemonChannel
from scripts.benchmarks._docker_engine import NoDocker, PausedContainer, paused_container
from scripts.benchmarks._spread import Ratio, ratio, summary
from tests.e2e.stack import Stack, echo, running_stack, until

PROMISE = {"p50": 0.25, "p99": 0.5}
PERCENT = {"p50": 50.0, "p99": 99.0}
FUNCTION = "bench"
FREEZE_AFTER_NS = 50 * MILLISECOND_NS
REST_S = 0.04
"""After everything is frozen: what froze it has ended, caches and connections are as cold as they get."""
AWAKE_REQUESTS = 4
MAX_AWAKE = 20
"""Requests in a row that found the instance awake: then something is wrong."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One answer: how long it took, when (CLOCK_MONOTONIC ns), and what the gateway says of the wait."""

    began_ns: int
    ended_ns: int
    wake_ms: float
    body: dict[str, Any]

    @property
    def took_ms(self) -> float:
        return (self.ended_ns - self.began_ns) / MILLISECOND_NS


@dataclass(slots=True)
class Samples:
    """Milliseconds, one entry a repetition (`awake` and `unpause`: their own numbers)."""

    total: list[float] = field(default_factory=list)
    driver: list[float] = field(default_factory=list)
    gateway_wait: list[float] = field(default_factory=list)
    agent_wake: list[float] = field(default_factory=list)
    awake: list[float] = field(default_factory=list)
    unpause: list[float] = field(default_factory=list)

    def added(self) -> list[float]:
        awake = median(self.awake)
        return [total - driver - awake for total, driver in zip(self.total, self.driver, strict=True)]

    def stages(self) -> dict[str, list[float]]:
        """Where `added` goes: before the agent began to wake it, in the agent, after it was awake."""
        awake = median(self.awake)
        rows = list(zip(self.total, self.driver, self.gateway_wait, self.agent_wake, strict=True))
        return {
            "ask_agent": [wait - wake for _, _, wait, wake in rows],
            "agent_wake": [wake - driver for _, driver, _, wake in rows],
            "first_request": [total - wait - awake for total, _, wait, _ in rows],
        }


class Client:
    """Asks one function through the gateway on one keep-alive connection."""

    def __init__(self, gateway: str) -> None:
        self._connection = http.client.HTTPConnection(gateway, timeout=60)

    def ask(self) -> Asked:
        began = time.monotonic_ns()
        self._connection.request("GET", f"/fn/{FUNCTION}/")
        answer = self._connection.getresponse()
        content = answer.read()
        ended = time.monotonic_ns()
        if answer.status != 200:
            raise RuntimeError(f"the gateway answered {answer.status}: {content[:300]!r}")
        return Asked(began, ended, float(answer.headers.get("x-hibernode-wake-ms", "0")), json.loads(content))

    def close(self) -> None:
        self._connection.close()


class Bench:
    """One run on a running stack."""

    def __init__(
        self, client: Client, channel: DaemonChannel, driver: EmulatedDriver, rival: PausedContainer | None
    ) -> None:
        self._client = client
        self._channel = channel
        self._driver = driver
        self._rival = rival
        self._seen = 0

    async def run(self, repetitions: int, warm_up: int) -> Samples:
        await self._repeat(Samples(), warm_up)
        samples = Samples()
        await self._repeat(samples, repetitions)
        return samples

    async def _repeat(self, samples: Samples, count: int) -> None:
        awake = 0
        while len(samples.total) < count:
            await self._frozen()
            await asyncio.sleep(REST_S)
            asked = self._client.ask()
            if not asked.wake_ms:
                awake += 1
                if awake > MAX_AWAKE:
                    raise RuntimeError("the instance is never found frozen")
                continue
            awake = 0
            samples.awake.extend(a.took_ms for _ in range(AWAKE_REQUESTS) if not (a := self._client.ask()).wake_ms)
            samples.total.append(asked.took_ms)
            samples.gateway_wait.append(asked.wake_ms)
            samples.driver.append(self._driver_ms(asked))
            samples.agent_wake.append((await self._instance()).last_wake.total_ns / MILLISECOND_NS)
            if self._rival is not None:
                samples.unpause.append(self._rival.unpause_ns() / MILLISECOND_NS)
                self._rival.pause()
            if len(samples.total) % 25 == 0:
                progress(f"{len(samples.total)} of {count} wakes")

    def _driver_ms(self, asked: Asked) -> float:
        """The driver's own time for the wake that this request waited for."""
        records = self._driver.oplog(self._seen)
        if records:
            self._seen = records[-1].seq
        mine = [r for r in records if r.pid == asked.body["pid"] and asked.began_ns <= r.at_ns <= asked.ended_ns]
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


def progress(text: str) -> None:
    print(f"wake: {text}", file=sys.stderr, flush=True)


async def measure(repetitions: int, warm_up: int) -> dict[str, Any]:
    """The whole run, as the object that --json prints."""
    with ExitStack() as resources:
        rival, why_not = None, ""
        try:
            progress("looking for a Docker Engine")
            rival = resources.enter_context(paused_container())
        except NoDocker as error:
            why_not = str(error)
            progress(f"no Docker Engine: {why_not}")
        progress("starting driver, scheduler and agent")
        settings = {"log_format": "json"}  # as in production; the stack's own is for people
        async with running_stack("--gpus", "1", "--gib", "1", "--profile", "580", agent_settings=settings) as stack:
            samples = await _measure_on(stack, rival, repetitions, warm_up)
        return report(samples, rival, why_not)


async def _measure_on(stack: Stack, rival: PausedContainer | None, repetitions: int, warm_up: int) -> Samples:
    spec = echo(FUNCTION)
    await stack.deploy(replace(spec, idle=replace(spec.idle, freeze_after_ns=FREEZE_AFTER_NS)), target=1)
    client = Client(stack.gateway)
    progress(f"{warm_up} wakes to warm up, {repetitions} to measure")
    try:
        async with stack.channel("agent") as channel:
            with stack.driver() as driver:
                samples = await Bench(client, channel, driver, rival).run(repetitions, warm_up)
                if driver.frozen_calls():
                    raise RuntimeError("the driver was asked about a frozen process: the figures are worth nothing")
    finally:
        client.close()
    await stack.remove_functions([FUNCTION])
    return samples


def report(samples: Samples, rival: PausedContainer | None, why_not: str) -> dict[str, Any]:
    added = samples.added()
    ratios = {name: ratio(added, samples.unpause, at) for name, at in PERCENT.items()} if rival else {}
    return {
        "benchmark": "wake",
        "repetitions": len(samples.total),
        "machine": {"cpus": os.cpu_count(), "kernel": platform.release(), "load_1m": round(os.getloadavg()[0], 2)},
        "total_ms": summary(samples.total),
        "driver_ms": summary(samples.driver),
        "awake_request_ms": summary(samples.awake),
        "added_ms": summary(added),
        "added_stages_ms": {name: summary(values) for name, values in samples.stages().items()},
        "docker": {"engine": rival.version, "where": rival.where} if rival else {"missing": why_not},
        "unpause_ms": summary(samples.unpause) if rival else None,
        "ratio": {name: _as_json(found) for name, found in ratios.items()} or None,
        "promise": PROMISE,
        "met": all(ratios[name].value <= bound for name, bound in PROMISE.items()) if ratios else None,
    }


def _as_json(found: Ratio) -> dict[str, float]:
    return {"value": found.value, "low": found.low, "high": found.high}


LINES = (
    ("request to a frozen instance", "total_ms"),
    ("- the driver's own time", "driver_ms"),
    ("- a request while awake", "awake_request_ms"),
    ("= added by gateway + agent", "added_ms"),
    ("unpause by the Docker Engine", "unpause_ms"),
)
STAGES = {
    "ask_agent": "  gateway decides, asks, hears",
    "agent_wake": "  agent wakes it",
    "first_request": "  first request goes through",
}


def table(result: Mapping[str, Any]) -> str:
    """For people. Times in ms."""
    rows = [f"{result['repetitions']} wakes, times in ms", _row("", ("p50", "p99", "p25", "p75", "min", "max"))]
    for text, key in LINES:
        if result[key] is not None:
            rows.append(_row(text, result[key].values()))
        if key == "added_ms":
            rows.extend(_row(STAGES[name], figures.values()) for name, figures in result["added_stages_ms"].items())
    rows.append("")
    if result["ratio"] is None:
        rows.append(f"Not counted as met: no Docker Engine to compare with ({result['docker']['missing']}).")
        return "\n".join(rows)
    for name, bound in PROMISE.items():
        found = result["ratio"][name]
        verdict = "met" if found["value"] <= bound else "not met"
        spread = f"95 % interval {found['low']:.3f} to {found['high']:.3f}"
        rows.append(f"added / unpause, {name}: {found['value']:.3f} ({spread}); promised {bound}: {verdict}")
    rows.append(f"Docker {result['docker']['engine']}, {result['docker']['where']}")
    return "\n".join(rows)


def _row(text: str, cells: Sequence[object] | Any) -> str:
    return f"{text:<32}" + "".join(f"{f'{c:.3f}' if isinstance(c, float) else c:>10}" for c in cells)


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench wake", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--repetitions", type=int, default=200, help="wakes to measure (default: %(default)s)")
    parser.add_argument("--warm-up", type=int, default=20, help="wakes before that (default: %(default)s)")
    given = parser.parse_args()
    if given.repetitions < 1 or given.warm_up < 0:
        parser.error("--repetitions must be 1 or more, --warm-up 0 or more")
    result = asyncio.run(measure(given.repetitions, given.warm_up))
    print(json.dumps(result) if given.json else table(result))


if __name__ == "__main__":
    main()
