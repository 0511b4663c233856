"""Makes the proof's JSON document from the results of its steps: raw reports, and the figures drawn from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from agent.selftest.proof.budget import GB
from agent.selftest.proof.cycles import summarize_cycles
from agent.selftest.proof.figures import figure_of, fit_line
from agent.selftest.proof.steps import MEMORY_CHANGED, NOT_RUN, PASSED

SCHEMA = 1
"""Raised whenever a key is removed or changes its meaning."""

EMULATED = "Emulated "
"""How the emulated driver names its GPUs."""

_FIGURES = (
    *("freeze_s", "wake_s", "lock_s", "checkpoint_s", "cgroup_freeze_s", "thaw_s", "restore_s", "unlock_s"),
    *("checkpoint_gb_s", "restore_gb_s", "released_bytes"),
)


def make_document(made: Mapping[str, Any], steps: Sequence[Mapping[str, Any]], without_utility: str) -> dict[str, Any]:
    """The document. `made`: date, commit and so on; `steps`: the rows of a proof (`__main__.py`)."""
    of_name = {step["name"]: step["data"] for step in steps if step["data"]}
    facts = of_name.get("facts") or {}
    gpus = facts.get("gpus") or []
    selftests = [step["data"] for step in steps if step["name"].startswith("selftest ") and step["data"]]
    cycles = of_name.get("cycles")
    return {
        "schema": SCHEMA,
        "emulated": any(gpu["model"].startswith(EMULATED) for gpu in gpus),
        "outcome": outcome_of(steps),
        "made": dict(made),
        "facts": facts,
        "without_utility": without_utility,
        "steps": [{key: value for key, value in step.items() if key != "data"} for step in steps],
        "figures": {
            "sizes": [row for report in selftests for row in size_rows(report)],
            "fit": fit_rows(selftests),
            "pinned": [row for report in selftests for row in pinned_rows(report)],
            "cycles": {**summarize_cycles(cycles["runs"]), "size_bytes": cycles["size_bytes"]} if cycles else None,
            "end_to_end": of_name.get("end to end"),
        },
        "doctor": of_name.get("doctor"),
        "reports": [*selftests, *([cycles] if cycles else [])],
    }


def outcome_of(steps: Sequence[Mapping[str, Any]]) -> str:
    """The worst outcome of a step. Without any verified freeze nothing is proved, even if nothing failed."""
    outcomes = [step["outcome"] for step in steps]
    if MEMORY_CHANGED in outcomes:
        return MEMORY_CHANGED
    froze = any(step["outcome"] == PASSED and step["name"].startswith("selftest ") for step in steps)
    interrupted = any(step["reason"] == "INTERRUPTED" for step in steps)
    if froze and not interrupted and set(outcomes) <= {PASSED, NOT_RUN}:
        return PASSED
    return "failed"


def size_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each checkpointer of a selftest, over its counted runs."""
    rows = []
    for name in report["checkpointers"]:
        runs = [run for run in report["runs"] if run["counted"] and run["checkpointer"] == name]
        if runs:
            figures = {key: figure_of(run[key] for run in runs) for key in _FIGURES}
            rows.append({"size_bytes": report["size_bytes"], "checkpointer": name, "runs": len(runs), **figures})
    return rows


def fit_rows(reports: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The fixed cost and the cost a GB of a freeze and of a wake, by checkpointer, from all counted runs."""
    rows = []
    runs = [(report["size_bytes"] / GB, run) for report in reports for run in report["runs"] if run["counted"]]
    for name in dict.fromkeys(run["checkpointer"] for _, run in runs):
        for operation in ("freeze", "wake"):
            points = [(gb, run[f"{operation}_s"]) for gb, run in runs if run["checkpointer"] == name]
            line = fit_line(points)
            if line is not None:
                rows.append(
                    {
                        "checkpointer": name,
                        "operation": operation,
                        "n": line.n,
                        "sizes": line.sizes,
                        "intercept_s": line.intercept_s,
                        "s_per_gb": line.s_per_gb,
                        "gb_s": line.gb_s,
                        "worst_residual_s": line.worst_residual_s,
                    }
                )
    return rows


def pinned_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """GB/s of a plain copy through pinned memory, and the driver's share of it, each compared within its own run."""
    rows = []
    for name in report["checkpointers"]:
        runs = [
            run
            for run in report["runs"]
            if run["counted"] and run["checkpointer"] == name and not run["pinned"]["unavailable"]
        ]
        runs = [run for run in runs if run["pinned"]["to_host_gb_s"] > 0 < run["pinned"]["to_device_gb_s"]]
        if runs:
            rows.append(
                {
                    "size_bytes": report["size_bytes"],
                    "checkpointer": name,
                    "to_host_gb_s": figure_of(run["pinned"]["to_host_gb_s"] for run in runs),
                    "to_device_gb_s": figure_of(run["pinned"]["to_device_gb_s"] for run in runs),
                    "checkpoint_share": figure_of(
                        run["checkpoint_gb_s"] / run["pinned"]["to_host_gb_s"] for run in runs
                    ),
                    "restore_share": figure_of(run["restore_gb_s"] / run["pinned"]["to_device_gb_s"] for run in runs),
                }
            )
    return rows
