"""Tests identities in /proc: names with parentheses, reused pids, threads, and the three ways to belong."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.adapters.kernel import process_table
from agent.core.types import ProcessId

BOOT = "6f1c2a34-0000-4000-8000-00000000beef"
MARK = "HIBERNODE_INSTANCE=state/resize-a"
ROOT = ProcessId(BOOT, 100, 1000)

Add = Callable[..., None]


@pytest.fixture
def add(tmp_path: Path) -> Add:
    """Add a process to the made-up /proc."""

    def put(
        pid: int, *, ppid: int = 1, session: int = 1, start: int = 1000, state: str = "S", environ: str = "A=1"
    ) -> None:
        folder = tmp_path / str(pid)
        folder.mkdir()
        line = f"{pid} (py) S 9 (x) {state} {ppid} {pid} {session} 0 -1 0 0 0 0 0 12 13 4 2 20 0 1 0 {start} 0 77\n"
        (folder / "stat").write_text(line)
        (folder / "environ").write_bytes(environ.encode() + b"\0")

    (tmp_path / "meminfo").touch()
    put(1, ppid=0, start=1)
    return put


def found(proc: Path, root: ProcessId = ROOT) -> list[int]:
    return [stat.pid for stat in process_table.members(root, BOOT, MARK, proc)]


def test_a_name_with_parentheses_does_not_shift_the_fields(add: Add, tmp_path: Path) -> None:
    add(100, ppid=7, session=90, start=4242, state="T")
    stat = process_table.read_stat(100, tmp_path)
    assert stat == process_table.ProcessStat(
        pid=100, state="T", ppid=7, session=90, start_time=4242, cpu_ticks=31, resident_pages=77
    )


def test_members_by_descent_session_and_mark(add: Add, tmp_path: Path) -> None:
    add(100, session=100)
    add(101, ppid=100, session=101, start=1001)
    add(102, ppid=101, session=102, start=1002)
    add(103, session=100, start=1001)
    add(104, session=104, start=1003, environ=f"A=1\0{MARK}")
    add(105, ppid=104, session=105, start=1004)
    add(200, session=200, start=1005, environ=f"{MARK}-but-another")
    assert found(tmp_path) == [100, 101, 102, 103, 104, 105]


def test_members_are_found_without_the_main_process(add: Add, tmp_path: Path) -> None:
    add(103, session=100, start=1001)
    add(104, session=104, start=1003, environ=MARK)
    add(106, session=106, start=1003)
    assert found(tmp_path) == [103, 104]


def test_process_with_a_reused_pid_is_not_a_member(add: Add, tmp_path: Path) -> None:
    add(100, session=100, start=5000)
    add(101, ppid=100, session=100, start=5001)
    assert found(tmp_path) == []


def test_older_or_dead_process_is_not_a_member(add: Add, tmp_path: Path) -> None:
    add(100, session=100)
    add(50, start=10, environ=MARK)
    add(101, ppid=100, session=100, start=1001, state="Z")
    assert found(tmp_path) == [100]
    assert found(tmp_path, ProcessId("another boot", 100, 1000)) == []


def test_is_alive_needs_the_same_living_process(add: Add, tmp_path: Path) -> None:
    add(100)
    add(101, state="Z")
    assert process_table.is_alive(ROOT, BOOT, tmp_path)
    assert not process_table.is_alive(ROOT, "another boot", tmp_path)
    assert not process_table.is_alive(ProcessId(BOOT, 100, 1001), BOOT, tmp_path)
    assert not process_table.is_alive(ProcessId(BOOT, 101, 1000), BOOT, tmp_path)
    assert not process_table.is_alive(ProcessId(BOOT, 999, 1000), BOOT, tmp_path)


def test_a_thread_is_not_a_process() -> None:
    done, tids = threading.Event(), list[int]()
    ready = threading.Event()

    def idle() -> None:
        tids.append(threading.get_native_id())
        ready.set()
        done.wait(10)

    thread = threading.Thread(target=idle)
    thread.start()
    assert ready.wait(10)
    try:
        assert process_table.thread_group(tids[0]) == os.getpid()
        assert len(process_table.thread_states(os.getpid())) >= 2
        boot = process_table.boot_id()
        identity = process_table.identify(tids[0], boot)  # /proc answers for threads too
        assert identity
        assert process_table.open_pidfd(identity, boot) is None
    finally:
        done.set()
        thread.join(10)


def test_only_exactly_this_process_is_signalled() -> None:
    boot = process_table.boot_id()
    process = subprocess.Popen(["sleep", "86389"])
    identity = process_table.identify(process.pid, boot)
    assert identity
    later = ProcessId(boot, process.pid, identity.start_time + 1)
    assert not process_table.send_signal(later, boot, signal.SIGKILL)
    assert not process_table.send_signal(identity, "another boot", signal.SIGKILL)
    assert process.poll() is None
    assert process_table.send_signal(identity, boot, signal.SIGTERM)
    assert process.wait(10) == -signal.SIGTERM
    assert not process_table.send_signal(identity, boot, signal.SIGTERM)
    assert process_table.thread_group(process.pid) is None
    assert process_table.thread_states(process.pid) == []
