"""x-fc-log-result: the request's part of the instance's log, and its cost."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from agent.core.errors import UnavailableError
from agent.core.types import MILLISECOND_NS, Handle, ProcessId
from agent.host.ingress.invoke_log import RESULT_BYTES, between_markers, log_result
from agent.http.exchange import Exchange
from tests.host.ingress.test_ingress import a_door
from tests.host.rig import OCR, eventually, hangs

ID = "1-67a59f35-150c1267-f381ba1c085c"
START = b"FC Invoke Start RequestId: " + ID.encode() + b"\n"
END = b"FC Invoke End RequestId: " + ID.encode() + b"\n"
OTHER = b"FC Invoke Start RequestId: 1-0-0-1\nother's\nFC Invoke End RequestId: 1-0-0-1\n"
HANDLE = Handle("i-1", ProcessId("boot", 1, 1), "127.0.0.1", 9000)


@pytest.mark.parametrize(
    ("log", "section", "whole"),
    [
        (OTHER + START + b"mine\n" + END + OTHER, START + b"mine\n" + END, True),
        (START + END.rstrip(b"\n"), START + END.rstrip(b"\n"), True),
        (b"[app] " + START + b"x\n[app] " + END + b"more", START + b"x\n[app] " + END, True),
        (b"scrolled away\n" + END + OTHER, b"scrolled away\n" + END, True),
        (OTHER + START + b"mine\nTraceback", START + b"mine\nTraceback", False),
        (OTHER, b"", False),
        (b"", b"", False),
        (START.replace(ID.encode(), ID.encode() + b"0") + START + b"mine\n" + END, START + b"mine\n" + END, True),
        (START + b"mine\n" + END.replace(b"\n", b"0\n"), START + b"mine\n" + END.replace(b"\n", b"0\n"), False),
        (END + START, START, False),  # an End marker before its Start belongs to another request
    ],
)
def test_what_belongs_to_a_request(log: bytes, section: bytes, whole: bool) -> None:
    assert between_markers(log, ID.encode()) == (section, whole)


class Logs:
    """A log that grows between two reads."""

    def __init__(self, *looks: bytes | Exception) -> None:
        self.looks = list(looks)
        self.asked = 0

    async def read_log(self, handle: Handle, tail_bytes: int) -> bytes:
        self.asked += 1
        look = self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]
        if isinstance(look, Exception):
            raise look
        return look


@pytest.mark.parametrize(
    ("looks", "wait_s", "expected"),
    [
        ([START + b"a\n" + END], 10.0, START + b"a\n" + END),
        ([b"", START, START + b"a\n" + END], 10.0, START + b"a\n" + END),  # it is waited for
        ([START + b"streaming\n"], 0.02, START + b"streaming\n"),  # but not for ever
        ([b"prints no markers\n"], 0.02, b""),
        ([START, OSError("gone")], 10.0, START),
        ([UnavailableError("ENGINE_UNAVAILABLE", "the engine is away")], 10.0, b""),
        ([START + b"x" * 9000 + b"\n" + END], 0.0, (START + b"x" * 9000 + b"\n" + END)[-RESULT_BYTES:]),
    ],
)
async def test_the_end_is_waited_for_and_four_kilobytes_come(
    looks: list[bytes | Exception], wait_s: float, expected: bytes
) -> None:
    assert base64.b64decode(await log_result(Logs(*looks), HANDLE, ID, wait_s)) == expected


async def test_an_engine_that_does_not_answer_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stuck:
        async def read_log(self, handle: Handle, tail_bytes: int) -> bytes:
            await asyncio.get_running_loop().create_future()
            return b""

    monkeypatch.setattr("agent.host.ingress.invoke_log.READ_S", 0.02)
    assert await log_result(Stuck(), HANDLE, ID, 0.0) == b""


# ---- through the ingress --------------------------------------------------------------------------------------------


def prints(say: Callable[[bytes], None], before: bytes, after: bytes) -> Callable[[Exchange], Awaitable[None]]:
    """An instance that prints like a custom container does."""

    async def serve(exchange: Exchange) -> None:
        request_id = exchange.head.get(b"x-fc-request-id") or b""
        say(b"FC Invoke Start RequestId: " + request_id + b"\n" + before)
        await exchange.buffer_body(1 << 20)
        say(after + b"FC Invoke End RequestId: " + request_id + b"\n")
        await exchange.answer(200, [(b"x-fc-log-result", b"forged")], b"done")

    return serve


async def test_tail_brings_what_the_request_printed() -> None:
    async with a_door() as door:
        actor = await door.rig.running()

        def say(text: bytes) -> None:
            door.rig.runtime.print(actor.uid, text)

        say(OTHER)
        door.rig.app.answers["/ocr"] = prints(say, b"page 1\n", b"done\n")
        status, headers, body = await door.ask(actor, f"x-fc-request-id: {ID}", "x-fc-log-type: Tail")
        assert (status, body) == (200, b"done")
        assert base64.b64decode(headers[b"x-fc-log-result"]) == START + b"page 1\ndone\n" + END
        assert not door.rig.app.requests[-1].get(b"x-fc-log-type"), "the instance hears nothing of it"


async def test_without_tail_no_log_is_read_and_none_can_be_forged() -> None:
    async with a_door() as door:
        actor = await door.rig.running()
        door.rig.app.answers["/ocr"] = prints(lambda text: None, b"", b"")

        async def never(handle: Handle, tail_bytes: int) -> bytes:
            raise AssertionError("nobody asked for it")

        door.rig.runtime.read_log = never  # type: ignore[method-assign]
        for more in ([], ["x-fc-log-type: None"]):
            status, headers, _ = await door.ask(actor, *more)
            assert status == 200
            assert b"x-fc-log-result" not in headers


async def test_timed_out_request_returns_its_log_so_far() -> None:
    async with a_door() as door:
        actor = await door.rig.running(replace(OCR, timeout_ns=30 * MILLISECOND_NS))
        door.rig.runtime.print(actor.uid, START + b"loading page 700\n")
        door.rig.app.answers["/ocr"] = hangs
        status, headers, _ = await door.ask(actor, f"x-fc-request-id: {ID}", "x-fc-log-type: Tail")
        assert status == 504
        assert base64.b64decode(headers[b"x-fc-log-result"]) == START + b"loading page 700\n"


async def test_client_that_leaves_while_its_log_is_read_frees_the_slot() -> None:
    async with a_door() as door:
        actor = await door.rig.running()
        reading = asyncio.Event()

        async def stuck(handle: Handle, tail_bytes: int) -> bytes:
            reading.set()
            await asyncio.get_running_loop().create_future()
            return b""

        door.rig.runtime.read_log = stuck  # type: ignore[method-assign]
        wire = await door.send(actor, "x-fc-log-type: Tail")
        await asyncio.wait_for(reading.wait(), 5)
        assert actor.gate.in_flight == 1
        wire.reset()
        await eventually(lambda: actor.gate.in_flight == 0)
