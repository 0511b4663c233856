"""Metrics of fresh, frozen, failing, ended and lost instances, functions and nodes."""

from __future__ import annotations

from collections.abc import Callable
from time import process_time

import pytest

from agent.api.agent_metrics import AgentHealth, AgentMetrics
from agent.core.lifecycle.events import StopAsked
from agent.core.provisioning.model import Scheduling
from agent.core.provisioning.problem import Problem
from agent.core.snapshots import InstanceReading
from agent.core.types import GIB, SECOND_NS, GpuSample
from agent.host.node.gauges import Gauges
from agent.host.node.observer import Observer
from agent.v1.types_pb2 import Gpu, Instance
from tests.api.central import Central, load
from tests.api.promql import Scrape, read_scrape
from tests.api.test_instance_servicer import observer_of
from tests.fakes.instance_reader import FakeInstanceReader
from tests.host.rig import NodeRig, eventually, node_rig

GPU = {"sm_percent": 50, "encoder_percent": 0}
HEALTHY = AgentHealth(store_ok=True, pending_windows=0, merged_windows=0, unmatched_ends=0, scheduler_connected=True)


async def scraped(world: NodeRig) -> Scrape:
    """The agent's metrics, with a sample for every GPU and a reading for every instance."""
    reader = FakeInstanceReader({uid: InstanceReading(2 * SECOND_NS, GIB) for uid in world.node.actors})
    gauges = Gauges(reader, world.node.actors)
    await gauges.poll()
    figures = {gpu.uuid: GpuSample(gpu.uuid, GIB, **GPU) for gpu in world.gpus.gpus}  # type: ignore[arg-type]
    identity, billing = observer_of(world).identity, world.billing
    observer = Observer(
        world.node,
        identity,
        world.clock,
        totals=billing.totals,
        gpu_samples=lambda: figures,
        gauges=gauges,
        peak=billing.peak,
    )
    return read_scrape(AgentMetrics(observer, lambda: HEALTHY).render().decode())


async def test_gpu_metrics_belong_to_the_awake_holder_only() -> None:
    async with node_rig() as world:
        asleep = await world.frozen()
        awake = await world.running()
        awake.figures.vram_bytes = GIB // 4
        found = await scraped(world)
        assert found.value("hibernode_instance_gpu_memory_used_ratio", uid=awake.uid) == 0.25
        assert found.value("hibernode_instance_gpu_sm_utilization_ratio", uid=awake.uid, gpu=awake.gpu_uuids[0]) == 0.5
        assert found.value("hibernode_instance_cpu_seconds_total", uid=awake.uid) == 2
        assert found.value("hibernode_instance_memory_bytes", uid=awake.uid) == GIB
        for name in ("gpu_memory_used_bytes", "gpu_sm_utilization_ratio", "memory_bytes"):
            with pytest.raises(KeyError):
                found.value(f"hibernode_instance_{name}", uid=asleep.uid)
        assert found.value("hibernode_instance_gpu_memory_limit_bytes", uid=asleep.uid) == GIB
        assert "hibernode_instance_gpu_decoder_utilization_ratio" not in found.labels(), "the device does not say"


async def test_ended_instance_has_no_series() -> None:
    async with node_rig() as world:
        actor = await world.running()
        assert (await scraped(world)).value("hibernode_wakes_total", uid=actor.uid) == 0
        actor.handle(StopAsked(SECOND_NS))
        await eventually(lambda: not world.node.actors)
        found = await scraped(world)
        assert not any("uid" in labels for labels in found.labels().values())
        assert found.value("hibernode_instances") == 0


# ---- the scheduler ------------------------------------------------------------------------------------------------


async def test_function_has_all_series_until_it_is_deleted(central: Central) -> None:
    await central.rig.deploy(target=2)
    found = central.scrape()
    mine = {name for name, labels in found.labels().items() if "function" in labels}
    assert len(mine) > 20
    for name in mine:
        assert found.value(name, function="ocr") == (2 if name == "hibernode_function_target_instances" else 0), name
    for kind in ("concurrency", "resource"):
        assert found.value("hibernode_function_throttles_total", kind=kind) == 0
    await central.rig.catalog.delete("ocr")
    await central.rig.catalog.forget("ocr")
    assert not any("function" in labels for labels in central.scrape().labels().values())


async def test_instances_by_state_and_ending_ones_are_not_current(central: Central) -> None:
    await central.rig.deploy(target=3)
    central.report(
        load("i1", Instance.STATE_RUNNING), load("i2", Instance.STATE_FROZEN), load("i3", Instance.STATE_STOPPING),
        load("i4", Instance.STATE_FAILED), load("i5", Instance.STATE_RUNNING, "another-scheduler's"),
    )  # fmt: skip
    found = central.scrape()
    assert found.value("hibernode_function_current_instances", function="ocr") == 2
    assert found.value("hibernode_function_slots", function="ocr") == 8
    states = ("RUNNING", "FROZEN", "STOPPING", "FAILED", "RESTORING")
    counts = [found.value("hibernode_function_instances", function="ocr", state=state) for state in states]
    assert counts == [1, 1, 1, 1, 0]
    assert found.value("hibernode_foreign_instances") == 1


async def test_function_below_its_target_is_degraded(central: Central) -> None:
    await central.rig.deploy()
    central.rig.catalog.set_problem("ocr", Problem("NO_FREE_GPU", "no"))
    assert central.scrape().value("hibernode_function_degraded", function="ocr") == 1


async def test_nodes_have_gpus_by_use_until_they_are_lost(central: Central) -> None:
    gpus = (
        Gpu(uuid="a", health=Gpu.HEALTH_OK, holder_uids=["i1"]),
        Gpu(uuid="b", health=Gpu.HEALTH_OK),
        Gpu(uuid="c", health=Gpu.HEALTH_CORDONED, holder_uids=["i2"]),
        Gpu(uuid="d", health=Gpu.HEALTH_OK, mig=True),
    )
    central.report(load("i1", Instance.STATE_RUNNING), gpus=gpus)
    found = central.scrape()
    assert [found.value("hibernode_node_gpus", use=use) for use in ("held", "free", "unusable")] == [1, 1, 2]
    assert found.value("hibernode_node_host_memory_bytes", node="n1", kind="available") == 32 * GIB
    assert found.value("hibernode_node_gpu_waiters", node="n1") == 3
    assert found.value("hibernode_node_scheduling", node="n1", scheduling="NORMAL") == 1
    central.fleet.set_scheduling("n1", Scheduling.DRAINED)
    assert central.scrape().value("hibernode_node_scheduling", node="n1", scheduling="DRAINED") == 1
    heard = found.value("hibernode_node_heard_timestamp_seconds", node="n1")
    central.clock.advance(11 * SECOND_NS)
    central.fleet.check_silence()
    found = central.scrape()
    assert "hibernode_node_gpus" not in found.labels(), "nobody knows what is on it now"
    assert found.value("hibernode_nodes", standing="LOST") == 1
    assert found.value("hibernode_node_heard_timestamp_seconds", node="n1") == heard


async def test_scrape_of_a_large_scheduler_is_short(central: Central) -> None:
    """50 functions with 1,000 instances; the scrape runs on the event loop."""
    for number in range(50):
        await central.rig.deploy(f"f{number}")
    central.report(*(load(f"i{n}", Instance.STATE_RUNNING, f"f{n % 50}") for n in range(1000)))

    def fastest(work: Callable[[], object]) -> float:
        spent = []
        for _ in range(3):
            began = process_time()
            work()
            spent.append(process_time() - began)
        return min(spent)

    took = fastest(central.metrics.render)
    assert took < 0.5, f"{took * 1000:.0f} ms"
