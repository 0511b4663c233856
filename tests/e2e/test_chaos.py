"""Random faults from a seed under load: answers are right or documented errors; afterwards everything recovers.

A long run: `CHAOS_SECONDS=120 CHAOS_SEED=7 scripts/test tests/e2e/test_chaos.py`. The seed chooses the faults; their
effects depend on timing, so a seed does not reproduce a run exactly.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from contextlib import suppress
from dataclasses import replace

import pytest

from agent.core.errors import HibernodeError
from agent.core.types import SECOND_NS, FunctionSpec
from agent.examples.echo.__main__ import expected_answer
from agent.v1 import types_pb2
from agent.v1.instance_service_pb2 import WakeInstanceRequest
from tests.e2e.chaos_checks import GpuObserver, check_all_frozen, check_answers
from tests.e2e.chaos_faults import Chaos, keep_agent_running
from tests.e2e.load import Traffic
from tests.e2e.stack import Stack, echo, running_stack, until

SEED = int(os.environ.get("CHAOS_SEED", "3"))
CHAOS_S = float(os.environ.get("CHAOS_SECONDS", "15"))
FUNCTIONS = {"ocr": 2, "speech": 2, "resize": 1, "embed": 1}
"""Instances per function, on three GPUs."""
QUEUE_S, TIMEOUT_S = 20, 10
SLACK_S = 5
HEAL_S = 30.0
GPU = {
    "migrate": True,
    "instances_per_gpu": 3,
    "lock_timeout": "200ms",
    "operation_timeout": "1s",
    "release_timeout": "3s",
}


def function(name: str) -> FunctionSpec:
    return replace(echo(name), timeout_ns=TIMEOUT_S * SECOND_NS, queue_timeout_ns=QUEUE_S * SECOND_NS)


@pytest.mark.slow
@pytest.mark.timeout(CHAOS_S + 200)
async def test_random_faults_under_load_and_recovery() -> None:
    async with running_stack("--gpus", "3", "--gib", "1", "--profile", "580", gpu_settings=GPU) as stack:
        for name, count in FUNCTIONS.items():
            await stack.deploy(function(name), target=count)
        with stack.driver() as driver, stack.driver() as witness_driver:
            chaos, observer = Chaos(stack, driver, random.Random(SEED)), GpuObserver(witness_driver)
            try:
                await run_chaos(stack, chaos, observer)
            except BaseException as error:
                error.add_note("\n".join([f"seed {SEED}:", *chaos.log, *await instance_states(stack, chaos)]))
                raise
        await stack.remove_functions(FUNCTIONS)
        assert not stack.leftovers()
        assert (await stack.node()).host_memory.reserved_bytes == 0


async def run_chaos(stack: Stack, chaos: Chaos, observer: GpuObserver) -> None:
    """Faults under load, then recovery, then the checks."""
    watching = asyncio.create_task(observer.run())
    keeping = asyncio.create_task(keep_agent_running(stack, chaos.note))
    traffics = [Traffic(stack, name, seed) for seed in (1, 2) for name in FUNCTIONS]
    load = [asyncio.create_task(t.run(100_000, most_at_once=8, longest_pause_s=0.4)) for t in traffics]
    background = [watching, keeping, *load]
    try:
        await inject_faults(chaos)
        await chaos.heal()
        await check_recovered(stack, chaos)
        assert not any(task.done() for task in background), background
        for task in load:
            task.cancel()
        await asyncio.gather(*load, return_exceptions=True)
        check_answers(traffics, chaos, observer, QUEUE_S + TIMEOUT_S + SLACK_S)
        await check_all_frozen(stack, chaos, FUNCTIONS, HEAL_S)
        assert not observer.shared(), observer.shared()[:5]
        assert observer.looks > 100
    finally:
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)


async def inject_faults(chaos: Chaos) -> None:
    """Inject faults one after the other, for CHAOS_S."""
    ends = time.monotonic() + CHAOS_S
    while time.monotonic() < ends:
        chaos.strike()
        await asyncio.sleep(chaos.source.uniform(0.02, 0.4))  # the rate of faults


async def check_recovered(stack: Stack, chaos: Chaos) -> None:
    """Every function answers correctly again and has all its instances, within HEAL_S."""
    ends = time.monotonic() + HEAL_S

    async def ready() -> bool:
        with suppress(HibernodeError, OSError):
            return (await stack.node()).state == types_pb2.Node.STATE_READY
        return False

    async def answers(name: str) -> None:
        async def right() -> bool:
            answer = await stack.ask(name, "/answer?n=5")
            return answer.status == 200 and answer.body.decode() == expected_answer(5)

        await until(f"{name} answers", right, ends - time.monotonic())

    async def all_there() -> bool:
        return Counter(one.function for one in await stack.instances()) == Counter(FUNCTIONS)

    await until("the agent is ready", ready, HEAL_S)
    await asyncio.gather(*(answers(name) for name in FUNCTIONS))
    chaos.note("every function answers")
    await until("every function has all its instances", all_there, ends - time.monotonic())
    for one in await stack.instances():
        await wake(stack, one.uid)
    await until("every function has all its instances still", all_there, HEAL_S)


async def wake(stack: Stack, uid: str) -> None:
    """Wake an instance: operations that hung while it was frozen now run, and a damaged instance is replaced."""
    with suppress(HibernodeError):
        async with stack.channel("agent") as channel:
            await channel.call(channel.instances.WakeInstance, WakeInstanceRequest(uid=uid), 20.0)


async def instance_states(stack: Stack, chaos: Chaos) -> list[str]:
    """The state of every instance, for failure messages."""
    found = [*map(str, chaos.driver.processes()), *map(str, chaos.driver.devices())]
    with suppress(HibernodeError, OSError):
        for one in await stack.instances():
            state = types_pb2.Instance.State.Name(one.state)
            found.append(
                f"{one.uid} {one.function} {state} pid {one.pid} on {list(one.gpu_uuids)} {one.in_flight} inside"
            )
        found += [
            f"{gpu.uuid} holders {list(gpu.holder_uids)} waiters {list(gpu.waiter_uids)} {gpu.cordoned_reason}"
            for gpu in (await stack.node()).gpus
        ]
    return [*found, stack.log_of("agent")[-6000:]]
