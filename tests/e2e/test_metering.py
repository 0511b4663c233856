"""Metered active time lies between the instances' and the callers' records, within 0.1 %."""

from __future__ import annotations

import asyncio

import pytest

from tests.e2e.ledger import active_ns, by_instance, check_contiguous
from tests.e2e.load import read_truth, union_ns
from tests.e2e.stack import Answer, echo, running_stack, until

REQUESTS = 9
SERVICE_MS = 5_000
BOUND = 1_000
"""The difference is at most 1 / BOUND (agent/docs/specification.md)."""


@pytest.mark.timeout(120)
async def test_active_time_is_metered_exactly() -> None:
    """Requests of five seconds, some overlapping, some after a wake: long enough to tell 0.1 % from noise."""
    async with running_stack() as stack:
        log = stack.folder / "requests.log"
        log.touch()
        await stack.deploy(echo("ocr", log), target=2)

        async def client(first_pause_s: float) -> list[Answer]:
            await asyncio.sleep(first_pause_s)  # part of the traffic: callers start at different times
            found = []
            for number in range(REQUESTS // 3):
                found.append(await stack.ask("ocr", f"/sleep?ms={SERVICE_MS}"))
                await asyncio.sleep(0.3 * (number % 2))  # every other time the instance freezes meanwhile
            return found

        answers = [answer for some in await asyncio.gather(*map(client, (0, 0.7, 1.3))) for answer in some]
        assert all(answer.status == 200 for answer in answers)

        async def all_ended() -> bool:
            return not any(one.in_flight for one in await stack.instances())

        await until("the last slot is given back", all_ended)
        windows = await stack.windows()
        check_contiguous(windows)
        assert sum(window.invocations for window in windows) == len(answers)
        truth, seen = read_truth(log), {answer.instance for answer in answers}
        mine = by_instance(windows)
        for uid in seen:
            app_ns = union_ns(truth[uid])
            client_ns = union_ns((a.began_ns, a.ended_ns) for a in answers if a.instance == uid)
            metered_ns = active_ns(mine[uid])
            # The instance reads the request line after the grant and logs the end before the last byte is forwarded:
            # metering can only exceed the instance's time, and stays within the client's.
            assert app_ns <= metered_ns <= client_ns, f"{uid}: {app_ns} <= {metered_ns} <= {client_ns}"
            assert (metered_ns - app_ns) * BOUND <= app_ns, f"{uid}: {metered_ns} ns metered for {app_ns} ns of work"
