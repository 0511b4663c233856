"""Snapshots on the wire: node, fleet and load stream describe the same instance and node."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agent.core.snapshots import CapabilityLine, GpuSnapshot, InstanceSnapshot, NodeSnapshot
from agent.core.types import SECOND_NS, FunctionSpec, Gpu, GpuSample, InstanceState
from agent.v1 import types_pb2
from agent.wire.convert_load import instance_of_load
from agent.wire.convert_snapshot import instance_load, instance_to_proto, node_load, node_to_proto, registration
from agent.wire.json_view import to_json

SECRET = "hunter2-database-password"

FROZEN = InstanceSnapshot(
    uid="i-1",
    function=FunctionSpec(name="ocr", revision="3", instance_concurrency=4, environment=(("DB_PASSWORD", SECRET),)),
    request_id="ocr/3/0/1",
    state=InstanceState.FROZEN,
    reason="",
    message="",
    gpu_uuids=("GPU-1",),
    in_flight=0,
    waiting=2,
    healthy=True,
    vram_bytes=0,
    frozen_bytes=1 << 30,
    pid=4711,
    address="127.0.0.1:9000",
    create_wall_ns=1_700_000_000 * SECOND_NS,
    state_wall_ns=1_700_000_060 * SECOND_NS,
    wakes=1,
    freezes=2,
    last_wake_ns=1_500_000_000,
    last_wake_driver_ns=1_200_000_000,
    wake_estimate_ns=1_400_000_000,
    idle_for_ns=30 * SECOND_NS,
    freeze_cancellable=False,
    active_ns=7,
    idle_ns=8,
    unbilled_ns=9,
    container_id="4f2e",
)
FIRST_GPU = Gpu("GPU-1", 0, "NVIDIA L4", 24 << 30)
NODE = NodeSnapshot(
    name="node-7",
    boot_id="boot-1",
    agent_version="0.1.0",
    epoch=3,
    driver_version="580.65.06",
    cuda_version="13.0",
    gpus=(
        GpuSnapshot(FIRST_GPU, GpuSample("GPU-1", 1 << 30, sm_percent=0), "i-2", ("i-1", "i-3"), ""),
        GpuSnapshot(Gpu("GPU-2", 1, "NVIDIA L4", 24 << 30, persistence=False), None, "", ("i-4",), "XID_79"),
    ),
    host_total_bytes=256 << 30,
    host_available_bytes=200 << 30,
    host_reserved_bytes=1 << 30,
    capabilities=(CapabilityLine("gpu.persistence", "FAIL", "off on GPU-2", "nvidia-smi -pm 1"),),
    ready=True,
    draining=False,
    ingress_address="127.0.0.1:8610",
    grpc_address="127.0.0.1:8611",
    instances_per_gpu=2,
    runtimes=("process",),
    instance_count=4,
    start_wall_ns=1_700_000_000 * SECOND_NS,
    labels={"rack": "b2"},
)


def test_instance_is_complete_and_without_secrets() -> None:
    message = instance_to_proto(FROZEN, "node-7")
    assert SECRET not in str(message)
    view = to_json(message)
    assert view["spec"]["environment"] == {"DB_PASSWORD": "***"}
    shown = {name: view[name] for name in ("node", "function", "revision", "state", "frozen_bytes", "last_wake")}
    assert shown == {
        "node": "node-7",
        "function": "ocr",
        "revision": "3",
        "state": "FROZEN",
        "frozen_bytes": 1 << 30,
        "last_wake": {"total_ns": 1_500_000_000, "driver_ns": 1_200_000_000},
    }
    assert view["state_time"] == "2023-11-14T22:14:20Z"


def test_every_field_of_an_instance_is_filled() -> None:
    message = instance_to_proto(
        replace(FROZEN, reason="HOST_MEMORY_SHORT", message="no", in_flight=1, vram_bytes=1, progress="pulling"), "n"
    )
    assert {field.name for field, _ in message.ListFields()} == set(types_pb2.Instance.DESCRIPTOR.fields_by_name)


def test_an_instance_that_never_woke_has_no_last_wake() -> None:
    assert not instance_to_proto(replace(FROZEN, wakes=0), "node-7").HasField("last_wake")


def test_fleet_and_node_show_the_same_instance() -> None:
    by_load = instance_of_load(instance_load(FROZEN), "node-7")
    by_node = instance_to_proto(FROZEN, "node-7", with_spec=False)
    by_node.ClearField("address")  # only the agent has these two
    by_node.ClearField("container_id")
    assert by_load == by_node


def test_load_has_the_dispatchers_fields() -> None:
    load = instance_load(replace(FROZEN, state=InstanceState.FREEZING, freeze_cancellable=True))
    assert (load.concurrency, load.wake_estimate_ns, load.idle_for_ns) == (4, 1_400_000_000, 30 * SECOND_NS)
    assert load.freeze_cancellable
    assert not load.SerializeToString().count(SECRET.encode())


def test_node_and_registration_agree() -> None:
    node, first = node_to_proto(NODE), registration(NODE)
    shared = set(type(first).DESCRIPTOR.fields_by_name) & set(types_pb2.Node.DESCRIPTOR.fields_by_name)
    assert len(shared) >= 12
    for name in shared:
        assert getattr(node, name) == getattr(first, name), name
    assert [(gpu.uuid, gpu.index) for gpu in node.gpus] == [(one.gpu.uuid, one.gpu.index) for one in NODE.gpus]


def test_registration_has_gpu_migration() -> None:
    """Without it the scheduler would not wake an instance while its last GPU is held by another."""
    assert not registration(NODE).gpu_migration
    assert registration(replace(NODE, migrates=True)).gpu_migration


def test_gpus_show_holders_waiters_and_health() -> None:
    busy, broken = node_to_proto(NODE).gpus
    assert (list(busy.holder_uids), list(busy.waiter_uids)) == (["i-2"], ["i-1", "i-3"])
    assert (busy.health, broken.health) == (types_pb2.Gpu.HEALTH_OK, types_pb2.Gpu.HEALTH_CORDONED)
    assert (broken.cordoned_reason, list(broken.holder_uids)) == ("XID_79", [])
    assert node_load(NODE).gpu_waiting == 3


@pytest.mark.parametrize(
    ("ready", "draining", "state"),
    [
        (False, False, types_pb2.Node.STATE_RECOVERING),
        (False, True, types_pb2.Node.STATE_RECOVERING),
        (True, True, types_pb2.Node.STATE_DRAINING),
        (True, False, types_pb2.Node.STATE_READY),
    ],
)
def test_node_state(ready: bool, draining: bool, state: types_pb2.Node.State.ValueType) -> None:
    snapshot = replace(NODE, ready=ready, draining=draining)
    assert node_to_proto(snapshot).state == node_load(snapshot).state == state
