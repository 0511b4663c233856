"""A request that arrives while a freeze still locks, which is undone, against one that waits for freeze and wake.

One instance of the example `echo` whose device memory moves at hardware's pace. It is told to freeze, and as soon as
the emulated driver works on the operation in question it is asked through the gateway by one blocking client: in turns
during the lock (in time: the freeze is cancelled) and during the checkpoint (late: the freeze ends, then it is woken).

    ratio = in time / late, of what the request took

A cancel counts as in time if the driver's log shows no checkpoint between the lock and the answer. The driver takes
`--fixed-us` for each operation, and the bytes by `--bandwidth` for a copy, so a freeze's lock lasts that long here.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from agent.core.errors import HibernodeError
from agent.core.types import MIB, SECOND_NS, GpuNeed
from agent.emulated.control import EmulatedDriver
from agent.v1.instance_service_pb2 import FreezeInstanceRequest, ListInstancesRequest
from agent.wire.clients import DaemonChannel
from scripts.benchmarks._client import Asked, Client
from scripts.benchmarks._spread import ratio, summary
from tests.e2e.stack import echo, running_stack

FUNCTION = "bench"
NEVER_NS = 3600 * SECOND_NS
"""freezeAfter: it freezes only when it is told to."""
CALL_S = 60.0
LOOK_S = 0.001
"""The driver is looked at so often: shorter than what is looked for."""
PERCENT = {"p50": 50.0, "p99": 99.0}
LOCK, CHECKPOINT = "lock", "checkpoint"


@dataclass(slots=True)
class Samples:
    """Milliseconds. `tried`: requests sent during a lock, `in_time` those of them whose freeze was cancelled."""

    in_time: list[float] = field(default_factory=list)
    late: list[float] = field(default_factory=list)
    awake: list[float] = field(default_factory=list)
    tried: int = 0


class Bench:
    """One run on a running stack."""

    def __init__(self, client: Client, channel: DaemonChannel, driver: EmulatedDriver, uid: str) -> None:
        self._client = client
        self._channel = channel
        self._driver = driver
        self._uid = uid
        self._seen = 0

    async def run(self, repetitions: int) -> Samples:
        """Both cases in turns, until each was measured `repetitions` times. Raises RuntimeError if cancels are hardly
        ever in time: then there is nothing to compare."""
        samples = Samples()
        while len(samples.late) < repetitions or len(samples.in_time) < repetitions:
            samples.tried += 1
            asked, cancelled = await self._ask_during(LOCK)
            if cancelled:
                samples.in_time.append(asked.took_ms)
            samples.awake.append(self._client.ask().took_ms)
            asked, cancelled = await self._ask_during(CHECKPOINT)
            if cancelled:
                raise RuntimeError("a freeze was cancelled after its checkpoint had begun")
            samples.late.append(asked.took_ms)
            samples.awake.append(self._client.ask().took_ms)
            if samples.tried > 4 * repetitions:
                raise RuntimeError(f"only {len(samples.in_time)} of {samples.tried} cancels were in time")
            if samples.tried % 25 == 0:
                progress(f"{samples.tried} of each")
        return samples

    async def _ask_during(self, operation: str) -> tuple[Asked, bool]:
        """One freeze and one request during it; was the freeze cancelled?"""
        self._log()
        freezing = asyncio.create_task(self._freeze())
        await self._until_driver_works_on(operation)
        asked = self._client.ask()
        await freezing
        done = {op for op, at_ns in self._log() if at_ns <= asked.ended_ns}
        if LOCK not in done:
            raise RuntimeError("the driver's log does not show the lock")
        return asked, CHECKPOINT not in done

    async def _freeze(self) -> None:
        with suppress(HibernodeError):  # FREEZE_REFUSED: the request came in between, in both cases
            request = FreezeInstanceRequest(uid=self._uid)
            await self._channel.call(self._channel.instances.FreezeInstance, request, CALL_S)

    async def _until_driver_works_on(self, operation: str) -> None:
        """Nobody tells us, so it is asked. Raises TimeoutError: it never did, or for less than LOOK_S."""
        async with asyncio.timeout(CALL_S):
            while not any(process.operation == operation for process in self._driver.processes()):  # noqa: ASYNC110
                await asyncio.sleep(LOOK_S)

    def _log(self) -> list[tuple[str, int]]:
        """What the driver has done since the last poll: operation and arrival."""
        records = self._driver.oplog(self._seen)
        if records:
            self._seen = records[-1].seq
        return [(record.op, record.at_ns) for record in records]


@asynccontextmanager
async def running_bench(mib: int, bandwidth: str, fixed_us: int) -> AsyncIterator[Bench]:
    """Driver, scheduler and agent with one instance; they end with it."""
    arguments = ("--gpus", "1", "--gib", "1", "--profile", "580", "--bandwidth", bandwidth, "--fixed-us", str(fixed_us))
    async with running_stack(*arguments, agent_settings={"log_format": "json"}) as stack:
        spec = echo(FUNCTION, VRAM_MIB=str(mib))
        spec = replace(
            spec, gpu=GpuNeed(1, memory_bytes=2 * mib * MIB), idle=replace(spec.idle, freeze_after_ns=NEVER_NS)
        )
        await stack.deploy(spec, target=1)
        client = Client(stack.gateway, FUNCTION)
        try:
            async with stack.channel("agent") as channel:
                with stack.driver() as driver:
                    uid = (
                        (await channel.call(channel.instances.ListInstances, ListInstancesRequest(), CALL_S))
                        .instances[0]
                        .uid
                    )
                    yield Bench(client, channel, driver, uid)
                    if driver.frozen_calls():
                        raise RuntimeError("the driver was asked about a frozen process: the figures are worth nothing")
        finally:
            client.close()
        await stack.remove_functions([FUNCTION])


def progress(text: str) -> None:
    print(f"cancel: {text}", file=sys.stderr, flush=True)


async def measure(repetitions: int, warm_up: int, mib: int, bandwidth: str, fixed_us: int) -> dict[str, Any]:
    """The whole run, as the object that --json prints."""
    progress("starting driver, scheduler and agent")
    async with running_bench(mib, bandwidth, fixed_us) as bench:
        progress(f"{warm_up} of each to warm up, {repetitions} to measure")
        if warm_up:
            await bench.run(warm_up)
        samples = await bench.run(repetitions)
    ratios = {name: ratio(samples.in_time, samples.late, at) for name, at in PERCENT.items()}
    return {
        "benchmark": "cancel",
        "repetitions": repetitions,
        "machine": {"cpus": os.cpu_count(), "kernel": platform.release(), "load_1m": round(os.getloadavg()[0], 2)},
        "vram_mib": mib,
        "bandwidth": bandwidth,
        "fixed_us": fixed_us,
        "tried": samples.tried,
        "share_in_time": round(len(samples.in_time) / samples.tried, 4),
        "in_time_ms": summary(samples.in_time),
        "late_ms": summary(samples.late),
        "awake_request_ms": summary(samples.awake),
        "ratio": {name: {"value": r.value, "low": r.low, "high": r.high} for name, r in ratios.items()},
    }


LINES = (
    ("during the lock: cancelled", "in_time_ms"),
    ("during the checkpoint: waits", "late_ms"),
    ("a request while awake", "awake_request_ms"),
)


def table(result: Mapping[str, Any]) -> str:
    """For people. Times in ms."""
    size = f"{result['vram_mib']} MiB at {result['bandwidth']}, {result['fixed_us']} us an operation"
    rows = [f"{result['repetitions']} of each, {size}; times in ms"]
    rows.append(_row("a request that arrives", ("p50", "p99", "p25", "p75", "min", "max")))
    rows.extend(_row(text, tuple(result[key].values())) for text, key in LINES)
    rows.append("")
    rows.append(f"in time: {result['share_in_time']:.1%} of {result['tried']} requests sent during a lock")
    for name, found in result["ratio"].items():
        spread = f"95 % interval {found['low']:.3f} to {found['high']:.3f}"
        rows.append(f"cancelled / waits for freeze and wake, {name}: {found['value']:.3f} ({spread})")
    return "\n".join(rows)


def _row(text: str, cells: tuple[object, ...]) -> str:
    return f"{text:<32}" + "".join(f"{f'{c:.3f}' if isinstance(c, float) else c:>10}" for c in cells)


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench cancel", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--repetitions", type=int, default=100, help="of each case (default: %(default)s)")
    parser.add_argument("--warm-up", type=int, default=5, help="of each case before that (default: %(default)s)")
    parser.add_argument("--mib", type=int, default=64, help="device memory of the instance (default: %(default)s)")
    parser.add_argument("--bandwidth", default="1GB/s", help="of the emulated driver (default: %(default)s)")
    parser.add_argument("--fixed-us", type=int, default=10_000, help="each operation besides (default: %(default)s)")
    given = parser.parse_args()
    if given.repetitions < 1 or given.warm_up < 0 or not 1 <= given.mib <= 512:
        parser.error("--repetitions must be 1 or more, --warm-up 0 or more, --mib 1 to 512")
    result = asyncio.run(measure(given.repetitions, given.warm_up, given.mib, given.bandwidth, given.fixed_us))
    print(json.dumps(result) if given.json else table(result))


if __name__ == "__main__":
    main()
