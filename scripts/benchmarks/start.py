"""Start of an instance of a trivial image, from create to ready, against `docker run` of the same image.

The image is one static program that answers HTTP. In turns, on the same Docker Engine: an agent's CreateInstance until
the instance is RUNNING (image check, container, network, readiness by its port), and `docker run -d`, until the command
returns and until the container's port answers.

    ratio = create to ready / docker run until it returns

`docker run` gives its container no limits, network or readiness check; the agent does. Both are removed between the
turns, which is not measured. Exit status 1 without Docker.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

from agent.core.types import MILLISECOND_NS, FunctionSpec, GpuNeed, IdleMode, IdlePolicy
from agent.v1.instance_service_pb2 import CreateInstanceRequest, StopInstanceRequest
from agent.wire.clients import DaemonChannel
from agent.wire.convert_function import function_to_proto
from scripts.benchmarks._docker_engine import Engine, NoDocker, find_engine, imported_image
from scripts.benchmarks._spread import machine, ratio, row, summary
from tests.e2e.stack import running_stack

IMAGE = "hibernode-bench-server:latest"
PORT = 9000
RIVAL = "hibernode-bench-rival"
CALL_S = 120.0
PERCENT = {"p50": 50.0, "p99": 99.0}
LIMIT = 1.3
SERVER = """
#include <arpa/inet.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
int main(void) {
    static const char answer[] = "HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\n\\r\\nok";
    struct sockaddr_in any = {.sin_family = AF_INET, .sin_port = htons(9000)};
    int one = 1, door = socket(AF_INET, SOCK_STREAM, 0);
    setsockopt(door, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(door, (struct sockaddr *)&any, sizeof any) || listen(door, 64)) return 1;
    for (;;) {
        char request[4096];
        int guest = accept(door, 0, 0);
        if (guest < 0) continue;
        if (read(guest, request, sizeof request) > 0 && write(guest, answer, strlen(answer)) < 0) {}
        close(guest);
    }
}
"""


@dataclass(slots=True)
class Samples:
    """Times in milliseconds."""

    ours: list[float] = field(default_factory=list)
    run: list[float] = field(default_factory=list)
    run_ready: list[float] = field(default_factory=list)


def function() -> FunctionSpec:
    """The server, always awake and without a GPU, so that only the start is measured."""
    return FunctionSpec("bench", image=IMAGE, port=PORT, gpu=GpuNeed(0), idle=IdlePolicy(IdleMode.NEVER))


class Rival:
    """Runs `docker run -d` with Docker's own command."""

    def __init__(self, program: str, socket_path: str, engine: Engine) -> None:
        self._docker = (program, "-H", f"unix://{socket_path}")
        self._engine = engine

    def run(self) -> tuple[float, float]:
        """Times until the command returns and until the port answers, in ms. Raises RuntimeError."""
        began = time.monotonic_ns()
        done = subprocess.run(
            [*self._docker, "run", "-d", "--name", RIVAL, IMAGE], capture_output=True, timeout=CALL_S, check=False
        )
        returned = time.monotonic_ns()
        if done.returncode:
            raise RuntimeError(f"docker run: {done.stderr.decode(errors='replace').strip()}")
        address = self._engine.call("GET", f"/containers/{RIVAL}/json")["NetworkSettings"]["IPAddress"]
        ends = time.monotonic() + CALL_S
        while time.monotonic() < ends:
            with suppress(OSError):
                socket.create_connection((address, PORT), timeout=1.0).close()
                ready = time.monotonic_ns()
                return (returned - began) / MILLISECOND_NS, (ready - began) / MILLISECOND_NS
            time.sleep(0.002)
        raise RuntimeError(f"the rival's server does not answer at {address}:{PORT}")

    def remove(self) -> None:
        with suppress(NoDocker):  # it does not exist
            self._engine.call("DELETE", f"/containers/{RIVAL}?force=1")


async def create_to_ready(channel: DaemonChannel, number: int) -> float:
    """Time from the create to RUNNING in ms; stops the instance before it returns."""
    request = CreateInstanceRequest(
        request_id=f"bench/1/0/{number}", spec=function_to_proto(function(), reveal_secrets=True), wait=True
    )
    began = time.monotonic_ns()
    created = await channel.call(channel.instances.CreateInstance, request, CALL_S)
    took = (time.monotonic_ns() - began) / MILLISECOND_NS
    await channel.call(
        channel.instances.StopInstance, StopInstanceRequest(uid=created.instance.uid, force=True), CALL_S
    )
    return took


async def turns(channel: DaemonChannel, rival: Rival, repetitions: int, first: int) -> Samples:
    """Measures both sides in turns, starting with each alternately."""
    samples = Samples()
    for number in range(repetitions):
        for whose in ("ours", "rival") if number % 2 else ("rival", "ours"):
            if whose == "ours":
                samples.ours.append(await create_to_ready(channel, first + number))
                continue
            rival.remove()
            returned, ready = await asyncio.to_thread(rival.run)
            samples.run.append(returned)
            samples.run_ready.append(ready)
            rival.remove()
        if (number + 1) % 10 == 0:
            progress(f"{number + 1} of each")
    return samples


def progress(text: str) -> None:
    print(f"start: {text}", file=sys.stderr, flush=True)


async def measure(repetitions: int, warm_up: int) -> dict[str, Any]:
    """Runs the benchmark and returns the object that --json prints. Raises NoDocker."""
    program = shutil.which("docker")
    if program is None:
        raise NoDocker("no `docker` command")
    with ExitStack() as stack:
        progress("looking for a Docker Engine")
        path, where = find_engine(stack, bridge=True)
        engine = Engine(path)
        stack.callback(engine.close)
        version = engine.call("GET", "/version")["Version"]
        stack.enter_context(imported_image(engine, IMAGE, SERVER))
        rival = Rival(program, path, engine)
        stack.callback(rival.remove)
        progress("starting driver and agent")
        async with (
            running_stack(agent_settings={"log_format": "json"}, engine_socket=path, scheduler=False) as agent,
            agent.channel("agent") as channel,
        ):
            progress(f"{warm_up} of each to warm up, {repetitions} to measure")
            await turns(channel, rival, warm_up, 0)
            samples = await turns(channel, rival, repetitions, warm_up)
    to_run = {name: ratio(samples.ours, samples.run, at) for name, at in PERCENT.items()}
    to_ready = {name: ratio(samples.ours, samples.run_ready, at) for name, at in PERCENT.items()}
    return {
        "benchmark": "start",
        "repetitions": repetitions,
        "machine": machine(),
        "docker": {"engine": version, "where": where},
        "create_to_ready_ms": summary(samples.ours),
        "docker_run_ms": summary(samples.run),
        "docker_run_to_ready_ms": summary(samples.run_ready),
        "ratio": {name: r.as_json() for name, r in to_run.items()},
        "ratio_to_ready": {name: r.as_json() for name, r in to_ready.items()},
        "limit": LIMIT,
        "met": to_run["p50"].value <= LIMIT,
    }


LINES = (
    ("create to ready", "create_to_ready_ms"),
    ("docker run -d, until it returns", "docker_run_ms"),
    ("docker run -d, until ready", "docker_run_to_ready_ms"),
)


def table(result: Mapping[str, Any]) -> str:
    """The result as text, with times in ms."""
    rows = [f"{result['repetitions']} of each, Docker {result['docker']['engine']}, {result['docker']['where']}; in ms"]
    rows.append(row("", ("p50", "p99", "p25", "p75", "min", "max")))
    rows.extend(row(text, result[key].values(), 1) for text, key in LINES)
    rows.append("")
    for key, text in (("ratio", "until it returns"), ("ratio_to_ready", "until ready")):
        for name, found in result[key].items():
            spread = f"95 % interval {found['low']:.3f} to {found['high']:.3f}"
            rows.append(f"create to ready / docker run {text}, {name}: {found['value']:.3f} ({spread})")
    rows.append(f"promise, p50 at most {result['limit']} x docker run: {'met' if result['met'] else 'NOT met'}")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench start", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--repetitions", type=int, default=40, help="starts of each (default: %(default)s)")
    parser.add_argument("--warm-up", type=int, default=3, help="starts of each before measuring (default: %(default)s)")
    args = parser.parse_args()
    if args.repetitions < 1 or args.warm_up < 0:
        parser.error("--repetitions must be 1 or more, --warm-up 0 or more")
    try:
        result = asyncio.run(measure(args.repetitions, args.warm_up))
    except NoDocker as error:
        sys.exit(f"start: nothing to compare with: {error}")
    print(json.dumps(result) if args.json else table(result))


if __name__ == "__main__":
    main()
