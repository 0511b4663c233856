"""The Grafana dashboard that the scheduler serves at /grafana.json, built from the table below.

A variable names the data source. A test checks that every metric in an expression exists in real scrapes of both
daemons.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

UID = "hibernode"
SCHEMA_VERSION = 39
"""Of Grafana 10 and newer."""
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_SELECTED = 'function=~"$function"'
_IDLE = _SELECTED + ', kind="idle"'
_BILLED = _SELECTED + ', kind=~"idle|active"'
_PER_ROW = 3
_WIDTH, _HEIGHT = 24 // _PER_ROW, 8


@dataclass(frozen=True, slots=True)
class Query:
    """One expression and the legend of its curves."""

    expr: str
    legend: str


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel. `unit`: Grafana's name of it."""

    title: str
    unit: str
    queries: tuple[Query, ...]
    text: str


def _panel(title: str, unit: str, *queries: Query, text: str = "") -> Panel:
    return Panel(title, unit, queries, text)


def _rate(counter: str, by: str = "function", match: str = _SELECTED) -> str:
    return f"sum by ({by}) (rate({counter}{{{match}}}[$__rate_interval]))"


def _quantiles(histogram: str) -> tuple[Query, ...]:
    inside = _rate(f"{histogram}_bucket", "le, function")
    quantiles = tuple(
        Query(f"histogram_quantile({share}, {inside})", f"p{share * 100:g} {{{{function}}}}")
        for share in (0.5, 0.9, 0.99)
    )
    average = f"{_rate(f'{histogram}_sum')} / {_rate(f'{histogram}_count')}"
    return (*quantiles, Query(average, "average {{function}}"))


def _gauge(gauge: str, legend: str = "{{function}}", match: str = _SELECTED) -> Query:
    return Query(f"{gauge}{{{match}}}", legend)


def _gpu(gauge: str) -> Query:
    return Query(gauge, "{{gpu}}")


_BY_INSTANCE = "{{function}} {{uid}}"
_BY_GPU = "{{function}} {{uid}} {{gpu}}"

ROWS: dict[str, tuple[Panel, ...]] = {
    "Functions": (
        _panel("Invocations", "reqps", Query(_rate("hibernode_function_invocations_total"), "{{function}}")),
        _panel(
            "Answers by class",
            "reqps",
            Query(_rate("hibernode_function_responses_total", "function, class"), "{{class}} {{function}}"),
        ),
        _panel(
            "Errors and throttles",
            "reqps",
            Query(_rate("hibernode_function_client_errors_total"), "client errors {{function}}"),
            Query(_rate("hibernode_function_server_errors_total"), "server errors {{function}}"),
            Query(_rate("hibernode_function_throttles_total", "function, kind"), "throttles, {{kind}} {{function}}"),
            Query(_rate("hibernode_function_unanswered_total", "function, why"), "{{why}} {{function}}"),
            text="Errors that Hibernode itself answered with; throttles: queue full (429), no instance (503).",
        ),
        _panel(
            "Duration",
            "s",
            *_quantiles("hibernode_function_duration_seconds"),
            text="Arrival to last byte, wait included.",
        ),
        _panel("Longest request", "s", _gauge("hibernode_function_duration_max_seconds")),
        _panel("Wait for an instance", "s", *_quantiles("hibernode_function_queue_seconds")),
    ),
    "Provisioning": (
        _panel(
            "Instances: target and current",
            "short",
            _gauge("hibernode_function_target_instances", "target {{function}}"),
            _gauge("hibernode_function_current_instances", "current {{function}}"),
        ),
        _panel(
            "Instances by state",
            "short",
            Query(f"sum by (function, state) (hibernode_function_instances{{{_SELECTED}}})", "{{state}} {{function}}"),
        ),
        _panel(
            "Provisioned concurrency in use",
            "percentunit",
            Query(
                f"{_rate('hibernode_function_lease_seconds_total')} "
                f"/ sum by (function) (hibernode_function_slots{{{_SELECTED}}})",
                "{{function}}",
            ),
            text="Share of slots that are leased: the metric of target tracking.",
        ),
        _panel("Functions short of their target", "short", _gauge("hibernode_function_degraded")),
        _panel("Leased slots", "short", _gauge("hibernode_function_leased_slots")),
    ),
    "Queue and wakes": (
        _panel("Waiting requests", "short", _gauge("hibernode_function_queued_requests")),
        _panel("Instances waking", "short", _gauge("hibernode_function_waking_instances")),
        _panel("Wait for a wake", "s", *_quantiles("hibernode_function_wake_seconds")),
        _panel(
            "Wakes and freezes",
            "ops",
            Query(_rate("hibernode_wakes_total"), "wakes {{function}}"),
            Query(_rate("hibernode_freezes_total"), "freezes {{function}}"),
        ),
        _panel(
            "Wake calls of the scheduler",
            "ops",
            Query("sum by (outcome) (rate(hibernode_scheduler_wakes_total[$__rate_interval]))", "{{outcome}}"),
        ),
        _panel(
            "Returned dispatches",
            "ops",
            Query("sum by (why) (rate(hibernode_gateway_returns_total[$__rate_interval]))", "{{why}}"),
        ),
    ),
    "Usage": (
        _panel(
            "GPUs billed",
            "short",
            Query(_rate("hibernode_function_gpu_seconds_total", "function, kind"), "{{kind}} {{function}}"),
            text="GPU seconds per second; counted as agents upload their windows, a minute late.",
        ),
        _panel(
            "vCPUs billed",
            "short",
            Query(_rate("hibernode_function_vcpu_seconds_total", "function, kind"), "{{kind}} {{function}}"),
        ),
        _panel(
            "Idle share of billed GPU time",
            "percentunit",
            Query(
                f"{_rate('hibernode_function_gpu_seconds_total', match=_IDLE)} / "
                f"{_rate('hibernode_function_gpu_seconds_total', match=_BILLED)}",
                "{{function}}",
            ),
        ),
    ),
    "Instances": (
        _panel(
            "Requests inside",
            "short",
            _gauge("hibernode_requests_in_flight", _BY_INSTANCE),
            _gauge("hibernode_requests_in_flight_max", f"most {_BY_INSTANCE}"),
        ),
        _panel("Requests at the gate", "short", _gauge("hibernode_requests_waiting", _BY_INSTANCE)),
        _panel(
            "GPU memory",
            "bytes",
            _gauge("hibernode_instance_gpu_memory_used_bytes", f"used {_BY_INSTANCE}"),
            _gauge("hibernode_instance_gpu_memory_limit_bytes", f"limit {_BY_INSTANCE}"),
            _gauge("hibernode_instance_frozen_bytes", f"frozen {_BY_INSTANCE}"),
        ),
        _panel(
            "GPU memory, share of the limit",
            "percentunit",
            _gauge("hibernode_instance_gpu_memory_used_ratio", _BY_INSTANCE),
        ),
        _panel(
            "Load of the GPU",
            "percentunit",
            _gauge("hibernode_instance_gpu_sm_utilization_ratio", f"SM {_BY_GPU}"),
            _gauge("hibernode_instance_gpu_encoder_utilization_ratio", f"encoder {_BY_GPU}"),
            _gauge("hibernode_instance_gpu_decoder_utilization_ratio", f"decoder {_BY_GPU}"),
        ),
        _panel(
            "vCPUs used", "short", Query(_rate("hibernode_instance_cpu_seconds_total", "function, uid"), _BY_INSTANCE)
        ),
        _panel("Host memory while awake", "bytes", _gauge("hibernode_instance_memory_bytes", _BY_INSTANCE)),
        _panel("Last wake", "s", _gauge("hibernode_last_wake_seconds", _BY_INSTANCE)),
        _panel("Unhealthy", "short", Query(f"hibernode_instance_healthy{{{_SELECTED}}} == 0", _BY_INSTANCE)),
    ),
    "Nodes and GPUs": (
        _panel("Nodes by standing", "short", Query("hibernode_nodes", "{{standing}}")),
        _panel(
            "Nodes cordoned or drained",
            "short",
            Query('hibernode_node_scheduling{scheduling!="NORMAL"} == 1', "{{scheduling}} {{node}}"),
        ),
        _panel("GPUs by use", "short", Query("hibernode_node_gpus", "{{use}} {{node}}")),
        _panel("Instances waiting for a GPU", "short", Query("hibernode_node_gpu_waiters", "{{node}}")),
        _panel("Silence of nodes", "s", Query("time() - hibernode_node_heard_timestamp_seconds", "{{node}}")),
        _panel("Host memory", "bytes", Query("hibernode_node_host_memory_bytes", "{{kind}} {{node}}")),
        _panel("GPU memory", "bytes", _gpu("hibernode_gpu_memory_used_bytes")),
        _panel("SM load", "percentunit", _gpu("hibernode_gpu_sm_utilization_ratio")),
        _panel("Power", "watt", _gpu("hibernode_gpu_power_watts")),
        _panel("Temperature", "celsius", _gpu("hibernode_gpu_temperature_celsius")),
        _panel(
            "Unusable GPUs",
            "short",
            Query("hibernode_gpu_cordoned == 1", "cordoned {{gpu}}"),
            Query("hibernode_gpu_lost == 1", "lost {{gpu}}"),
        ),
        _panel(
            "XID events",
            "ops",
            Query(
                "sum by (gpu, code) (rate(hibernode_gpu_xid_events_total[$__rate_interval]))", "XID {{code}} {{gpu}}"
            ),
        ),
        _panel(
            "Agents: ledger and connection to the scheduler",
            "short",
            Query("hibernode_ledger_pending_windows", "windows not on disk {{instance}}"),
            Query("hibernode_scheduler_connected == 0", "not connected {{instance}}"),
            Query("hibernode_store_ok == 0", "store fails {{instance}}"),
        ),
    ),
}


def dashboard() -> dict[str, Any]:
    """The dashboard in Grafana's import format."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        panels.append(_row(len(panels) + 1, title, y))
        y += 1
        for index, panel in enumerate(row):
            x, row_y = index % _PER_ROW * _WIDTH, y + index // _PER_ROW * _HEIGHT
            place = {"x": x, "y": row_y, "w": _WIDTH, "h": _HEIGHT}
            panels.append(_panel_json(len(panels) + 1, panel, place))
        y += -(-len(row) // _PER_ROW) * _HEIGHT
    return {
        "uid": UID,
        "title": "Hibernode",
        "description": "GPU inference instances that freeze when idle: functions, instances, nodes.",
        "tags": ["hibernode"],
        "schemaVersion": SCHEMA_VERSION,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_source_variable(), _function_variable()]},
        "panels": panels,
    }


def render() -> bytes:
    """The dashboard as JSON."""
    return json.dumps(dashboard(), indent=1).encode()


def _source_variable() -> dict[str, Any]:
    return {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}


def _function_variable() -> dict[str, Any]:
    query = "label_values(hibernode_function_invocations_total, function)"
    return {
        "name": "function",
        "label": "Function",
        "type": "query",
        "datasource": _SOURCE,
        "query": {"query": query, "refId": "function"},
        "definition": query,
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def _row(number: int, title: str, y: int) -> dict[str, Any]:
    place = {"x": 0, "y": y, "w": 24, "h": 1}
    return {"id": number, "type": "row", "title": title, "collapsed": False, "gridPos": place, "panels": []}


def _panel_json(number: int, panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    targets = [
        {"refId": chr(ord("A") + n), "datasource": _SOURCE, "expr": query.expr, "legendFormat": query.legend}
        for n, query in enumerate(panel.queries)
    ]
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.text,
        "datasource": _SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": targets,
    }
