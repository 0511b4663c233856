"""Old windows are deleted once they are acknowledged, and stay otherwise."""

from __future__ import annotations

from agent.core.types import InstanceState
from agent.host.billing.pruning import KEPT_NS, LedgerPruner
from tests.fakes.stores import MemoryStore
from tests.host.rig import OCR, a_world


async def test_acknowledged_windows_go_after_a_week_and_the_others_stay() -> None:
    async with a_world() as world:
        for uid in ("i-billed", "i-unbilled"):
            world.billing.open(uid, OCR, InstanceState.RUNNING)
        world.clock.advance(5)
        for uid in ("i-billed", "i-unbilled"):
            world.billing.changed(uid, InstanceState.STOPPED)
        await world.billing.flush()
        await world.store.acknowledge([("i-billed", 0)])
        pruner = LedgerPruner(world.store, world.clock)
        assert await pruner.prune_once() == 0
        world.clock.advance(KEPT_NS + 1)
        assert await pruner.prune_once() == 1
        assert [window.instance_uid for window in await world.store.read_windows()] == ["i-unbilled"]


async def test_failing_store_does_not_end_the_pruner() -> None:
    async with a_world() as world:
        store = MemoryStore()
        store.failing = True
        assert await LedgerPruner(store, world.clock).prune_once() == 0
