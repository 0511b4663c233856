"""Repeated kills of the scheduler: functions, instances and usage survive, and nothing is created twice."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import defaultdict
from fractions import Fraction

import aiohttp
import pytest
import yaml

from agent.cli.commands.usage import list_usage
from agent.core.types import GIB, SECOND_NS
from agent.examples.echo.__main__ import expected_answer
from agent.v1 import function_service_pb2 as functions_pb
from agent.v1 import instance_service_pb2 as instances_pb
from agent.v1 import types_pb2
from agent.v1 import usage_service_pb2 as usage_pb
from tests.e2e.ledger import check_contiguous
from tests.e2e.stack import CALL_S, Stack, echo, running_stack, until

KILLS = 5
SEED = 11
CLIENTS = 4
FUNCTION = "ocr"
BACK_S = 2.0
"""How soon an agent reconnects to a scheduler that listens again."""

Sums = dict[str, tuple[int, int, int, int]]


def pin_ports(stack: Stack) -> None:
    """Keep the scheduler's ports across restarts, like a real one's."""
    endpoints = json.loads((stack.folder / "scheduler" / "endpoints.json").read_text())
    path = stack.folder / "scheduler.yaml"
    config = yaml.safe_load(path.read_text())
    for name in ("gateway", "grpc", "admin"):
        host, _, port = endpoints[name].rpartition(":")
        config[name] = {"host": host, "port": int(port)}
    path.write_text(yaml.safe_dump(config))


async def kill_and_restart(stack: Stack) -> None:
    process = stack.processes["scheduler"]
    process.kill()
    process.wait(10)
    (stack.folder / "scheduler" / "endpoints.json").unlink()
    stack.spawn("scheduler", "-m", "agent.daemons.scheduler", "--config", str(stack.folder / "scheduler.yaml"))
    await stack.wait_for_endpoints("scheduler")
    listening = time.monotonic()

    async def back() -> bool:
        async with stack.channel("scheduler") as channel:
            wanted = functions_pb.GetFunctionRequest(name=FUNCTION)
            found = (await channel.call(channel.functions.GetFunction, wanted, CALL_S)).function
        assert found.target == 2, "functions and targets are read before anybody is answered"
        return bool(found.current == 2)

    await until("the agent reports its instances", back, 20)
    took = time.monotonic() - listening
    assert took < BACK_S + 1.0, f"{took:.1f} s; a second is for this machine"


async def client(stack: Stack, number: int, answered: list[int], wrong: list[str]) -> None:
    """A correct client: it retries failed connections and 503; every other failure counts."""
    count = number
    while True:
        count += CLIENTS
        try:
            answer = await stack.ask(FUNCTION, f"/answer?n={count}")
        except aiohttp.ClientError:
            await asyncio.sleep(0.05)  # the client's pause before a retry
            continue
        answered.append(answer.status)
        if answer.status != 200 or answer.body.decode() != expected_answer(count):
            wrong.append(f"{count}: {answer.status} {answer.body[:200]!r}")
        await asyncio.sleep(0.02)  # part of the traffic


@pytest.mark.timeout(120)
async def test_scheduler_is_killed_under_load() -> None:
    async with running_stack() as stack:
        pin_ports(stack)
        await stack.deploy(echo(FUNCTION), target=2)
        before = {one.uid: one.pid for one in await stack.instances()}
        answered: list[int] = []
        wrong: list[str] = []
        clients = [asyncio.create_task(client(stack, number, answered, wrong)) for number in range(CLIENTS)]
        source = random.Random(SEED)
        for _ in range(KILLS):
            await asyncio.sleep(source.uniform(0.2, 0.8))  # the random moment of the kill
            await kill_and_restart(stack)
        served = len(answered)

        async def served_again() -> bool:
            return len(answered) > served + 20

        await until("requests are served after the last kill", served_again)
        for task in clients:
            task.cancel()
        ended = await asyncio.gather(*clients, return_exceptions=True)
        assert all(isinstance(one, asyncio.CancelledError) for one in ended), ended
        assert not wrong, wrong[:5]

        assert {one.uid: one.pid for one in await stack.instances()} == before, "the same instances, none made twice"
        assert len(await all_ever_made(stack)) == 2
        await stack.remove_functions([FUNCTION])
        await check_usage(stack, before)
        assert not stack.leftovers()


async def all_ever_made(stack: Stack) -> list[types_pb2.Instance]:
    async with stack.channel("agent") as channel:
        request = instances_pb.ListInstancesRequest(include_ended=True)
        return list((await channel.call(channel.instances.ListInstances, request, CALL_S)).instances)


async def check_usage(stack: Stack, instances: dict[str, int]) -> None:
    """Every window exists once, and the cost can be recomputed from the windows and the printed factors alone."""
    ledger = await stack.windows()
    check_contiguous(ledger)
    assert all(window.sealed for window in ledger), "the instances have ended"
    expected = sums(ledger)
    assert set(expected) == set(instances)

    async def uploaded() -> bool:
        return sums((await usage(stack, usage_pb.ListUsageRequest.GROUPING_INSTANCE)).windows) == expected

    await until("all windows are at the scheduler", uploaded, 20)
    found = await usage(stack, usage_pb.ListUsageRequest.GROUPING_INSTANCE)
    assert len(found.windows) == len(ledger)
    rows: Sums = {
        row.instance_uid: (row.active_ns, row.idle_ns, row.unbilled_ns, row.invocations) for row in found.rows
    }
    assert rows == expected
    total, always_on = recomputed(found)
    assert Fraction(found.total_cost) == round(total, 6)
    assert Fraction(found.total_always_on_cost) == round(always_on, 6)
    assert 0 < total < always_on
    by_function = await usage(stack, usage_pb.ListUsageRequest.GROUPING_FUNCTION)
    assert (by_function.total_cost, len(by_function.rows)) == (found.total_cost, 1)


async def usage(stack: Stack, grouping: usage_pb.ListUsageRequest.Grouping.ValueType) -> usage_pb.ListUsageResponse:
    async with stack.channel("scheduler") as channel:
        request = usage_pb.ListUsageRequest(grouping=grouping, include_windows=True)
        return await list_usage(channel, request)


def sums(windows: object) -> Sums:
    """Active, idle and unbilled ns, and requests, of each instance."""
    found: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for window in windows:  # type: ignore[attr-defined]
        mine = found[window.instance_uid]
        for index, value in enumerate((window.active_ns, window.idle_ns, window.unbilled_ns, window.invocations)):
            mine[index] += value
    return {uid: (values[0], values[1], values[2], values[3]) for uid, values in found.items()}


def recomputed(found: usage_pb.ListUsageResponse) -> tuple[Fraction, Fraction]:
    """(cost, always on), recomputed: each window times the factors of its instance's row."""
    factors = {row.instance_uid: row.factors for row in found.rows}
    cost = always = Fraction(0)
    for window in found.windows:
        price = factors[window.instance_uid]
        gpu = Fraction(window.gpu_count * window.gpu_memory_bytes, GIB)
        vcpu = Fraction(window.vcpu_millis, 1000)
        flat = Fraction(window.memory_bytes, GIB) * Fraction(price.memory)
        flat += Fraction(window.disk_bytes, GIB) * Fraction(price.disk)
        active = gpu * Fraction(price.gpu_active) + vcpu * Fraction(price.vcpu_active) + flat
        idle = gpu * Fraction(price.gpu_idle) + vcpu * Fraction(price.vcpu_idle) + flat
        calls = window.invocations * Fraction(price.invocation)
        cost += Fraction(window.active_ns, SECOND_NS) * active + Fraction(window.idle_ns, SECOND_NS) * idle + calls
        always += Fraction(window.active_ns + window.idle_ns + window.unbilled_ns, SECOND_NS) * active + calls
    return cost, always
