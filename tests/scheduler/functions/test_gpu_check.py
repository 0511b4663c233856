"""A deploy or provision that no node can ever run is refused with what there is; a doubt is only a warning."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent.core.errors import PreconditionError
from agent.core.types import GIB, MIB, SECOND_NS
from agent.event_log import EventLog
from agent.scheduler.database.store import Store
from agent.scheduler.fleet.fleet import Fleet
from agent.scheduler.functions.catalog import Catalog
from agent.scheduler.functions.deploy_rules import Defaults
from agent.scheduler.functions.gpu_check import GpuCheck
from agent.v1.function_service_pb2 import DeployFunctionRequest, ProvisionConfig
from agent.v1.scheduler_service_pb2 import NodeLoad, Registration, ReportLoadRequest
from agent.v1.types_pb2 import FunctionSpec, Gpu, GpuRequirement, Node
from tests.fakes.clock import FakeClock

SMALL, LARGE, HUGE = 16 * GIB, 48 * GIB, 100 * GIB


class Rig:
    """A catalog with the check of the daemon, on a fleet without nodes."""

    def __init__(self, store: Store) -> None:
        self.clock = FakeClock()
        events = EventLog(self.clock)
        self.fleet = Fleet(self.clock, events, lambda event: None, lambda: None, 3 * SECOND_NS, 10 * SECOND_NS)
        self.catalog = Catalog(
            self.clock, events, store, lambda event: None, lambda: None, Defaults(), GpuCheck(self.fleet)
        )

    def join(self, name: str, model: str, mib: int, *, mig: bool = False, **registration: object) -> None:
        gpu = Gpu(uuid=f"{name}-g", model=model, memory_total_bytes=mib * MIB, health=Gpu.HEALTH_CORDONED, mig=mig)
        message = ReportLoadRequest(epoch=1, sequence=1, snapshot=True, load=NodeLoad(state=Node.STATE_READY))
        message.registration.CopyFrom(
            Registration(ingress_address="127.0.0.1:1", grpc_address="127.0.0.1:2", gpus=[gpu], **registration)  # type: ignore[arg-type]
        )
        self.fleet.receive(name, self.fleet.stream_opened(name), message)

    async def deploy(
        self,
        memory: int = 0,
        gpu_type: str = "",
        target: int = 1,
        labels: dict[str, str] | None = None,
        *,
        dry: bool = False,
    ) -> list[str]:
        need = GpuRequirement(gpu_type=gpu_type, memory_bytes=memory, count=1)
        spec = FunctionSpec(name="ocr", entrypoint=["app"], gpu=need, node_labels=labels or {})
        _, warnings = await self.catalog.deploy(DeployFunctionRequest(spec=spec, target=target, validate_only=dry))
        return [warning for warning in warnings if "target is 0" not in warning]

    async def refusal(self, memory: int = 0, gpu_type: str = "", *, dry: bool = False) -> str:
        with pytest.raises(PreconditionError) as caught:
            await self.deploy(memory, gpu_type, dry=dry)
        assert caught.value.reason == "NO_SUCH_GPU"
        return caught.value.message


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    store = Store(f"sqlite:///{tmp_path}/scheduler.db")
    await store.open()
    yield Rig(store)
    await store.close()


@pytest.mark.parametrize("dry", [False, True])
async def test_what_no_gpu_of_the_fleet_is_gets_refused_and_nothing_is_deployed(rig: Rig, dry: bool) -> None:
    rig.join("gpu-1", "Tesla T4", 15360)
    rig.join("gpu-2", "NVIDIA L20", 46068)
    assert await rig.deploy(LARGE, dry=dry) == [], "the GPUs may be out of use: they come back"
    assert "the largest is NVIDIA L20 with 48 GiB" in await rig.refusal(HUGE, dry=dry)
    assert "it has NVIDIA L20, Tesla T4" in await rig.refusal(0, "H100", dry=dry)
    assert "with 16 GiB" in await rig.refusal(17 * GIB, "T4", dry=dry)
    kept = rig.catalog.find("ocr")
    assert (None if kept is None else kept.spec.gpu.memory_bytes) == (None if dry else LARGE)


async def test_gpus_of_a_silent_and_of_a_lost_node_count(rig: Rig) -> None:
    rig.join("gpu-1", "NVIDIA L20", 46068)
    for silent_s in (4, 11):
        rig.clock.advance(silent_s * SECOND_NS)
        rig.fleet.check_silence()
        assert await rig.deploy(LARGE) == []
        assert "48 GiB" in await rig.refusal(HUGE)


async def test_before_any_node_registers_nothing_is_refused(rig: Rig) -> None:
    assert await rig.deploy(HUGE) == ["no node has registered yet, so that GPU type and memory are not checked"]


async def test_a_node_not_heard_since_the_scheduler_started_may_have_the_gpu(rig: Rig) -> None:
    rig.join("gpu-1", "Tesla T4", 15360)
    rig.fleet.expect("gpu-2")
    (warning,) = await rig.deploy(HUGE)
    assert "the largest is Tesla T4 with 16 GiB" in warning
    assert "not refused: gpu-2, not heard since the scheduler started, may have it" in warning


async def test_a_function_that_is_to_have_no_instances_is_only_warned_of(rig: Rig) -> None:
    rig.join("gpu-1", "Tesla T4", 15360)
    (warning,) = await rig.deploy(HUGE, target=0)
    assert "the largest is Tesla T4 with 16 GiB" in warning


@pytest.mark.parametrize("dry", [False, True])
async def test_provisioning_is_refused_in_the_same_way_and_removing_instances_never_is(rig: Rig, dry: bool) -> None:
    await rig.deploy(HUGE)
    rig.join("gpu-1", "Tesla T4", 15360)
    with pytest.raises(PreconditionError) as caught:
        await rig.catalog.put_provision("ocr", ProvisionConfig(default_target=2), validate_only=dry)
    assert (caught.value.reason, "16 GiB" in caught.value.message) == ("NO_SUCH_GPU", True)
    await rig.catalog.put_provision("ocr", ProvisionConfig(), validate_only=dry)


async def test_only_nodes_with_the_labels_of_the_function_count_and_no_gpu_in_mig_mode(rig: Rig) -> None:
    rig.join("gpu-1", "NVIDIA H200", 143771)
    rig.join("gpu-2", "Tesla T4", 15360, labels={"zone": "b"})
    rig.join("gpu-3", "NVIDIA B200", 183359, mig=True)
    assert await rig.deploy(HUGE) == []
    with pytest.raises(PreconditionError) as caught:
        await rig.deploy(HUGE, labels={"zone": "b"})
    assert "the part of the fleet with zone=b has no GPU with 100 GiB" in caught.value.message
    assert "the largest is Tesla T4 with 16 GiB" in caught.value.message
    assert "the largest is NVIDIA H200 with 141 GiB" in await rig.refusal(150 * GIB)


async def test_labels_that_no_node_has_are_what_the_warning_names(rig: Rig) -> None:
    rig.join("gpu-1", "NVIDIA H200", 143771)
    assert await rig.deploy(HUGE, labels={"rack": "7", "zone": "b"}) == [
        "no node with rack=7, zone=b has registered yet, so that GPU type and memory are not checked"
    ]


async def test_types_mean_what_the_nodes_say(rig: Rig) -> None:
    rig.join("gpu-1", "Tesla T4", 15360)
    (warning,) = await rig.deploy(SMALL, "fc.gpu.ada.1")
    assert warning == "gpuType fc.gpu.ada.1 means any GPU here: no agent's gpu.types says which model it is"
    rig.join("gpu-1", "Tesla T4", 15360, gpu_types={"fc.gpu.tesla.1": "Tesla T4"})
    assert await rig.deploy(SMALL, "fc.gpu.tesla.1") == []
    assert "no GPU of type 'fc.gpu.ada.1'; it has Tesla T4" in await rig.refusal(SMALL, "fc.gpu.ada.1")
