"""The metrics of a working scheduler and agent, and the dashboard that shows them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from typing import Any

import pytest

from agent.core.types import MIB, IdleMode, IdlePolicy
from agent.v1 import types_pb2
from tests.api.promql import ONLY_OF_COUNTERS, Asked, Scrape, asked, read_scrape
from tests.e2e.stack import Stack, echo, running_stack, until

OF_A_SCRAPE = {"instance", "job"}
"""Labels added by Prometheus."""
PARTS = {"ms", "us", "ns", "milliseconds", "milliwatts", "percent", "minutes", "hours", "kb", "mb", "gb", "mib", "gib"}
"""Units that are not base units (prometheus.io/docs/practices/naming)."""


@dataclass(frozen=True)
class Broken:
    """A dashboard with one wrong panel."""

    expr: str
    complaint: str
    legend: str = ""

    def dashboard(self) -> dict[str, Any]:
        target = {"expr": self.expr, "legendFormat": self.legend, "datasource": {"uid": "${datasource}"}}
        return {"panels": [{"title": "broken", "targets": [target]}]}


BROKEN = (
    Broken("hibernode_function_invocation_total", "no family has"),
    Broken("rate(hibernode_function_invocations_total{functoin=~'a'}[5m])", "has no .*functoin"),
    Broken("sum by (node) (hibernode_function_leased_slots)", "has no .*node"),
    Broken("rate(hibernode_function_leased_slots[5m])", "rates are of counters"),
    Broken("hibernode_function_invocations_total", "rates are of counters"),
    Broken("hibernode_function_leased_slots", "broken.*uid", "{{uid}}"),
)


async def fetch(stack: Stack, daemon: str, path: str) -> str:
    assert stack.http is not None
    admin = json.loads((stack.folder / daemon / "endpoints.json").read_text())["admin"]
    async with stack.http.get(f"http://{admin}{path}") as response:
        assert response.status == 200
        return await response.text()


async def scrape(stack: Stack) -> Scrape:
    return read_scrape(await fetch(stack, "scheduler", "/metrics"), await fetch(stack, "agent", "/metrics"))


def is_there(found: Scrape, name: str, **labels: str) -> bool:
    try:
        return found.value(name, **labels) > 0
    except KeyError:
        return False


async def worked(stack: Stack) -> Scrape:
    """Metrics after requests to one function that freezes and one that never does."""
    await stack.deploy(echo("sleeper"), target=1)
    always = replace(echo("always"), idle=IdlePolicy(IdleMode.NEVER))
    await stack.deploy(always, target=1)
    await stack.wait_for_state(types_pb2.Instance.STATE_FROZEN, 1)
    await stack.ask_correctly("sleeper", 0)
    for number in range(3):
        await stack.ask_correctly("always", number)
    with stack.driver() as driver:
        driver.raise_xid(driver.devices()[0].uuid, 13)  # an application error: nothing is cordoned
    await stack.wait_for_state(types_pb2.Instance.STATE_FROZEN, 1)
    found = Scrape(())

    async def events_recorded() -> bool:
        nonlocal found
        found = await scrape(stack)
        return all(
            (
                is_there(found, "hibernode_function_gpu_seconds_total", function="sleeper", kind="idle"),
                is_there(found, "hibernode_function_gpu_seconds_total", function="sleeper", kind="active"),
                is_there(found, "hibernode_instance_cpu_seconds_total", function="always"),
                is_there(found, "hibernode_instance_gpu_memory_used_bytes", function="always"),
                is_there(found, "hibernode_instance_frozen_bytes", function="sleeper"),
                is_there(found, "hibernode_gpu_xid_events_total", code="13"),
                is_there(found, "hibernode_function_instances", function="sleeper", state="FROZEN"),
            )
        )

    await until("all that happened is in the metrics", events_recorded)
    return found


def expressions(dashboard: dict[str, Any]) -> dict[str, list[Asked]]:
    return {
        target["expr"]: asked(target["expr"]) for panel in dashboard["panels"] for target in panel.get("targets", ())
    }


def check_figures(found: Scrape) -> None:
    for function, requests in (("sleeper", 1), ("always", 3)):
        assert found.value("hibernode_function_invocations_total", function=function) == requests
        assert found.value("hibernode_function_responses_total", function=function, **{"class": "2xx"}) == requests
        assert found.value("hibernode_function_duration_seconds_count", function=function) == requests
        assert found.value("hibernode_function_queue_seconds_count", function=function) == requests
        assert found.value("hibernode_function_target_instances", function=function) == 1
        assert found.value("hibernode_function_current_instances", function=function) == 1
        assert found.value("hibernode_function_lease_seconds_total", function=function) > 0
    assert found.value("hibernode_function_wake_seconds_count", function="sleeper") == 1, "it slept"
    assert found.value("hibernode_function_wake_seconds_count", function="always") == 0
    wake = found.value("hibernode_function_wake_seconds_sum", function="sleeper")
    queue = found.value("hibernode_function_queue_seconds_sum", function="sleeper")
    duration = found.value("hibernode_function_duration_seconds_sum", function="sleeper")
    assert 0 < wake <= queue < duration <= found.value("hibernode_function_duration_max_seconds", function="sleeper")
    assert found.value("hibernode_instance_gpu_memory_limit_bytes", function="always") == 16 * MIB
    assert found.value("hibernode_instance_gpu_memory_used_bytes", function="always") >= 4 * MIB
    assert "hibernode_instance_memory_bytes" in found.labels()
    assert found.value("hibernode_node_gpus", use="held") == 1


def check_names(found: Scrape) -> None:
    for family in found.families:
        name = family.name
        assert re.fullmatch(r"hibernode_[a-z0-9_]+", name), name
        assert not PARTS.intersection(name.split("_")), f"{name} is not in a base unit"
        for sample in family.samples:
            assert (family.type == "counter") is (sample.name == f"{name}_total"), name
        assert family.documentation.endswith("."), name
    for name, labels in found.labels().items():
        assert not labels & OF_A_SCRAPE, f"{name} has a label that Prometheus sets"


def check_dashboard(dashboard: dict[str, Any], found: Scrape) -> None:
    labels = found.labels()
    for expr, metrics in expressions(dashboard).items():
        for metric in metrics:
            assert metric.name in labels, f"no family has {metric.name}: {expr}"
            missing = metric.labels - labels[metric.name] - {"le"}
            assert not missing, f"{metric.name} has no {missing}: {expr}"
            assert metric.rate is metric.name.endswith(ONLY_OF_COUNTERS), f"rates are of counters: {expr}"
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            assert target["datasource"]["uid"] == "${datasource}"
            shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            of_all = set.intersection(*(labels[one.name] for one in asked(target["expr"])))
            assert shown <= of_all | OF_A_SCRAPE, f"{panel['title']}: {shown - of_all}"


async def test_every_metric_of_the_dashboard_exists_and_is_right() -> None:
    async with running_stack() as stack:
        found = await worked(stack)
        check_figures(found)
        check_names(found)
        check_dashboard(json.loads(await fetch(stack, "scheduler", "/grafana.json")), found)
        for wrong in BROKEN:
            with pytest.raises(AssertionError, match=wrong.complaint):
                check_dashboard(wrong.dashboard(), found)
        assert "sleeper" in await fetch(stack, "scheduler", "/"), "the status page shows it"
        await stack.remove_functions(["sleeper", "always"])

        async def forgotten() -> bool:
            names = [
                name
                for family in (await scrape(stack)).families
                for sample in family.samples
                if (name := sample.labels.get("function"))
            ]
            return not names

        await until("the series of what was deleted are gone", forgotten)
