"""Sums by function, instance, node and GPU model: the same windows and the same cost in every grouping."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agent.core.billing.pricing import always_on_cost
from agent.core.billing.window import UsageWindow
from agent.scheduler.usage.collector import UsageCollector, UsageDatabase
from agent.scheduler.usage.reports import NO_GPU_MODEL, UsageFilter, UsageReports
from tests.contract.test_stores import window
from tests.core.billing.oracle import cost_of_windows
from tests.scheduler.usage.test_collector import NODE, WALL, book

GROUPINGS = [("function",), ("instance_uid", "function", "node"), ("node",), ("gpu_model",)]


def before_a_gpu(one: UsageWindow) -> UsageWindow:
    """Pulls its image and waits for a GPU: unbilled, and without a model."""
    length = one.end_mono_ns - one.start_mono_ns
    return replace(one, gpu_model="", gpu_uuids=(), active_ns=0, idle_ns=0, unbilled_ns=length, invocations=0)


def life(uid: str, function: str, model: str) -> list[UsageWindow]:
    """Waits for a GPU, works, is frozen."""
    windows = [replace(window(uid, seq), function=function, gpu_model=model) for seq in range(3)]
    return [before_a_gpu(windows[0]), replace(windows[1], active_ns=70, idle_ns=30), windows[2]]


FLEET = [
    *life("i-1", "ocr", "NVIDIA L20"),
    *life("i-2", "ocr", "NVIDIA A10"),
    *life("i-3", "llm", "NVIDIA A10"),
    before_a_gpu(replace(window("i-4"), function="broken")),
    before_a_gpu(replace(window("i-4", 1), function="broken")),
    *(replace(window("i-5", seq), function="cpu", gpu_model="", gpu_uuids=(), gpu_count=0) for seq in range(2)),
]


@pytest.mark.parametrize("groups", GROUPINGS, ids=lambda groups: groups[0])
async def test_every_grouping_adds_up_to_the_same(
    groups: tuple[str, ...], collector: UsageCollector, database: UsageDatabase
) -> None:
    await collector.accept(NODE, FLEET)
    prices = book()
    report = await UsageReports(database).report(prices, group_by=groups)
    spent, _, _ = cost_of_windows(FLEET, prices)
    assert sum(line.cost.total for line in report.lines) == spent.total > 0
    # Always on: each second of the billed instances, the time before the GPU at the price of the later model.
    models = {one.instance_uid: one.gpu_model for one in FLEET if one.gpu_model}
    lived = [replace(one, gpu_model=models.get(one.instance_uid, "")) for one in FLEET if one.function != "broken"]
    price = prices.prices[0]
    assert sum(line.always_on_cost.total for line in report.lines) == sum(
        always_on_cost(one, price).total for one in lived
    )
    assert sum(line.total("windows") for line in report.lines) == len(FLEET)
    assert sum(line.unpriced for line in report.lines) == 0


async def test_what_a_row_is_depends_on_the_grouping(collector: UsageCollector, database: UsageDatabase) -> None:
    await collector.accept(NODE, FLEET)
    await collector.accept("gpu-8", [replace(one, node="gpu-8") for one in life("i-9", "ocr", "NVIDIA L20")])
    rows = {}
    for groups in GROUPINGS:
        report = await UsageReports(database).report(book(), group_by=groups)
        rows[groups[0]] = [(line.group[0], line.gpu_model, line.total("windows")) for line in report.lines]
    assert rows == {
        "function": [
            ("broken", "", 2),
            ("cpu", "", 2),
            ("llm", "NVIDIA A10", 3),
            ("ocr", "NVIDIA A10", 3),
            ("ocr", "NVIDIA L20", 6),
        ],
        "instance_uid": [
            ("i-1", "NVIDIA L20", 3),
            ("i-2", "NVIDIA A10", 3),
            ("i-3", "NVIDIA A10", 3),
            ("i-4", "", 2),
            ("i-5", "", 2),
            ("i-9", "NVIDIA L20", 3),
        ],
        "node": [("gpu-7", "", 4), ("gpu-7", "NVIDIA A10", 6), ("gpu-7", "NVIDIA L20", 3), ("gpu-8", "NVIDIA L20", 3)],
        "gpu_model": [("", "", 4), ("NVIDIA A10", "NVIDIA A10", 6), ("NVIDIA L20", "NVIDIA L20", 6)],
    }


async def test_what_never_started_saves_nothing(collector: UsageCollector, database: UsageDatabase) -> None:
    """Its image was not found: nothing was billed, and always-on costs nothing either."""
    await collector.accept(NODE, FLEET)
    report = await UsageReports(database).report(book(), UsageFilter(function="broken"))
    (line,) = report.lines
    assert line.total("unbilled_ns") == 200
    assert not line.cost.total
    assert not line.always_on_cost.total


async def test_time_before_the_first_gpu_counts_as_the_later_model(
    collector: UsageCollector, database: UsageDatabase
) -> None:
    await collector.accept(NODE, life("i-1", "ocr", "NVIDIA L20"))
    beginning = UsageFilter(end_wall_ns=WALL + 100)
    (line,) = (await UsageReports(database).report(book(), beginning)).lines
    assert (line.gpu_model, line.total("windows")) == ("NVIDIA L20", 1)
    assert not line.cost.total
    assert line.always_on_cost.gpu > 0


async def test_a_model_is_chosen_with_the_time_before_it_came(
    collector: UsageCollector, database: UsageDatabase
) -> None:
    await collector.accept(NODE, FLEET)
    reports = UsageReports(database)
    for model, uids in (("NVIDIA L20", {"i-1"}), ("NVIDIA A10", {"i-2", "i-3"}), (NO_GPU_MODEL, {"i-4", "i-5"})):
        only = UsageFilter(gpu_model=model)
        windows = [one for one in FLEET if one.instance_uid in uids]
        assert await reports.windows(only) == windows
        assert await reports.windows(only, after=("i-2", 1)) == [
            one for one in windows if (one.instance_uid, one.seq) > ("i-2", 1)
        ]
        report = await reports.report(book(), only)
        assert sum(line.total("windows") for line in report.lines) == len(windows)
