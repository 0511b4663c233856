"""Writes that time out: the error says whether they may take effect, and the next write counts."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from agent.core.errors import UnavailableError
from agent.core.provisioning.model import Scheduling
from agent.scheduler.database.store import DEADLINE_S, Store
from agent.scheduler.fleet.node_scheduling import NodeScheduling
from tests.scheduler.functions.autoscaler_rig import Rig, current_policy

IMPATIENT_S = 0.5
MAY_BE = "takes effect at the next start then"


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    made = Store(f"sqlite:///{tmp_path}/scheduler.db")
    await made.open()
    yield made
    await made.close()


@pytest.fixture
async def rig(store: Store) -> Rig:
    made = Rig(store)
    await made.deploy(target=3)
    made.instances(3)
    return made


@contextmanager
def begins_and_hangs(store: Store, path: Path) -> Iterator[None]:
    """A write begins and waits for the file's lock past its deadline."""
    store.database.deadline_s = IMPATIENT_S
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")
    store.database.deadline_s = DEADLINE_S


@contextmanager
def waits_its_turn(store: Store) -> Iterator[None]:
    """A write does not begin before its deadline."""
    store.database.deadline_s = IMPATIENT_S
    released = threading.Event()
    store.database.executor.submit(released.wait)
    yield
    released.set()
    store.database.deadline_s = DEADLINE_S


async def restarted(store: Store) -> Rig:
    """A new catalog, read after all earlier writes: they use the same thread."""
    again = Rig(store)
    await again.catalog.load()
    return again


async def test_a_put_that_times_out_while_written_may_take_effect(rig: Rig, store: Store, tmp_path: Path) -> None:
    with begins_and_hangs(store, tmp_path / "scheduler.db"), pytest.raises(UnavailableError, match=MAY_BE) as caught:
        await rig.put(0)
    assert caught.value.reason == "STORE_FAILED"
    assert rig.ocr.target == 3
    assert (await restarted(store)).ocr.target == 0, "as the error says"


async def test_a_put_that_times_out_before_its_turn_is_not_written(rig: Rig, store: Store) -> None:
    with waits_its_turn(store), pytest.raises(UnavailableError, match="STORE_FAILED") as caught:
        await rig.put(0)
    assert MAY_BE not in str(caught.value)
    assert (rig.ocr.target, (await restarted(store)).ocr.target) == (3, 3)


@pytest.mark.parametrize("deploys", [False, True], ids=["put", "deploy"])
async def test_a_repeated_put_after_an_unconfirmed_one_survives_a_restart(
    rig: Rig, store: Store, tmp_path: Path, deploys: bool
) -> None:
    with begins_and_hangs(store, tmp_path / "scheduler.db"), pytest.raises(UnavailableError, match=MAY_BE):
        await rig.put(0, target_tracking_policies=[current_policy()])
    if deploys:
        await rig.deploy(target=3)
    else:
        await rig.put(3)
    again = await restarted(store)
    assert (again.ocr.target, again.ocr.config, again.ocr.spec.revision) == (3, rig.ocr.config, "1")
    assert not again.ocr.provisioning


async def test_an_unconfirmed_cordon_can_be_undone(rig: Rig, store: Store, tmp_path: Path) -> None:
    scheduling = NodeScheduling(store, rig.fleet, rig.event_log)
    with begins_and_hangs(store, tmp_path / "scheduler.db"), pytest.raises(UnavailableError, match=MAY_BE):
        await scheduling.put("n1", Scheduling.CORDONED)
    assert rig.fleet.scheduling("n1") is Scheduling.NORMAL
    assert await store.node_scheduling() == {"n1": "CORDONED"}, "as the error says"
    await scheduling.put("n1", Scheduling.NORMAL)
    assert await store.node_scheduling() == {}
