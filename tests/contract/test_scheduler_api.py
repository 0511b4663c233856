"""One contract, two schedulers: the fake that the CLI's tests talk to, and the real servicers over a real server.

What is written here is what the CLI relies on. Texts are not compared: reasons are.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from agent.core.errors import InvalidArgumentError, NotFoundError
from agent.core.provisioning.model import parse_request_id
from agent.v1 import function_service_pb2 as fn
from agent.v1 import usage_service_pb2 as usage
from agent.v1.types_pb2 import Event, FunctionSpec, Instance, Node
from agent.wire.clients import DaemonChannel
from agent.wire.convert_function import function_to_proto
from agent.wire.convert_time import time_to_proto
from tests.contract import daemon_worlds
from tests.contract.daemon_worlds import PATIENCE_S, ask, pages, refused
from tests.host.rig import OCR

LISTS = [
    ("functions", "ListFunctions", "functions"),
    ("functions", "ListProvisionConfigs", "provisions"),
    ("scheduler", "ListNodes", "nodes"),
    ("scheduler", "ListFleetInstances", "instances"),
    ("scheduler", "ListFleetEvents", "events"),
    ("usage", "ListUsage", "rows"),
]


@pytest.fixture(params=["fake", "real"])
async def scheduler(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[DaemonChannel]:
    async with getattr(daemon_worlds, f"{request.param}_scheduler")(tmp_path) as channel:
        yield channel


def spec(**changes: Any) -> FunctionSpec:
    made = function_to_proto(OCR, reveal_secrets=True)
    for name, value in changes.items():
        setattr(made, name, value)
    made.environment["PASSWORD"] = "hunter2"
    return made


@pytest.mark.parametrize(("service", "method", "field"), LISTS)
async def test_pages_hold_every_item_once_and_in_order(
    scheduler: DaemonChannel, service: str, method: str, field: str
) -> None:
    if service == "functions":
        for name in ("one", "two", "three"):
            await deploy(scheduler, name)
    one_by_one = await pages(scheduler, service, method, field)
    assert len(one_by_one) >= (1 if method == "ListUsageWindows" else 2)
    answer = await ask(scheduler, service, method, page_size=1000)
    assert list(getattr(answer, field)) == one_by_one[: len(getattr(answer, field))]


@pytest.mark.parametrize(("service", "method", "field"), LISTS)
async def test_a_page_that_can_not_be_is_refused(
    scheduler: DaemonChannel, service: str, method: str, field: str
) -> None:
    for token in ("x", "-1", "1" * 13):
        await refused(ask(scheduler, service, method, page_token=token), InvalidArgumentError, "PAGE_TOKEN_INVALID")
    await refused(ask(scheduler, service, method, page_size=-1), InvalidArgumentError, "PAGE_SIZE_INVALID")


# ---- what is not there ----------------------------------------------------------------------------------------


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


async def test_a_filter_that_matches_nothing_is_an_empty_list(scheduler: DaemonChannel) -> None:
    assert not (await ask(scheduler, "scheduler", "ListFleetInstances", node="gone")).instances
    assert not (await ask(scheduler, "functions", "ListProvisionConfigs", function="gone")).provisions
    assert not (await ask(scheduler, "scheduler", "ListFleetEvents", function="gone")).events
    assert not (await ask(scheduler, "scheduler", "ListFleetEvents", node="gone")).events
    for only in ({"function": "gone"}, {"node": "gone"}, {"gpu_model": "gone"}):
        assert not (await ask(scheduler, "usage", "ListUsage", **only)).rows


# ---- functions ---------------------------------------------------------------------------------------


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


# ---- nodes -------------------------------------------------------------------------------------------


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
    assert parse_request_id(chat.request_id) is not None, "it was made by the scheduler"


# ---- events ------------------------------------------------------------------------------------------


async def events_of(scheduler: DaemonChannel, **only: Any) -> list[Event]:
    return await pages(scheduler, "scheduler", "ListFleetEvents", "events", **only)


async def test_events_of_the_scheduler_say_what_happened_to_whom_when_and_how_grave_it_is(
    scheduler: DaemonChannel,
) -> None:
    events = await events_of(scheduler)
    assert [(one.name, one.attributes["node"], one.level) for one in events] == [
        ("fleet.node_lost", "gpu-host-2", Event.LEVEL_WARNING),
        ("fleet.node_registered", "gpu-host-1", Event.LEVEL_INFO),
        ("fleet.node_heard", "gpu-host-1", Event.LEVEL_INFO),
    ]
    assert {(one.count, one.instance_uid) for one in events} == {(1, "")}
    assert all(one.time.seconds and one.first_time == one.time for one in events)
    assert await events_of(scheduler, node="gpu-host-2") == events[:1]
    assert await events_of(scheduler, since=events[0].time) == events
    later = events[-1].time.ToNanoseconds() + 1
    assert await events_of(scheduler, since=time_to_proto(later)) == []


async def test_a_deploy_is_an_event_of_its_function_and_a_dry_run_is_none(scheduler: DaemonChannel) -> None:
    await deploy(scheduler, "other")
    await deploy(scheduler, validate_only=True)
    assert await events_of(scheduler, function="new") == []
    await deploy(scheduler, target=0)
    (event,) = await events_of(scheduler, function="new")
    assert (event.name, event.level) == ("function.deployed", Event.LEVEL_INFO)
    assert dict(event.attributes) == {"function": "new", "revision": "1", "target": "0"}
    assert "hunter2" not in str(event)


async def test_the_scheduling_of_a_node_is_an_event(scheduler: DaemonChannel) -> None:
    await ask(scheduler, "scheduler", "SetNodeScheduling", name="gpu-host-2", scheduling=Node.SCHEDULING_CORDONED)
    event = (await events_of(scheduler, node="gpu-host-2"))[-1]
    assert (event.name, event.attributes["scheduling"]) == ("node.scheduling", "CORDONED")


# ---- usage -------------------------------------------------------------------------------------------

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
