"""The traffic of a fleet: ten minutes in less than one, from a seed, with a record of each request by its client.

`COMPRESSED` compresses pauses, lulls, service times and `freezeAfter`. Arrivals do not wait for answers. Clients retry
a connection that is refused or not accepted, which is no failed request. Once connected they never send a request
twice: each has its own connection and is a POST (which aiohttp does not repeat).
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
"""Before compression: mean pause between bursts, length of a lull (after one burst in `LULLS`), service time."""
LULLS, ANSWERS = 10, 12
"""One request in `ANSWERS` asks for the device memory's answer, which takes almost no time."""
SIZES = (1, 1, 1, 2, 4)
RETRY_S, GIVE_UP_S = 0.05, 60.0


def ocr(log: Path) -> FunctionSpec:
    """One request at a time, like an image model."""
    return replace(_function("ocr", log), instance_concurrency=1)


def chat(log: Path) -> FunctionSpec:
    """Several at once, like a language model."""
    return replace(_function("chat", log), instance_concurrency=3)


def _function(name: str, log: Path) -> FunctionSpec:
    spec = echo(name, log)
    return replace(spec, idle=replace(spec.idle, freeze_after_ns=3 * SECOND_NS // COMPRESSED))


@dataclass(frozen=True, slots=True)
class Job:
    """A planned request: `number` >= 0 asks for the memory's answer, otherwise the instance works for `work_ms`."""

    after_s: float
    """Delay after the previous request."""
    function: str
    work_ms: int
    number: int


def jobs(functions: tuple[str, ...], seed: int) -> Iterator[Job]:
    """Yield bursts and pauses endlessly."""
    source = random.Random(seed)
    for count in range(1_000_000):
        pause_s = source.uniform(*LULL_S) if count % LULLS == LULLS - 1 else source.expovariate(1 / PAUSE_S)
        function = source.choice(functions)
        for place in range(source.choice(SIZES)):
            work_ms = round(source.uniform(*SERVICE_S) / COMPRESSED * 1000)
            number = source.randrange(10_000) if source.randrange(ANSWERS) == 0 else -1
            yield Job(pause_s / COMPRESSED if place == 0 else 0.0, function, work_ms, number)


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """A request as its client saw it, from the write to the end in CLOCK_MONOTONIC ns. `status` 0: the connection broke
    before the answer. `attempts` includes refused connections."""

    function: str
    status: int
    request_id: str
    instance: str
    began_ns: int
    ended_ns: int
    attempts: int
    error_text: str = ""

    @property
    def served(self) -> bool:
        return self.status == 200 and not self.error_text

    def during(self, at_ns: int) -> bool:
        return self.began_ns <= at_ns <= self.ended_ns


@dataclass
class Clients:
    """`run` sends requests until it is cancelled or `stop` is called; `records` has all that have ended."""

    fleet: Fleet
    records: list[RequestRecord] = field(default_factory=list)
    under_way: set[asyncio.Task[None]] = field(default_factory=set)

    async def run(self, source: Iterator[Job], for_s: float = float("inf")) -> None:
        """Send for this long, or until cancelled; running requests continue (`finish`)."""
        ends = time.monotonic() + for_s
        for job in source:
            if time.monotonic() + job.after_s > ends:
                return
            if job.after_s:
                await asyncio.sleep(job.after_s)  # part of the traffic
            self.send(job)

    def send(self, job: Job) -> None:
        task = asyncio.create_task(self._one(job))
        self.under_way.add(task)
        task.add_done_callback(self.under_way.discard)

    async def finish(self) -> None:
        """Wait for the end of every request."""
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
            status, headers, body, error_text = 0, {}, b"", ""
            try:
                async with http.post(url, timeout=aiohttp.ClientTimeout(total=GIVE_UP_S)) as response:
                    status = response.status
                    headers = {name.lower(): value for name, value in response.headers.items()}
                    body = await response.read()
            except aiohttp.ClientConnectorError:
                if time.monotonic() < gives_up:
                    await asyncio.sleep(RETRY_S)  # the client's pause before a retry
                    continue
                error_text = "never connected"
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                error_text = repr(error)
            if status == 200 and not error_text:
                error_text = _wrong(job, body)
            elif not error_text:
                error_text = body.decode(errors="replace")[:300]
            record = RequestRecord(
                job.function, status, headers.get("x-fc-request-id", ""), headers.get("x-fc-instance-id", ""),
                began, time.monotonic_ns(), attempts, error_text,
            )  # fmt: skip
            self.records.append(record)
            return


def _wrong(job: Job, body: bytes) -> str:
    right = expected_answer(job.number) if job.number >= 0 else json.dumps({"slept_ms": job.work_ms}) + "\n"
    return "" if body.decode() == right else f"a wrong answer: {body[:100]!r}"


@dataclass(frozen=True, slots=True)
class Execution:
    """One execution as logged by the instance."""

    instance: str
    start_ns: int
    end_ns: int


def executions(log: Path) -> dict[str, list[Execution]]:
    """Executions by request id, once all are answered; two of the same id mean that a request was sent twice."""
    found: dict[str, list[Execution]] = {}
    for line in log.read_text().splitlines():
        with suppress(json.JSONDecodeError):  # the instance was killed while writing
            entry = json.loads(line)
            found.setdefault(entry["request_id"], []).append(
                Execution(entry["instance"], entry["start_ns"], entry["end_ns"])
            )
    return found


def milliseconds(ns: int) -> float:
    return round(ns / MILLISECOND_NS, 1)
