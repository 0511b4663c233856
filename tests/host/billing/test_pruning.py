"""Old windows are deleted once they are acknowledged, and stay otherwise."""

from __future__ import annotations

from agent.core.types import InstanceState
from agent.host.billing.pruning import KEPT_NS, LedgerPruner
from tests.fakes.stores import MemoryStore
from tests.host.rig import OCR, node_rig


async def test_acknowledged_windows_go_after_a_week_and_the_others_stay() -> None:
    async with node_rig() as rig:
        for uid in ("i-billed", "i-unbilled"):
            rig.billing.open(uid, OCR, InstanceState.RUNNING)
        rig.clock.advance(5)
        for uid in ("i-billed", "i-unbilled"):
            rig.billing.changed(uid, InstanceState.STOPPED)
        await rig.billing.flush()
        await rig.store.acknowledge([("i-billed", 0)])
        pruner = LedgerPruner(rig.store, rig.clock)
        assert await pruner.prune_once() == 0
        rig.clock.advance(KEPT_NS + 1)
        assert await pruner.prune_once() == 1
        assert [window.instance_uid for window in await rig.store.read_windows()] == ["i-unbilled"]


async def test_failing_store_does_not_end_the_pruner() -> None:
    async with node_rig() as rig:
        store = MemoryStore()
        store.failing = True
        assert await LedgerPruner(store, rig.clock).prune_once() == 0
