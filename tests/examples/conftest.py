"""Runs an example like the process runtime does: a program with a port, without an agent."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

DEADLINE_S = 30.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Program:
    """A running example. `request` makes one call on a kept-alive connection."""

    def __init__(self, module: str, folder: Path, environment: dict[str, str]) -> None:
        self.port = free_port()
        self.request_log = folder / "requests.jsonl"
        self.stderr = folder / "stderr"
        own = {
            "FC_CUSTOM_LISTEN_PORT": str(self.port),
            "REQUEST_LOG": str(self.request_log),
            "FC_INSTANCE_ID": "moon-1",
        }
        with self.stderr.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module], env={**os.environ, **own, **environment}, stderr=stderr
            )
        self.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE_S)

    def wait_until_listening(self) -> float:
        """Wait for the port; returns the seconds."""
        began = time.monotonic()
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), DEADLINE_S).close()
            except ConnectionRefusedError:
                assert self.process.poll() is None, self.stderr.read_text()
                assert time.monotonic() - began < DEADLINE_S, "it does not listen"
                time.sleep(0.002)  # another program's port: there is no event to wait for
            else:
                return time.monotonic() - began

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, chunked: bool = False
    ) -> tuple[int, bytes]:
        self.connection.request(method, path, body, headers or {}, encode_chunked=chunked)
        response = self.connection.getresponse()
        return response.status, response.read()

    def json(self, method: str, path: str, body: bytes | None = None) -> tuple[int, Any]:
        status, content = self.request(method, path, body)
        return status, json.loads(content)

    def logged(self, count: int) -> list[dict[str, Any]]:
        """The request log once it has `count` lines: lines follow their answers."""
        deadline = time.monotonic() + DEADLINE_S
        while len(lines := self.request_log.read_text().splitlines()) < count:
            assert time.monotonic() < deadline, lines
            time.sleep(0.002)
        return [json.loads(line) for line in lines]

    def close(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.wait(DEADLINE_S)


Start = Callable[..., Program]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """start("echo", VRAM_MIB="8", ...) returns a program that may not listen yet; it ends after the test."""
    programs: list[Program] = []

    def start_one(name: str, driver: Any = None, **environment: str) -> Program:
        visible = dict(driver.environment) if driver is not None else {}
        programs.append(Program(f"agent.examples.{name}", tmp_path, {**visible, **environment}))
        return programs[-1]

    yield start_one
    for program in programs:
        program.close()
