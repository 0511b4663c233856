"""An agent that dies: starts one instance and SIGKILLs itself at the named point. The crash tests run it.

    python -m tests.adapters.process.victim STATE_DIR STATE_UUID FENCED UID POINT

POINT is "before NAME" or "after NAME" of a step of a start, or "never"; then "started" is printed.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvloop

from agent.adapters.kernel import cgroup
from agent.adapters.kernel.clock import SystemClock
from agent.adapters.process import launch
from agent.adapters.process.launch import LaunchPlan
from agent.adapters.process.runtime import ProcessRuntime, ProcessRuntimeOptions
from agent.adapters.runtime.bundles import Bundles
from agent.adapters.runtime.exits import ExitWatch
from agent.adapters.runtime.log_files import LogFiles
from agent.core.types import FunctionSpec, InstanceSpec
from agent.ports import StartSpec

# Every step of a start, in its order: (owner, name of the step).
STEPS: dict[str, tuple[Any, str]] = {
    "bundle": (Bundles, "create"),
    "cgroup": (cgroup.CgroupSlice, "create"),
    "log": (LogFiles, "open"),
    "spawn": (launch, "spawn"),
    "watch": (ExitWatch, "watch"),
    "record": (Bundles, "write"),
    "replace": (Path, "replace"),
    "release": (launch, "release"),
}
POINTS = [f"{side} {name}" for name in STEPS for side in ("before", "after")] + ["half a plan", "whole plan"]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(point: str) -> None:
    """Make the agent die at that point."""
    if point in ("half a plan", "whole plan"):
        arm_plan(whole=point == "whole plan")
        return
    side, _, name = point.partition(" ")
    owner, attribute = STEPS[name]
    real: Callable[..., Any] = getattr(owner, attribute)

    def deadly(*args: Any, **kwargs: Any) -> Any:
        if side == "before":
            die()
        answer = real(*args, **kwargs)
        if asyncio.iscoroutine(answer):
            return then_die(answer)
        die()
        return answer

    setattr(owner, attribute, deadly)


async def then_die(running: Any) -> None:
    await running
    die()


def arm_plan(*, whole: bool) -> None:
    """Die when this much of the plan is in the socket, without waiting for the answer."""

    async def deadly(control: socket.socket, plan: LaunchPlan) -> None:
        encoded = plan.encode()
        control.send(encoded if whole else encoded[: len(encoded) // 2])
        die()

    launch.release = deadly


async def start(state_dir: Path, state_uuid: str, fenced: bool, uid: str) -> None:
    slice_ = cgroup.open_slice(state_uuid) if fenced else None
    runtime = ProcessRuntime(ProcessRuntimeOptions(state_dir, state_uuid, slice_), SystemClock())
    # Leaves a trace that it ran, and stays.
    script = f"echo ran >>{state_dir}/ran; exec sleep 86391"
    function = FunctionSpec(name="resize", entrypoint=("/bin/sh", "-c", script))
    await runtime.start(StartSpec(InstanceSpec(uid, f"resize/1/{uid}", function), {}, ()))
    sys.stdout.write("started\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


if __name__ == "__main__":
    folder, own_uuid, is_fenced, instance_uid, where = sys.argv[1:]
    if where != "never":
        arm(where)
    uvloop.run(start(Path(folder), own_uuid, is_fenced == "fenced", instance_uid))
