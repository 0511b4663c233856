"""Tests the stand-alone worker script: its messages, how it finds the driver, and that it dies with the agent."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from agent.adapters.cuda.driver_worker import CHECKPOINT, LOCK, RESTORE, STATE, UNLOCK, uuid_bytes
from agent.adapters.cuda.driver_worker_process import WORKER_SCRIPT
from agent.core.types import MIB
from tests.fakes.emulated_driver import CudaTarget, EmulatedNvidia

DEADLINE_S = 20.0


class Worker:
    """The script at the other end of a socket."""

    def __init__(self, environment: Mapping[str, str], parent: int | None = None) -> None:
        self.channel, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.channel.settimeout(DEADLINE_S)
        with other:
            number = str(other.fileno())
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(WORKER_SCRIPT), number, str(parent or os.getpid()), "0"],
                pass_fds=(other.fileno(),),
                env=dict(environment),
            )

    def receive(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self.channel.recv(1 << 17))
        return message

    def ask(self, *calls: tuple[int, int, int, list[list[str]]]) -> list[list[int]]:
        """Rows of [code, state code, state, microseconds]."""
        self.channel.send(json.dumps({"id": 5, "calls": calls}).encode())
        answer = self.receive()
        assert answer["id"] == 5
        rows: list[list[int]] = answer["answers"]
        return rows

    def end(self) -> int:
        self.channel.close()
        return self.process.wait(DEADLINE_S)


@contextmanager
def worker(environment: Mapping[str, str], parent: int | None = None) -> Iterator[Worker]:
    it = Worker(environment, parent)
    try:
        yield it
    finally:
        it.process.kill()
        it.end()


@pytest.fixture
def target(nvidia: EmulatedNvidia) -> Iterator[CudaTarget]:
    program = CudaTarget(nvidia.environment)
    program.fill(MIB)
    yield program
    program.end()


def test_a_whole_cycle_in_two_messages(nvidia: EmulatedNvidia, target: CudaTarget) -> None:
    with worker(nvidia.environment) as it:
        assert it.receive() == {"hello": 13000, "error": ""}
        pid = target.pid
        asleep = it.ask((LOCK, pid, 1000, []), (CHECKPOINT, pid, 0, []), (STATE, pid, 0, []))
        assert [row[:3] for row in asleep] == [[0, -1, -1], [0, -1, -1], [0, 0, 2]]
        awake = it.ask((RESTORE, pid, 0, []), (UNLOCK, pid, 0, []), (STATE, pid, 0, []))
        assert [row[:3] for row in awake] == [[0, -1, -1], [0, -1, -1], [0, 0, 0]]
        assert all(row[3] > 0 for row in asleep + awake)
    assert target.verify()


def test_batch_stops_at_first_failure_and_reads_the_state(nvidia: EmulatedNvidia, target: CudaTarget) -> None:
    with worker(nvidia.environment) as it:
        it.receive()
        rows = it.ask((CHECKPOINT, target.pid, 0, []), (LOCK, target.pid, 0, []))
        assert [row[:3] for row in rows] == [[401, 0, 0]]  # illegal state: it is running, not locked


def test_process_without_cuda_is_not_a_failure(nvidia: EmulatedNvidia, target: CudaTarget) -> None:
    with worker(nvidia.environment) as it:
        it.receive()
        rows = it.ask((STATE, os.getpid(), 0, []), (STATE, target.pid, 0, []))
        assert rows[0][0] == 0
        assert rows[0][1] in (1, 3)
        assert rows[1][:3] == [0, 0, 0]


def test_worker_ends_when_the_agent_closes_the_socket(nvidia: EmulatedNvidia) -> None:
    it = Worker(nvidia.environment)
    it.receive()
    assert it.end() == 0


def test_worker_does_not_serve_another_parent(nvidia: EmulatedNvidia) -> None:
    with worker(nvidia.environment, parent=1) as it:
        assert it.channel.recv(100) == b""
        assert it.process.wait(DEADLINE_S) == 1


def test_worker_dies_with_a_killed_agent(nvidia: EmulatedNvidia) -> None:
    # The agent is a shell's child here: it starts a worker, prints its pid, and is killed without a clean-up.
    agent = """
import os, socket, subprocess, sys, signal
ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
leaked = os.dup(ours.fileno()); os.set_inheritable(leaked, True)
p = subprocess.Popen([sys.executable, "-I", "-S", sys.argv[1], str(its.fileno()), str(os.getpid()), "0"],
                     pass_fds=(its.fileno(), leaked))
ours.recv(1000)
print(p.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run(
        [sys.executable, "-c", agent, str(WORKER_SCRIPT)],
        env=dict(nvidia.environment),
        capture_output=True,
        check=False,
    )
    assert_ends(int(done.stdout))


def assert_ends(pid: int) -> None:
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    with open(pidfd, closefd=True) as held:
        poll = select.poll()
        poll.register(held, select.POLLIN)
        assert poll.poll(DEADLINE_S * 1000)


@pytest.mark.parametrize(
    ("source", "error"),
    [
        (None, "can't be loaded"),
        # The pitfall of drivers 550 and 555: success, and a null pointer.
        ("int cuGetProcAddress_v2(const char*s,void**p,int v,unsigned long f,int*q){*p=0;*q=1;return 0;}", "install"),
        ("int cuGetProcAddress(const char*s,void**p,int v,unsigned long f){return 500;}", "install driver 570"),
        ("int nothing;", "install driver 570"),
        # Newer drivers refuse a version that they don't have by INVALID_VALUE.
        (
            "int cuGetProcAddress_v2(const char*s,void**p,int v,unsigned long f,int*q){*p=0;return 1;}",
            "(CUDA 12.5) has no cuCheckpointProcessGetState (answer 1): install driver 570",
        ),
        ("#define CUDA 13000\nint nothing;", "its version should"),
    ],
)
def test_driver_without_the_functions_is_reported_at_start(tmp_path: Path, source: str | None, error: str) -> None:
    if source is not None:
        version = "\n#ifndef CUDA\n#define CUDA 12050\n#endif\nint cuDriverGetVersion(int*v){*v=CUDA;return 0;}"
        code = tmp_path / "old.c"
        code.write_text(source + version)
        library = tmp_path / "libcuda.so.1"
        subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(code)], check=True)
    with worker({"LD_LIBRARY_PATH": str(tmp_path)}) as it:
        hello = it.receive()
        assert hello["hello"] == 0
        assert error in hello["error"]


def test_the_functions_are_asked_for_in_the_version_that_made_them_public(tmp_path: Path) -> None:
    """A newer version would be refused by the older of the drivers that have them, or ask for other arguments."""
    code = tmp_path / "strict.c"
    code.write_text(
        "static int any(void){return 0;}\n"
        "int cuDriverGetVersion(int*v){*v=12080;return 0;}\n"
        "int cuGetProcAddress_v2(const char*s,void**p,int v,unsigned long f,int*q)"
        "{*p=v==12080?(void*)any:0;return v==12080?0:1;}"
    )
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(tmp_path / "libcuda.so.1"), str(code)], check=True)
    with worker({"LD_LIBRARY_PATH": str(tmp_path)}) as it:
        assert it.receive() == {"hello": 12080, "error": ""}


def test_uuids_are_sixteen_bytes() -> None:
    assert uuid_bytes("GPU-00112233-4455-6677-8899-aabbccddeeff").hex() == "00112233445566778899aabbccddeeff"
