"""A function on this host's GPU, from the caller's side: `python -m agent.selftest.proof.end_to_end`.

Starts a private scheduler and agent, deploys a function with real GPU memory, lets it freeze and wakes it by requests.
Reports as `agent/selftest/reporting.py` says; everything it started ends with it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent.adapters.kernel.clock import SystemClock
from agent.cli.demo.client import GatewayClient, Tally
from agent.cli.demo.function import WorldFunction
from agent.cli.demo.gpus import HostGpus
from agent.cli.demo.report import DemoReport, UsageQuery, collect_usage, union_ns
from agent.cli.demo.timeline import Timeline
from agent.cli.demo.world import DemoWorld, WorldProgram, demo_world
from agent.core.errors import HibernodeError
from agent.core.types import MIB
from agent.examples.echo.__main__ import expected_answer
from agent.selftest.proof.figures import figure_of
from agent.selftest.reporting import emit, report_of

FUNCTION = "proof"
CHECKOUT = Path(__file__).parents[3]
MAX_ROUNDS, MIN_ROUNDS = 20, 3
BURST = 8
"""Requests at once against a frozen instance."""
WARM = 20
"""Requests in a row against an awake one."""
INPUTS = 16
FREEZE_AFTER = "300ms"
INIT_S = 180
END_S = 15.0
"""What the last requests, the last usage and the end of the daemons may take."""


@dataclass(frozen=True, slots=True)
class Program:
    """What the function runs: the first module, which imports the others.

    `oracle`: the answer for each input; None: what it answers before any freeze."""

    name: str
    python: str
    modules: tuple[str, ...]
    oracle: Callable[[int], str] | None


def choose_program(torch_python: str, torch_version: str) -> Program:
    """PyTorch if a Python has it, else the CUDA driver API through ctypes."""
    if torch_python:
        name = f"a perceptron in half precision, PyTorch {torch_version}"
        return Program(name, torch_python, ("agent.examples.torch_mlp", "torch"), None)
    return Program(
        "echo, on the CUDA driver API through ctypes", sys.executable, ("agent.examples.echo",), expected_answer
    )


@dataclass(slots=True)
class Measured:
    """What the caller saw, in milliseconds. `wake_ms`: requests that found the instance frozen."""

    wake_ms: list[float] = field(default_factory=list)
    warm_ms: list[float] = field(default_factory=list)
    burst_ms: list[float] = field(default_factory=list)
    rounds: int = 0
    intact: bool = False


class Caller:
    """Sends requests to the function and compares each answer. `expected` grows with the first answers."""

    def __init__(self, client: GatewayClient, program: Program, clock: SystemClock) -> None:
        self._client = client
        self._clock = clock
        self._expected = {n: program.oracle(n).encode() for n in range(INPUTS)} if program.oracle else {}

    async def ask(self, number: int, times: list[float]) -> None:
        """One request; its time from the caller's side goes into `times`."""
        number %= INPUTS
        begin = self._clock.monotonic_ns()
        response = await self._client.call(f"/answer?n={number}", b"GET", f"/answer?n={number}")
        if response is None:
            return
        times.append((self._clock.monotonic_ns() - begin) / 1e6)
        if response.body != self._expected.setdefault(number, response.body):
            self._client.count_different(f"/answer?n={number} differs from the answer before the first freeze")

    async def learn(self) -> None:
        """Get every answer once, before the first freeze."""
        for number in range(INPUTS):
            await self.ask(number, [])

    async def verify(self) -> bool:
        """Whether the function finds every byte of its GPU memory unchanged."""
        return await self._client.call("/verify", b"GET", "/verify") is not None


async def run_rounds(function: WorldFunction, caller: Caller, measured: Measured, until_ns: int) -> None:
    """Freeze, wake by one request, answer in a row, freeze, wake by several at once; until the time is used."""
    clock = SystemClock()
    while measured.rounds < MIN_ROUNDS or (measured.rounds < MAX_ROUNDS and clock.monotonic_ns() < until_ns):
        await function.wait_until_frozen()
        emit("step", f"round {measured.rounds + 1}: waking by a request")
        await caller.ask(measured.rounds, measured.wake_ms)
        for number in range(WARM):
            await caller.ask(number, measured.warm_ms)
        await function.wait_until_frozen()
        await asyncio.gather(*(caller.ask(number, measured.burst_ms) for number in range(BURST)))
        measured.rounds += 1
    await function.wait_until_frozen()
    measured.intact = await caller.verify()


async def prove(stack: AsyncExitStack, options: argparse.Namespace) -> dict[str, Any]:
    """The report; `problems` has a sentence for each thing that is not as promised. Without figures if it broke off."""
    try:
        return await _prove(stack, options)
    except HibernodeError as error:
        return {"problems": [{"reason": error.reason, "message": error.message}]}


async def _prove(stack: AsyncExitStack, options: argparse.Namespace) -> dict[str, Any]:
    clock = SystemClock()
    until_ns = clock.monotonic_ns() + round((options.within_s - END_S) * 1e9)
    program = choose_program(options.torch_python, options.torch_version)
    timeline = Timeline(sys.stderr)
    world = await stack.enter_async_context(
        demo_world(
            None,
            lambda _home: HostGpus(),
            WorldProgram(program.python, program.modules, {"PYTHONPATH": str(CHECKOUT)}),
            timeline.step,
        )
    )
    async with world.agent() as agent, world.scheduler() as scheduler:
        function = WorldFunction(world, FUNCTION, agent, scheduler)
        tally, measured = Tally(), Measured()
        timeline.step(f"deploying a function with {options.vram_mib} MiB of GPU memory: {program.name}")
        await function.deploy(s_yaml(world, program, options.vram_mib), 1)
        await function.wait_until_ready(INIT_S)
        client = GatewayClient(world.gateway, FUNCTION, tally, timeline.trouble, timeline.alias)
        try:
            caller = Caller(client, program, clock)
            await caller.learn()
            await run_rounds(function, caller, measured, until_ns)
        finally:
            client.close()
        await timeline.catch_up(agent)
        found = await _usage(world, function, agent, scheduler, timeline.began_ns)
        return _report(program, options.vram_mib * MIB, tally, measured, timeline, found)


async def _usage(
    world: DemoWorld, function: WorldFunction, agent: Any, scheduler: Any, began_wall_ns: int
) -> dict[str, Any]:
    """Remove the function, so that its last window is sealed and sent; compare both sides' time in nanoseconds."""
    await world.remove_functions()
    instances = await function.instances(ended=True)
    report = DemoReport()
    await collect_usage(report, agent, scheduler, instances, UsageQuery(FUNCTION, began_wall_ns))
    node = sum(one.active_ns + one.idle_ns + one.unbilled_ns for one in instances)
    return {
        "complete": report.usage_complete,
        "active_ns": report.active_ns,
        "idle_ns": report.idle_ns,
        "unbilled_ns": report.unbilled_ns,
        "scheduler_ns": report.active_ns + report.idle_ns + report.unbilled_ns,
        "node_ns": node,
        "program_active_ns": union_ns(world.request_log),
        "freezes": sum(one.freeze_count for one in instances),
        "wakes": sum(one.wake_count for one in instances),
    }


def _report(
    program: Program, vram_bytes: int, tally: Tally, measured: Measured, timeline: Timeline, usage: dict[str, Any]
) -> dict[str, Any]:
    return {
        "program": program.name,
        "vram_bytes": vram_bytes,
        "rounds": measured.rounds,
        "requests": tally.requests,
        "failed": tally.failed,
        "different": tally.different,
        "memory_intact": measured.intact,
        "caller_wake_ms": figure_of(measured.wake_ms),
        "caller_burst_ms": figure_of(measured.burst_ms),
        "caller_warm_ms": figure_of(measured.warm_ms),
        "gateway_wake_ms": figure_of(tally.wake_request_ms),
        "agent_wake_ms": figure_of(timeline.wake_ms),
        "agent_freeze_ms": figure_of(timeline.freeze_ms),
        "usage": usage,
        "problems": problems_of(tally, measured, usage),
    }


def problems_of(tally: Tally, measured: Measured, usage: dict[str, Any]) -> list[dict[str, str]]:
    """Reason and sentence of each broken promise, the worst first."""
    checks = [
        (
            tally.different > 0 or not measured.intact,
            "MEMORY_CHANGED",
            f"{tally.different} answers differ, memory {'intact' if measured.intact else 'NOT intact'}",
        ),
        (tally.failed > 0, "REQUESTS_LOST", f"{tally.failed} of {tally.requests} requests have no answer"),
        (
            usage["wakes"] < 2 * measured.rounds,
            "NOT_WOKEN",
            f"{usage['wakes']} wakes in {measured.rounds} rounds of two",
        ),
        (
            not usage["complete"] or usage["scheduler_ns"] != usage["node_ns"],
            "USAGE_DIFFERS",
            f"the scheduler has {usage['scheduler_ns']} ns of usage, the node {usage['node_ns']}",
        ),
        (
            usage["active_ns"] < usage["program_active_ns"],
            "USAGE_DIFFERS",
            f"{usage['active_ns']} ns are metered as active, the program worked {usage['program_active_ns']}",
        ),
    ]
    return [{"reason": reason, "message": message} for is_wrong, reason, message in checks if is_wrong]


def s_yaml(world: DemoWorld, program: Program, vram_mib: int) -> str:
    """The function. It inherits nothing, so it gets the path of its program."""
    return f"""\
edition: 3.0.0
name: hibernode-proof
resources:
  {FUNCTION}:
    component: fc3
    props:
      functionName: {FUNCTION}
      region: local
      runtime: custom-container
      cpu: 1
      memorySize: 4096
      timeout: 60
      instanceConcurrency: {BURST}
      customContainerConfig: {{image: host, entrypoint: {json.dumps([program.python, "-P", "-m", program.modules[0]])}}}
      environmentVariables:
        PYTHONPATH: {json.dumps(str(CHECKOUT))}
        PYTHONDONTWRITEBYTECODE: "1"
        REQUEST_LOG: {json.dumps(str(world.request_log))}
        VRAM_MIB: "{vram_mib}"
      instanceLifecycleConfig:
        initializer: {{handler: index.initialize, timeout: {INIT_S}}}
      provisionConfig: {{defaultTarget: 1, alwaysAllocateGPU: false}}
      triggers:
        - {{triggerName: http, triggerType: http, triggerConfig: {{authType: anonymous}}}}
      hibernode: {{gpus: 1, freezeAfter: {FREEZE_AFTER}}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vram-mib", type=int, required=True)
    parser.add_argument("--within-s", type=float, required=True)
    parser.add_argument("--torch-python", default="")
    parser.add_argument("--torch-version", default="")
    options = parser.parse_args()
    report_of(lambda stack: prove(stack, options))


if __name__ == "__main__":
    main()
