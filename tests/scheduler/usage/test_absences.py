"""Usage of the time in which a node was given up is stored as unbilled, whenever its scheduler is killed."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
import sqlalchemy as sa

from agent.core.billing.absence import NO_END_NS, Absence
from agent.core.errors import UnavailableError
from agent.scheduler.usage import absences as module
from agent.scheduler.usage.absences import Absences
from agent.scheduler.usage.collector import UsageCollector, UsageDatabase
from agent.scheduler.usage.reports import UsageReports
from agent.scheduler.usage.retention import UsageRetention
from agent.scheduler.usage.tables import ABSENCES
from tests.contract.test_stores import window
from tests.fakes.clock import FakeClock
from tests.scheduler.usage.test_collector import NODE

SINCE = 1_700_000_000


async def test_time_away_is_stored_as_unbilled_and_a_repeated_upload_is_no_conflict(
    collector: UsageCollector, database: UsageDatabase
) -> None:
    kept = Absences(database)
    await kept.begin(NODE, SINCE)
    await kept.end(NODE, SINCE, Absence("boot-a", 150, 300))
    batch = [window(seq=seq, active_ns=10) for seq in range(4)]
    for _ in range(2):
        accepted = await collector.accept(NODE, batch)
        assert (accepted.marks, accepted.conflicts) == ({"i-ocr-1": 3}, ())
    stored = await UsageReports(database).windows()
    assert [(w.active_ns, w.idle_ns, w.unbilled_ns) for w in stored] == [
        (10, 90, 0), (0, 50, 50), (0, 0, 100), (10, 90, 0),
    ]  # fmt: skip
    found = [one async for one in UsageReports(database).reconcile()]
    assert [one.has_findings for one in found] == [False]


async def test_other_nodes_and_other_boots_are_billed(collector: UsageCollector, database: UsageDatabase) -> None:
    kept = Absences(database)
    await kept.end(NODE, SINCE, Absence("boot-b", 0, 900))
    await kept.end("gpu-8", SINCE, Absence("boot-a", 0, 900))
    await collector.accept(NODE, [window()])
    assert await UsageReports(database).windows() == [window()]


async def test_a_host_rebooted_while_it_was_given_up_is_not_billed_for_the_boot_before(
    collector: UsageCollector, database: UsageDatabase
) -> None:
    """It was cut off and went on, and what it metered meanwhile is uploaded after the reboot."""
    kept = Absences(database)
    await kept.begin(NODE, SINCE, Absence("boot-a", 150, NO_END_NS))
    await kept.end(NODE, SINCE + 900, Absence("boot-b", -700, 200))
    later = replace(window("i-ocr-2"), boot_id="boot-b", start_mono_ns=200, end_mono_ns=300)
    await collector.accept(NODE, [*(window(seq=seq) for seq in range(4)), later])
    stored = await UsageReports(database).windows()
    assert [(w.instance_uid, w.unbilled_ns) for w in stored] == [
        *(("i-ocr-1", unbilled_ns) for unbilled_ns in (0, 50, 100, 100)), ("i-ocr-2", 0),
    ]  # fmt: skip


async def test_a_step_of_the_wall_clock_while_the_scheduler_was_down_does_not_move_the_beginning(
    collector: UsageCollector, database: UsageDatabase
) -> None:
    await Absences(database).begin(NODE, SINCE, Absence("boot-a", 150, NO_END_NS))
    await Absences(database).end(NODE, SINCE + 900, Absence("boot-a", 240, 250))
    await collector.accept(NODE, [window(seq=seq) for seq in range(4)])
    assert [w.unbilled_ns for w in await UsageReports(database).windows()] == [0, 50, 50, 0]


@pytest.mark.parametrize("end", [Absence("boot-a", 150, 250), None])
async def test_without_a_reboot_the_boot_before_is_billed_again_after_the_return(
    collector: UsageCollector, database: UsageDatabase, end: Absence | None
) -> None:
    kept = Absences(database)
    await kept.begin(NODE, SINCE, Absence("boot-a", 150, NO_END_NS))
    await kept.end(NODE, SINCE + 900, end)
    await collector.accept(NODE, [window(seq=seq) for seq in range(4)])
    stored = await UsageReports(database).windows()
    assert [w.unbilled_ns for w in stored] == ([0, 50, 50, 0] if end else [0, 0, 0, 0])


async def test_nothing_is_taken_of_a_node_that_is_given_up_until_it_is_back(
    collector: UsageCollector, database: UsageDatabase
) -> None:
    """Also by the next scheduler, if this one is killed now."""
    await Absences(database).begin(NODE, SINCE)
    with pytest.raises(UnavailableError) as caught:
        await collector.accept(NODE, [window()])
    assert caught.value.reason == "NODE_GIVEN_UP"
    other = replace(window("i-ocr-2"), node="gpu-8")
    assert (await collector.accept("gpu-8", [other])).marks == {"i-ocr-2": 0}
    following = Absences(database)
    assert await following.unfinished() == {NODE: SINCE}
    await following.begin(NODE, SINCE + 500)
    assert await following.unfinished() == {NODE: SINCE}, "it goes on"
    await following.end(NODE, SINCE + 900, Absence("boot-a", 0, 50))
    assert await following.unfinished() == {}
    await collector.accept(NODE, [window()])
    (mine, _) = await UsageReports(database).windows()
    assert (mine.active_ns, mine.idle_ns, mine.unbilled_ns) == (0, 50, 50)


async def test_an_absence_that_cannot_be_dated_costs_nobody_anything(
    collector: UsageCollector, database: UsageDatabase
) -> None:
    kept = Absences(database)
    await kept.begin(NODE, SINCE)
    await kept.end(NODE, SINCE, None)
    await collector.accept(NODE, [window()])
    assert await UsageReports(database).windows() == [window()]


async def test_a_failed_write_is_repeated_and_the_end_comes_after_the_beginning(
    database: UsageDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0.0)
    run, failures = database.run, iter([UnavailableError("STORE_FAILED", "no disk")] * 2)

    async def failing(work: object, **options: object) -> object:
        for error in failures:
            raise error
        return await run(work, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(database, "run", failing)
    kept = Absences(database)
    await asyncio.gather(kept.begin(NODE, SINCE), kept.end(NODE, SINCE + 9, Absence("boot-a", 1, 2)))
    assert await kept.unfinished() == {}
    with database.engine.connect() as connection:
        (row,) = connection.execute(sa.select(ABSENCES)).mappings()
    assert (row["since_wall_ns"], row["boot_id"]) == (SINCE, "boot-a")


async def test_absences_are_kept_as_long_as_usage_and_without_an_end_for_ever(database: UsageDatabase) -> None:
    clock, kept = FakeClock(), Absences(database)
    clock.advance(5_000)
    now = clock.wall_ns()
    await kept.end(NODE, now - 2_000, Absence("boot-a", 0, 50))
    await kept.end(NODE, now - 10, Absence("boot-a", 60, 70))
    await kept.begin("gpu-8", now - 3_000, Absence("boot-a", 150, NO_END_NS))
    assert await UsageRetention(database, clock, 1_000).prune() == 1
    with database.engine.connect() as connection:
        left = connection.execute(sa.select(ABSENCES.c.since_wall_ns)).scalars().all()
    assert sorted(left) == [now - 3_000, now - 3_000, now - 10]
