"""Random traffic from a seed (bursts and pauses) with all answers recorded, and the instances' own request logs."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from agent.examples.echo.__main__ import expected_answer
from tests.e2e.stack import Answer, Stack

Interval = tuple[int, int]


@dataclass
class Traffic:
    """`run` requests `/answer` of one function; records wrong answers and errors with their requests."""

    stack: Stack
    function: str
    seed: int
    answers: list[Answer] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    failed: list[Answer] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    async def run(self, requests: int, *, most_at_once: int, longest_pause_s: float) -> None:
        """Send `requests` in bursts of 1 to `most_at_once`, with pauses of up to `longest_pause_s` between them."""
        source = random.Random(self.seed)
        sent = 0
        while sent < requests:
            burst = min(source.choice([1, 1, 2, 5, most_at_once]), requests - sent)
            numbers = [sent + i for i in range(burst)]
            await asyncio.gather(*(self.one(number) for number in numbers))
            sent += burst
            await asyncio.sleep(source.uniform(0, longest_pause_s))  # part of the traffic

    async def one(self, number: int) -> None:
        try:
            answer = await self.stack.ask(self.function, f"/answer?n={number}")
        except (aiohttp.ClientError, TimeoutError) as error:
            self.broken.append(f"request {number}: {error!r}")
            return
        self.answers.append(answer)
        if answer.status != 200:
            self.failed.append(answer)
        elif answer.body.decode() != expected_answer(number):
            self.wrong.append(f"request {number}: {answer.body[:100]!r} from {answer.instance}")


def union_ns(intervals: Iterable[Interval]) -> int:
    """Length of the union of intervals."""
    total, end = 0, 0
    for begin, finish in sorted(intervals):
        if finish > end:
            total += finish - max(begin, end)
            end = finish
    return total


def read_truth(path: Path) -> dict[str, list[Interval]]:
    """Requests of each instance from its own log, on CLOCK_MONOTONIC."""
    found: dict[str, list[Interval]] = {}
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        found.setdefault(entry["instance"], []).append((entry["start_ns"], entry["end_ns"]))
    return found
