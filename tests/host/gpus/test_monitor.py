"""The GPU monitor: findings cordon, stale samples are not shown, and no failure ends it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from agent.core.gpus.health import HealthLimits
from agent.core.types import SECOND_NS, Xid
from agent.host.gpus.monitor import MAX_XID_COUNTERS, GpuMonitor
from tests.fakes.gpus import FakeGpuEvents
from tests.host.rig import NodeRig, eventually, node_rig

LIMITS = HealthLimits(bad_samples=2, good_samples=2, silent_ns=10 * SECOND_NS)


@dataclass
class Watched:
    rig: NodeRig
    watch: GpuMonitor
    driver: FakeGpuEvents

    def uuid(self, index: int) -> str:
        return self.rig.gpus.gpus[index].uuid

    def cordoned(self, index: int) -> str:
        return self.rig.node.broker.allocator.devices[self.uuid(index)].cordoned

    async def looks(self, times: int) -> None:
        for _ in range(times):
            await self.watch.poll()


@asynccontextmanager
async def watched() -> AsyncIterator[Watched]:
    async with node_rig() as rig:
        driver = FakeGpuEvents()
        watch = GpuMonitor(rig.gpus, driver, rig.node.broker, rig.events, rig.clock, limits=LIMITS, period_s=0.001)
        yield Watched(rig, watch, driver)


async def test_samples_are_shown_while_they_are_fresh() -> None:
    async with watched() as it:
        assert it.watch.samples() == {}
        await it.watch.poll()
        assert set(it.watch.samples()) == {it.uuid(0), it.uuid(1)}
        it.rig.clock.advance(5 * SECOND_NS)
        assert it.watch.samples()
        it.rig.clock.advance(1)
        assert it.watch.samples() == {}, "unknown, not old"


async def test_fatal_xid_cordons_and_a_program_error_is_only_recorded() -> None:
    async with watched() as it:
        it.watch.record_xid(Xid(it.uuid(0), 31))
        assert it.cordoned(0) == ""
        it.watch.record_xid(Xid(it.uuid(0), 79))
        it.watch.record_xid(Xid(it.uuid(0), 79))
        assert it.cordoned(0) == "XID_79: the GPU has fallen off the bus"
        assert [cordon.lasting for cordon in it.rig.node.broker.allocator.devices[it.uuid(0)].cordons] == [True]
        assert it.cordoned(1) == ""
        assert it.watch.xids == {(it.uuid(0), 31): 1, (it.uuid(0), 79): 2}
        assert it.rig.messages("gpu.xid")[0].startswith("XID 31: a program accessed an illegal address")
        assert len(it.rig.messages("gpu.cordoned")) == 1


async def test_gpu_is_cordoned_while_it_answers_with_errors() -> None:
    async with watched() as it:
        it.rig.gpus.errors[it.uuid(1)] = "ill"
        await it.looks(2)
        assert it.cordoned(1).startswith("NVML_ERROR: ")
        assert it.watch.samples()[it.uuid(0)].memory_used_bytes == 0
        it.rig.gpus.errors.clear()
        await it.looks(1)
        assert it.cordoned(1)
        await it.looks(1)
        assert it.cordoned(1) == it.cordoned(0) == ""


async def test_a_lost_gpu_stays_out() -> None:
    async with watched() as it:
        it.rig.gpus.errors[it.uuid(1)] = "lost"
        await it.looks(1)
        it.rig.gpus.errors.clear()
        await it.looks(10)
        assert it.cordoned(1).startswith("GPU_LOST: ")


async def test_cuda_numbers_are_unknown_once_a_gpu_is_lost() -> None:
    """CUDA may no longer count the lost one. An ill one counts."""
    async with watched() as it:
        numbers = it.rig.node.broker.cuda_numbers
        it.rig.gpus.errors[it.uuid(0)] = "ill"
        await it.looks(2)
        assert it.cordoned(0)
        assert numbers([it.uuid(1)]) == (1,)
        it.rig.gpus.errors[it.uuid(0)] = "lost"
        await it.looks(1)
        assert numbers([it.uuid(1)]) == ()


async def test_silent_driver_cordons_all_gpus_until_it_answers() -> None:
    async with watched() as it:
        await it.watch.poll()
        it.rig.gpus.unavailable = True
        await it.watch.poll()
        assert it.cordoned(0) == ""
        it.rig.clock.advance(10 * SECOND_NS)
        await it.watch.poll()
        assert it.cordoned(0) == it.cordoned(1) == "DRIVER_SILENT: NVML has not answered for 10 s"
        it.rig.gpus.unavailable = False
        await it.watch.poll()
        assert it.cordoned(0) == it.cordoned(1) == ""


async def test_monitor_survives_every_failure() -> None:
    async with watched() as it:
        failures = 0

        async def fails() -> None:
            nonlocal failures
            failures += 1
            raise (RuntimeError("a fault of ours") if failures % 2 else PermissionError("/proc"))

        it.watch._after_sample = fails
        running = asyncio.create_task(it.watch.run())
        await eventually(lambda: failures >= 4)
        it.rig.gpus.unavailable = True
        it.driver.raise_xid(it.uuid(0), 48)
        await eventually(lambda: bool(it.cordoned(0)))
        it.rig.gpus.unavailable = False
        before = failures
        await eventually(lambda: failures > before)
        assert not running.done()
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running


async def test_the_counters_are_bounded() -> None:
    async with watched() as it:
        for code in range(1000, 1000 + MAX_XID_COUNTERS + 5):
            it.watch.record_xid(Xid(it.uuid(0), code))
        assert len(it.watch.xids) == MAX_XID_COUNTERS


async def test_persistence_mode_off_is_reported_to_checkpointer_and_once_as_event() -> None:
    async with node_rig() as rig:
        told: list[str] = []
        watch = GpuMonitor(
            rig.gpus,
            FakeGpuEvents(),
            rig.node.broker,
            rig.events,
            rig.clock,
            persistence_is_off=lambda: told.append("off"),
        )
        first = rig.gpus.gpus[0].uuid
        await watch.poll()
        assert not told
        rig.gpus.volatile.add(first)
        await watch.poll()
        await watch.poll()
        assert told == ["off", "off"], "for as long as it is off"
        assert len(rig.messages("gpu.persistence_off")) == 1
