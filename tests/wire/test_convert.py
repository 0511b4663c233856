"""Converters: lossless round trips, core's defaults for absent fields, masked secrets, refused unknown values."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.core.billing.window import UsageWindow
from agent.core.dispatch.events import InstanceReported, NodeReported
from agent.core.errors import InvalidArgumentError
from agent.core.types import (
    DispatchPolicy,
    FunctionSpec,
    Gpu,
    HealthCheck,
    Hook,
    Hooks,
    IdleMode,
    InstanceState,
    StopCause,
    VisibleDevices,
)
from agent.v1 import types_pb2
from agent.v1.instance_service_pb2 import StopInstanceRequest
from agent.v1.scheduler_service_pb2 import InstanceLoad, NodeLoad, Registration
from agent.wire.convert_enums import (
    dispatch_from_proto,
    dispatch_to_proto,
    idle_mode_from_proto,
    idle_mode_to_proto,
    state_from_proto,
    state_to_proto,
    stop_cause_from_proto,
    stop_cause_to_proto,
    visible_devices_from_proto,
    visible_devices_to_proto,
)
from agent.wire.convert_function import function_from_proto, function_to_proto
from agent.wire.convert_load import (
    gpu_to_proto,
    instance_of_load,
    load_of_instance,
    node_reported,
    reported_of_load,
)
from agent.wire.convert_time import MAX_SECONDS, MIN_SECONDS, time_from_proto, time_to_proto
from agent.wire.convert_usage import window_from_proto, window_to_proto
from agent.wire.json_view import short_name, to_json
from tests.wire import strategies

SECRET = "hunter2-database-password"
CHATTY = FunctionSpec(
    name="ocr",
    entrypoint=("python3", "app.py"),
    environment=(("DB_PASSWORD", SECRET), ("LANG", "C.UTF-8")),
    hooks=Hooks(initializer=Hook(timeout_ns=30_000_000_000)),
    health_check=HealthCheck(path="/healthz"),
)


# ---- functions ------------------------------------------------------------------------------------------------


@given(strategies.functions)
@settings(max_examples=150, deadline=None)
def test_function_round_trip(spec: FunctionSpec) -> None:
    sent = function_to_proto(spec, reveal_secrets=True).SerializeToString()
    assert function_from_proto(types_pb2.FunctionSpec.FromString(sent)) == spec


def test_empty_message_has_cores_defaults() -> None:
    assert function_from_proto(types_pb2.FunctionSpec(name="ocr")) == FunctionSpec(name="ocr")
    sparse = types_pb2.FunctionSpec(
        name="ocr",
        gpu=types_pb2.GpuRequirement(),
        hooks=types_pb2.LifecycleHooks(pre_stop=types_pb2.LifecycleHooks.Hook()),
        health_check=types_pb2.HealthCheck(path="/healthz"),
        idle_policy=types_pb2.IdlePolicy(),
    )
    expected = FunctionSpec(name="ocr", hooks=Hooks(pre_stop=Hook()), health_check=HealthCheck(path="/healthz"))
    assert function_from_proto(sparse) == expected


def test_zero_is_not_an_absent_field() -> None:
    message = types_pb2.FunctionSpec(name="ocr", queue_length=0, idle_policy=types_pb2.IdlePolicy(freeze_after_ns=0))
    spec = function_from_proto(message)
    assert (spec.queue_length, spec.idle.freeze_after_ns) == (0, 0)


def test_every_field_of_core_and_wire_is_converted() -> None:
    core = {field.name for field in fields(FunctionSpec)}
    wire = set(types_pb2.FunctionSpec.DESCRIPTOR.fields_by_name)
    assert {"idle_policy" if name == "idle" else name for name in core} == wire
    assert {field.name for field in fields(UsageWindow)} == set(types_pb2.UsageWindow.DESCRIPTOR.fields_by_name)


def test_answer_masks_the_environment() -> None:
    answer = function_to_proto(CHATTY)
    assert SECRET not in str(answer)
    assert SECRET.encode() not in answer.SerializeToString()
    assert SECRET not in str(to_json(answer))
    assert dict(answer.environment) == {"DB_PASSWORD": "***", "LANG": "***"}


def test_masked_secret_is_refused() -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        function_from_proto(function_to_proto(CHATTY))
    assert refused.value.reason == "MASKED_SECRET"


@pytest.mark.parametrize(
    "spec",
    [
        replace(CHATTY, port=2**31),
        replace(CHATTY, memory_bytes=2**63),
        replace(CHATTY, environment=(("DB_PASSWORD", f"{SECRET}\ud800"),)),
    ],
    ids=["int32", "int64", "lone surrogate"],
)
def test_value_out_of_range_is_refused_without_secrets(spec: FunctionSpec) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        function_to_proto(spec, reveal_secrets=True)
    assert refused.value.reason == "VALUE_OUT_OF_RANGE"
    assert SECRET not in str(refused.value)
    assert refused.value.__suppress_context__  # a traceback would quote the value


# ---- enums ----------------------------------------------------------------------------------------------------


def test_every_enum_value_has_its_counterpart() -> None:
    assert [state_from_proto(state_to_proto(state)) for state in InstanceState] == list(InstanceState)
    assert [idle_mode_from_proto(idle_mode_to_proto(m), IdleMode.NEVER) for m in IdleMode] == list(IdleMode)
    policies = [dispatch_from_proto(dispatch_to_proto(p), DispatchPolicy.SPREAD) for p in DispatchPolicy]
    assert policies == list(DispatchPolicy)
    assert [stop_cause_from_proto(stop_cause_to_proto(cause)) for cause in StopCause] == list(StopCause)
    assert len(StopInstanceRequest.Cause.values()) == len(StopCause)
    names = [visible_devices_from_proto(visible_devices_to_proto(one)) for one in VisibleDevices]
    assert names == list(VisibleDevices)
    # UNSPECIFIED of each, and UNKNOWN: the scheduler says it of a lost node's instances.
    for enum, members, more in (
        (types_pb2.Instance.State, InstanceState, 2),
        (types_pb2.IdlePolicy.Mode, IdleMode, 1),
        (types_pb2.GpuRequirement.VisibleDevices, VisibleDevices, 1),
    ):
        assert len(enum.values()) == len(members) + more


def test_enum_names_match_cores() -> None:
    descriptor = types_pb2.Instance.State.DESCRIPTOR
    assert {short_name(descriptor, state_to_proto(state)) for state in InstanceState} == {
        s.value for s in InstanceState
    }


@pytest.mark.parametrize("number", [0, 99])
def test_unknown_state_is_refused(number: int) -> None:
    load = InstanceLoad(uid="i-1")
    load.state = number  # type: ignore[assignment]  # proto3 keeps numbers it does not know
    with pytest.raises(InvalidArgumentError) as refused:
        reported_of_load(load, "node-7")
    assert (refused.value.reason, refused.value.metadata["value"]) == ("UNKNOWN_ENUM_VALUE", str(number))


@pytest.mark.parametrize("field", ["dispatch", "idle_policy.mode"])
def test_unknown_policy_is_refused(field: str) -> None:
    message = types_pb2.FunctionSpec(name="ocr")
    if field == "dispatch":
        message.dispatch = 7  # type: ignore[assignment]
    else:
        message.idle_policy.mode = 7  # type: ignore[assignment]
    with pytest.raises(InvalidArgumentError) as refused:
        function_from_proto(message)
    assert refused.value.metadata["field"] == field


# ---- windows, GPUs, load, time ----------------------------------------------------------------------------------


@given(strategies.windows())
@settings(max_examples=100, deadline=None)
def test_window_round_trip(window: UsageWindow) -> None:
    sent = window_to_proto(window).SerializeToString()
    assert window_from_proto(types_pb2.UsageWindow.FromString(sent)) == window


def test_the_wire_and_the_ledger_have_the_same_fields() -> None:
    assert {field.name for field in fields(UsageWindow)} == set(types_pb2.UsageWindow.DESCRIPTOR.fields_by_name)


def window(**changed: object) -> UsageWindow:
    quiet_minute = UsageWindow(
        "i-1", 0, "node-7", "boot-1", "ocr", "RUNNING", "NVIDIA L4", ("GPU-1",), 1, 2**34, 350, 2**29, 2**29,
        5, 60_000_000_005, 1, 0, 60_000_000_000, 0, 0, False, True,
    )  # fmt: skip
    return replace(quiet_minute, **changed)  # type: ignore[arg-type]


@pytest.mark.parametrize("changed", [{"active_ns": 1}, {"end_mono_ns": 4}, {"unbilled_ns": -60_000_000_000}])
def test_window_with_inconsistent_sums_is_refused(changed: dict[str, object]) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        window_from_proto(window_to_proto(window(**changed)))
    assert refused.value.reason == "WINDOW_INCONSISTENT"


@pytest.mark.parametrize("changed", [{"invocations": 2**63}, {"gpu_count": -(2**31) - 1}])
def test_window_out_of_range_is_refused(changed: dict[str, object]) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        window_to_proto(window(**changed))
    assert refused.value.reason == "VALUE_OUT_OF_RANGE"


def test_window_in_a_state_of_another_version_counts_all_the_same() -> None:
    newer = window_to_proto(window())
    newer.state = 77  # type: ignore[assignment]
    taken = window_from_proto(newer)
    assert taken == window(state="STATE_77")
    assert window_to_proto(taken) == newer, "and is shown as it came"
    own = window_from_proto(window_to_proto(window(state="SLEEPY")))  # of a newer agent's ledger
    assert own == window(state="STATE_0")


@given(strategies.gpus)
@settings(max_examples=50, deadline=None)
def test_gpu_to_proto(gpu: Gpu) -> None:
    sent = gpu_to_proto(gpu)
    assert Gpu(sent.uuid, sent.index, sent.model, sent.memory_total_bytes, sent.persistence, sent.mig) == gpu


@given(strategies.loads)
@settings(max_examples=100, deadline=None)
def test_load_round_trip_through_an_instance(load: InstanceLoad) -> None:
    again = load_of_instance(
        instance_of_load(load, "node-7"),
        load.concurrency,
        load.wake_estimate_ns,
        load.idle_for_ns,
        load.freeze_cancellable,
    )
    assert again == load


def test_a_load_becomes_an_event_of_the_dispatcher() -> None:
    load = InstanceLoad(
        uid="i-1",
        function="ocr",
        state=types_pb2.Instance.STATE_FREEZING,
        in_flight=1,
        waiting=2,
        concurrency=4,
        freeze_cancellable=True,
        wake_estimate_ns=7,
        gpu_uuids=["GPU-1"],
    )
    expected = InstanceReported(
        uid="i-1",
        function="ocr",
        node="node-7",
        state=InstanceState.FREEZING,
        concurrency=4,
        in_flight=3,
        cancellable=True,
        healthy=False,
        wake_estimate_ns=7,
        gpus=("GPU-1",),
    )
    assert reported_of_load(load, "node-7") == expected
    load.concurrency, load.in_flight = 2**31 - 1, -5
    unlikely = reported_of_load(load, "node-7")
    assert (unlikely.concurrency, unlikely.in_flight) == (200, 2), "what no function may ask for is not believed"


def test_recovering_node_drains_and_unusable_gpus_do_not_count() -> None:
    good = types_pb2.Gpu(uuid="GPU-1", health=types_pb2.Gpu.HEALTH_OK)
    cordoned = types_pb2.Gpu(uuid="GPU-2", health=types_pb2.Gpu.HEALTH_CORDONED)
    sliced = types_pb2.Gpu(uuid="GPU-3", health=types_pb2.Gpu.HEALTH_OK, mig=True)
    registration = Registration(gpus=[good, cordoned, sliced], gpu_migration=True)
    ready = node_reported("node-7", 4, registration, NodeLoad(state=types_pb2.Node.STATE_READY), registration.gpus)
    assert ready == NodeReported("node-7", gpu_count=1, migrates=True, draining=False, epoch=4)
    recovering = node_reported("node-7", 4, registration, NodeLoad(state=types_pb2.Node.STATE_RECOVERING), [good, good])
    assert recovering == NodeReported("node-7", 2, True, True, epoch=4)


@given(st.integers(MIN_SECONDS * 10**9, MAX_SECONDS * 10**9 + 999_999_999))
@settings(max_examples=100, deadline=None)
def test_time_round_trip_to_the_nanosecond(wall_ns: int) -> None:
    assert time_from_proto(time_to_proto(wall_ns)) == wall_ns


@pytest.mark.parametrize("wall_ns", [MIN_SECONDS * 10**9 - 1, (MAX_SECONDS + 1) * 10**9])
def test_time_out_of_range_is_refused(wall_ns: int) -> None:
    with pytest.raises(InvalidArgumentError):
        time_to_proto(wall_ns)


def test_a_malformed_timestamp_is_refused() -> None:
    malformed = types_pb2.Event().time
    malformed.nanos = -1
    with pytest.raises(InvalidArgumentError):
        time_from_proto(malformed)


# ---- JSON -----------------------------------------------------------------------------------------------------


def test_json_has_the_protos_names_numbers_and_short_enums() -> None:
    instance = types_pb2.Instance(
        uid="i-1",
        state=types_pb2.Instance.STATE_FROZEN,
        frozen_bytes=2**40,
        gpu_uuids=["GPU-1"],
        create_time=time_to_proto(1_500_000_000),
        spec=function_to_proto(CHATTY),
    )
    view = to_json(instance)
    assert list(view) == [field.name for field in types_pb2.Instance.DESCRIPTOR.fields]
    assert (view["state"], view["frozen_bytes"], view["gpu_uuids"]) == ("FROZEN", 2**40, ["GPU-1"])
    assert (view["create_time"], view["last_wake"]) == ("1970-01-01T00:00:01.500Z", None)
    assert view["spec"]["environment"] == {"DB_PASSWORD": "***", "LANG": "***"}
    assert view["spec"]["idle_policy"]["mode"] == "REQUIRE"
    assert view["spec"]["hooks"] == {
        "initializer": {"timeout_ns": 30_000_000_000},
        "pre_freeze": None,
        "pre_stop": None,
    }
