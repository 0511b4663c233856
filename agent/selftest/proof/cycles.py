"""What many freezes of one process show: drift of their times, and memory that grows."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from agent.core.types import MIB
from agent.selftest.proof.figures import figure_of

EDGE = 10
"""The first and the last runs that are compared."""
MOST_GROWTH = {"gpu": 32 * MIB, "program": 64 * MIB, "agent": 64 * MIB}
"""Growth between them that is no leak: caches and heaps settle."""


def summarize_cycles(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of the counted runs; `drift` is the last runs' median through the first ones'."""
    counted = [run for run in runs if run["counted"]]
    first, last = edges(counted)
    return {
        "done": len(counted),
        "equal": sum(run["bytes_equal"] for run in counted),
        "freeze_s": figure_of(run["freeze_s"] for run in counted),
        "wake_s": figure_of(run["wake_s"] for run in counted),
        "first": {key: figure_of(run[key] for run in first) for key in ("freeze_s", "wake_s")},
        "last": {key: figure_of(run[key] for run in last) for key in ("freeze_s", "wake_s")},
        "drift": {key: _drift(first, last, key) for key in ("freeze_s", "wake_s")},
        "memory_before": counted[0]["memory"] if counted else None,
        "memory_after": counted[-1]["memory"] if counted else None,
        "growth_bytes": growth_of(counted),
    }


def edges(counted: Sequence[Mapping[str, Any]]) -> tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]]:
    """The first and the last ten runs; fewer, so that they do not overlap. Empty with one run."""
    size = min(EDGE, len(counted) // 2)
    return counted[:size], counted[len(counted) - size :]


def growth_of(counted: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Bytes between the medians of the first and of the last runs: GPU memory in use, the program, the agent's side."""
    first, last = edges(counted)
    if not first:
        return {}

    def grown(key: str) -> float:
        before, after = (statistics.median(float(run["memory"][key]) for run in edge) for edge in (first, last))
        return after - before

    return {"gpu": -grown("gpu_free_bytes"), "program": grown("program_bytes"), "agent": grown("agent_bytes")}


def problem_of(runs: Sequence[Mapping[str, Any]]) -> str:
    """What grows more than it may; "" if nothing does."""
    grown = growth_of([run for run in runs if run["counted"]])
    return "; ".join(
        f"{name} memory grew by {grown[name] / MIB:.0f} MiB"
        for name, most in MOST_GROWTH.items()
        if grown.get(name, 0) > most
    )


def _drift(first: Sequence[Mapping[str, Any]], last: Sequence[Mapping[str, Any]], key: str) -> float | None:
    if not first:
        return None
    before = statistics.median(run[key] for run in first)
    return statistics.median(run[key] for run in last) / before if before > 0 else None
