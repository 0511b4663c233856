"""The scheduler's status page: functions, nodes, GPUs and instances as plain HTML at the root of its admin address.

Read-only, without scripts or external resources; reloads itself. The address needs no authentication, so the page shows
error reasons but no messages, which may quote an instance's log; `hibernode functions` shows those.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from html import escape

from agent.core.dispatch.dispatcher import Dispatcher
from agent.core.dispatch.model import NodeStanding
from agent.core.natural_order import natural_key
from agent.core.provisioning.model import Scheduling
from agent.core.provisioning.problem import NextTry, Problem
from agent.core.provisioning.reconcile import MAX_ATTEMPTS
from agent.core.types import GIB, SECOND_NS
from agent.ports import Clock
from agent.scheduler.fleet.fleet import ENDED, Fleet, NodeRecord
from agent.scheduler.functions.catalog import Catalog
from agent.v1.scheduler_service_pb2 import InstanceLoad
from agent.v1.types_pb2 import Gpu, Instance

MAX_ROWS = 500
"""Per table; a last line counts the rows beyond that."""
RELOAD_S = 5
CONTENT_TYPE = "text/html; charset=utf-8"
HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
_CSS = (
    "body{font:14px system-ui,sans-serif;margin:1.5em}table{border-collapse:collapse;margin-bottom:1.5em}"
    "th,td{padding:.2em .8em;text-align:left;border-bottom:1px solid #ddd;white-space:nowrap}"
    "h2{font-size:1.1em;margin:.5em 0}.bad{color:#b00}"
)
_UNKNOWN = "–"
_HEALTH = {number: name.removeprefix("HEALTH_") for name, number in Gpu.Health.items()}
_LEAVING = (*ENDED, Instance.STATE_STOPPING)
_NEXT = {
    NextTry.UNDER_WAY: "next under way",
    NextTry.WAITING: "next once there is room",
    NextTry.GIVEN_UP: "given up until the next deploy",
}

Row = Sequence[object]


class StatusPage:
    """Renders the scheduler's current state."""

    def __init__(self, clock: Clock, catalog: Catalog, fleet: Fleet, dispatcher: Dispatcher) -> None:
        self._clock = clock
        self._catalog = catalog
        self._fleet = fleet
        self._dispatcher = dispatcher

    def render(self) -> bytes:
        """The whole page, UTF-8."""
        nodes = self._fleet.nodes()
        body = "".join(
            (
                _table("Functions", _FUNCTION, self._functions()),
                _table("Nodes", _NODE, map(self._node, nodes)),
                _table("GPUs", _GPU, (row for node in nodes for row in _gpus(node))),
                _table("Instances", _INSTANCE, self._instances()),
            )
        )
        return (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="refresh" content="{RELOAD_S}">'
            f"<title>Hibernode</title><style>{_CSS}</style></head><body><h1>Hibernode</h1>{body}"
            '<p><a href="/metrics">metrics</a> <a href="/grafana.json">Grafana dashboard</a></p></body></html>\n'
        ).encode()

    def _functions(self) -> Iterator[Row]:
        states: dict[str, Counter[Instance.State.ValueType]] = {}
        revisions: dict[str, set[str]] = {}
        for node, load in self._fleet.instances():
            if node.standing is not NodeStanding.LOST:
                states.setdefault(load.function, Counter())[load.state] += 1
                if load.state not in (Instance.STATE_STARTING, *_LEAVING):
                    revisions.setdefault(load.function, set()).add(load.revision)
        for function in self._catalog.all():
            name, problem = function.spec.name, self._catalog.problem(function.spec.name)
            counts = states.get(name, Counter())
            queue = self._dispatcher.queue_state(name)
            current = sum(count for state, count in counts.items() if state not in _LEAVING)
            awake, frozen = counts[Instance.STATE_RUNNING], counts[Instance.STATE_FROZEN]
            trouble = "DELETING" if function.deleting else self._trouble(problem)
            numbers = (function.target, current, awake, frozen, queue.waking, queue.queued)
            running = ", ".join(sorted(revisions.get(name, ()), key=natural_key, reverse=True))
            yield (name, function.spec.revision, running or _UNKNOWN, *numbers, _Alert(trouble))

    def _trouble(self, problem: Problem | None) -> str:
        """What is in the way, the last failed start, and the next; without messages, which may quote a log."""
        if problem is None:
            return ""
        last = problem.last
        if last is None:
            return problem.reason
        failure = last.failure
        ago_s = max(0, self._clock.wall_ns() - failure.wall_ns) / SECOND_NS
        where = " ".join(filter(None, (failure.node, failure.uid)))
        if last.next_try is NextTry.SCHEDULED:
            following = f"next in {max(0, last.next_ns - self._clock.monotonic_ns()) / SECOND_NS:.0f} s"
        else:
            following = _NEXT[last.next_try]
        failed = f"{failure.reason} {ago_s:.0f} s ago ({where}), attempt {last.attempt} of {MAX_ATTEMPTS}, {following}"
        return failed if problem.reason == failure.reason else f"{problem.reason}; {failed}"

    def _node(self, node: NodeRecord) -> Row:
        registration, last_report = node.registration, "never"
        if node.last_heard_wall_ns:
            last_report = f"{max(0, self._clock.wall_ns() - node.last_heard_wall_ns) / SECOND_NS:.1f} s ago"
        gpus = node.gpus
        memory = node.load.host_memory if node.load.HasField("host_memory") else registration.host_memory
        instances = sum(load.state not in ENDED for load in node.instances.values())
        scheduling = self._fleet.scheduling(node.name)
        expected = node.standing is NodeStanding.SUSPECT and not node.last_heard_wall_ns
        standing: object = "EXPECTED" if expected else node.standing.value
        if node.standing is not NodeStanding.READY or scheduling is not Scheduling.NORMAL:
            ordered = scheduling.shown(instances)
            standing = _Alert(f"{standing} {ordered}".removesuffix(f" {Scheduling.NORMAL.value}"))
        held = f"{sum(bool(gpu.holder_uids) for gpu in gpus)} of {len(gpus)}"
        available = (
            f"{_size(memory.available_bytes)} of {_size(memory.total_bytes)}" if memory.total_bytes else _UNKNOWN
        )
        versions = (registration.agent_version, registration.driver_version)
        return (node.name, standing, last_report, held, node.load.gpu_waiting, instances, available, *versions)

    def _instances(self) -> Iterator[Row]:
        for node, load in sorted(
            self._fleet.instances(),
            key=lambda pair: (natural_key(pair[1].function), natural_key(pair[0].name), pair[1].uid),
        ):
            yield _instance(node, load)


_FUNCTION = ("Function", "Revision", "Running", "Target", "Current", "Awake", "Frozen", "Waking", "Queued", "Trouble")
_NODE = ("Node", "Standing", "Heard", "GPUs held", "Wait for a GPU", "Instances", "Memory free", "Agent", "Driver")
_GPU = ("Node", "GPU", "Model", "Memory", "SM", "Temperature", "Held by", "Trouble")
_INSTANCE = ("Instance", "Function", "Node", "State", "Requests", "GPU memory", "Frozen", "Wakes", "Active", "Idle")


class _Alert(str):
    """A cell shown in red: it needs attention."""

    __slots__ = ()


def _gpus(node: NodeRecord) -> Iterator[Row]:
    for gpu in node.gpus:
        used = _size(gpu.memory_used_bytes) if gpu.HasField("memory_used_bytes") else _UNKNOWN
        sm = f"{gpu.sm_percent} %" if gpu.HasField("sm_percent") else _UNKNOWN
        temperature = f"{gpu.temperature_celsius} °C" if gpu.HasField("temperature_celsius") else _UNKNOWN
        trouble = "" if gpu.health == Gpu.HEALTH_OK else _HEALTH.get(gpu.health, "UNKNOWN")
        memory = f"{used} of {_size(gpu.memory_total_bytes)}"
        yield (node.name, gpu.uuid, gpu.model, memory, sm, temperature, ", ".join(gpu.holder_uids), _Alert(trouble))


def _instance(node: NodeRecord, load: InstanceLoad) -> Row:
    name = Instance.State.Name(load.state).removeprefix("STATE_")
    state: object = f"{name} {load.state_reason}".strip()
    lost = node.standing is NodeStanding.LOST and load.state not in ENDED
    if lost:
        state = f"UNKNOWN NODE_LOST, was {name}"
    if lost or load.state == Instance.STATE_FAILED or not load.healthy:
        state = _Alert(state)
    requests = f"{load.in_flight} of {load.concurrency}" + (f", {load.waiting} wait" if load.waiting else "")
    sizes = (_size(load.vram_bytes), _size(load.frozen_bytes))
    times = (f"{load.active_ns / SECOND_NS:.1f} s", f"{load.idle_ns / SECOND_NS:.1f} s")
    return (load.uid, load.function, node.name, state, requests, *sizes, load.wake_count, *times)


def _size(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.1f} GiB" if size_bytes else _UNKNOWN


def _table(title: str, heads: Sequence[str], rows: Iterable[Row]) -> str:
    """One table; escapes all of its text."""
    lines, more = [], 0
    for number, row in enumerate(rows):
        if number < MAX_ROWS:
            lines.append("<tr>" + "".join(map(_cell, row)) + "</tr>")
        else:
            more += 1
    if more:
        lines.append(f'<tr><td colspan="{len(heads)}">and {more} more</td></tr>')
    if not lines:
        lines.append(f'<tr><td colspan="{len(heads)}">none</td></tr>')
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    return f"<h2>{escape(title)}</h2><table><tr>{head}</tr>{''.join(lines)}</table>"


def _cell(value: object) -> str:
    mark = ' class="bad"' if isinstance(value, _Alert) and value else ""
    return f"<td{mark}>{escape(str(value))}</td>"
