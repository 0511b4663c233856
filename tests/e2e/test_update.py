"""A function is replaced and deleted under load without a failed request."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
import yaml

from agent.core.types import SECOND_NS, FunctionSpec, IdlePolicy
from agent.v1 import function_service_pb2 as functions_pb
from agent.wire.convert_function import function_to_proto
from tests.e2e.stack import CALL_S, Answer, Stack, echo, running_stack, until

CLIENTS = 3
FUNCTION = "ocr"
LONG_MS = 3_000
Clients = list[asyncio.Task[list[Answer]]]


def revision(number: int) -> FunctionSpec:
    """Always awake, so that old instances hold their GPUs; revisions differ in an environment variable."""
    return replace(
        echo(FUNCTION, RELEASE=str(number)), idle=IdlePolicy(freeze_after_ns=60 * SECOND_NS), timeout_ns=60 * SECOND_NS
    )


async def deploy(stack: Stack, spec: FunctionSpec, target: int) -> functions_pb.Function:
    async with stack.channel("scheduler") as channel:
        message = function_to_proto(spec, reveal_secrets=True)
        request = functions_pb.DeployFunctionRequest(spec=message, target=target)
        return (await channel.call(channel.functions.DeployFunction, request, CALL_S)).function


async def uids(stack: Stack) -> set[str]:
    return {one.uid for one in await stack.instances()}


async def revisions(stack: Stack) -> list[str]:
    return sorted(one.revision for one in await stack.instances())


def begin_load(stack: Stack, enough: asyncio.Event) -> Clients:
    async def client() -> list[Answer]:
        answers = []
        while not enough.is_set():
            answers.append(await stack.ask(FUNCTION, "/sleep?ms=30"))
        return answers

    return [asyncio.create_task(client()) for _ in range(CLIENTS)]


@pytest.mark.timeout(120)
async def test_update_and_delete_under_load() -> None:
    """Two GPUs, at most one instance each: the new revision fits only after an old instance has ended."""
    async with running_stack() as stack:
        await one_instance_per_gpu(stack)
        await stack.deploy(revision(1), target=2)
        first = await uids(stack)
        same = await deploy(stack, revision(1), target=2)
        assert same.spec.revision == "1", "the same content again is no new revision"

        long = asyncio.create_task(stack.ask(FUNCTION, f"/sleep?ms={LONG_MS}"))
        await until("the long request is inside", lambda: in_flight(stack, 1))
        enough = asyncio.Event()
        clients = begin_load(stack, enough)
        await until("so is one of the load", lambda: in_flight(stack, 2))
        assert await uids(stack) == first, "nothing was restarted for the same content"
        changed = await deploy(stack, revision(2), target=2)
        assert changed.spec.revision == "2"

        async def replaced() -> bool:
            return await revisions(stack) == ["2", "2"] and not first & await uids(stack)

        await until("two instances of revision 2, and none of revision 1", replaced)
        assert (await long).status == 200, "an instance is drained, not cut"
        enough.set()
        answers = [answer for some in await asyncio.gather(*clients) for answer in some]
        failed = [(answer.status, answer.body[:200]) for answer in answers if answer.status != 200]
        assert not failed, failed[:5]
        assert {answer.instance for answer in answers} & first, "revision 1 served"
        assert {answer.instance for answer in answers} & await uids(stack), "so did revision 2"

        await check_target(stack)
        await check_delete(stack)


async def one_instance_per_gpu(stack: Stack) -> None:
    path = stack.folder / "agent.yaml"
    config = yaml.safe_load(path.read_text())
    config["gpu"]["instances_per_gpu"] = 1
    path.write_text(yaml.safe_dump(config))
    stack.kill_agent()
    await stack.start_agent()


async def in_flight(stack: Stack, count: int) -> bool:
    return sum(one.in_flight for one in await stack.instances()) >= count


async def check_target(stack: Stack) -> None:
    """Check that a new target for the same spec starts and stops only the difference."""
    before = await uids(stack)
    await deploy(stack, revision(2), target=1)

    async def one_left() -> bool:
        return len(await uids(stack)) == 1

    await until("one instance", one_left)
    assert await uids(stack) < before


async def check_delete(stack: Stack) -> None:
    """Check that running and waiting requests are answered, then nothing is left and the function is unknown."""
    inside = asyncio.create_task(stack.ask(FUNCTION, f"/sleep?ms={LONG_MS}"))
    await until("a request is inside", lambda: in_flight(stack, 1))
    waiting = asyncio.create_task(stack.ask(FUNCTION, "/"))

    async def queued() -> bool:
        async with stack.channel("scheduler") as channel:
            request = functions_pb.GetFunctionRequest(name=FUNCTION)
            return bool((await channel.call(channel.functions.GetFunction, request, CALL_S)).function.queued == 1)

    await until("another one waits", queued)
    await stack.remove_functions([FUNCTION])
    assert (await inside).status == 200
    assert (await waiting).status == 404
    assert (await stack.ask(FUNCTION, "/")).status == 404
    assert not stack.leftovers()
