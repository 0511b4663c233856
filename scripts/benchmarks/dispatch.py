"""Latency under load through the gateway's queue, against HAProxy's leastconn with maxconn 1 and its round robin.

Eight instances of a server that handles one request at a time run as host processes behind an agent. The same requests
at the same times go to three entry points, in turns within one run: the gateway (scheduler and agent between client and
instance), HAProxy `balance leastconn` with `maxconn 1` per server (a central queue), and HAProxy `balance roundrobin`
(a queue per server). HAProxy connects to the instances directly.

Arrivals are Poisson; service times are lognormal with a mean of 20 ms, drawn from a seed and sent with the requests.
Promise (agent/docs/specification.md) at load 0.9 and cv 1: p99 at most 1.05 x leastconn's, round robin's at least 3 x
ours. Exit status 0 whether it is met or not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from agent.core.types import SECOND_NS, FunctionSpec, GpuNeed, IdleMode, IdlePolicy
from scripts.benchmarks._open_loop import OpenLoop, Planned
from scripts.benchmarks._spread import machine, percentile, ratio
from tests.e2e.stack import running_stack

SERVERS = 8
MEAN_S = 0.02
FUNCTION = "bench"
CELLS = ((1.0, 0.9), (1.0, 0.7), (0.3, 0.9), (0.3, 0.7))
"""(cv, load); the promise applies to the first."""
PROMISE = {"leastconn": 1.05, "roundrobin": 3.0}
DRAIN_S = 60.0
SETTLE_S = 0.5


class NoHaproxy(Exception):
    """HAProxy is not installed."""


def plan(cv: float, load: float, count: int, seed: int, path: str, host: str) -> list[Planned]:
    """Arrivals and service times of one run, equal for every entry point."""
    source = random.Random(seed)
    sigma = math.sqrt(math.log(1 + cv * cv))
    mu = math.log(MEAN_S) - sigma * sigma / 2
    at = 0.0
    planned = []
    for _ in range(count):
        at += source.expovariate(SERVERS * load / MEAN_S)
        service_us = max(1, round(source.lognormvariate(mu, sigma) * 1e6))
        message = f"GET {path}?us={service_us} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
        planned.append(Planned(int(at * SECOND_NS), message))
    return planned


@contextmanager
def haproxy(addresses: Sequence[str]) -> Iterator[dict[str, int]]:
    """Runs HAProxy with a port per balancing method, and yields the ports. Raises NoHaproxy."""
    program = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")
    if program is None:
        raise NoHaproxy("`haproxy` is not installed; on Debian: apt install haproxy")
    ports = _free_ports(2)
    entry_points = {"leastconn": ports[0], "roundrobin": ports[1]}
    lines = [
        "global",
        "  nbthread 1",
        "  maxconn 8000",
        "defaults",
        "  mode http",
        "  http-reuse always",
        "  timeout connect 5s",
        "  timeout client 300s",
        "  timeout server 300s",
        "  timeout queue 300s",
    ]
    for name, port in entry_points.items():
        bound = " maxconn 1" if name == "leastconn" else ""
        lines += [f"listen {name}", f"  bind 127.0.0.1:{port}", f"  balance {name}"]
        lines += [f"  server s{number} {address}{bound}" for number, address in enumerate(addresses)]
    with tempfile.TemporaryDirectory(prefix="hibernode-bench-") as folder:
        path = Path(folder) / "haproxy.cfg"
        path.write_text("\n".join(lines) + "\n")
        process = subprocess.Popen([program, "-db", "-f", str(path)], stderr=subprocess.DEVNULL)
        try:
            yield entry_points
        finally:
            process.terminate()
            process.wait(10)


def _free_ports(count: int) -> list[int]:
    import socket

    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


def spec() -> FunctionSpec:
    """The function: one request at a time, never frozen, no GPU."""
    return FunctionSpec(
        FUNCTION,
        entrypoint=(sys.executable, "-m", "scripts.benchmarks._queue_server"),
        environment=(("PYTHONPATH", str(Path.cwd())),),
        timeout_ns=120 * SECOND_NS,
        gpu=GpuNeed(0),
        idle=IdlePolicy(IdleMode.NEVER),
        queue_length=10_000,
        queue_timeout_ns=300 * SECOND_NS,
    )


def progress(text: str) -> None:
    print(f"dispatch: {text}", file=sys.stderr, flush=True)


async def measure(cells: Sequence[tuple[float, float]], arrivals: int, seeds: int) -> dict[str, Any]:
    """Runs the benchmark and returns the object that --json prints. Raises NoHaproxy."""
    async with running_stack(agent_settings={"log_format": "json"}) as stack:
        await stack.deploy(spec(), SERVERS)
        addresses = [one.address for one in await stack.instances()]
        gateway = stack.gateway.partition(":")[2]
        with haproxy(addresses) as entry_points:
            await asyncio.sleep(1)  # HAProxy has no readiness signal
            ports = {"hibernode": int(gateway), **entry_points}
            found = []
            for cv, load in cells:
                found.append(await _cell(cv, load, ports, arrivals, seeds))
    return {
        "benchmark": "dispatch",
        "machine": machine(),
        "servers": SERVERS,
        "mean_service_ms": MEAN_S * 1000,
        "arrivals": arrivals,
        "seeds": seeds,
        "cells": found,
        "promise": PROMISE,
    }


async def _cell(cv: float, load: float, ports: Mapping[str, int], arrivals: int, seeds: int) -> dict[str, Any]:
    latencies: dict[str, list[float]] = {name: [] for name in ports}
    by_seed: dict[str, list[float]] = {name: [] for name in ports}
    refused = 0
    for seed in range(1, seeds + 1):
        names = list(ports)
        for name in names[seed % 3 :] + names[: seed % 3]:
            path, host = (f"/fn/{FUNCTION}/", "localhost") if name == "hibernode" else ("/", "bench")
            planned = plan(cv, load, arrivals, seed, path, host)
            began = time.monotonic()
            took, statuses = await asyncio.to_thread(OpenLoop("127.0.0.1", ports[name]).run, planned, DRAIN_S)
            refused += sum(count for status, count in statuses.items() if status != 200)
            latencies[name] += took
            by_seed[name].append(percentile(took, 99))
            progress(
                f"cv {cv:g} load {load:g} seed {seed} {name}: p50 {percentile(took, 50):.1f} ms, "
                f"p99 {percentile(took, 99):.1f} ms, in {time.monotonic() - began:.0f} s"
            )
            await asyncio.sleep(SETTLE_S)  # let the servers become idle
    if refused:
        raise RuntimeError(f"{refused} answers other than 200: the measurements are invalid")
    against = {}
    for name in PROMISE:
        for at in (50.0, 99.0):
            found = ratio(latencies["hibernode"], latencies[name], at)
            against[f"{name}_p{at:.0f}"] = found.as_json()
    return {
        "cv": cv,
        "load": load,
        "p50_ms": {name: round(percentile(took, 50), 2) for name, took in latencies.items()},
        "p99_ms": {name: round(percentile(took, 99), 2) for name, took in latencies.items()},
        "p99_ms_by_seed": {name: [round(one, 2) for one in found] for name, found in by_seed.items()},
        "hibernode_over": against,
    }


def table(result: Mapping[str, Any]) -> str:
    """The result as text, with times in ms."""
    rows = [
        f"{result['seeds']} x {result['arrivals']} arrivals, {SERVERS} servers, mean {result['mean_service_ms']} ms"
    ]
    head = "".join(f"{name:>22}" for name in ("hibernode", "leastconn", "roundrobin"))
    rows.append(f"{'p50 / p99, ms':<18}{head}")
    for cell in result["cells"]:
        cells = (f"{cell['p50_ms'][name]:.1f} / {cell['p99_ms'][name]:.1f}" for name in cell["p50_ms"])
        rows.append(f"cv {cell['cv']:g}, load {cell['load']:g}".ljust(18) + "".join(f"{one:>22}" for one in cells))
    for cell in result["cells"]:
        least, robin = cell["hibernode_over"]["leastconn_p99"], cell["hibernode_over"]["roundrobin_p99"]
        rows.append(
            f"cv {cell['cv']:g}, load {cell['load']:g}: p99 / leastconn's {least['value']:.3f} "
            f"({least['low']:.3f} to {least['high']:.3f}), round robin's / ours {1 / robin['value']:.2f}"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench dispatch", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--arrivals", type=int, default=20_000, help="requests in each run (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each entry point (default: %(default)s)")
    parser.add_argument("--cells", type=int, default=len(CELLS), help="combinations of cv and load (default: all 4)")
    args = parser.parse_args()
    if args.arrivals < 100 or args.seeds < 1 or not 1 <= args.cells <= len(CELLS):
        parser.error("--arrivals must be 100 or more, --seeds 1 or more, --cells 1 to 4")
    try:
        result = asyncio.run(measure(CELLS[: args.cells], args.arrivals, args.seeds))
    except NoHaproxy as error:
        sys.exit(f"dispatch: nothing to compare with: {error}")
    print(json.dumps(result) if args.json else table(result))


if __name__ == "__main__":
    main()
