"""Scheduler scaling: the cost of a dispatch decision from 10 to 10,000 instances, and load reports of 1,000 nodes.

`decision`: one request arrives, is dispatched and ends in the dispatcher (core/dispatch/dispatcher.py). Half of the
instances are awake, on nodes of eight GPUs. Sizes are measured in turns for many rounds, so that noise affects all.

`fleet`: a scheduler process with 1,000 registered nodes of eight instances, each with its own load stream from another
process. Each node sends four messages per second: two with heartbeat, GPUs and gauges of awake instances, two with a
change of an instance. Measured: the scheduler's CPU time, its memory, and the time to acknowledge a snapshot, which is
one message in `SNAPSHOT_EVERY`.

Promise (agent/docs/specification.md): a decision at 10,000 instances costs less than 1.5 x one at 10; 1,000 nodes with
4 messages/s use less than one core. Exit status 0 whether it is met or not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import yaml

from agent.core.dispatch.dispatcher import Dispatcher
from agent.core.dispatch.events import FunctionSet, InstanceReported, LeaseEnded, NodeReported, RequestArrived
from agent.core.types import InstanceState
from agent.v1 import types_pb2
from agent.v1.scheduler_service_pb2 import InstanceLoad, NodeLoad, Registration, ReportLoadRequest
from agent.wire.clients import DaemonChannel
from scripts.benchmarks._spread import machine, percentile, ratio

SIZES = (10, 100, 1_000, 10_000)
PROMISE = {"decision": 1.5, "cores": 1.0}
PER_NODE = 8
REQUESTS = 400
MESSAGES_PER_S = 4
SNAPSHOT_EVERY = 20
SETTLE_S = 3.0
TOKEN = "node-{:04d}-0123456789abcdef0123456789"


# ---- the cost of a decision ----------------------------------------------------------------------------------------


class LoadedDispatcher:
    """A dispatcher with `instances` instances, half of them awake."""

    def __init__(self, instances: int) -> None:
        self._dispatcher = Dispatcher()
        self._dispatcher.step(FunctionSet("ocr"), 1)
        self._number = 0
        self._at = 1
        for n in range(instances):
            node = f"n{n // PER_NODE}"
            if n % PER_NODE == 0:
                self._dispatcher.step(NodeReported(node, gpu_count=PER_NODE), 1)
            state = InstanceState.RUNNING if n % 2 else InstanceState.FROZEN
            gpus = (f"{node}-g{n % PER_NODE}",)
            self._dispatcher.step(InstanceReported(f"i{n}", "ocr", node, state, gpus=gpus), 1)

    def decision_us(self) -> float:
        """Mean time of REQUESTS requests in microseconds, with three in flight."""
        step, first = self._dispatcher.step, self._number
        began = time.perf_counter_ns()
        for number in range(first, first + REQUESTS):
            self._at += 1000
            step(RequestArrived(number, "ocr", self._at + 10**12), self._at)
            if number >= first + 3:
                step(LeaseEnded(number - 3), self._at)
        took = time.perf_counter_ns() - began
        for number in range(first + REQUESTS - 3, first + REQUESTS):
            step(LeaseEnded(number), self._at)
        self._number = first + REQUESTS
        return took / 1000 / REQUESTS


def decisions(rounds: int) -> dict[str, Any]:
    """Measures all sizes in turns."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    dispatchers = {size: LoadedDispatcher(size) for size in SIZES}
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    samples: dict[int, list[float]] = {size: [] for size in SIZES}
    for number in range(rounds + 2):
        for size in SIZES if number % 2 else reversed(SIZES):
            took = dispatchers[size].decision_us()
            if number >= 2:  # the first rounds warm up
                samples[size].append(took)
    found = ratio(samples[SIZES[-1]], samples[SIZES[0]], 50.0)
    return {
        "median_us": {str(size): round(median(samples[size]), 2) for size in SIZES},
        "growth": found.as_json(),
        "bytes_per_instance": round(grown * 1024 / sum(SIZES)),
        "met": found.value < PROMISE["decision"],
    }


# ---- load reports of a fleet ---------------------------------------------------------------------------------------


def prepare(folder: Path, nodes: int) -> Path:
    """The scheduler's configuration, with a credential for each node."""
    tokens = folder / "tokens"
    tokens.mkdir()
    credentials = []
    for number in range(nodes):
        path = tokens / f"{number}"
        path.write_text(TOKEN.format(number))
        path.chmod(0o600)
        credentials.append({"name": f"node-{number:04d}", "token_file": str(path)})
    any_port = {"host": "127.0.0.1", "port": 0}
    config = {
        "state_dir": str(folder / "scheduler"),
        "log_level": "error",
        **dict.fromkeys(("gateway", "grpc", "admin"), any_port),
        "nodes": credentials,
    }
    path = folder / "scheduler.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


class Node:
    """One simulated agent with its load stream."""

    def __init__(self, number: int, address: str) -> None:
        self._name = f"node-{number:04d}"
        self._channel = DaemonChannel(address, TOKEN.format(number))
        self._sequence = 0
        self._sent: dict[int, float] = {}
        self.lags_ms: list[float] = []
        self.taken = 0

    def _instance(self, index: int, state: types_pb2.Instance.State.ValueType) -> InstanceLoad:
        return InstanceLoad(
            uid=f"{self._name}-i{index}", function=f"f{index}", revision="1", request_id=f"f{index}/1/0/1", state=state,
            concurrency=1, healthy=True, gpu_uuids=[f"{self._name}-g{index}"],
        )  # fmt: skip

    def _message(self, change: bool) -> ReportLoadRequest:
        self._sequence += 1
        snapshot = self._sequence % SNAPSHOT_EVERY == 1
        message = ReportLoadRequest(epoch=1, sequence=self._sequence, snapshot=snapshot)
        memory = types_pb2.HostMemory(total_bytes=1 << 38, available_bytes=1 << 37)
        if self._sequence == 1:
            message.registration.CopyFrom(
                Registration(
                    ingress_address="127.0.0.1:9", grpc_address="127.0.0.1:9", gpus=self._gpus(), instances_per_gpu=1,
                    runtimes=["engine"], host_memory=memory,
                )
            )  # fmt: skip
        if snapshot:
            running = types_pb2.Instance.STATE_RUNNING
            message.instances.extend(self._instance(index, running) for index in range(PER_NODE))
        elif change:
            awake = self._sequence % 4 < 2
            state = types_pb2.Instance.STATE_RUNNING if awake else types_pb2.Instance.STATE_FROZEN
            message.instances.append(self._instance(self._sequence % PER_NODE, state))
        if snapshot or not change:
            ready = types_pb2.Node.STATE_READY
            message.load.CopyFrom(NodeLoad(state=ready, host_memory=memory, gpus=self._gpus()))
            for index in range(PER_NODE // 2):
                message.load.instances.add(
                    uid=f"{self._name}-i{index}", cpu_ns=self._sequence * 10**8, vram_bytes=1 << 33
                )
        return message

    def _gpus(self) -> list[types_pb2.Gpu]:
        used = 1 << 33
        return [
            types_pb2.Gpu(
                uuid=f"{self._name}-g{n}", index=n, model="H100", health=types_pb2.Gpu.HEALTH_OK,
                memory_total_bytes=80 << 30, memory_used_bytes=used, sm_percent=self._sequence % 100,
                memory_percent=10, temperature_celsius=60, power_milliwatts=400_000,
            )
            for n in range(PER_NODE)
        ]  # fmt: skip

    async def run(self, offset_s: float) -> None:
        """Sends reports until cancelled."""
        await asyncio.sleep(offset_s)  # spread the agents' heartbeats
        stream = self._channel.report_load()
        reader = asyncio.create_task(self._read(stream))
        try:
            while True:
                due = asyncio.get_running_loop().time() + 1 / MESSAGES_PER_S
                message = self._message(change=self._sequence % 2 == 1)
                if message.snapshot:
                    self._sent[self._sequence] = time.monotonic()
                await stream.send(message)
                await asyncio.sleep(max(0.0, due - asyncio.get_running_loop().time()))
        finally:
            reader.cancel()
            stream.close()

    async def _read(self, stream: Any) -> None:
        while (answer := await stream.receive()) is not None:
            self.lags_ms.append((time.monotonic() - self._sent.pop(answer.acknowledged_sequence)) * 1000)
            self.taken = answer.acknowledged_sequence


def _scheduler(config: Path, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "agent.daemons.scheduler", "--config", str(config)]
    with log.open("wb") as file:
        return subprocess.Popen(command, stdout=file, stderr=file)


async def fleet(nodes: int, seconds: float) -> dict[str, Any]:
    """Measures a scheduler with the reports of `nodes` nodes."""
    with tempfile.TemporaryDirectory(prefix="hibernode-bench-") as name:
        folder = Path(name)
        config = prepare(folder, nodes)
        process = _scheduler(config, folder / "log")
        try:
            endpoints = folder / "scheduler" / "endpoints.json"
            ends = time.monotonic() + 60
            while not endpoints.exists():
                if process.poll() is not None or time.monotonic() > ends:
                    raise RuntimeError(f"the scheduler did not start: {(folder / 'log').read_text()[-2000:]}")
                await asyncio.sleep(0.05)
            return await _measured(process.pid, json.loads(endpoints.read_text())["grpc"], nodes, seconds)
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


async def _measured(pid: int, address: str, count: int, seconds: float) -> dict[str, Any]:
    nodes = [Node(number, address) for number in range(count)]
    tasks = [asyncio.create_task(node.run(2 * number / count)) for number, node in enumerate(nodes)]
    process = psutil.Process(pid)
    try:
        await asyncio.sleep(2 + SETTLE_S)  # all are connected and send heartbeats
        for node in nodes:
            node.lags_ms.clear()
        before = sum(node.taken for node in nodes)
        began, cpu = time.monotonic(), sum(process.cpu_times()[:2])
        await asyncio.sleep(seconds)
        took, used = time.monotonic() - began, sum(process.cpu_times()[:2]) - cpu
        taken = sum(node.taken for node in nodes) - before
        lags = [lag for node in nodes for lag in node.lags_ms]
        crashed = [task.exception() for task in tasks if task.done()]
        if crashed:
            raise RuntimeError(f"{len(crashed)} load streams ended: {crashed[0]!r}")
        return {
            "nodes": count,
            "seconds": round(took, 1),
            "messages_per_s": round(taken / took),
            "scheduler_cores": round(used / took, 3),
            "scheduler_rss_mib": round(process.memory_info().rss / (1 << 20), 1),
            "acknowledged_ms": {"p50": round(percentile(lags, 50), 1), "p99": round(percentile(lags, 99), 1)},
            "met": used / took < PROMISE["cores"] and taken / took >= 0.95 * count * MESSAGES_PER_S,
        }
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def table(result: Mapping[str, Any]) -> str:
    """The result as text."""
    decision, reports = result["decision"], result["fleet"]
    rows = [f"{size:>7} instances: {took:7.2f} us per decision" for size, took in decision["median_us"].items()]
    growth = decision["growth"]
    rows.append(f"from 10 to 10,000: {growth['value']:.2f} x ({growth['low']:.2f} to {growth['high']:.2f})")
    rows.append(
        f"{reports['nodes']} nodes, {reports['messages_per_s']} messages/s: {reports['scheduler_cores']} cores, "
        f"{reports['scheduler_rss_mib']} MiB, acknowledged in {reports['acknowledged_ms']['p50']} ms "
        f"(p99 {reports['acknowledged_ms']['p99']} ms)"
    )
    rows.append(f"promise: decision {_met(decision)}, fleet {_met(reports)}")
    return "\n".join(rows)


def _met(part: Mapping[str, Any]) -> str:
    return "met" if part["met"] else "NOT met"


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench scale", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rounds", type=int, default=60, help="rounds of decisions (default: %(default)s)")
    parser.add_argument("--nodes", type=int, default=1000, help="nodes that report (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=30.0, help="duration of the reports (default: %(default)s)")
    args = parser.parse_args()
    if args.rounds < 1 or not 1 <= args.nodes <= 2000 or args.seconds <= 0:
        parser.error("--rounds must be 1 or more, --nodes 1 to 2000, --seconds more than 0")
    result = {
        "benchmark": "scale",
        "machine": machine(),
        "decision": decisions(args.rounds),
        "fleet": asyncio.run(fleet(args.nodes, args.seconds)),
        "promise": PROMISE,
    }
    print(json.dumps(result) if args.json else table(result))


if __name__ == "__main__":
    main()
