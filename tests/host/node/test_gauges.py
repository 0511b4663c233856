"""Gauges: readings of awake instances, once per period; unknown values stay unknown."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from agent.core.errors import UnavailableError
from agent.core.snapshots import InstanceReading
from agent.core.types import GIB, GpuNeed
from agent.host.node.gauges import Gauges
from agent.host.node.observer import Observer
from agent.v1.scheduler_service_pb2 import NodeLoad
from agent.wire.convert_snapshot import node_load
from tests.api.test_instance_servicer import observer_of
from tests.fakes.instance_reader import FakeInstanceReader
from tests.host.rig import OCR, NodeRig, enter, eventually, node_rig

BUSY = InstanceReading(cpu_ns=5_000, memory_bytes=3 * GIB)


def observing(rig: NodeRig, gauges: Gauges) -> Observer:
    identity = observer_of(rig).identity
    return Observer(rig.node, identity, rig.clock, totals=rig.billing.totals, gauges=gauges, peak=rig.billing.peak)


def heartbeat(observer: Observer) -> dict[str, NodeLoad.InstanceGauges]:
    return {one.uid: one for one in node_load(observer.node(), observer.awake()).instances}


async def test_heartbeat_names_only_awake_instances() -> None:
    async with node_rig() as rig:
        frozen = await rig.frozen()
        awake = await rig.running()
        reader = FakeInstanceReader({awake.uid: BUSY, frozen.uid: BUSY})
        gauges = Gauges(reader, rig.node.actors)
        await gauges.poll()
        assert reader.asked == [[awake.uid]], "a frozen one is not even read"
        (gauge,) = heartbeat(observing(rig, gauges)).values()
        assert (gauge.uid, gauge.cpu_ns, gauge.memory_bytes) == (awake.uid, 5_000, 3 * GIB)


async def test_node_with_all_instances_frozen_reads_nothing() -> None:
    async with node_rig() as rig:
        await rig.frozen()
        reader = FakeInstanceReader()
        await Gauges(reader, rig.node.actors).poll()
        assert reader.asked == []


async def test_unknown_readings_are_absent_and_not_zero() -> None:
    async with node_rig() as rig:
        actor = await rig.running()
        actor.note_vram(0)
        gauges = Gauges(FakeInstanceReader(), rig.node.actors)
        observer = observing(rig, gauges)
        for _ in range(2):
            gauge = heartbeat(observer)[actor.uid]
            assert not any(gauge.HasField(name) for name in ("cpu_ns", "memory_bytes", "vram_bytes"))
            await gauges.poll()  # its container has ended meanwhile: still no reading


async def test_old_readings_are_dropped_when_the_host_does_not_answer() -> None:
    async with node_rig() as rig:
        actor = await rig.running()
        reader = FakeInstanceReader({actor.uid: BUSY})
        gauges = Gauges(reader, rig.node.actors)
        await gauges.poll()
        reader.fails = True
        with pytest.raises(UnavailableError):
            await gauges.poll()
        assert gauges.of(actor.uid) == InstanceReading()


async def test_frozen_instance_keeps_its_cpu_time_and_an_ended_one_nothing() -> None:
    async with node_rig() as rig:
        actor = await rig.running()
        reader = FakeInstanceReader({actor.uid: BUSY})
        actors = dict(rig.node.actors)
        gauges = Gauges(reader, actors)
        await gauges.poll()
        rig.clock.advance(OCR.idle.freeze_after_ns)
        await eventually(lambda: actor.state.value == "FROZEN")
        await gauges.poll()
        assert gauges.of(actor.uid) == InstanceReading(cpu_ns=5_000)
        actors.clear()
        await gauges.poll()
        assert gauges.of(actor.uid) == InstanceReading()


async def test_cpu_time_never_goes_back() -> None:
    async with node_rig() as rig:
        actor = await rig.running()
        reader = FakeInstanceReader({actor.uid: BUSY})
        gauges = Gauges(reader, rig.node.actors)
        await gauges.poll()
        reader.readings[actor.uid] = InstanceReading(cpu_ns=4_000, memory_bytes=GIB)
        await gauges.poll()
        assert gauges.of(actor.uid) == InstanceReading(cpu_ns=5_000, memory_bytes=GIB)


@pytest.mark.parametrize(("need", "limit"), [(GpuNeed(2, memory_bytes=GIB), 2 * GIB), (GpuNeed(2), 32 * GIB)])
async def test_vram_limit_is_the_declared_size_or_the_whole_gpus(need: GpuNeed, limit: int) -> None:
    async with node_rig() as rig:
        actor = await rig.running(replace(OCR, gpu=need))
        assert heartbeat(observer_of(rig))[actor.uid].vram_limit_bytes == limit


async def test_gpu_memory_is_what_nvml_shows_now() -> None:
    async with node_rig() as rig:
        actor = await rig.running()
        shown = {actor.uid: 7 * GIB}
        observer = observing(rig, Gauges(FakeInstanceReader(), rig.node.actors, lambda: shown))
        assert heartbeat(observer)[actor.uid].vram_bytes == 7 * GIB
        shown.clear()
        actor.note_vram(GIB)
        assert heartbeat(observer)[actor.uid].vram_bytes == GIB, "as it was measured when it started"


async def test_the_most_requests_at_once_are_remembered_for_a_while() -> None:
    async with node_rig() as rig:
        actor = await rig.running(replace(OCR, instance_concurrency=3))
        observer = observing(rig, Gauges(FakeInstanceReader(), rig.node.actors))
        for _ in range(2):
            await enter(actor)
        actor.gate.leave()
        assert (observer.instance(actor).in_flight, observer.instance(actor).peak_in_flight) == (1, 2)


async def test_failing_reader_does_not_end_the_polling() -> None:
    async with node_rig() as rig:
        actor = await rig.running()
        reader = FakeInstanceReader({actor.uid: BUSY}, fails=True)
        gauges = Gauges(reader, rig.node.actors, period_s=0.001)
        running = asyncio.create_task(gauges.run())
        await eventually(lambda: len(reader.asked) > 1)
        reader.fails = False
        await eventually(lambda: gauges.of(actor.uid) == BUSY)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
