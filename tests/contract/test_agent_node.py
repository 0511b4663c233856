"""One contract, two nodes: the fake that the gateway's and the scheduler's tests talk to, and a real agent.

Three parts: the ingress (the hop protocol), InstanceService as far as the scheduler calls it, and the load stream.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest

from agent.core.errors import ConflictError, ExhaustedError, InvalidArgumentError, NotFoundError
from agent.v1.instance_service_pb2 import CreateInstanceRequest
from agent.v1.scheduler_service_pb2 import InstanceLoad, ReportLoadRequest
from agent.v1.types_pb2 import Gpu, Instance, Node
from tests.contract import agent_node_worlds
from tests.contract.agent_node_worlds import GPUS, HELD, PATIENCE_S, PER_GPU, Headers, NodeUnderTest, spec
from tests.fakes import agent_node as names
from tests.http.rig import Wire, connect

ANY, STARTED = f"{names.ANY}: 1", f"{names.STARTED}: 1"
HOLD = f"{names.WAKE_HOLD_MS}: 2000"
SOON = f"{names.DEADLINE_MS}: 20"
REFUSED, FREE_SLOTS = names.REFUSED.encode(), names.FREE_SLOTS.encode()
QUEUE_TIME, WAKE_TIME = names.QUEUE_TIME.encode(), names.WAKE_TIME.encode()


@pytest.fixture(params=["fake", "real"])
async def node(request: pytest.FixtureRequest) -> AsyncIterator[NodeUnderTest]:
    async with getattr(agent_node_worlds, f"{request.param}_node")() as made:
        yield made
        made.go.set()
        made.release_wakes()


def refusal(answer: tuple[int, Headers, bytes]) -> tuple[int, str, str]:
    """Status, Code and reason of an answer that says that no byte of the request has reached an instance."""
    status, headers, body = answer
    return status, json.loads(body)["Code"], headers[REFUSED].decode()


async def statuses(wire: Wire) -> list[int]:
    """The final answer's and those before it."""
    found = [0]
    while found[-1] < 200:
        found.append((await wire.head())[0])
    return found[1:]


# ---- the ingress ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "reason"), [("", "TOKEN_MISSING"), ("wrong-token-0123456789", "TOKEN_UNKNOWN")])
async def test_a_request_without_the_token_is_refused(node: NodeUnderTest, given: str, reason: str) -> None:
    wire = await connect(node.port)
    await wire.send(node.head(await node.running(), token=given))
    status, _, refused = refusal(await wire.message())
    assert (status, refused) == (401, reason)
    assert node.seen() == []


async def test_a_request_names_an_instance_of_this_node(node: NodeUnderTest) -> None:
    assert refusal(await node.ask("")) == (400, "InvalidArgument", "INSTANCE_MISSING")
    assert refusal(await node.ask("i-unknown")) == (404, "InstanceNotFound", "INSTANCE_NOT_FOUND")


async def test_the_answer_names_request_and_instance_and_no_wait_where_there_was_none(node: NodeUnderTest) -> None:
    uid = await node.running()
    status, headers, _ = await node.ask(uid, "/", "x-fc-request-id: 1-2-3-4")
    assert status == 200
    assert (headers[b"x-fc-request-id"], headers[b"x-fc-instance-id"]) == (b"1-2-3-4", uid.encode())
    assert not {REFUSED, QUEUE_TIME, WAKE_TIME} & set(headers)


async def test_a_refusal_names_the_request(node: NodeUnderTest) -> None:
    _, headers, body = await node.ask("i-unknown", "/", "x-fc-request-id: 1-2-3-4")
    assert (headers[b"x-fc-request-id"], json.loads(body)["RequestId"]) == (b"1-2-3-4", "1-2-3-4")


async def test_a_request_wakes_a_frozen_instance_and_the_answer_says_how_long_that_took(node: NodeUnderTest) -> None:
    uid = await node.frozen()
    node.hold_wakes()
    asking = asyncio.create_task(node.ask(uid))
    await node.waking()
    assert node.seen() == []
    node.time_passes()
    node.release_wakes()
    status, headers, _ = await asking
    assert status == 200
    assert float(headers[WAKE_TIME]) > 0
    assert QUEUE_TIME not in headers


async def test_a_busy_instance_serves_one_request_after_the_other(node: NodeUnderTest) -> None:
    uid = await node.running()
    first = await node.inside(uid)
    second = asyncio.create_task(node.ask(uid))
    assert refusal(await node.ask(uid, "/", SOON)) == (504, "QueueTimeout", "QUEUE_TIMEOUT")
    assert not second.done()
    assert node.seen() == [HELD]
    node.time_passes()
    node.go.set()
    assert (await first)[0] == 200
    status, headers, _ = await second
    assert status == 200
    assert float(headers[QUEUE_TIME]) > 0
    assert WAKE_TIME not in headers


async def test_a_request_for_any_instance_goes_to_a_sibling_with_room(node: NodeUnderTest) -> None:
    busy, free = await node.running(), await node.running()
    held = await node.inside(busy)
    status, headers, _ = await node.ask(busy, "/", ANY)
    assert (status, headers[b"x-fc-instance-id"]) == (200, free.encode())
    assert not {QUEUE_TIME, WAKE_TIME} & set(headers)
    node.go.set()
    await held


async def test_a_request_for_any_instance_takes_the_one_that_is_named_if_it_has_room(node: NodeUnderTest) -> None:
    for uid in (await node.running(), await node.running()):
        assert (await node.ask(uid, "/", ANY))[1][b"x-fc-instance-id"] == uid.encode()


async def test_a_caller_that_asks_for_it_is_told_when_the_request_is_given_to_an_instance(node: NodeUnderTest) -> None:
    uid = await node.frozen()
    assert await statuses(await node.send(uid, "/", STARTED)) == [102, 200]
    assert await statuses(await node.send(uid, "/")) == [200]


async def test_nothing_is_said_of_a_request_that_no_instance_has_taken(node: NodeUnderTest) -> None:
    uid = await node.frozen()
    node.hold_wakes()
    wire = await connect(node.port)
    await wire.send(node.head(uid, "/", STARTED, SOON, "expect: 100-continue", length=4))
    assert await statuses(wire) == [504]
    assert node.seen() == []


async def test_100_continue_is_given_once_an_instance_has_taken_the_request(node: NodeUnderTest) -> None:
    wire = await connect(node.port)
    await wire.send(node.head(await node.frozen(), "/", STARTED, "expect: 100-continue", length=4))
    assert [(await wire.head())[0], (await wire.head())[0]] == [102, 100]
    await wire.send(b"body")
    status, _, body = await wire.message()
    assert (status, body) == (200, b"body")


@pytest.mark.parametrize("value", ["soon", "-5", "1e3", "99999999999"])
async def test_a_deadline_is_a_number_of_milliseconds(node: NodeUnderTest, value: str) -> None:
    answer = await node.ask(await node.running(), "/", f"{names.DEADLINE_MS}: {value}")
    assert refusal(answer) == (400, "InvalidArgument", "DEADLINE_INVALID")


async def test_a_caller_that_leaves_while_it_waits_gives_up_its_place(node: NodeUnderTest) -> None:
    uid = await node.running()
    first = await node.inside(uid)
    leaves = await node.send(uid, "/?left")
    assert refusal(await node.ask(uid, "/", SOON))[0] == 504  # by now the other one waits
    leaves.reset()
    assert refusal(await node.ask(uid, "/", SOON))[0] == 504
    node.go.set()
    assert (await first)[0] == 200
    assert (await node.ask(uid))[0] == 200
    assert node.seen() == [HELD, "/"]


async def test_a_stopping_instance_ends_what_is_inside_and_takes_no_more(node: NodeUnderTest) -> None:
    uid = await node.running()
    inside = await node.inside(uid)
    stopping = asyncio.create_task(node.stop(uid))
    await shown(node, uid, Instance.STATE_STOPPING)
    assert refusal(await node.ask(uid)) == (503, "InstanceStopping", "INSTANCE_STOPPING")
    assert not stopping.done()
    node.go.set()
    assert (await inside)[0] == 200
    assert (await stopping).state == Instance.STATE_STOPPED
    assert refusal(await node.ask(uid))[2] == "INSTANCE_NOT_FOUND"


# ---- the scheduler's wake over the ingress ----------------------------------------------------------------------


async def test_a_wake_answers_with_the_free_slots_once_the_instance_is_awake(node: NodeUnderTest) -> None:
    uid = await node.frozen(concurrency=3)
    status, headers, _ = await node.ask(uid, names.WAKE_PATH, HOLD)
    assert (status, headers[FREE_SLOTS]) == (200, b"3")
    await shown(node, uid, Instance.STATE_RUNNING)
    held = await node.inside(uid)
    assert (await node.ask(uid, names.WAKE_PATH, HOLD))[1][FREE_SLOTS] == b"2"
    node.go.set()
    await held
    assert node.seen() == [HELD], "no instance hears of a wake"


@pytest.mark.parametrize("hold", ["soon", "-1", "601000"])
async def test_a_wake_holds_for_a_number_of_milliseconds(node: NodeUnderTest, hold: str) -> None:
    uid = await node.frozen()
    answer = await node.ask(uid, names.WAKE_PATH, f"{names.WAKE_HOLD_MS}: {hold}")
    assert refusal(answer) == (400, "InvalidArgument", "HOLD_INVALID")


async def test_a_wake_that_can_not_be_is_refused(node: NodeUnderTest) -> None:
    assert refusal(await node.ask("i-unknown", names.WAKE_PATH, HOLD))[::2] == (404, "INSTANCE_NOT_FOUND")
    uid = await node.frozen()
    node.hold_wakes()
    assert refusal(await node.ask(uid, names.WAKE_PATH, HOLD, SOON)) == (504, "WakeTimeout", "WAKE_TIMEOUT")


async def test_the_path_of_a_wake_without_its_header_is_the_functions_own(node: NodeUnderTest) -> None:
    assert (await node.ask(await node.running(), names.WAKE_PATH))[0] == 200
    assert node.seen() == [names.WAKE_PATH]


# ---- InstanceService --------------------------------------------------------------------------------------------


async def test_a_created_instance_is_shown_as_asked_for(node: NodeUnderTest) -> None:
    made = await node.create("ocr/7/0/1")
    assert (made.node, made.function, made.revision, made.request_id) == ("n1", "ocr", "7", "ocr/7/0/1")
    assert made.state == Instance.STATE_RUNNING
    assert made.healthy
    assert len(made.gpu_uuids) == 1
    assert made.HasField("create_time")


async def test_the_same_request_id_gives_the_same_instance_also_after_its_end(node: NodeUnderTest) -> None:
    uid = (await node.create("ocr/7/0/1")).uid
    assert (await node.create("ocr/7/0/1")).uid == uid
    with pytest.raises(ConflictError) as other:
        await node.create("ocr/7/0/1", concurrency=2)
    assert other.value.reason == "REQUEST_ID_REUSED"
    await node.stop(uid)
    again = await node.create("ocr/7/0/1")
    assert (again.uid, again.state) == (uid, Instance.STATE_STOPPED)


@pytest.mark.parametrize("request_id", ["", "x" * 201])
async def test_a_create_needs_a_request_id(node: NodeUnderTest, request_id: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        await create(node, CreateInstanceRequest(request_id=request_id, spec=spec()))
    assert caught.value.reason == "REQUEST_ID_INVALID"


async def test_a_create_refuses_a_spec_that_can_not_be(node: NodeUnderTest) -> None:
    wrong = spec()
    wrong.port = 0
    with pytest.raises(InvalidArgumentError) as caught:
        await create(node, CreateInstanceRequest(request_id="ocr/7/0/1", spec=wrong))
    assert (caught.value.reason, caught.value.metadata["field"]) == ("SPEC_INVALID", "port")


async def test_a_gpu_takes_so_many_instances_and_no_more(node: NodeUnderTest) -> None:
    made = [await node.create() for _ in range(GPUS * PER_GPU)]
    taken = [uuid for one in made for uuid in one.gpu_uuids]
    assert {taken.count(uuid) for uuid in taken} == {PER_GPU}
    with pytest.raises(ExhaustedError) as full:
        await node.create()
    assert full.value.reason == "GPU_CAPACITY"
    await node.stop(made[0].uid)
    await removed(node, made[0].uid)
    assert (await node.create()).gpu_uuids == made[0].gpu_uuids


async def test_a_stop_answers_when_it_has_ended_and_once_more_is_success(node: NodeUnderTest) -> None:
    uid = await node.running()
    assert (await node.stop(uid)).state == Instance.STATE_STOPPED
    assert (await node.stop(uid)).state == Instance.STATE_STOPPED


async def test_a_stop_of_an_unknown_instance_is_not_found(node: NodeUnderTest) -> None:
    with pytest.raises(NotFoundError) as caught:
        await node.stop("i-unknown")
    assert caught.value.reason == "INSTANCE_NOT_FOUND"


async def create(node: NodeUnderTest, request: CreateInstanceRequest) -> None:
    await node.channel.call(node.channel.instances.CreateInstance, request, PATIENCE_S)


# ---- the load stream --------------------------------------------------------------------------------------------


async def shown(node: NodeUnderTest, uid: str, state: Instance.State.ValueType) -> InstanceLoad:
    """The first report of the instance in that state."""
    message = await node.scheduler.until_received(
        lambda message: any((one.uid, one.state) == (uid, state) for one in message.instances)
    )
    return next(one for one in message.instances if one.uid == uid)


async def removed(node: NodeUnderTest, uid: str) -> ReportLoadRequest:
    return await node.scheduler.until_received(lambda message: uid in message.removed_uids)


async def test_a_stream_begins_with_a_registration_and_a_snapshot(node: NodeUnderTest) -> None:
    first = await node.scheduler.until_received(lambda message: True)
    assert (first.sequence, first.snapshot, first.load.state) == (1, True, Node.STATE_READY)
    said = first.registration
    assert said.ingress_address == f"127.0.0.1:{node.port}"
    assert said.grpc_address == node.channel.target
    assert all((said.boot_id, said.agent_version, said.runtimes, said.HasField("start_time")))
    assert said.instances_per_gpu == PER_GPU
    assert [gpu.index for gpu in said.gpus] == list(range(GPUS))
    assert all(gpu.uuid and gpu.model and gpu.memory_total_bytes for gpu in said.gpus)
    assert {gpu.health for gpu in said.gpus} == {Gpu.HEALTH_OK}
    assert said.host_memory.total_bytes


async def test_messages_are_numbered_one_by_one_and_only_the_first_is_a_snapshot(node: NodeUnderTest) -> None:
    uid = await node.running()
    await node.freeze(uid)
    await shown(node, uid, Instance.STATE_FROZEN)
    heard = node.scheduler.received
    assert [message.sequence for message in heard] == list(range(1, len(heard) + 1))
    assert [message.snapshot for message in heard] == [True] + [False] * (len(heard) - 1)
    assert [message.HasField("registration") for message in heard] == [message.snapshot for message in heard]
    assert {message.epoch for message in heard} == {1}


async def test_every_change_of_an_instance_is_reported(node: NodeUnderTest) -> None:
    made = await node.create(concurrency=3)
    load = await shown(node, made.uid, Instance.STATE_RUNNING)
    assert (load.function, load.revision, load.request_id) == ("ocr", "7", made.request_id)
    assert (load.concurrency, load.in_flight, load.healthy) == (3, 0, True)
    assert list(load.gpu_uuids) == list(made.gpu_uuids)
    assert load.create_time == made.create_time
    await node.freeze(made.uid)
    await shown(node, made.uid, Instance.STATE_FROZEN)
    node.scheduler.received.clear()
    await node.ask(made.uid, names.WAKE_PATH, HOLD)
    await shown(node, made.uid, Instance.STATE_RUNNING)


async def test_requests_inside_are_reported_with_the_next_change(node: NodeUnderTest) -> None:
    uid = await node.running(concurrency=2)
    inside = await node.inside(uid)
    stopping = asyncio.create_task(node.stop(uid))
    assert (await shown(node, uid, Instance.STATE_STOPPING)).in_flight == 1
    node.go.set()
    await asyncio.gather(inside, stopping)


async def test_an_instance_that_has_ended_is_removed_and_how_it_ended_is_said_no_later(node: NodeUnderTest) -> None:
    stopped, crashed = await node.running(), await node.running()
    await node.stop(stopped)
    node.crash(crashed)
    ends = {stopped: Instance.STATE_STOPPED, crashed: Instance.STATE_FAILED}
    for uid, state in ends.items():
        last = (await removed(node, uid)).sequence
        reports = [one for m in node.scheduler.received if m.sequence <= last for one in m.instances if one.uid == uid]
        assert reports[-1].state == state
        if uid == crashed:
            assert reports[-1].state_reason == "INSTANCE_CRASHED"
            assert reports[-1].state_message


async def test_a_scheduler_that_missed_something_gets_everything_anew(node: NodeUnderTest) -> None:
    living, gone = await node.running(), await node.running()
    await node.stop(gone)
    await removed(node, gone)
    count = len(node.scheduler.received)
    node.scheduler.resync_at = node.scheduler.received[-1].sequence + 1
    again = await node.scheduler.until_received(lambda message: message.snapshot and message.sequence > count)
    assert [one.uid for one in again.instances] == [living]
    assert not again.HasField("registration")
    numbers = [message.sequence for message in node.scheduler.received]
    assert numbers == list(range(1, len(numbers) + 1))


async def test_a_stream_that_ended_is_opened_again_from_the_beginning(node: NodeUnderTest) -> None:
    uid = await node.running()
    await shown(node, uid, Instance.STATE_RUNNING)
    node.scheduler.end_after = node.scheduler.received[-1].sequence + 1
    again = await node.scheduler.until_received(lambda message: message.sequence == 1 and bool(message.instances))
    assert again.snapshot
    assert again.registration.ingress_address == f"127.0.0.1:{node.port}"
    assert [one.uid for one in again.instances] == [uid]


async def test_a_node_that_has_nothing_to_say_says_how_it_is_once_a_second(node: NodeUnderTest) -> None:
    await node.scheduler.until_received(lambda message: True)
    beat = await node.scheduler.until_received(lambda message: message.sequence > 1, deadline_s=3.0)
    assert beat.load.state == Node.STATE_READY
    assert [gpu.index for gpu in beat.load.gpus] == list(range(GPUS))
