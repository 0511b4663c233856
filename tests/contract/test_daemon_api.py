"""One contract, two pairs of daemons: the fakes that the CLI's tests talk to, and the real servicers.

What is written here is what the CLI relies on. Texts are not compared: reasons are.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from agent.core.errors import (
    ConflictError,
    HibernodeError,
    InstanceError,
    InvalidArgumentError,
    NotFoundError,
    PreconditionError,
)
from agent.core.provisioning.model import parse_request_id
from agent.v1 import function_service_pb2 as fn
from agent.v1 import instance_service_pb2 as inst
from agent.v1 import node_service_pb2 as node
from agent.v1 import scheduler_service_pb2 as sched
from agent.v1 import usage_service_pb2 as usage
from agent.v1.types_pb2 import FunctionSpec, Instance, Node
from agent.wire.clients import DaemonChannel, ExecStream
from agent.wire.convert_function import function_to_proto
from tests.contract import daemon_worlds
from tests.contract.daemon_worlds import LOG, PATIENCE_S, Daemons
from tests.host.rig import OCR

T = TypeVar("T")
Step = inst.ExecInstanceRequest


@pytest.fixture(params=["fake", "real"])
async def daemons(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Daemons]:
    async with getattr(daemon_worlds, f"{request.param}_daemons")(tmp_path) as made:
        yield made


@pytest.fixture
def agent(daemons: Daemons) -> DaemonChannel:
    return daemons.agent


@pytest.fixture
def scheduler(daemons: Daemons) -> DaemonChannel:
    return daemons.scheduler


async def ask(channel: DaemonChannel, service: str, method: str, **fields: Any) -> Any:
    """`service.method(fields)`: the answer."""
    stub = getattr(getattr(channel, service), method)
    modules = {"instances": inst, "nodes": node, "functions": fn, "scheduler": sched, "usage": usage}
    return await channel.call(stub, getattr(modules[service], f"{method}Request")(**fields), PATIENCE_S)


async def refused(call: Awaitable[object], kind: type[HibernodeError], reason: str) -> HibernodeError:
    with pytest.raises(kind) as caught:
        await call
    assert (type(caught.value), caught.value.reason) == (kind, reason)
    assert caught.value.message
    return caught.value


# ---- pages --------------------------------------------------------------------------------------------------------

LISTS = [
    ("instances", "ListInstances", "instances"),
    ("instances", "ListEvents", "events"),
    ("nodes", "ListUsageWindows", "windows"),
    ("functions", "ListFunctions", "functions"),
    ("functions", "ListProvisionConfigs", "provisions"),
    ("scheduler", "ListNodes", "nodes"),
    ("scheduler", "ListFleetInstances", "instances"),
    ("usage", "ListUsage", "rows"),
]


async def pages(channel: DaemonChannel, service: str, method: str, field: str, **fields: Any) -> list[Any]:
    """All items, one a page."""
    found: list[Any] = []
    token = ""
    while True:
        answer = await ask(channel, service, method, page_size=1, page_token=token, **fields)
        items, token = getattr(answer, field), answer.next_page_token
        assert len(items) == 1 or (not items and not token)
        found += items
        if not token:
            return found


@pytest.mark.parametrize(("service", "method", "field"), LISTS)
async def test_pages_hold_every_item_once_and_in_order(daemons: Daemons, service: str, method: str, field: str) -> None:
    channel = daemons.agent if service in ("instances", "nodes") else daemons.scheduler
    if service == "functions":
        for name in ("one", "two", "three"):
            await deploy(channel, name)
    one_by_one = await pages(channel, service, method, field)
    assert len(one_by_one) >= (1 if method == "ListUsageWindows" else 2)
    answer = await ask(channel, service, method, page_size=1000)
    assert list(getattr(answer, field)) == one_by_one[: len(getattr(answer, field))]


@pytest.mark.parametrize(("service", "method", "field"), LISTS)
async def test_a_page_that_can_not_be_is_refused(daemons: Daemons, service: str, method: str, field: str) -> None:
    channel = daemons.agent if service in ("instances", "nodes") else daemons.scheduler
    for token in ("x", "-1", "1" * 13):
        await refused(ask(channel, service, method, page_token=token), InvalidArgumentError, "PAGE_TOKEN_INVALID")
    await refused(ask(channel, service, method, page_size=-1), InvalidArgumentError, "PAGE_SIZE_INVALID")


# ---- what is not there ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GetInstance", "FreezeInstance", "WakeInstance", "StopInstance"])
async def test_an_unknown_instance_is_not_found(agent: DaemonChannel, method: str) -> None:
    error = await refused(ask(agent, "instances", method, uid="i-gone"), NotFoundError, "INSTANCE_NOT_FOUND")
    assert "'i-gone'" in error.message
    await refused(ask(agent, "instances", method), NotFoundError, "INSTANCE_NOT_FOUND")


async def test_streams_and_events_of_an_unknown_instance_are_not_found(agent: DaemonChannel) -> None:
    await refused(logs(agent, "i-gone"), NotFoundError, "INSTANCE_NOT_FOUND")
    await refused(ended(await begun(agent, "i-gone", "say")), NotFoundError, "INSTANCE_NOT_FOUND")
    events = ask(agent, "instances", "ListEvents", instance_uid="i-gone")
    await refused(events, NotFoundError, "INSTANCE_NOT_FOUND")


async def test_the_beginning_of_a_uid_is_enough_where_only_one_begins_so(agent: DaemonChannel) -> None:
    assert (await ask(agent, "instances", "GetInstance", uid="i-co")).instance.uid == "i-cold"
    await refused(ask(agent, "instances", "GetInstance", uid="i-c"), NotFoundError, "INSTANCE_NOT_FOUND")


@pytest.mark.parametrize(
    ("method", "field"),
    [
        ("GetFunction", "name"),
        ("DeleteFunction", "name"),
        ("PutProvisionConfig", "function"),
        ("DeleteProvisionConfig", "function"),
    ],
)
async def test_an_unknown_function_is_not_found(scheduler: DaemonChannel, method: str, field: str) -> None:
    await refused(ask(scheduler, "functions", method, **{field: "gone"}), NotFoundError, "FUNCTION_NOT_FOUND")


async def test_an_unknown_node_is_not_found(scheduler: DaemonChannel) -> None:
    call = ask(scheduler, "scheduler", "SetNodeScheduling", name="gone", scheduling=Node.SCHEDULING_CORDONED)
    await refused(call, NotFoundError, "NODE_NOT_FOUND")


async def test_filters_that_match_nothing_are_empty_lists(daemons: Daemons) -> None:
    assert not (await ask(daemons.agent, "instances", "ListInstances", function="gone")).instances
    assert not (await ask(daemons.agent, "nodes", "ListUsageWindows", function="gone")).windows
    assert not (await ask(daemons.scheduler, "scheduler", "ListFleetInstances", node="gone")).instances
    assert not (await ask(daemons.scheduler, "functions", "ListProvisionConfigs", function="gone")).provisions
    for only in ({"function": "gone"}, {"node": "gone"}, {"gpu_model": "gone"}):
        assert not (await ask(daemons.scheduler, "usage", "ListUsage", **only)).rows


# ---- the agent: instances -------------------------------------------------------------------------------------------


def spec(**changes: Any) -> FunctionSpec:
    made = function_to_proto(OCR, reveal_secrets=True)
    for name, value in changes.items():
        setattr(made, name, value)
    made.environment["PASSWORD"] = "hunter2"
    return made


async def create(agent: DaemonChannel, request_id: str = "mine", **changes: Any) -> Instance:
    wait = changes.pop("wait", False)
    answer = await ask(agent, "instances", "CreateInstance", request_id=request_id, spec=spec(**changes), wait=wait)
    return answer.instance


async def test_living_instances_are_listed_and_ended_ones_if_they_are_asked_for(agent: DaemonChannel) -> None:
    async def listed(**only: Any) -> list[str]:
        return [one.uid for one in await pages(agent, "instances", "ListInstances", "instances", **only)]

    assert await listed() == ["i-run", "i-cold", "i-chat"]
    assert await listed(function="chat") == ["i-chat"]
    assert set(await listed(include_ended=True)) == {"i-run", "i-cold", "i-chat", "i-dead"}


async def test_an_instance_is_shown_without_its_secrets(agent: DaemonChannel) -> None:
    run = (await ask(agent, "instances", "GetInstance", uid="i-run")).instance
    assert (run.node, run.function, run.state, run.in_flight, run.healthy) == (
        "gpu-host-1", "ocr", Instance.STATE_RUNNING, 1, True
    )  # fmt: skip
    assert dict(run.spec.environment) == {"KEY": "***"}
    assert run.spec.name == "ocr"
    assert run.HasField("create_time")
    assert run.HasField("state_time")
    assert len(run.gpu_uuids) == 1
    dead = (await ask(agent, "instances", "GetInstance", uid="i-dead")).instance
    assert (dead.state, dead.state_reason) == (Instance.STATE_FAILED, "INSTANCE_CRASHED")
    assert dead.state_message


async def test_a_freeze_and_a_wake_answer_with_the_instance_as_it_is_then(agent: DaemonChannel) -> None:
    for uid in ("i-chat", "i-cold"):  # the second one is frozen already
        assert (await ask(agent, "instances", "FreezeInstance", uid=uid)).instance.state == Instance.STATE_FROZEN
    shown = (await ask(agent, "instances", "GetInstance", uid="i-chat")).instance
    assert shown.state == Instance.STATE_FROZEN
    for _ in range(2):  # the second time it is awake already
        answer = await ask(agent, "instances", "WakeInstance", uid="i-chat")
        assert (answer.instance.uid, answer.instance.state) == ("i-chat", Instance.STATE_RUNNING)
        assert answer.free_slots == 1
    assert (await ask(agent, "instances", "WakeInstance", uid="i-run")).free_slots == 0


async def test_an_instance_in_use_is_not_frozen(agent: DaemonChannel) -> None:
    await refused(ask(agent, "instances", "FreezeInstance", uid="i-run"), PreconditionError, "NOT_IDLE")
    assert (await ask(agent, "instances", "GetInstance", uid="i-run")).instance.state == Instance.STATE_RUNNING


async def test_a_failed_instance_says_why_it_failed(agent: DaemonChannel) -> None:
    for method in ("FreezeInstance", "WakeInstance"):
        await refused(ask(agent, "instances", method, uid="i-dead"), InstanceError, "INSTANCE_CRASHED")


async def test_times_that_can_not_be_are_refused(agent: DaemonChannel) -> None:
    for wrong in ({"hold_ns": -1}, {"hold_ns": 10**12}, {"timeout_ns": -1}):
        await refused(
            ask(agent, "instances", "WakeInstance", uid="i-cold", **wrong), InvalidArgumentError, "HOLD_INVALID"
        )
    stop = ask(agent, "instances", "StopInstance", uid="i-cold", grace_ns=-1)
    await refused(stop, InvalidArgumentError, "GRACE_INVALID")


async def test_a_stop_answers_with_the_end_and_once_more_is_success(agent: DaemonChannel) -> None:
    for _ in range(2):
        assert (await ask(agent, "instances", "StopInstance", uid="i-chat")).instance.state == Instance.STATE_STOPPED
    assert (await ask(agent, "instances", "StopInstance", uid="i-dead")).instance.state == Instance.STATE_FAILED
    listed = (await ask(agent, "instances", "ListInstances", function="chat")).instances
    assert not listed
    assert (await ask(agent, "instances", "GetInstance", uid="i-chat")).instance.state == Instance.STATE_STOPPED


async def test_a_create_answers_at_once_or_when_it_runs(agent: DaemonChannel) -> None:
    made = await create(agent)
    assert (made.state, made.function, made.request_id) == (Instance.STATE_STARTING, "ocr", "mine")
    assert dict(made.spec.environment) == {"PASSWORD": "***"}
    waited = await create(agent, wait=True)
    assert (waited.uid, waited.state) == (made.uid, Instance.STATE_RUNNING)
    assert made.uid in [one.uid for one in await pages(agent, "instances", "ListInstances", "instances")]
    assert (await create(agent, "yours")).uid != made.uid


async def test_a_request_id_stands_for_one_spec(agent: DaemonChannel) -> None:
    await create(agent)
    await refused(create(agent, instance_concurrency=2), ConflictError, "REQUEST_ID_REUSED")


async def test_a_create_that_can_not_be_is_refused(agent: DaemonChannel) -> None:
    for request_id in ("", "x" * 201):
        await refused(create(agent, request_id), InvalidArgumentError, "REQUEST_ID_INVALID")
    error = await refused(create(agent, port=0), InvalidArgumentError, "SPEC_INVALID")
    assert error.metadata["field"] == "port"


# ---- the agent: streams ---------------------------------------------------------------------------------------------


async def logs(agent: DaemonChannel, uid: str, **how: Any) -> bytes:
    request = inst.GetInstanceLogsRequest(uid=uid, **how)
    stream = agent.stream(agent.instances.GetInstanceLogs, request, PATIENCE_S)
    return b"".join([chunk.data async for chunk in stream])


async def test_a_log_is_bytes_and_its_end_a_number_of_bytes(agent: DaemonChannel) -> None:
    assert await logs(agent, "i-run") == LOG
    assert await logs(agent, "i-run", tail_bytes=9) == LOG[-9:]
    assert await logs(agent, "i-run", tail_bytes=10_000) == LOG


async def test_a_followed_log_ends_with_its_instance_and_not_before(agent: DaemonChannel) -> None:
    await logs(agent, "i-dead", follow=True)
    request = inst.GetInstanceLogsRequest(uid="i-run", follow=True, tail_bytes=9)
    stream = aiter(agent.stream(agent.instances.GetInstanceLogs, request, PATIENCE_S))
    assert (await anext(stream)).data == LOG[-9:]

    async def rest() -> bytes:
        return b"".join([chunk.data async for chunk in stream])

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(rest(), 0.1)


async def begun(agent: DaemonChannel, uid: str, *command: str, **how: Any) -> ExecStream:
    stream = agent.exec_instance()
    await stream.send(Step(start=Step.Start(uid=uid, command=command, **how)))
    return stream


async def ended(stream: ExecStream, last: Callable[[inst.ExecInstanceResponse], bool] = lambda _: False) -> list[Any]:
    """All answers up to one for which `last` holds, or the end."""
    found = []
    async with asyncio.timeout(PATIENCE_S):
        while (answer := await stream.receive()) is not None:
            found.append(answer)
            if last(answer):
                break
    stream.close()
    return found


def is_exit(answer: inst.ExecInstanceResponse) -> bool:
    return answer.WhichOneof("step") == "exit_code"


async def test_a_command_begins_with_an_empty_output_and_ends_with_its_exit_code(agent: DaemonChannel) -> None:
    first, *outputs, last = await ended(await begun(agent, "i-chat", "say", "hi"), is_exit)
    assert (first.WhichOneof("step"), first.output) == ("output", b"")
    assert b"".join(one.output for one in outputs) == b"out hi\n"
    assert b"".join(one.error_output for one in outputs) == b"err\n"
    assert last.exit_code == 0
    assert (await ended(await begun(agent, "i-chat", "exit", "7"), is_exit))[-1].exit_code == 7


async def test_input_reaches_the_command_until_it_ends(agent: DaemonChannel) -> None:
    stream = await begun(agent, "i-chat", "cat")
    for step in (Step(input=b"one "), Step(input=b"two"), Step(end_of_input=True)):
        await stream.send(step)
    assert b"".join(one.output for one in await ended(stream, is_exit)) == b"one two"


async def test_a_command_needs_an_instance_that_is_awake_or_may_be_woken(agent: DaemonChannel) -> None:
    await refused(ended(await begun(agent, "i-dead", "say")), PreconditionError, "NOT_RUNNING")
    await refused(ended(await begun(agent, "i-cold", "say")), PreconditionError, "INSTANCE_FROZEN")
    assert (await ended(await begun(agent, "i-cold", "say", wake=True), is_exit))[-1].exit_code == 0
    assert (await ask(agent, "instances", "GetInstance", uid="i-cold")).instance.state == Instance.STATE_RUNNING


async def test_a_command_that_can_not_be_is_refused(agent: DaemonChannel) -> None:
    await refused(ended(await begun(agent, "i-chat")), InvalidArgumentError, "COMMAND_INVALID")
    await refused(ended(await begun(agent, "i-chat", "a\0b")), InvalidArgumentError, "COMMAND_INVALID")
    await refused(ended(await begun(agent, "i-chat", "say", user="x" * 101)), InvalidArgumentError, "USER_INVALID")
    stream = agent.exec_instance()
    await stream.send(Step(input=b"too early"))
    await refused(ended(stream), InvalidArgumentError, "EXEC_NOT_STARTED")


async def test_events_have_a_time_an_instance_and_a_dotted_name(agent: DaemonChannel) -> None:
    events = await pages(agent, "instances", "ListEvents", "events", instance_uid="i-cold")
    assert {event.instance_uid for event in events} == {"i-cold"}
    names = [event.name for event in events]
    assert (names[0], names[-1]) == ("instance.created", "instance.frozen")
    assert "instance.running" in names
    times = [event.time.ToNanoseconds() for event in events]
    assert times == sorted(times)
    assert times[0] > 0
    since = Timestamp()
    since.FromNanoseconds(times[-1] + 1_000_000_000)
    assert not (await ask(agent, "instances", "ListEvents", instance_uid="i-cold", since=since)).events
    assert {event.instance_uid for event in await pages(agent, "instances", "ListEvents", "events")} >= {"i-cold"}


async def test_a_command_inside_is_an_event(agent: DaemonChannel) -> None:
    await ended(await begun(agent, "i-chat", "say", "secret"), is_exit)
    events = await pages(agent, "instances", "ListEvents", "events", instance_uid="i-chat")
    (event,) = [one for one in events if one.name == "instance.exec"]
    assert event.attributes["program"] == "say"
    assert "secret" not in str(event)


# ---- the agent: its node --------------------------------------------------------------------------------------------


async def test_the_node_shows_its_gpus_and_who_holds_them(agent: DaemonChannel) -> None:
    shown = (await ask(agent, "nodes", "GetNode")).node
    assert (shown.name, shown.state, shown.instance_count) == ("gpu-host-1", Node.STATE_READY, 3)
    assert [gpu.index for gpu in shown.gpus] == list(range(len(shown.gpus)))
    assert all(gpu.uuid and gpu.model for gpu in shown.gpus)
    assert "i-run" in [uid for gpu in shown.gpus for uid in gpu.holder_uids]
    assert shown.host_memory.total_bytes > 0
    assert "process" in shown.runtimes
    assert shown.instances_per_gpu > 0


async def test_the_ledger_has_sealed_windows_and_open_ones_if_they_are_asked_for(agent: DaemonChannel) -> None:
    async def keys(**only: Any) -> list[tuple[str, int]]:
        found = await pages(agent, "nodes", "ListUsageWindows", "windows", **only)
        return [(one.instance_uid, one.seq) for one in found]

    sealed, both = await keys(instance_uid="i-cold"), await keys(instance_uid="i-cold", include_open=True)
    assert sealed == sorted(sealed)
    assert both[: len(sealed)] == sealed
    assert len(both) == len(sealed) + 1
    assert await keys(instance_uid="i-gone") == []
    for window in await pages(agent, "nodes", "ListUsageWindows", "windows", include_open=True, function="ocr"):
        assert window.function == "ocr"
        assert window.active_ns + window.idle_ns + window.unbilled_ns == window.end_mono_ns - window.start_mono_ns


# ---- the scheduler: functions ---------------------------------------------------------------------------------------


async def deploy(scheduler: DaemonChannel, name: str = "new", target: int = 1, **fields: Any) -> Any:
    message = fields.pop("spec", None) or spec(name=name)
    return await ask(scheduler, "functions", "DeployFunction", spec=message, target=target, **fields)


async def test_a_deployed_function_is_shown_with_defaults_and_without_secrets(scheduler: DaemonChannel) -> None:
    answer = await deploy(scheduler, spec=FunctionSpec(name="new", entrypoint=["x"], environment={"KEY": "secret"}))
    made = answer.function
    assert (made.name, made.target, made.default_target, made.current, made.spec.revision) == ("new", 1, 1, 0, "1")
    assert made.state == fn.Function.STATE_PROVISIONING
    assert made.url.endswith("/fn/new/")
    assert dict(made.spec.environment) == {"KEY": "***"}
    assert (made.spec.queue_length, made.spec.queue_timeout_ns) == (1000, 60_000_000_000)
    assert made.spec.dispatch == FunctionSpec.DISPATCH_PACK
    assert [trigger.name for trigger in made.triggers] == ["default"]
    assert not answer.warnings
    assert (await ask(scheduler, "functions", "GetFunction", name="new")).function.url == made.url


async def test_another_spec_is_another_revision_and_the_same_one_is_none(scheduler: DaemonChannel) -> None:
    revisions = [
        (await deploy(scheduler, spec=spec(name="new", memory_bytes=bytes_))).function.spec.revision
        for bytes_ in (1 << 30, 1 << 30, 2 << 30)
    ]
    assert revisions == ["1", "1", "2"]


async def test_a_function_without_instances_is_ready_and_warned_of(scheduler: DaemonChannel) -> None:
    answer = await deploy(scheduler, target=0)
    assert answer.function.state == fn.Function.STATE_READY
    assert any("target is 0" in text for text in answer.warnings)


async def test_a_dry_run_deploys_nothing(scheduler: DaemonChannel) -> None:
    assert (await deploy(scheduler, validate_only=True)).function.name == "new"
    await refused(ask(scheduler, "functions", "GetFunction", name="new"), NotFoundError, "FUNCTION_NOT_FOUND")


async def test_a_deploy_that_can_not_be_is_refused(scheduler: DaemonChannel) -> None:
    error = await refused(deploy(scheduler, spec=spec(port=0)), InvalidArgumentError, "SPEC_INVALID")
    assert error.metadata["field"] == "port"
    await refused(deploy(scheduler, target=-1), InvalidArgumentError, "SPEC_INVALID")


async def test_functions_are_listed_by_name_until_they_are_deleted(scheduler: DaemonChannel) -> None:
    for name in ("two", "one"):
        await deploy(scheduler, name)
    listed = await pages(scheduler, "functions", "ListFunctions", "functions")
    assert [one.name for one in listed] == ["one", "two"]
    await ask(scheduler, "functions", "DeleteFunction", name="one")
    await refused(ask(scheduler, "functions", "DeleteFunction", name="one"), NotFoundError, "FUNCTION_NOT_FOUND")
    left = await pages(scheduler, "functions", "ListFunctions", "functions")
    assert [one.name for one in left if one.state != fn.Function.STATE_DELETING] == ["two"]


def policy(end: str = "2999-01-01T00:00:00Z", **changes: Any) -> fn.TargetTrackingPolicy:
    fields: dict[str, Any] = {
        "name": "busy",
        "start_time": "2020-01-01T00:00:00Z",
        "end_time": end,
        "metric_type": fn.TargetTrackingPolicy.METRIC_TYPE_PROVISIONED_CONCURRENCY_UTILIZATION,
        "metric_target": 0.3,
        "min_capacity": 2,
        "max_capacity": 30,
    }
    return fn.TargetTrackingPolicy(**{**fields, **changes})


async def put(scheduler: DaemonChannel, target: int = 1, *policies: fn.TargetTrackingPolicy, **fields: Any) -> Any:
    always = fields.pop("always_allocate_gpu", None)
    config = fn.ProvisionConfig(default_target=target, target_tracking_policies=policies, always_allocate_gpu=always)
    return await ask(scheduler, "functions", "PutProvisionConfig", function="new", config=config, **fields)


async def provision(scheduler: DaemonChannel) -> fn.Provision | None:
    found = await pages(scheduler, "functions", "ListProvisionConfigs", "provisions", function="new")
    return found[0] if found else None


async def test_an_active_policy_asks_for_its_least(scheduler: DaemonChannel) -> None:
    await deploy(scheduler)
    answer = await put(scheduler, 1, policy())
    made = answer.provision
    assert (made.function, made.target, made.decided_by, made.config.default_target) == ("new", 2, "busy", 1)
    assert [(one.name, one.active, one.target) for one in made.policies] == [("busy", True, 2)]
    assert not answer.warnings
    assert (await provision(scheduler)) == made
    function = (await ask(scheduler, "functions", "GetFunction", name="new")).function
    assert (function.target, function.default_target) == (2, 1)


async def test_a_policy_whose_time_is_over_is_warned_of_and_does_nothing(scheduler: DaemonChannel) -> None:
    await deploy(scheduler)
    answer = await put(scheduler, 1, policy(end="2021-01-01T00:00:00Z"))
    assert ["window ended" in text for text in answer.warnings] == [True]
    assert (answer.provision.target, answer.provision.decided_by) == (1, "")
    assert [one.active for one in answer.provision.policies] == [False]


async def test_a_dry_run_provisions_nothing(scheduler: DaemonChannel) -> None:
    await deploy(scheduler)
    assert (await put(scheduler, 5, validate_only=True)).provision.target == 5
    kept = await provision(scheduler)
    assert kept is not None
    assert kept.target == 1


async def test_a_provision_config_without_anything_is_not_listed(scheduler: DaemonChannel) -> None:
    await deploy(scheduler)
    await put(scheduler, 1, policy())
    for _ in range(2):  # it is gone after the first time, and the function is not
        await ask(scheduler, "functions", "DeleteProvisionConfig", function="new")
    assert await provision(scheduler) is None
    assert (await ask(scheduler, "functions", "GetFunction", name="new")).function.target == 0


async def test_a_deploy_takes_a_provision_config_along_or_leaves_it_as_it_is(scheduler: DaemonChannel) -> None:
    config = fn.ProvisionConfig(default_target=1, target_tracking_policies=[policy()])
    await deploy(scheduler, provision=config)
    await deploy(scheduler)
    kept = await provision(scheduler)
    assert kept is not None
    assert [one.name for one in kept.config.target_tracking_policies] == ["busy"]
    assert kept.target == 2


@pytest.mark.parametrize("always", [True, False])
async def test_idle_mode_is_a_provision_config_s_too(scheduler: DaemonChannel, always: bool) -> None:
    await deploy(scheduler)
    made = (await put(scheduler, always_allocate_gpu=always)).provision
    assert (made.always_allocate_gpu, made.config.always_allocate_gpu) == (always, always)


async def test_a_provision_config_that_can_not_be_is_refused(scheduler: DaemonChannel) -> None:
    await deploy(scheduler)
    for call in (put(scheduler, -1), put(scheduler, 1, policy(min_capacity=0)), put(scheduler, 1, policy(), policy())):
        error = await refused(call, InvalidArgumentError, "SPEC_INVALID")
        assert error.metadata["field"]


# ---- the scheduler: nodes -------------------------------------------------------------------------------------------


async def test_nodes_are_listed_by_name_as_last_heard(scheduler: DaemonChannel) -> None:
    nodes = await pages(scheduler, "scheduler", "ListNodes", "nodes")
    assert [(one.name, one.state) for one in nodes] == [
        ("gpu-host-1", Node.STATE_READY),
        ("gpu-host-2", Node.STATE_LOST),
    ]
    assert {one.scheduling for one in nodes} == {Node.SCHEDULING_NORMAL}
    assert nodes[0].instance_count == 3
    assert nodes[0].gpus


async def test_the_scheduling_of_a_node_is_kept(scheduler: DaemonChannel) -> None:
    for wanted in (Node.SCHEDULING_CORDONED, Node.SCHEDULING_NORMAL):
        answer = await ask(scheduler, "scheduler", "SetNodeScheduling", name="gpu-host-1", scheduling=wanted)
        assert (answer.node.name, answer.node.scheduling) == ("gpu-host-1", wanted)
        nodes = await pages(scheduler, "scheduler", "ListNodes", "nodes")
        assert [one.scheduling for one in nodes] == [wanted, Node.SCHEDULING_NORMAL]


async def test_a_scheduling_that_is_none_is_refused(scheduler: DaemonChannel) -> None:
    call = ask(scheduler, "scheduler", "SetNodeScheduling", name="gpu-host-1")
    await refused(call, InvalidArgumentError, "UNKNOWN_ENUM_VALUE")


async def test_instances_of_the_fleet_are_listed_by_node_and_age(scheduler: DaemonChannel) -> None:
    async def listed(**only: Any) -> list[str]:
        found = await pages(scheduler, "scheduler", "ListFleetInstances", "instances", **only)
        assert {one.node for one in found} <= {"gpu-host-1"}
        return [one.uid for one in found]

    assert await listed() == ["i-run", "i-cold", "i-chat"]
    assert await listed(function="chat") == ["i-chat"]
    assert await listed(node="gpu-host-1") == await listed()
    assert await listed(node="gpu-host-2") == []
    (chat,) = await pages(scheduler, "scheduler", "ListFleetInstances", "instances", function="chat")
    assert (chat.function, chat.state, chat.healthy) == ("chat", Instance.STATE_RUNNING, True)
    assert parse_request_id(chat.request_id) is not None


# ---- the scheduler: usage -------------------------------------------------------------------------------------------

GROUPINGS = {
    usage.ListUsageRequest.GROUPING_FUNCTION: {"function"},
    usage.ListUsageRequest.GROUPING_INSTANCE: {"function", "instance_uid", "node"},
    usage.ListUsageRequest.GROUPING_NODE: {"node"},
    usage.ListUsageRequest.GROUPING_GPU_MODEL: set(),
}


@pytest.mark.parametrize("grouping", list(GROUPINGS))
async def test_usage_has_a_row_for_each_group_named_by_it(
    scheduler: DaemonChannel, grouping: usage.ListUsageRequest.Grouping.ValueType
) -> None:
    rows = await pages(scheduler, "usage", "ListUsage", "rows", grouping=grouping)
    named = ("function", "instance_uid", "node")
    assert all({name for name in named if getattr(row, name)} == GROUPINGS[grouping] for row in rows)
    keys = [tuple(getattr(row, name) for name in (*named, "gpu_model")) for row in rows]
    assert len(set(keys)) == len(keys)
    assert all(row.gpu_model for row in rows)
    assert len(rows) == (3 if "function" in GROUPINGS[grouping] else 1)


async def test_an_unknown_grouping_is_refused(scheduler: DaemonChannel) -> None:
    await refused(ask(scheduler, "usage", "ListUsage", grouping=99), InvalidArgumentError, "USAGE_GROUP_UNKNOWN")


@pytest.mark.parametrize("function", ["", "ocr"])
async def test_every_page_of_usage_has_the_totals_of_all_rows(scheduler: DaemonChannel, function: str) -> None:
    first = await ask(scheduler, "usage", "ListUsage", page_size=1, function=function)
    rows = await pages(scheduler, "usage", "ListUsage", "rows", function=function)
    assert [row.function for row in rows] == (["ocr"] if function else ["chat", "ocr", "tts"])
    for total, name in ((first.total_cost, "cost"), (first.total_always_on_cost, "always_on_cost")):
        assert abs(sum(Decimal(getattr(row, name)) for row in rows) - Decimal(total)) <= Decimal("0.00001")
    assert first.unit
    assert rows[0].factors.gpu_active
    assert Decimal(rows[0].gpu_active_gib_s) > 0
    assert rows[0].window_count > 0


async def test_windows_follow_behind_the_last_rows(scheduler: DaemonChannel) -> None:
    token, answers = "", []
    while True:
        answers.append(
            await ask(
                scheduler, "usage", "ListUsage", page_size=1, page_token=token, function="ocr", include_windows=True
            )
        )
        token = answers[-1].next_page_token
        if not token:
            break
    assert [bool(answer.rows) for answer in answers] == [True] + [False] * (len(answers) - 1)
    assert not answers[0].windows
    assert [bool(answer.total_cost) for answer in answers] == [bool(answer.rows) for answer in answers]
    windows = [window for answer in answers for window in answer.windows]
    assert len(windows) == answers[0].rows[0].window_count
    assert {window.function for window in windows} == {"ocr"}
    assert not (await ask(scheduler, "usage", "ListUsage")).windows


async def reconciled(scheduler: DaemonChannel, **only: Any) -> list[usage.ReconcileUsageResponse]:
    request = usage.ReconcileUsageRequest(**only)
    return [one async for one in scheduler.stream(scheduler.usage.ReconcileUsage, request, PATIENCE_S)]


async def test_a_reconciliation_names_instances_with_findings_and_ends_with_the_totals(
    scheduler: DaemonChannel,
) -> None:
    *found, last = await reconciled(scheduler)
    assert [one.HasField("instance") for one in found] == [True] * len(found)
    assert last.HasField("total")
    chat = next(one.instance for one in found if one.instance.function == "chat")
    assert chat.instance_uid == "i-chat"
    assert chat.node
    assert chat.gap_count > 0
    assert chat.gap_ns > 0
    assert chat.findings[0].kind == usage.UsageFinding.KIND_GAP
    assert chat.findings[0].duration_ns > 0
    assert last.total.gap_count == sum(one.instance.gap_count for one in found)
    assert last.total.instance_count >= len(found)


async def test_a_reconciliation_without_findings_is_its_totals(scheduler: DaemonChannel) -> None:
    (last,) = await reconciled(scheduler, function="tts")
    assert (last.total.instance_count, last.total.gap_count, last.total.estimated_count) == (1, 0, 0)
