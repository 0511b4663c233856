"""`hibernode demo`: runs all of Hibernode on this machine, without a GPU."""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from agent.cli.demo.report import DemoReport
    from agent.cli.demo.scenario import Scenario
    from agent.cli.demo.timeline import Timeline
    from agent.cli.demo.world import DemoWorld
    from agent.v1 import types_pb2

CALL_S = 10.0


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """Values of the command's options."""

    state_dir: Path | None
    as_json: bool
    keep: bool
    flip_byte: bool
    quick: bool


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout; the timeline goes to stderr.")
@click.option("--keep", is_flag=True, help="Keep running afterwards, with commands to try, until Ctrl-C or SIGTERM.")
@click.option(
    "--state-dir",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Folder for all files, kept as a HIBERNODE_HOME; default: a temporary one.",
)
@click.option("--flip-byte", is_flag=True, hidden=True, help="Rehearsal: damage GPU memory of a frozen instance.")
@click.option("--quick", is_flag=True, hidden=True, help="A short one, for tests.")
def demo(as_json: bool, keep: bool, state_dir: Path | None, flip_byte: bool, quick: bool) -> int:
    """Try Hibernode on this machine, without a GPU.

    Starts an emulated NVIDIA driver with two GPUs, a scheduler and an agent. Deploys three instances of an example that
    detects file types with a real model, sends it files of this machine, and lets the instances freeze and wake. Then
    shows wake times, active and idle time, and the cost compared with always-on instances. Every answer is compared
    with that of a model that was never frozen.

    Exit code 1 if a request failed or an answer differs.

    \b
    Examples:
      hibernode demo
      hibernode demo --json | jq '{wakes, wake_ms, cost, always_on_cost}'
      hibernode demo --keep --state-dir /tmp/hibernode-demo
    """
    from agent.cli.demo.timeline import Timeline

    timeline = Timeline(sys.stderr if as_json else sys.stdout)
    options = DemoOptions(state_dir, as_json, keep, flip_byte, quick)
    code = asyncio.run(_interruptible(_demo(timeline, options)))
    if code is None:
        raise KeyboardInterrupt
    return code


async def _interruptible(work: Any) -> int | None:
    """Cancels `work` on SIGINT, SIGTERM and SIGHUP, which stops everything properly; the result is then None."""
    task = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, task.cancel)
    try:
        code: int = await task
    except asyncio.CancelledError:
        return None
    return code


async def _demo(timeline: Timeline, options: DemoOptions) -> int:
    from agent.cli.demo.gpus import EmulatedGpus
    from agent.cli.demo.scenario import PROGRAM, QUICK, Pace, Scenario
    from agent.cli.demo.world import demo_world

    async with demo_world(options.state_dir, EmulatedGpus, PROGRAM, timeline.step) as world:
        node = await _describe_node(world, timeline)
        scenario = Scenario(world, timeline, QUICK if options.quick else Pace(), flip_byte=options.flip_byte)
        await scenario.run()
        report = await _report(world, node, scenario, timeline, ended=not options.keep)
        _show(report, options.as_json)
        if options.keep:
            await _stay(world)
    return 0 if report.answers_identical and not report.failed else 1


async def _describe_node(world: DemoWorld, timeline: Timeline) -> types_pb2.Node:
    """Gets the node, and prints how this machine differs from a GPU host."""
    from agent.v1 import node_service_pb2

    async with world.agent() as agent:
        node: types_pb2.Node = (await agent.call(agent.nodes.GetNode, node_service_pb2.GetNodeRequest(), CALL_S)).node
    if os.geteuid() == 0:
        why = "root, because `nobody` may not read this Python, its packages or this folder"
        timeline.step(f"instances run as {world.user or why}")
    if not _has_cgroups(node):
        timeline.step("this user may not write cgroups: instances are stopped with SIGSTOP instead (as root: cgroups)")
    timeline.step(f"the gateway is http://{world.gateway}")
    return node


def _has_cgroups(node: types_pb2.Node) -> bool:
    from agent.v1 import types_pb2

    ok = types_pb2.Capability.LEVEL_OK
    return all(line.level == ok for line in node.capabilities if line.name == "cgroup")


async def _report(
    world: DemoWorld, node: types_pb2.Node, scenario: Scenario, timeline: Timeline, *, ended: bool
) -> DemoReport:
    from agent.cli.demo.report import DemoReport, UsageQuery, collect_usage, driver_log, union_ns
    from agent.cli.demo.scenario import FUNCTION

    tally = scenario.tally
    async with world.agent() as agent, world.scheduler() as scheduler:
        report = DemoReport(
            requests=tally.requests,
            failed=tally.failed,
            answers_identical=tally.requests > 0 and not tally.different and not tally.failed,
            answers_compared=tally.requests - tally.failed,
            gpus=len(node.gpus),
            wake_ms=timeline.wake_ms,
            freeze_ms=timeline.freeze_ms,
            wake_request_ms=tally.wake_request_ms,
            latency_ms=tally.latency_ms,
            driver_ms=driver_log(world.home / "emulated"),
            app_active_ns=union_ns(world.request_log),
            cgroups=_has_cgroups(node),
            user=world.user or _own_name(),
            home=str(world.home),
        )
        if ended:
            timeline.step("removing the function, so that its last seconds are metered and sent to the scheduler")
            await world.remove_functions()
        instances = await scenario.instances(agent, ended=True)
        report.instances = len(instances)
        report.freezes = sum(one.freeze_count for one in instances)
        report.wakes = sum(one.wake_count for one in instances)
        await collect_usage(report, agent, scheduler, instances, UsageQuery(FUNCTION, timeline.began_ns))
        return report


def _own_name() -> str:
    import pwd

    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def _show(report: DemoReport, as_json: bool) -> None:
    from agent.cli.console.output import note, show_json
    from agent.cli.demo.report import show

    if as_json:
        show_json(report.as_json())
    else:
        show(report)
    note("GPUs and driver were emulated: times are those of this machine's memory, not of a GPU.")
    sys.stdout.flush()


def _on_path() -> str:
    """A line that adds `hibernode` to PATH if missing: scripts/demo installs it in .venv/bin."""
    here = Path(sys.executable).parent
    found = shutil.which("hibernode")
    return "" if found and Path(found).parent == here else f"  export PATH={shlex.quote(str(here))}:$PATH\n"


async def _stay(world: DemoWorld) -> None:
    """Waits for a signal, which ends the command with success."""
    home = world.home
    click.echo(
        f"""
The demo keeps running until Ctrl-C. In another terminal:

{_on_path()}  export HIBERNODE_HOME={home}
  hibernode ps                                            # frozen and running instances
  curl -sS --data-binary @/bin/ls http://{world.gateway}/fn/filetype/invoke
  hibernode invoke filetype --event 'import os'
  hibernode events --since 1m
  hibernode usage
  hibernode node
  hibernode emulated ps --dir {home}/emulated
  hibernode deploy -t {home}/filetype.s.yaml --target 2
  ls {home}/logs
""",
        err=True,
    )
    task = asyncio.current_task()
    assert task is not None
    try:
        while True:
            world.processes.check()
            await asyncio.sleep(0.5)
    except asyncio.CancelledError:
        task.uncancel()
