"""The light example: fast, logs its requests correctly, and detects every lost byte of device memory."""

from __future__ import annotations

import socket
import time

import pytest

from agent.examples.echo.__main__ import expected_answer
from tests.examples.conftest import Start
from tests.fakes.emulated_driver import EmulatedNvidia, nvidia

__all__ = ["nvidia"]


def test_answers_on_one_connection_and_logs_request_times(start: Start) -> None:
    echo = start("echo")
    echo.wait_until_listening()
    before = time.monotonic_ns()
    assert echo.request("POST", "/invoke", b"hello", {"x-fc-request-id": "1-a"}) == (200, b"hello")
    assert echo.request("POST", "/x", iter([b"in ", b"pieces"]), {"x-fc-request-id": "1-b"})[0] == 200
    assert echo.json("GET", "/sleep?ms=30") == (200, {"slept_ms": 30})
    assert echo.json("GET", "/healthz") == (200, {"status": "ok"})
    assert echo.json("GET", "/")[1]["instance"] == "moon-1"
    after = time.monotonic_ns()
    lines = echo.logged(4)
    assert [line["request_id"] for line in lines[:2]] == ["1-a", "1-b"]
    assert len(lines) == 4, "the health probe is no request"
    assert all(before <= line["start_ns"] < line["end_ns"] <= after for line in lines)
    assert lines[2]["end_ns"] - lines[2]["start_ns"] >= 30_000_000


def test_reads_a_chunked_body(start: Start) -> None:
    echo = start("echo")
    echo.wait_until_listening()
    status, body = echo.request("POST", "/", iter([b"in ", b"pieces"]), {"Transfer-Encoding": "chunked"}, chunked=True)
    assert (status, body) == (200, b"in pieces")


@pytest.mark.real_time
def test_streams_events_immediately(start: Start) -> None:
    echo = start("echo")
    echo.wait_until_listening()
    echo.connection.request("GET", "/sse?events=3&ms=40")
    response = echo.connection.getresponse()
    assert response.headers["content-type"] == "text/event-stream"
    began = time.monotonic()
    assert response.readline() == b"id: 0\n"
    assert time.monotonic() - began < 0.1, "the first event waits for the others"
    assert response.read().count(b"data: event") == 3


@pytest.mark.parametrize("body", [b"5\r\nhel", b"zz\r\n"])
def test_truncated_or_malformed_body_does_not_stop_it(start: Start, body: bytes) -> None:
    echo = start("echo")
    echo.wait_until_listening()
    with socket.create_connection(("127.0.0.1", echo.port), 10) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + body)
        client.shutdown(socket.SHUT_WR)
        answer = client.recv(100)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 400 ")
    assert echo.request("POST", "/", b"still here") == (200, b"still here")


def test_verify_covers_every_byte(start: Start, nvidia: EmulatedNvidia) -> None:
    uuid = nvidia.control.devices()[1].uuid
    echo = start("echo", nvidia, VRAM_MIB="3", CUDA_VISIBLE_DEVICES=uuid)
    echo.wait_until_listening()
    assert echo.json("POST", "/initialize") == (200, {"vram_bytes": 3 << 20})
    assert echo.json("GET", "/verify") == (200, {"intact": True, "vram_bytes": 3 << 20})
    assert echo.request("GET", "/answer?n=5") == (200, expected_answer(5).encode())
    held = {p.pid: p.vram_bytes for p in nvidia.control.processes()}
    assert held[echo.process.pid][uuid] >= 3 << 20, "it is on the GPU that CUDA_VISIBLE_DEVICES names"

    nvidia.control.flip_byte(echo.process.pid, offset=(2 << 20) + 17)
    assert echo.json("GET", "/verify") == (500, {"intact": False, "vram_bytes": 3 << 20, "corrupt_mib": 2})
    assert echo.request("GET", "/answer?n=5") == (200, expected_answer(5).encode())
    nvidia.control.flip_byte(echo.process.pid, offset=5 * 7919)
    assert echo.request("GET", "/answer?n=5") != (200, expected_answer(5).encode())


def test_missing_driver_is_named(start: Start) -> None:
    echo = start("echo", VRAM_MIB="1", LD_LIBRARY_PATH="")
    echo.wait_until_listening()
    status, answer = echo.json("POST", "/initialize")
    assert status == 500
    assert "libcuda.so.1 can't be loaded" in answer["error"]
    assert echo.request("GET", "/answer?n=9") == (200, expected_answer(9).encode()), "without memory: the pattern"


def test_misbehaviour_on_request(start: Start) -> None:
    refusing = start("echo", INIT_STATUS="500", PRE_FREEZE_STATUS="404")
    refusing.wait_until_listening()
    assert refusing.request("POST", "/initialize")[0] == 500
    assert refusing.request("GET", "/pre-freeze")[0] == 404
    assert refusing.request("GET", "/pre-stop")[0] == 200
    with pytest.raises(ConnectionError):
        refusing.request("GET", "/crash?code=7")
    assert refusing.process.wait(10) == 7

    leaving = start("echo", EXIT_CODE="4")
    assert leaving.process.wait(10) == 4

    silent = start("echo", NEVER_LISTEN="1")
    while b"the port stays closed" not in silent.stderr.read_bytes():
        assert silent.process.poll() is None
        time.sleep(0.01)
    with pytest.raises(ConnectionRefusedError):
        silent.request("GET", "/")


@pytest.mark.real_time
def test_start_and_requests_are_fast(start: Start) -> None:
    """100 ms to listen and 1,000 requests/s on an idle machine; the limits leave room for a busy one."""
    echo = start("echo")
    assert echo.wait_until_listening() < 1.0
    began = time.monotonic()
    for _ in range(300):
        assert echo.request("POST", "/", b"x")[0] == 200
    assert 300 / (time.monotonic() - began) > 200
