"""One contract, two agents: the fake that the CLI's tests talk to, and the real servicers over a real server.

What is written here is what the CLI relies on. Texts are not compared: reasons are.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from agent.core.errors import ConflictError, InstanceError, InvalidArgumentError, NotFoundError, PreconditionError
from agent.v1 import instance_service_pb2 as inst
from agent.v1.types_pb2 import Event, FunctionSpec, Instance, Node
from agent.wire.clients import DaemonChannel, ExecStream
from agent.wire.convert_function import function_to_proto
from tests.contract import daemon_worlds
from tests.contract.daemon_worlds import LOG, PATIENCE_S, ask, pages, refused
from tests.host.rig import OCR

Step = inst.ExecInstanceRequest
LISTS = [
    ("instances", "ListInstances", "instances"),
    ("instances", "ListEvents", "events"),
    ("nodes", "ListUsageWindows", "windows"),
]


@pytest.fixture(params=["fake", "real"])
async def agent(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[DaemonChannel]:
    async with getattr(daemon_worlds, f"{request.param}_agent")(tmp_path) as channel:
        yield channel


@pytest.mark.parametrize(("service", "method", "field"), LISTS)
async def test_pages_hold_every_item_once_and_in_order(
    agent: DaemonChannel, service: str, method: str, field: str
) -> None:
    one_by_one = await pages(agent, service, method, field)
    assert len(one_by_one) >= (1 if method == "ListUsageWindows" else 2)
    answer = await ask(agent, service, method, page_size=1000)
    assert list(getattr(answer, field)) == one_by_one[: len(getattr(answer, field))]


@pytest.mark.parametrize(("service", "method", "field"), LISTS)
async def test_a_page_that_can_not_be_is_refused(agent: DaemonChannel, service: str, method: str, field: str) -> None:
    for token in ("x", "-1", "1" * 13):
        await refused(ask(agent, service, method, page_token=token), InvalidArgumentError, "PAGE_TOKEN_INVALID")
    await refused(ask(agent, service, method, page_size=-1), InvalidArgumentError, "PAGE_SIZE_INVALID")


# ---- what is not there ----------------------------------------------------------------------------------------


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


async def test_a_filter_that_matches_nothing_is_an_empty_list(agent: DaemonChannel) -> None:
    assert not (await ask(agent, "instances", "ListInstances", function="gone")).instances
    assert not (await ask(agent, "nodes", "ListUsageWindows", function="gone")).windows


# ---- instances -------------------------------------------------------------------------------------------


def spec(**changes: Any) -> FunctionSpec:
    made = function_to_proto(OCR, reveal_secrets=True)
    for name, value in changes.items():
        setattr(made, name, value)
    made.environment["PASSWORD"] = "hunter2"
    return made


async def create(agent: DaemonChannel, request_id: str = "mine", **changes: Any) -> Instance:
    wait = changes.pop("wait", False)
    answer = await ask(agent, "instances", "CreateInstance", request_id=request_id, spec=spec(**changes), wait=wait)
    assert isinstance(answer, inst.CreateInstanceResponse)
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


async def test_a_create_that_waits_fails_with_what_kept_the_instance_from_running(agent: DaemonChannel) -> None:
    await refused(create(agent, name="broken", wait=True), InstanceError, "FUNCTION_NOT_STARTED")
    made = await create(agent, name="broken")
    assert (made.state, made.state_reason) == (Instance.STATE_FAILED, "FUNCTION_NOT_STARTED")
    assert made.state_message
    assert not (await ask(agent, "instances", "ListInstances", function="broken")).instances


async def test_a_create_that_can_not_be_is_refused(agent: DaemonChannel) -> None:
    for request_id in ("", "x" * 201):
        await refused(create(agent, request_id), InvalidArgumentError, "REQUEST_ID_INVALID")
    error = await refused(create(agent, port=0), InvalidArgumentError, "SPEC_INVALID")
    assert error.metadata["field"] == "port"


# ---- streams ---------------------------------------------------------------------------------------------


async def logs(agent: DaemonChannel, uid: str, **how: Any) -> bytes:
    request = inst.GetInstanceLogsRequest(uid=uid, **how)
    stream = agent.stream(agent.instances.GetInstanceLogs, request, PATIENCE_S)
    return b"".join([chunk.data async for chunk in stream])


async def test_a_log_is_bytes_and_its_end_a_number_of_bytes(agent: DaemonChannel) -> None:
    assert await logs(agent, "i-run") == LOG
    assert await logs(agent, "i-run", tail_bytes=9) == LOG[-9:]
    assert await logs(agent, "i-run", tail_bytes=10_000) == LOG


async def test_the_end_of_a_log_may_be_a_number_of_lines(agent: DaemonChannel) -> None:
    lines = LOG.splitlines(keepends=True)
    assert len(lines) == 2
    assert await logs(agent, "i-run", tail_lines=1) == lines[-1]
    assert await logs(agent, "i-run", tail_lines=3) == LOG
    assert await logs(agent, "i-run", tail_lines=0) == b""
    assert await logs(agent, "i-run", tail_lines=1, tail_bytes=4) == LOG[-4:], "as far as they lie within the bytes"


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
    assert {(event.level, event.count) for event in events} == {(Event.LEVEL_INFO, 1)}
    assert all(event.first_time == event.time for event in events)
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


# ---- its node --------------------------------------------------------------------------------------------


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
