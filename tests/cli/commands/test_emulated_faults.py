"""`hibernode emulated fault`: faults on a running driver, in its state, and errors of the command."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tests.fakes.emulated_driver import CudaTarget, EmulatedNvidia, emulated_nvidia


@pytest.fixture(scope="module")
def a100s() -> Iterator[EmulatedNvidia]:
    with emulated_nvidia("--model", "A100", "--gib", "1", "--compute-mode", "exclusive_process") as driver:
        yield driver


@pytest.fixture
def driver(a100s: EmulatedNvidia) -> Iterator[EmulatedNvidia]:
    """Two A100 in exclusive-process mode, reset to their initial state after the test."""
    yield a100s
    a100s.control.clear_faults()
    for one in a100s.control.devices():
        a100s.control.reserve(one.uuid, 0)
        a100s.control.set_device(
            one.uuid, persistence=True, mig=False, compute_mode="EXCLUSIVE_PROCESS", nvml_error=0, silent=False
        )


@pytest.fixture
def fault(run: Run, driver: EmulatedNvidia) -> Run:
    return lambda *words: run("emulated", "fault", "--dir", driver.directory, *words)


def test_a_fault_is_planned_listed_and_cleared(fault: Run, driver: EmulatedNvidia) -> None:
    uuid = driver.control.devices()[1].uuid
    first = fault("add", "restore", "out_of_memory", "--gpu", "1", "--times", "0", "--delay", "250").out.strip()
    second = fault("add", "lock", "NOT_READY", "--after", "--skip", "2", "--pid", "4242").out.strip()
    listed = fault("list").words
    assert listed[0] == ["FAULT", "OPERATION", "KIND", "PID", "GPU", "TIMES", "SKIP", "DELAY", "STRUCK"]
    assert listed[1] == [first, "restore", "OUT_OF_MEMORY", "-", uuid, "always", "0", "250", "ms", "0"]
    assert listed[2] == [second, "lock", "NOT_READY", "(after)", "4242", "-", "1", "2", "-", "0"]
    assert fault("list", "-o", "json").json["faults"][1] == {
        "id": int(second), "operation": "lock", "kind": "NOT_READY", "pid": 4242, "gpu": None, "times": 1, "skip": 2,
        "after": True, "delay_ms": 0, "seen": 0, "hits": 0,
    }  # fmt: skip
    cleared = fault("clear")
    assert (cleared.code, cleared.out) == (0, "")
    assert "2 planned faults cleared, 0 hanging calls continued" in cleared.err
    assert fault("list", "-o", "json").json == {"faults": []}


def test_directory_option_after_the_subcommand(run: Run, driver: EmulatedNvidia) -> None:
    assert run("emulated", "fault", "list", "--dir", driver.directory).code == 0
    missing = run("emulated", "fault", "list")
    assert (missing.code, missing.out) == (2, "")
    assert "Missing option '--dir'" in missing.err


def test_hanging_call_is_shown_and_continues(fault: Run, run: Run, driver: EmulatedNvidia) -> None:
    target = CudaTarget(driver.environment)
    target.fill(4096)
    fault("add", "lock", "HANG")
    lock = [str(driver.directory / "bin" / "cuda-checkpoint"), "--action", "lock", "--pid", str(target.pid)]
    with subprocess.Popen(lock) as caller:
        while not any(one.hung for one in driver.control.processes()):
            assert caller.poll() is None
        assert "lock hangs" in run("emulated", "ps", "--dir", driver.directory).out
        assert "0 planned faults cleared, 1 hanging calls continued" in fault("clear").err
        assert caller.wait(10) == 0
    target.end()


def test_gpus_are_changed_by_index_or_uuid_and_ps_says_so(fault: Run, run: Run, driver: EmulatedNvidia) -> None:
    uuid = driver.control.devices()[1].uuid
    assert fault("device", "0", "--no-persistence", "--mig", "--nvml-error", "15").code == 0
    assert fault("device", uuid, "--compute-mode", "default").code == 0
    assert fault("device", uuid[:12], "--silent").code == 0
    assert fault("reserve", "0", "1GiB").code == 0
    assert fault("xid", "1", "79").code == 0
    fault("add", "unlock", "STALE")
    shown = run("emulated", "ps", "--dir", driver.directory).out
    first, second = (line for line in shown.splitlines() if "A100" in line)
    assert "no persistence mode, MIG, EXCLUSIVE_PROCESS, NVML error 15" in first
    assert first.split()[4:8] == ["1.0", "GiB", "1.0", "GiB"]
    assert second.endswith("silent")
    assert "STALE" in shown
    assert "Calls on frozen processes: 0" in shown
    found = run("emulated", "ps", "--dir", driver.directory, "-o", "json").json
    assert set(found) == {"devices", "processes", "faults", "frozen_calls"}
    assert [one["silent"] for one in found["devices"]] == [False, True]


@pytest.mark.parametrize(
    ("words", "code", "problem"),
    [
        (["add", "explode", "HANG"], 2, "'lock', 'checkpoint', 'restore', 'unlock', 'state'"),
        (["add", "lock", "BOOM"], 2, "is not one of 'NOT_READY', 'NOT_SUPPORTED'"),
        (["add", "lock", "STALE", "--after"], 2, "after goes with"),
        (["add", "lock", "SLOW"], 2, "SLOW needs delay_ms"),
        (["add", "lock", "HANG", "--gpu", "7"], 2, "none of the driver's GPUs: 0 (GPU-"),
        (["add", "lock", "HANG", "--times", "-1"], 2, "not in the range"),
        (["device", "0"], 2, "name at least one option"),
        (["device", "GPU-", "--mig"], 2, "none of the driver's GPUs"),
        (["device", "0", "--compute-mode", "SHARED"], 2, "is not one of"),
        (["reserve", "0", "much"], 2, "expected a size with its unit"),
        (["reserve", "0", "2GiB"], 4, "EMULATED_VRAM_SHORT"),
        (["xid", "2", "79"], 2, "none of the driver's GPUs"),
        (["lsit"], 2, "No such command"),
    ],
)
def test_usage_error_names_the_valid_values(
    fault: Run, driver: EmulatedNvidia, words: list[str], code: int, problem: str
) -> None:
    before = driver.control.devices()
    done = fault(*words)
    assert (done.code, done.out) == (code, "")
    assert problem in done.err
    assert driver.control.faults() == []
    assert driver.control.devices() == before


def test_no_driver(run: Run, tmp_path: Path) -> None:
    for words in (["list"], ["clear"], ["add", "lock", "HANG"], ["xid", "0", "79"]):
        done = run("emulated", "fault", "--dir", tmp_path, *words)
        assert done.code == 5
        assert "start one with `hibernode emulated up --dir /" in done.err


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("hibernode emulated fa", {"fault"}),
        ("hibernode emulated fault x", {"xid"}),
        ("hibernode emulated fault add res", {"restore"}),
        ("hibernode emulated fault add lock h", {"HANG"}),
    ],
)
def test_completion(program: list[str], typed: str, offered: set[str]) -> None:
    words = {"COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1), "_HIBERNODE_COMPLETE": "bash_complete"}
    done = subprocess.run(program, env={**os.environ, **words}, capture_output=True, text=True, timeout=30, check=False)
    assert {line.partition(",")[2] for line in done.stdout.split()} == offered
