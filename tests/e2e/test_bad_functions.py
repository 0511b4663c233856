"""Functions that do not start, do not answer, crash or are overloaded: each gives a clear error and leaves nothing.

Those that can't start are deployed first and requested in the background, because the scheduler tries five times.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace

import pytest
import pytest_asyncio

from agent.core.types import MILLISECOND_NS, SECOND_NS, FunctionSpec
from agent.v1 import function_service_pb2 as functions_pb
from tests.e2e.bad_world import BadInputStack, running_world
from tests.e2e.raw_http import error_code
from tests.e2e.stack import OWN_USER, Answer, echo, until

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]

READY_TIMEOUT = "2500ms"
GPUS = 6


def hopeless() -> list[FunctionSpec]:
    """Functions whose instances never start."""
    return [
        replace(echo("no-command"), entrypoint=("/opt/nowhere/serve", "--port", "9000")),
        echo("never-listens", NEVER_LISTEN="1"),
        echo("init-fails", INIT_STATUS="500"),
        echo("leaves-at-once", EXIT_CODE="3"),
    ]


class BackgroundRequests:
    """Requests that wait for functions which never start."""

    def __init__(self, world: BadInputStack) -> None:
        self.world = world
        self.tasks: dict[str, asyncio.Task[Answer]] = {}

    async def begin(self) -> None:
        for spec in hopeless():
            await self.world.deploy(spec)
            self.tasks[spec.name] = self.world.ask_later(spec.name, "/")

    async def end(self) -> None:
        for task in self.tasks.values():
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def asked() -> AsyncIterator[BackgroundRequests]:
    settings = {"runtime": {"process": OWN_USER, "ready_timeout": READY_TIMEOUT}}
    async with running_world(GPUS, settings) as world:
        made = BackgroundRequests(world)
        await made.begin()
        yield made
        await made.end()


@pytest.fixture
def world(asked: BackgroundRequests) -> BadInputStack:
    return asked.world


def expect(answer: Answer, status: int, code: str) -> None:
    """Expect an error of agent/docs/fc-contract.md."""
    assert (answer.status, error_code(answer.body, answer.headers)) == (status, code), answer.body


# ---- overload -------------------------------------------------------------------------------------------------------


async def test_full_queue_is_429_with_retry_after(world: BadInputStack) -> None:
    await world.stack.deploy(replace(echo("narrow"), queue_length=1), target=1)
    first = world.ask_later("narrow", "/sleep?ms=1500")
    await world.until_inside("narrow", 1)
    others = await asyncio.gather(*(world.stack.ask("narrow", "/") for _ in range(3)))
    refused = [answer for answer in others if answer.status != 200]
    assert len(refused) == 2, "one waits, there is no room for two more"
    for answer in refused:
        expect(answer, 429, "ResourceExhausted")
        assert int(answer.headers["retry-after"]) >= 1
    assert (await first).status == 200


async def test_queue_timeout_is_504(world: BadInputStack) -> None:
    spec = replace(echo("impatient"), queue_timeout_ns=400 * MILLISECOND_NS)
    await world.stack.deploy(spec, target=1)
    first = world.ask_later("impatient", "/sleep?ms=2000")
    await world.until_inside("impatient", 1)
    answer = await world.stack.ask("impatient", "/")
    expect(answer, 504, "QueueTimeout")
    assert 400 * MILLISECOND_NS <= answer.ended_ns - answer.began_ns < 1900 * MILLISECOND_NS
    assert (await first).status == 200, "its own time does not count as queueing"


# ---- timeouts and crashes -------------------------------------------------------------------------------------------


async def test_request_over_the_functions_timeout_and_the_next_one(world: BadInputStack) -> None:
    await world.stack.deploy(replace(echo("slow"), timeout_ns=600 * MILLISECOND_NS), target=1)
    before = (await world.instance("slow")).uid
    answer = await world.stack.ask("slow", "/sleep?ms=4000")
    expect(answer, 504, "FunctionTimeout")
    assert answer.ended_ns - answer.began_ns < 3 * SECOND_NS
    answer = await world.stack.ask("slow", "/")
    assert (answer.status, answer.instance) == (200, before), "the slot is free and the instance survives"
    for _ in range(2):
        expect(await world.stack.ask("slow", "/sleep?ms=4000"), 504, "FunctionTimeout")

    async def replaced() -> bool:
        return [one.uid for one in await world.alive() if one.function == "slow"] not in ([], [before])

    await until("two timeouts in a row replace the instance", replaced, 30.0)
    assert (await world.stack.ask("slow", "/")).status == 200


async def test_crash_during_a_request(world: BadInputStack) -> None:
    await world.stack.deploy(echo("fragile"), target=1)
    before = await world.instance("fragile")
    expect(await world.stack.ask("fragile", "/crash?code=7"), 502, "InstanceCrashed")

    async def noticed() -> bool:  # an exiting process may still accept a connection
        return before.uid not in [one.uid for one in await world.alive()]

    await until("the agent knows of the crash", noticed, 10.0)
    answer = await world.stack.ask("fragile", "/")
    assert answer.status == 200, "it waited for the replacement"
    assert answer.instance != before.uid
    (ended,) = (one for one in await world.remembered() if one.uid == before.uid)
    assert (ended.state_reason, ended.in_flight) == ("INSTANCE_CRASHED", 0)
    assert "exited with code 7" in ended.state_message


# ---- failed starts --------------------------------------------------------------------------------------------------

NEVER_THERE = {
    "no-command": ("START_FAILED", "FunctionNotStarted", "/opt/nowhere/serve"),
    "init-fails": ("INITIALIZATION_ERROR", "InitializationError", "POST /initialize answered 500"),
    "leaves-at-once": ("FUNCTION_NOT_STARTED", "FunctionNotStarted", "exiting with $EXIT_CODE"),
    "never-listens": ("FUNCTION_NOT_STARTED", "FunctionNotStarted", "The CA's http server cannot be started"),
}


@pytest.mark.parametrize("name", NEVER_THERE)
async def test_function_that_never_starts(asked: BackgroundRequests, name: str) -> None:
    """Waiting requests get the reason at the end; `hibernode functions` shows it from the first attempt on."""
    reason, code, text = NEVER_THERE[name]
    world = asked.world

    async def known() -> bool:
        return bool((await world.functions())[name].current_error)

    await until(f"the scheduler says what is wrong with {name}", known, 20.0)
    answer = await asked.tasks[name]
    expect(answer, 502, code)
    assert text in answer.body.decode()
    function = (await world.functions())[name]
    assert function.state == functions_pb.Function.STATE_DEGRADED
    assert function.current_error_reason == reason
    assert text in function.current_error
    shown = world.hibernode("functions", "show", name)
    assert text in shown.stdout
    again = await world.stack.ask(name, "/", timeout_s=5.0)
    expect(again, 502, code)
    left = [one for one in await world.alive() if one.function == name]
    assert not left, "nothing is tried any more"
