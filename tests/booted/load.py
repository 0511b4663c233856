"""Requests through the gateway from a few clients, each one after the other; every answer is recorded.

The clients are one program in the host's network: `python -m tests.booted.load`. It writes one JSON line per request
and ends when its standard input is closed.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from threading import Timer
from typing import TextIO, cast

import aiohttp

from agent.examples.echo.__main__ import expected_answer
from tests.booted.machine import Machine
from tests.booted.root import ROOT
from tests.booted.site import GATEWAY

CLIENTS = 6
PAUSE_S = 0.01
ANSWER_S = 90.0
END_S = 100.0


@dataclass(frozen=True, slots=True)
class SentRequest:
    """One request, with CLOCK_MONOTONIC ns. `status` 0: no answer. `right`: the body matches the GPU memory."""

    began_ns: int
    ended_ns: int
    status: int
    right: bool
    instance: str
    queue_ms: float
    text: str

    @property
    def seconds(self) -> float:
        return (self.ended_ns - self.began_ns) / 1e9


@dataclass
class Load:
    """The requests so far; complete once the load has ended."""

    lines: TextIO
    asked: list[SentRequest] = field(default_factory=list)

    def go_on(self, answers: int) -> None:
        """Wait for this many answers to requests that start from now on."""
        now = time.monotonic_ns()
        while len(self.after(now)) < answers:
            line = self.lines.readline()
            assert line, "the load has ended early"
            self.asked.append(SentRequest(**json.loads(line)))

    @property
    def failed(self) -> list[SentRequest]:
        return [one for one in self.asked if one.status != 200 or not one.right]

    def after(self, at_ns: int) -> list[SentRequest]:
        """Requests that started later."""
        return [one for one in self.asked if one.began_ns > at_ns]

    def summary(self) -> str:
        """The waiting times in the gateway, for the test's output."""
        seconds = sorted(one.seconds for one in self.asked)
        queued = sorted(one.queue_ms for one in self.asked)
        p99 = queued[int(len(queued) * 0.99)]
        return (
            f"{len(seconds)} requests, {len(self.failed)} failed; in the gateway's queue p50 "
            f"{queued[len(queued) // 2]:.0f} ms, p99 {p99:.0f} ms, longest {queued[-1]:.0f} ms; "
            f"longest request {seconds[-1]:.2f} s"
        )


@contextmanager
def under_load(machine: Machine) -> Iterator[Load]:
    """Run the load during the block; complete after it. It has answers before the block starts."""
    with ExitStack() as stack:
        errors = stack.enter_context(tempfile.TemporaryFile("w+"))
        program = stack.enter_context(
            subprocess.Popen(
                [*machine.entry("-n"), sys.executable, "-m", "tests.booted.load"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=ROOT,
            )
        )
        stack.callback(program.kill)
        assert program.stdin is not None
        load = Load(cast("TextIO", program.stdout))
        load.go_on(20)
        yield load
        program.stdin.close()
        overdue = Timer(END_S, program.kill)
        stack.callback(overdue.cancel)
        overdue.start()
        load.asked.extend(SentRequest(**json.loads(line)) for line in load.lines)
        code = program.wait(END_S)
        errors.seek(0)
        assert code == 0, errors.read()[-2000:]


async def _client(session: aiohttp.ClientSession, number: int, over: asyncio.Event) -> None:
    while not over.is_set():
        number += CLIENTS
        asked = await _ask(session, number)
        print(json.dumps(asdict(asked)), flush=True)  # noqa: T201 - the program's output
        await asyncio.sleep(PAUSE_S)  # part of the load


async def _ask(session: aiohttp.ClientSession, number: int) -> SentRequest:
    began = time.monotonic_ns()
    try:
        async with session.get(f"{GATEWAY}/fn/echo/answer?n={number}") as response:
            text = await response.text()
            right = text == expected_answer(number)
            instance = response.headers.get("x-fc-instance-id", "")
            queue_ms = float(response.headers.get("x-hibernode-queue-ms", "0"))
            shown = "" if response.status == 200 and right else text[:300]
            return SentRequest(began, time.monotonic_ns(), response.status, right, instance, queue_ms, shown)
    except (aiohttp.ClientError, TimeoutError) as error:
        return SentRequest(began, time.monotonic_ns(), 0, False, "", 0.0, repr(error)[:300])


async def _main() -> None:
    over = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin, over.set)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=ANSWER_S)) as session:
        await asyncio.gather(*(_client(session, number, over) for number in range(CLIENTS)))


if __name__ == "__main__":
    asyncio.run(_main())
