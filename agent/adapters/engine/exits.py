"""Determines how a container ended, from the kernel (pidfd, memory cgroup) and the engine (exit code)."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Mapping
from typing import Any

from agent.adapters.engine.api import EngineError
from agent.adapters.engine.containers import EngineContainers
from agent.adapters.runtime.exits import Signs
from agent.core.errors import HibernodeError
from agent.core.types import Exit

INSPECT_DEADLINE_S = 10.0
FIRST_PAUSE_S = 0.01
LONGEST_PAUSE_S = 0.5
_NOT_OVER = ("running", "paused", "restarting", "stopping")
SIGNAL_BASE = 128
"""Exit codes above it mean "killed by signal n", in shells and all engines."""

UNKNOWN = Exit(code=-1, message="its exit code is unknown: it was replaced, or the host was rebooted")


async def exit_of(containers: EngineContainers, container_id: str, signs: Signs) -> Exit:
    """The exit of a container whose main process has just ended. The engine notices later than the kernel and may be
    down; the answer comes within `INSPECT_DEADLINE_S` in any case."""
    try:
        async with asyncio.timeout(INSPECT_DEADLINE_S):
            state = await _ended_state(containers, container_id)
    except TimeoutError:
        return _unknown(signs, "the container engine does not report in time how it ended")
    except EngineError as error:
        if error.not_found:
            return _unknown(signs, "its container was removed from outside (`docker rm`?)")
        return _unknown(signs, error.message)
    except HibernodeError as error:
        return _unknown(signs, error.message)
    return read_exit(state, signs)


async def _ended_state(containers: EngineContainers, container_id: str) -> Mapping[str, Any]:
    pause_s = FIRST_PAUSE_S
    while True:
        state: Mapping[str, Any] = (await containers.inspect(container_id)).get("State") or {}
        if not is_running(state):
            return state
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def is_running(state: Mapping[str, Any]) -> bool:
    """Whether it has a main process, paused or not. Podman's `stopped` counts as ended: the exit code is known."""
    return bool(state.get("Running")) or str(state.get("Status") or "") in _NOT_OVER


def read_exit(state: Mapping[str, Any], signs: Signs = Signs()) -> Exit:  # noqa: B008 - frozen
    """The exit from the `State` of an ended container.

    Any failure after an OOM kill in the container counts as out of memory, except our own SIGKILL: the death of a
    worker often shows only in the exit code of its parent."""
    code = int(state.get("ExitCode") or 0)
    oom = code != 0 and not signs.killed_by_us and (bool(state.get("OOMKilled")) or signs.out_of_memory)
    number = code - SIGNAL_BASE
    if 0 < number < signal.NSIG:
        text = f"killed by signal {number} ({signal.strsignal(number)})" + (", out of memory" if oom else "")
        return Exit(code=-1, signal=number, oom_killed=oom, message=text)
    text = f"exited with code {code}" + (", after the OOM killer killed one of its processes" if oom else "")
    return Exit(code=code, oom_killed=oom, message=text)


def _unknown(signs: Signs, why: str) -> Exit:
    if signs.killed_by_us:
        return Exit(code=-1, signal=signal.SIGKILL, message="killed by signal 9 (Killed)")
    if signs.out_of_memory:
        return Exit(code=-1, oom_killed=True, message=f"out of memory; its exit code is unknown: {why}")
    return Exit(code=-1, message=f"its exit code is unknown: {why}")
