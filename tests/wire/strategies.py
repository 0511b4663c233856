"""Arbitrary values of core within the ranges of the wire's fields."""

from __future__ import annotations

from hypothesis import strategies as st

from agent.core.billing.window import UsageWindow
from agent.core.types import (
    DispatchPolicy,
    FunctionSpec,
    Gpu,
    GpuNeed,
    HealthCheck,
    Hook,
    Hooks,
    IdleMode,
    IdlePolicy,
    InstanceState,
    VisibleDevices,
)
from agent.log import MASK
from agent.v1 import types_pb2
from agent.v1.scheduler_service_pb2 import InstanceLoad

texts = st.text(max_size=12)
int32s = st.integers(0, 2**31 - 1)
int64s = st.integers(0, 2**63 - 1)
hooks = st.none() | st.builds(Hook, timeout_ns=int64s)
environments = st.dictionaries(texts, texts.filter(lambda value: value != MASK), max_size=4).map(
    lambda pairs: tuple(sorted(pairs.items()))
)

functions = st.builds(
    FunctionSpec,
    name=texts,
    revision=texts,
    image=texts,
    entrypoint=st.lists(texts, max_size=3).map(tuple),
    command=st.lists(texts, max_size=3).map(tuple),
    port=int32s,
    environment=environments,
    handler=texts,
    region=texts,
    vcpu_millis=int32s,
    memory_bytes=int64s,
    disk_bytes=int64s,
    timeout_ns=int64s,
    instance_concurrency=int32s,
    gpu=st.builds(
        GpuNeed,
        count=int32s,
        model=texts,
        gpu_type=texts,
        memory_bytes=int64s,
        visible_devices=st.sampled_from(VisibleDevices),
    ),
    hooks=st.builds(Hooks, initializer=hooks, pre_freeze=hooks, pre_stop=hooks),
    health_check=st.none()
    | st.builds(
        HealthCheck,
        path=texts,
        initial_delay_ns=int64s,
        period_ns=int64s,
        timeout_ns=int64s,
        failure_threshold=int32s,
        success_threshold=int32s,
    ),
    idle=st.builds(IdlePolicy, mode=st.sampled_from(IdleMode), freeze_after_ns=int64s, min_awake_ns=int64s),
    dispatch=st.sampled_from(DispatchPolicy),
    wake_factor=st.floats(allow_nan=False),
    queue_length=int32s,
    queue_timeout_ns=int64s,
)

gpus = st.builds(
    Gpu,
    uuid=texts,
    index=int32s,
    model=texts,
    memory_bytes=int64s,
    persistence=st.booleans(),
    mig=st.booleans(),
)


@st.composite
def windows(draw: st.DrawFn) -> UsageWindow:
    """A window whose sums equal its length."""
    active, idle, unbilled, start = (draw(st.integers(0, 2**60)) for _ in range(4))
    return UsageWindow(
        instance_uid=draw(texts),
        seq=draw(int64s),
        node=draw(texts),
        boot_id=draw(texts),
        function=draw(texts),
        state=draw(st.sampled_from(InstanceState)).value,
        gpu_model=draw(texts),
        gpu_uuids=tuple(draw(st.lists(texts, max_size=3))),
        gpu_count=draw(int32s),
        gpu_memory_bytes=draw(int64s),
        vcpu_millis=draw(int32s),
        memory_bytes=draw(int64s),
        disk_bytes=draw(int64s),
        start_mono_ns=start,
        end_mono_ns=start + active + idle + unbilled,
        start_wall_ns=draw(int64s),
        active_ns=active,
        idle_ns=idle,
        unbilled_ns=unbilled,
        invocations=draw(int64s),
        estimated=draw(st.booleans()),
        sealed=draw(st.booleans()),
    )


loads = st.builds(
    InstanceLoad,
    uid=texts,
    function=texts,
    revision=texts,
    request_id=texts,
    state=st.sampled_from([number for number in types_pb2.Instance.State.values() if number]),
    state_reason=texts,
    state_message=texts,
    in_flight=int32s,
    waiting=int32s,
    concurrency=int32s,
    wake_estimate_ns=int64s,
    idle_for_ns=int64s,
    freeze_cancellable=st.booleans(),
    healthy=st.booleans(),
    gpu_uuids=st.lists(texts, max_size=3),
    vram_bytes=int64s,
    frozen_bytes=int64s,
    wake_count=int64s,
    freeze_count=int64s,
    last_wake=st.none() | st.builds(types_pb2.Instance.WakeTiming, total_ns=int64s, driver_ns=int64s),
    pid=int32s,
    active_ns=int64s,
    idle_ns=int64s,
    unbilled_ns=int64s,
)
