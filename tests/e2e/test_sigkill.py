"""Thirty kills of the agent under load: few requests fail, instances survive, and the usage is right."""

from __future__ import annotations

import asyncio
import random
import time

import pytest

from agent.core.types import MILLISECOND_NS, SECOND_NS
from agent.v1 import types_pb2
from tests.e2e.ledger import active_ns, by_instance, check_contiguous
from tests.e2e.load import Traffic, read_truth, union_ns
from tests.e2e.stack import Stack, echo, running_stack

KILLS = 30
SEED = 7
FUNCTIONS = ("ocr", "speech")
"""Two instances of each on two GPUs, one of ocr and one of speech per GPU, so that they take turns."""


async def kill_and_restart(stack: Stack, source: random.Random) -> int:
    """SIGKILL the agent at a random moment under load; returns the time (monotonic ns)."""
    await asyncio.sleep(source.uniform(0.05, 0.6))  # the random moment
    at = time.monotonic_ns()
    stack.kill_agent()
    await asyncio.sleep(source.choice([0.0, 0.0, 0.3]))  # some restarts are delayed
    await stack.start_agent()
    return at


@pytest.mark.timeout(300)
async def test_thirty_agent_kills_under_load() -> None:
    async with running_stack() as stack:
        log = stack.folder / "requests.log"
        log.touch()
        began_ns = time.monotonic_ns()
        for function in FUNCTIONS:
            await stack.deploy(echo(function, log), target=2)
        before = {one.uid: one.pid for one in await stack.instances()}
        traffics = [Traffic(stack, function, seed) for function in FUNCTIONS for seed in (1, 2, 3)]
        load = asyncio.gather(*(t.run(100_000, most_at_once=20, longest_pause_s=0.2) for t in traffics))
        source = random.Random(SEED)
        kills = [await kill_and_restart(stack, source) for _ in range(KILLS)]
        await asyncio.sleep(1.0)  # a second of load without a kill, in which the ledger is written
        load.cancel()
        await asyncio.gather(load, return_exceptions=True)
        await stack.wait_for_state(types_pb2.Instance.STATE_FROZEN, 4)

        check_answers(traffics, kills)
        after = {one.uid: one.pid for one in await stack.instances()}
        assert after == before, "instances survive, none is started twice"
        await check_ledger(stack, len(kills), began_ns)
        await check_nothing_leaked(stack, set(before.values()))
        await stack.remove_functions(FUNCTIONS)
        assert not stack.leftovers()


def check_answers(traffics: list[Traffic], kills: list[int]) -> None:
    """Only requests inside the agent at a kill fail, with 502; all others are answered correctly."""
    for traffic in traffics:
        assert not traffic.wrong, traffic.wrong[:5]
        assert not traffic.broken, traffic.broken[:5]
        for answer in traffic.failed:
            during = any(answer.began_ns <= kill <= answer.ended_ns for kill in kills)
            text = f"{answer.status} {answer.body[:300]!r} {answer.headers}"
            assert answer.status == 502, text
            assert during, f"no kill while it was under way: {text}"
    answered = sum(len(traffic.answers) for traffic in traffics)
    assert answered > 300, f"{answered} answers are hardly a load"


async def check_ledger(stack: Stack, kills: int, began_ns: int) -> None:
    """Windows are contiguous from the start; a kill loses at most a second of active time and adds none."""
    windows = await stack.windows()
    check_contiguous(windows)
    truth = read_truth(stack.folder / "requests.log")
    for uid, mine in by_instance(windows).items():
        assert mine[0].start_mono_ns < began_ns + 20 * SECOND_NS, f"{uid}: the ledger forgot its beginning"
        assert any(window.estimated for window in mine), f"{uid}: no gap is marked as estimated"
        requests = truth.get(uid, [])
        app_ns = union_ns(requests)
        metered_ns = active_ns(mine)
        assert metered_ns >= app_ns - kills * SECOND_NS, f"{uid}: {app_ns} ns of work, {metered_ns} ns metered"
        # The agent adds the time from grant to request line, and from the answer's last byte to the release.
        slack_ns = len(requests) * 10 * MILLISECOND_NS
        assert metered_ns <= app_ns + slack_ns, f"{uid}: {metered_ns} ns metered for {app_ns} ns of work"


async def check_nothing_leaked(stack: Stack, pids: set[int]) -> None:
    """Check processes, cgroups, the GPU allocator and device memory once all instances are frozen."""
    leftovers = stack.leftovers()
    assert len(leftovers) == 8, f"four processes and four cgroups: {leftovers}"
    node = await stack.node()
    assert [list(gpu.holder_uids) for gpu in node.gpus] == [[], []]
    assert not any(gpu.cordoned_reason for gpu in node.gpus)
    with stack.driver() as driver:
        assert all(device.used_bytes == 0 for device in driver.devices())
        assert {process.pid for process in driver.processes()} == pids
