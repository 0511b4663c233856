"""Tests a workload that attacks the root process that keeps its log: nothing may block the agent."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.adapters.process.launch import resolve_user
from agent.adapters.runtime.bundles import WorkloadUser
from agent.adapters.runtime.log_files import LogFiles

# Opening a leased file waits for its holder, up to /proc/sys/fs/lease-break-time (45 s), in the agent's loop.
LEASE = """
import fcntl, os, signal, sys
uid, gid = map(int, sys.argv[1:])
if uid != os.getuid():
    os.setgroups([]), os.setgid(gid), os.setuid(uid)
signal.signal(signal.SIGIO, signal.SIG_IGN)
try:
    fcntl.fcntl(1, fcntl.F_SETLEASE, fcntl.F_WRLCK)
except OSError as error:
    print(f"refused: {error.strerror}", file=sys.stderr, flush=True)
else:
    print("leased", file=sys.stderr, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def leaser() -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        process.kill()
        process.communicate()


def take_lease(started: list[subprocess.Popen[bytes]], log_fd: int, user: WorkloadUser | None) -> str:
    """A workload whose stdout is the log leases it; returns the result."""
    uid, gid = (user.uid, user.gid) if user else (os.getuid(), os.getgid())
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", LEASE, str(uid), str(gid)],
        stdin=subprocess.PIPE,
        stdout=log_fd,
        stderr=subprocess.PIPE,
    )
    started.append(process)
    os.close(log_fd)  # the agent keeps none either
    assert process.stderr
    return process.stderr.readline().decode().strip()


def test_leased_log_does_not_block(tmp_path: Path, leaser: list[subprocess.Popen[bytes]]) -> None:
    """A workload of the agent's own user owns the file and may lease it: then the log waits, not the agent."""
    logs = LogFiles(tmp_path, cap_bytes=10, keep=5)
    log_fd = logs.open("resize-a", None)
    os.write(log_fd, b"more than the cap")
    if take_lease(leaser, log_fd, None) != "leased":
        pytest.skip("this file system has no leases")
    began = time.monotonic()
    for look in (lambda: logs.read(logs.path("resize-a"), 100), lambda: logs.trim(logs.path("resize-a"))):
        with pytest.raises(BlockingIOError):
            look()
    assert time.monotonic() - began < 5


@pytest.mark.root
def test_another_user_cannot_lease_its_log(tmp_path: Path, leaser: list[subprocess.Popen[bytes]]) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can start a process as another user")
    user = resolve_user("nobody")
    logs = LogFiles(tmp_path, cap_bytes=10, keep=5)
    log_fd = logs.open("resize-a", user)
    os.write(log_fd, b"kept")
    assert take_lease(leaser, log_fd, user).startswith("refused")
    assert logs.read(logs.path("resize-a"), 100) == b"kept"


def test_link_in_place_of_a_log_is_not_followed(tmp_path: Path) -> None:
    """Only the agent can write to the folder; should that ever fail, a link in it still leads nowhere."""
    victim = tmp_path / "shadow"
    victim.write_bytes(b"root's, and longer than the cap")
    logs = LogFiles(tmp_path, cap_bytes=10, keep=5)
    (tmp_path / "logs").mkdir()
    for name in ("resize-a.log", "resize-b.log.1"):
        (tmp_path / "logs" / name).symlink_to(victim)
    for look in (lambda: logs.open("resize-a", None), lambda: logs.read(logs.path("resize-a"), 5)):
        with pytest.raises(OSError, match="symbolic"):
            look()
    with pytest.raises(OSError, match="symbolic"):
        logs.trim(logs.path("resize-a"))
    log_fd = logs.open("resize-b", None)
    os.write(log_fd, b"more than the cap")
    os.close(log_fd)
    assert logs.trim(logs.path("resize-b"))  # replaces the link, does not write through it
    assert victim.read_bytes() == b"root's, and longer than the cap"
