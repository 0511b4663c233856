"""Ten times the capacity: admitted requests are served in time, the rest is refused at once, and nothing grows."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import aiohttp
import psutil
import pytest

from agent.core.types import MIB, MILLISECOND_NS, SECOND_NS
from agent.v1 import function_service_pb2 as functions_pb
from tests.e2e.stack import CALL_S, Stack, echo, running_stack, until

INSTANCES = 2
WORK_MS = 50
CAPACITY = INSTANCES * 1000 / WORK_MS
"""Requests per second."""
FACTOR = 10
OVERLOAD_S = 60.0
QUEUE_LENGTH = 40
QUEUE_TIMEOUT_S = 5.0

Record = Callable[[str, object], None]


@dataclass
class Flood:
    """Open loop: requests are sent on time, whatever happens to earlier ones."""

    stack: Stack
    statuses: Counter[int] = field(default_factory=Counter)
    admitted_s: list[float] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)
    without_advice: int = 0
    broken: list[str] = field(default_factory=list)

    async def run(self, rate: float, seconds: float) -> int:
        """Send at this rate; returns how many."""
        began, sent, tasks = time.monotonic(), 0, set[asyncio.Task[None]]()
        while (now := time.monotonic() - began) < seconds:
            while sent < now * rate:
                tasks.add(asyncio.create_task(self._one()))
                sent += 1
            tasks = {task for task in tasks if not task.done()}
            await asyncio.sleep(0.005)  # part of the traffic
        await asyncio.gather(*tasks)
        return sent

    async def _one(self) -> None:
        assert self.stack.http is not None
        began = time.monotonic()
        try:
            async with self.stack.http.get(
                f"http://{self.stack.gateway}/fn/flooded/sleep?ms={WORK_MS}", timeout=aiohttp.ClientTimeout(total=60)
            ) as answer:
                await answer.read()
                took = time.monotonic() - began
                self.statuses[answer.status] += 1
                if answer.status == 200:
                    self.admitted_s.append(took)
                else:
                    self.refused_s.append(took)
                    self.without_advice += answer.status == 429 and "retry-after" not in answer.headers
        except (aiohttp.ClientError, TimeoutError) as error:
            self.broken.append(repr(error))


async def queued(stack: Stack) -> int:
    async with stack.channel("scheduler") as channel:
        wanted = functions_pb.GetFunctionRequest(name="flooded")
        return int((await channel.call(channel.functions.GetFunction, wanted, CALL_S)).function.queued)


@pytest.mark.slow
@pytest.mark.real_time
@pytest.mark.timeout(180)
async def test_overload_admits_only_what_can_be_served(record_property: Record) -> None:
    spec = replace(
        echo("flooded"), queue_length=QUEUE_LENGTH, queue_timeout_ns=int(QUEUE_TIMEOUT_S * SECOND_NS),
        idle=replace(echo("flooded").idle, freeze_after_ns=500 * MILLISECOND_NS),
    )  # fmt: skip
    async with running_stack() as stack:
        await stack.deploy(spec, INSTANCES)
        flood = Flood(stack)
        await flood.run(CAPACITY / 2, 2.0)  # warm up with a normal load
        assert flood.statuses == Counter({200: flood.statuses[200]})
        process = psutil.Process(stack.processes["scheduler"].pid)
        before = process.memory_info().rss
        most_queued = 0
        flood = Flood(stack)
        overload = asyncio.create_task(flood.run(FACTOR * CAPACITY, OVERLOAD_S))
        most_rss = before
        while not overload.done():
            most_queued = max(most_queued, await queued(stack))
            most_rss = max(most_rss, process.memory_info().rss)
            await asyncio.wait([overload], timeout=0.1)
        sent = await overload
        ended = time.monotonic()

        async def calm() -> bool:
            return await queued(stack) == 0

        await until("the queue is empty", calm, 2.0)
        answer = await stack.ask("flooded", f"/sleep?ms={WORK_MS}")
        recovered_s = time.monotonic() - ended
        figures = {
            "sent": sent,
            "statuses": dict(flood.statuses),
            "most_queued": most_queued,
            "grown_mib": round((most_rss - before) / MIB, 1),
            "admitted_worst_s": round(max(flood.admitted_s), 3),
            "refused_p99_s": round(sorted(flood.refused_s)[int(0.99 * len(flood.refused_s))], 3),
            "recovered_s": round(recovered_s, 3),
        }
        record_property("overload", json.dumps(figures))
        assert not flood.broken, flood.broken[:3]
        assert sum(flood.statuses.values()) == sent, "every request is answered exactly once"
        assert set(flood.statuses) == {200, 429}, figures
        assert not flood.without_advice, "429 says when to come again"
        assert flood.statuses[200] >= 0.7 * CAPACITY * OVERLOAD_S, figures
        assert flood.statuses[429] >= 0.5 * sent, figures
        assert 0 < most_queued <= QUEUE_LENGTH, figures
        assert max(flood.admitted_s) <= QUEUE_TIMEOUT_S + WORK_MS / 1000 + 1, figures
        assert most_rss - before < 64 * MIB, figures
        assert answer.status == 200
        assert recovered_s < 2.0, figures
        await stack.remove_functions(["flooded"])
