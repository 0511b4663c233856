"""A demo's final report: wakes with their times, usage and costs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent.cli.daemon_calls import pages
from agent.core.errors import HibernodeError
from agent.core.types import SECOND_NS
from agent.v1 import node_service_pb2, types_pb2, usage_service_pb2
from agent.wire.convert_time import time_to_proto

CALL_S = 10.0
MICROSECONDS_PER_MS = 1000


@dataclass(slots=True)
class DemoReport:
    """The figures. Costs are decimal numbers as text, rounded by the scheduler."""

    requests: int = 0
    failed: int = 0
    answers_identical: bool = False
    answers_compared: int = 0
    instances: int = 0
    gpus: int = 0
    freezes: int = 0
    wakes: int = 0
    wake_ms: list[float] = field(default_factory=list)
    wake_request_ms: list[float] = field(default_factory=list)
    driver_ms: list[float] = field(default_factory=list)
    freeze_ms: list[float] = field(default_factory=list)
    latency_ms: list[float] = field(default_factory=list)
    active_ns: int = 0
    idle_ns: int = 0
    unbilled_ns: int = 0
    app_active_ns: int = 0
    cost: str = "0"
    always_on_cost: str = "0"
    unit: str = ""
    usage: dict[str, Any] = field(default_factory=dict)
    usage_complete: bool = False
    cgroups: bool = True
    user: str = ""
    home: str = ""

    def as_json(self) -> dict[str, Any]:
        """The object printed by `--json`."""
        return {
            "requests": self.requests,
            "failed": self.failed,
            "freezes": self.freezes,
            "wakes": self.wakes,
            "wake_ms": spread(self.wake_ms),
            "driver_ms": spread(self.driver_ms),
            "wake_request_ms": spread(self.wake_request_ms),
            "freeze_ms": spread(self.freeze_ms),
            "request_ms": spread(self.latency_ms),
            "active_s": self.active_ns / SECOND_NS,
            "idle_s": self.idle_ns / SECOND_NS,
            "unbilled_s": self.unbilled_ns / SECOND_NS,
            "app_active_s": self.app_active_ns / SECOND_NS,
            "cost": float(self.cost),
            "always_on_cost": float(self.always_on_cost),
            "unit": self.unit,
            "answers_identical": self.answers_identical,
            "answers_compared": self.answers_compared,
            "instances": self.instances,
            "gpus": self.gpus,
            "usage_complete": self.usage_complete,
            "usage": self.usage,
            "freezer": "cgroup" if self.cgroups else "SIGSTOP",
            "instance_user": self.user,
            "home": self.home,
        }


@dataclass(frozen=True, slots=True)
class UsageQuery:
    """Selects the usage of one run: a folder that was used before also has that of earlier ones."""

    function: str
    since_wall_ns: int

    def request(self, **fields: Any) -> usage_service_pb2.ListUsageRequest:
        """The request to the scheduler, with further fields."""
        start = time_to_proto(self.since_wall_ns)
        return usage_service_pb2.ListUsageRequest(function=self.function, start_time=start, **fields)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed; 0 without values."""
    ranked = sorted(values)
    return ranked[max(0, -(-int(share * 1000) * len(ranked) // 1000) - 1)] if ranked else 0.0


def spread(values: Sequence[float]) -> dict[str, float | int]:
    """{"p50", "p99", "n"}, in milliseconds with microseconds."""
    return {"p50": round(percentile(values, 0.5), 3), "p99": round(percentile(values, 0.99), 3), "n": len(values)}


def driver_times_ms(operations: Iterable[Any]) -> list[float]:
    """The driver's part of each wake, from the emulated driver's log: a restore and the unlock after it."""
    restores: dict[int, int] = {}
    found = []
    for one in operations:
        if one.result != 0:
            continue
        if one.op == "restore":
            restores[one.pid] = one.us
        elif one.op == "unlock" and one.pid in restores:
            found.append((restores.pop(one.pid) + one.us) / MICROSECONDS_PER_MS)
    return found


def union_ns(path: Path) -> int:
    """Sum over instances of the time with at least one request, from the programs' own records."""
    spans: dict[str, list[tuple[int, int]]] = {}
    for line in path.read_text().splitlines():
        one = json.loads(line)
        spans.setdefault(one["instance"], []).append((one["start_ns"], one["end_ns"]))
    total = 0
    for of_instance in spans.values():
        covered = 0
        for start, end in sorted(of_instance):
            total += max(0, end - max(start, covered))
            covered = max(covered, end)
    return total


async def collect_usage(
    report: DemoReport, agent: Any, scheduler: Any, instances: Sequence[types_pb2.Instance], query: UsageQuery
) -> None:
    """Adds usage and costs of this run, once the scheduler has all sealed windows of its instances, or after CALL_S."""
    from agent.cli.commands.usage import list_usage
    from agent.cli.demo.processes import comes_true

    report.usage_complete = await comes_true(lambda: _all_arrived(agent, scheduler, instances, query), CALL_S)
    whole = await list_usage(scheduler, query.request())
    _fill_in(report, whole)


async def _all_arrived(agent: Any, scheduler: Any, instances: Sequence[types_pb2.Instance], query: UsageQuery) -> bool:
    """Whether the scheduler has all windows before each open one, and the whole time of ended instances."""
    from agent.cli.commands.usage import list_usage

    request = query.request(grouping=usage_service_pb2.ListUsageRequest.GROUPING_INSTANCE)
    windows_of: dict[str, int] = {}
    metered_ns: dict[str, int] = {}
    for row in (await list_usage(scheduler, request)).rows:  # one per GPU model and price
        windows_of[row.instance_uid] = windows_of.get(row.instance_uid, 0) + row.window_count
        row_ns = row.active_ns + row.idle_ns + row.unbilled_ns
        metered_ns[row.instance_uid] = metered_ns.get(row.instance_uid, 0) + row_ns
    still_open = await _open_windows(agent)
    for one in instances:
        if one.uid in still_open:
            if windows_of.get(one.uid, 0) < still_open[one.uid]:
                return False
        elif metered_ns.get(one.uid, -1) < one.active_ns + one.idle_ns + one.unbilled_ns:
            return False
    return True


async def _open_windows(agent: Any) -> dict[str, int]:
    """The number of each living instance's open window, which equals the count of windows before it."""
    request = node_service_pb2.ListUsageWindowsRequest(include_open=True)
    listing = pages(agent, agent.nodes.ListUsageWindows, request)
    return {window.instance_uid: window.seq async for page in listing for window in page.windows if not window.sealed}


def _fill_in(report: DemoReport, whole: usage_service_pb2.ListUsageResponse) -> None:
    from agent.wire.json_view import to_json

    for row in whole.rows:
        report.active_ns += row.active_ns
        report.idle_ns += row.idle_ns
        report.unbilled_ns += row.unbilled_ns
    report.cost, report.always_on_cost, report.unit = whole.total_cost, whole.total_always_on_cost, whole.unit
    report.usage = {**to_json(whole), "windows": []}


def driver_log(directory: Path) -> list[float]:
    """`driver_times_ms` of a running driver; empty if it does not answer."""
    from agent.emulated.control import EmulatedDriver

    try:
        with EmulatedDriver(directory) as driver:
            return driver_times_ms(driver.oplog())
    except HibernodeError:
        return []


def show(report: DemoReport) -> None:
    """Prints the tables on stdout."""
    from agent.cli.console.output import show_table, show_text
    from agent.cli.console.units import money

    show_text("\n")
    rows = [
        ("a wake, from the GPU's grant to RUNNING", report.wake_ms),
        ("  of which the (emulated) driver", report.driver_ms),
        ("delay of a request by a wake, seen by its client", report.wake_request_ms),
        ("a freeze, from the decision to FROZEN", report.freeze_ms),
    ]
    table = [(name, f"{len(v)}", f"{percentile(v, 0.5):.2f}", f"{percentile(v, 0.99):.2f}") for name, v in rows]
    show_table(("", "TIMES", "P50 MS", "P99 MS"), table, right=("TIMES", "P50 MS", "P99 MS"))
    show_text("\n")
    always = float(report.always_on_cost)
    saved = f"{100 * (1 - float(report.cost) / always):.0f} % less than always on" if always else ""
    summary = [
        ("requests", f"{report.requests}", f"{report.failed} failed; {_identical(report)}"),
        ("freezes, wakes", f"{report.freezes}, {report.wakes}", f"{report.instances} instances on {report.gpus} GPUs"),
        ("active", f"{report.active_ns / SECOND_NS:.3f} s", _by_the_app(report)),
        ("idle", f"{report.idle_ns / SECOND_NS:.3f} s", "frozen or waiting for requests"),
        ("cost", f"{money(report.cost)} {report.unit}", saved),
        ("always on", f"{money(report.always_on_cost)} {report.unit}", "the same instances and time, all active"),
    ]
    show_table(("", "", ""), summary)
    if not report.usage_complete:
        show_text("\nThe scheduler has not received all usage yet: the costs above are incomplete.\n")


def _identical(report: DemoReport) -> str:
    if report.answers_identical:
        return f"all {report.answers_compared} answers equal those without freezing"
    return "ANSWERS DIFFER from those without freezing"


def _by_the_app(report: DemoReport) -> str:
    return f"{report.app_active_ns / SECOND_NS:.3f} s by the programs' own records"
