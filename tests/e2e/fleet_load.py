"""Traffic of a fleet: ten minutes' worth in less than one, from a seed; and each request's story, told by its client.

Time is compressed by `COMPRESSED`: pauses, lulls, service times and `freezeAfter` alike. Arrivals do not wait for
answers. Clients are as good ones are: a connection that is refused or not answered is tried again, which is not a
failed request; once connected nothing is ever sent twice, so each request has its own connection and is a POST (which
aiohttp would not repeat).
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import aiohttp

from agent.core.types import MILLISECOND_NS, SECOND_NS, FunctionSpec
from agent.examples.echo.__main__ import expected_answer
from tests.e2e.fleet_world import Fleet
from tests.e2e.stack import echo

COMPRESSED = 15
PAUSE_S, LULL_S, SERVICE_S = 6.0, (30.0, 90.0), (15.0, 90.0)
"""Before compression: mean pause between bursts, what a lull takes (one burst in `LULLS` follows one), the service."""
LULLS, ANSWERS = 10, 12
"""One request in `ANSWERS` asks what is in device memory, which takes no time to speak of."""
SIZES = (1, 1, 1, 2, 4)
RETRY_S, GIVE_UP_S = 0.05, 60.0


def ocr(log: Path) -> FunctionSpec:
    """One request at a time, as image models do."""
    return replace(_function("ocr", log), instance_concurrency=1)


def chat(log: Path) -> FunctionSpec:
    """Several at once, as language models do."""
    return replace(_function("chat", log), instance_concurrency=3)


def _function(name: str, log: Path) -> FunctionSpec:
    spec = echo(name, log)
    return replace(spec, idle=replace(spec.idle, freeze_after_ns=3 * SECOND_NS // COMPRESSED))


@dataclass(frozen=True, slots=True)
class Job:
    """One request to be: `number` >= 0 asks for the memory's answer, else the instance works for `work_ms`."""

    after_s: float
    """From the one before."""
    function: str
    work_ms: int
    number: int


def jobs(functions: tuple[str, ...], seed: int) -> Iterator[Job]:
    """Bursts and pauses without end."""
    source = random.Random(seed)
    for count in range(1_000_000):
        pause_s = source.uniform(*LULL_S) if count % LULLS == LULLS - 1 else source.expovariate(1 / PAUSE_S)
        function = source.choice(functions)
        for place in range(source.choice(SIZES)):
            work_ms = round(source.uniform(*SERVICE_S) / COMPRESSED * 1000)
            number = source.randrange(10_000) if source.randrange(ANSWERS) == 0 else -1
            yield Job(pause_s / COMPRESSED if place == 0 else 0.0, function, work_ms, number)


@dataclass(frozen=True, slots=True)
class Told:
    """What a client can tell of one request. `status` 0: the connection broke before the answer. From the moment it
    was written to the end, CLOCK_MONOTONIC ns; refused connections before that are `attempts`."""

    function: str
    status: int
    request_id: str
    instance: str
    began_ns: int
    ended_ns: int
    attempts: int
    trouble: str = ""

    @property
    def served(self) -> bool:
        return self.status == 200 and not self.trouble

    def during(self, at_ns: int) -> bool:
        return self.began_ns <= at_ns <= self.ended_ns


@dataclass
class Clients:
    """`run` sends jobs until it is cancelled or `stop` is called; `told` has every request that has ended."""

    fleet: Fleet
    told: list[Told] = field(default_factory=list)
    under_way: set[asyncio.Task[None]] = field(default_factory=set)

    async def run(self, source: Iterator[Job], for_s: float = float("inf")) -> None:
        """For so long, or until cancelled; what is under way goes on (`finish`)."""
        ends = time.monotonic() + for_s
        for job in source:
            if time.monotonic() + job.after_s > ends:
                return
            if job.after_s:
                await asyncio.sleep(job.after_s)  # the traffic's own shape
            self.send(job)

    def send(self, job: Job) -> None:
        task = asyncio.create_task(self._one(job))
        self.under_way.add(task)
        task.add_done_callback(self.under_way.discard)

    async def finish(self) -> None:
        """Every request has its end."""
        while self.under_way:
            await asyncio.gather(*self.under_way)

    async def _one(self, job: Job) -> None:
        http = self.fleet.http
        assert http is not None
        path = f"/answer?n={job.number}" if job.number >= 0 else f"/sleep?ms={job.work_ms}"
        url = f"{self.fleet.gateway}/fn/{job.function}{path}"
        gives_up = time.monotonic() + GIVE_UP_S
        attempts = 0
        while True:
            attempts += 1
            began = time.monotonic_ns()
            status, headers, body, trouble = 0, {}, b"", ""
            try:
                async with http.post(url, timeout=aiohttp.ClientTimeout(total=GIVE_UP_S)) as response:
                    status = response.status
                    headers = {name.lower(): value for name, value in response.headers.items()}
                    body = await response.read()
            except aiohttp.ClientConnectorError:
                if time.monotonic() < gives_up:
                    await asyncio.sleep(RETRY_S)  # the client's own pause before it tries again
                    continue
                trouble = "never connected"
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                trouble = repr(error)
            if status == 200 and not trouble:
                trouble = _wrong(job, body)
            elif not trouble:
                trouble = body.decode(errors="replace")[:300]
            told = Told(
                job.function, status, headers.get("x-fc-request-id", ""), headers.get("x-fc-instance-id", ""),
                began, time.monotonic_ns(), attempts, trouble,
            )  # fmt: skip
            self.told.append(told)
            return


def _wrong(job: Job, body: bytes) -> str:
    right = expected_answer(job.number) if job.number >= 0 else json.dumps({"slept_ms": job.work_ms}) + "\n"
    return "" if body.decode() == right else f"a wrong answer: {body[:100]!r}"


@dataclass(frozen=True, slots=True)
class Run:
    """One execution inside an instance, by its own word."""

    instance: str
    start_ns: int
    end_ns: int


def executions(log: Path) -> dict[str, list[Run]]:
    """By request id; more than one run of an id is a request that was sent twice. Everything is answered by now."""
    found: dict[str, list[Run]] = {}
    for line in log.read_text().splitlines():
        with suppress(json.JSONDecodeError):  # an instance that was killed while it wrote
            entry = json.loads(line)
            found.setdefault(entry["request_id"], []).append(Run(entry["instance"], entry["start_ns"], entry["end_ns"]))
    return found


def milliseconds(ns: int) -> float:
    return round(ns / MILLISECOND_NS, 1)
