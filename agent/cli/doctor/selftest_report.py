"""Formats a selftest's report as text. Its keys are those of `agent.selftest.run`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from agent.cli.console.output import show_table, show_text
from agent.cli.doctor.checks import show_lines
from agent.core.snapshots import CapabilityLine
from agent.core.types import GIB

_STEPS = (
    ("freeze, total", "freeze_s", ""),
    ("  lock", "lock_s", ""),
    ("  checkpoint", "checkpoint_s", "checkpoint_gb_s"),
    ("  stop threads", "cgroup_freeze_s", ""),
    ("wake, total", "wake_s", ""),
    ("  thaw", "thaw_s", ""),
    ("  restore", "restore_s", "restore_gb_s"),
    ("  unlock", "unlock_s", ""),
)
_PINNED = (
    ("pinned copy to host", "to_host_s", "to_host_gb_s"),
    ("pinned copy to GPU", "to_device_s", "to_device_gb_s"),
)
_SPREAD = ("median", "min", "max")
_HEADLINES = {
    "PROVED": "PROVED on {where}: GPU memory is frozen and woken without losing a byte.",
    "FAILED": "FAILED on {where}: this host must not freeze instances.",
    "MEMORY_CHANGED": "MEMORY CHANGED on {where}. THIS HOST MUST NOT FREEZE INSTANCES: their models would "
    "silently compute wrong answers.",
    "NOT_RUN": "NOT RUN: a requirement is missing; nothing was frozen.",
    "TIMED_OUT": "TIMED OUT on {where}: a step did not end; this host must not freeze instances.",
}


def show_report(report: dict[str, Any]) -> None:
    """Prints checks, figures and verdict on stdout."""
    show_lines([CapabilityLine(**check) for check in report["checks"]])
    counted = [run for run in report["runs"] if run["counted"]]
    if counted:
        show_text("\n" + _what(report, len(counted) // len(report["checkpointers"])))
        _show_figures(report)
        unavailable = counted[-1]["pinned"]["unavailable"]
        if unavailable:
            show_text(f"no pinned copy for comparison: {unavailable}\n")
    show_text(f"\n{_HEADLINES[report['verdict']['proof']].format(where=_where(report))}\n")


def _where(report: dict[str, Any]) -> str:
    """The device and driver, so that figures of an emulated one are not taken for hardware's."""
    gpu = report["host"]["gpu"]
    return f"{gpu['model']}, driver {report['host']['driver']}" if gpu else "this host"


def _what(report: dict[str, Any], runs: int) -> str:
    size = f"{report['size_bytes'] / GIB:g} GiB in {report['allocations']} allocations"
    return (
        f"{_where(report)}: {size}, {runs} run{'s' if runs > 1 else ''} after a warm-up that is not counted.\n"
        "Median (min-max); GB/s within the driver's call.\n"
    )


def _show_figures(report: dict[str, Any]) -> None:
    summary, names = report["summary"], report["checkpointers"]
    compared = len(names) == 2
    columns = ["STEP"]
    for name in names:
        columns += [name.upper(), "GB/S"]
    if compared:
        columns.append(f"{names[1]} / {names[0]}".upper())
    rows: list[list[str]] = []
    for title, seconds, speed in _STEPS:
        row = [title]
        for name in names:
            row += [_seconds(summary[name][seconds]), _speed(summary[name].get(speed))]
        if compared:
            row.append(_times(report["ratio"].get(seconds)))
        rows.append(row)
    rows += [[*row, *[""] * (len(columns) - 3)] for row in _pinned(summary)]
    show_table(columns, rows)


def _pinned(summary: dict[str, Any]) -> Iterator[list[str]]:
    if "pinned" in summary:
        for title, seconds, speed in _PINNED:
            yield [title, _seconds(summary["pinned"][seconds]), _speed(summary["pinned"][speed])]


def _seconds(spread: dict[str, float]) -> str:
    """`404 ms (398-412)`, `1.25 s (1.2-1.31)`: one unit per cell, three significant digits."""
    unit, factor = ("s", 1.0) if spread["median"] >= 1 else ("ms", 1000.0)
    return _with_spread([_short(spread[key] * factor) for key in _SPREAD], f" {unit}")


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _speed(spread: dict[str, float] | None) -> str:
    return _with_spread([f"{spread[key]:.2f}" for key in _SPREAD]) if spread else ""


def _times(spread: dict[str, float] | None) -> str:
    return _with_spread([f"{spread[key]:.2f}" for key in _SPREAD], " x") if spread else ""


def _with_spread(texts: Sequence[str], unit: str = "") -> str:
    median, least, most = texts
    return f"{median}{unit}" if least == most else f"{median}{unit} ({least}-{most})"
