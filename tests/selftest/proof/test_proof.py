"""`scripts/gpu-proof` as a program, on the emulated driver and, where possible, without a network."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from agent.adapters.kernel.cgroup import open_slice
from agent.selftest.proof.__main__ import parse
from agent.selftest.target_process import SLICE_NAME
from tests.fakes.emulated_driver import EmulatedNvidia, emulated_nvidia

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "scripts" / "gpu-proof"
DEADLINE_S = 110.0
SMALL = ("--sizes", "0.015625,0.0625,0.5", "--cycles", "4")
FIXED_US = 20_000
SLOW = 10_000_000  # bytes a second: a restore of 16 MiB takes more than a second
LOOPBACK = """
import fcntl, os, socket, struct, sys
with socket.socket() as probe:
    fcntl.ioctl(probe, 0x8914, struct.pack("16sh14x", b"lo", 1))  # SIOCSIFFLAGS, IFF_UP
os.execvp(sys.argv[1], sys.argv[1:])
"""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(150)]


@pytest.fixture(scope="module")
def driver() -> Iterator[EmulatedNvidia]:
    with emulated_nvidia("--gpus", "1", "--gib", "0.75", "--fixed-us", str(FIXED_US)) as running:
        yield running


@pytest.fixture
def folder() -> Iterator[Path]:
    """For results and temporary files. Its path is short, since the end-to-end step has sockets there."""
    with tempfile.TemporaryDirectory(prefix="proof-", dir="/tmp") as name:
        yield Path(name)


def environment(driver: EmulatedNvidia, folder: Path) -> dict[str, str]:
    """`TEST_OF_PROOF` marks every process that the proof leaves behind; instances have our marks of their own."""
    own = {"HIBERNODE_PYTHON": sys.executable, "TEST_OF_PROOF": str(folder), "TMPDIR": str(folder)}
    return {**driver.environment, **own}


def offline() -> list[str]:
    """A prefix that takes the network away; nothing where that is not allowed."""
    probe = ["unshare", "-n", "true"]
    if shutil.which("unshare") is None or subprocess.run(probe, capture_output=True, check=False).returncode:
        return []
    return ["unshare", "-n", sys.executable, "-c", LOOPBACK]


def left_behind(folder: Path) -> list[str]:
    mark = f"TEST_OF_PROOF={folder}"
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TEST_OF_PROOF") == mark.partition("=")[2]:
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found


def until(reached: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not reached():
        assert time.monotonic() < deadline, "not reached in time"
        time.sleep(0.02)  # other programs, which notify nobody


def assert_clean(driver: EmulatedNvidia, folder: Path) -> None:
    until(lambda: not driver.control.processes())
    until(lambda: not left_behind(folder))
    slice_ = open_slice(SLICE_NAME)
    assert slice_ is None or not slice_.uids()
    until(lambda: not list(folder.glob("hibernode-demo-*")))


def read(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "proof.json").read_text())
    return found


def test_a_whole_proof_without_a_network(driver: EmulatedNvidia, folder: Path) -> None:
    out = folder / "out"
    done = subprocess.run(
        [*offline(), str(SCRIPT), "--out", str(out), *SMALL, "--budget", "100"],
        env=environment(driver, folder),
        cwd="/",
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = read(out)
    outcomes = {step["name"]: (step["outcome"], step["reason"]) for step in found["steps"]}
    # 0.75 GiB of GPU memory, half a GiB for a context: the largest size gives way to the room, a quarter.
    assert set(outcomes.values()) == {("passed", "")}, outcomes
    figures = found["figures"]
    assert [row["size_bytes"] / (1 << 30) for row in figures["sizes"] if row["checkpointer"] == "driver"] == [
        0.015625,
        0.0625,
        0.25,
    ]
    assert {row["checkpointer"] for row in figures["sizes"]} == {"driver", "utility"}
    for row in figures["fit"]:  # an operation takes 20 ms more; a freeze is a lock and a checkpoint
        assert row["intercept_s"] > FIXED_US / 1e6
    assert (figures["cycles"]["done"], figures["cycles"]["equal"]) == (4, 4)
    function = figures["end_to_end"]
    assert (function["failed"], function["different"], function["problems"]) == (0, 0, [])
    assert function["rounds"] >= 3
    assert function["usage"]["scheduler_ns"] == function["usage"]["node_ns"] > 0
    assert found["emulated"]
    assert (out / "proof.md").read_text().startswith("# EMULATED, no proof of hardware: 1 x Emulated T4")
    assert not done.stdout
    assert_clean(driver, folder)


def started(driver: EmulatedNvidia, folder: Path, *options: str) -> subprocess.Popen[bytes]:
    with (folder / "stderr").open("wb") as stderr:
        return subprocess.Popen(
            [str(SCRIPT), "--out", str(folder / "out"), *SMALL, *options],
            env=environment(driver, folder),
            stderr=stderr,
            start_new_session=True,
        )


def test_an_interrupted_proof_writes_what_it_has(driver: EmulatedNvidia, folder: Path) -> None:
    process = started(driver, folder)
    until(lambda: b"selftest 0.0625 GiB: at most" in (folder / "stderr").read_bytes())
    until(driver.control.processes)
    process.send_signal(signal.SIGINT)
    assert process.wait(DEADLINE_S) == 1
    found = read(folder / "out")
    outcomes = {step["name"]: (step["outcome"], step["reason"]) for step in found["steps"]}
    assert outcomes["selftest 0.015625 GiB"] == ("passed", "")
    assert outcomes["selftest 0.0625 GiB"] == outcomes["cycles"] == ("not run", "INTERRUPTED")
    assert found["figures"]["sizes"]
    assert "INTERRUPTED" in (folder / "out" / "proof.md").read_text()
    assert_clean(driver, folder)


def test_a_killed_proof_leaves_nothing_behind(driver: EmulatedNvidia, folder: Path) -> None:
    """While its function is up: scheduler, agent and instance end with it."""
    process = started(driver, folder)
    until(lambda: b"deploying a function" in (folder / "stderr").read_bytes())
    until(driver.control.processes)
    process.kill()
    process.wait(DEADLINE_S)
    assert_clean(driver, folder)


def test_a_changed_byte_is_the_exit_status(driver: EmulatedNvidia, folder: Path) -> None:
    driver.control.set_latency(bandwidth_bytes_s=SLOW)
    try:
        process = started(driver, folder, "--sizes", "0.015625", "--budget", "60")
        until(lambda: [one for one in driver.control.processes() if one.state == "CHECKPOINTED"])
        driver.control.flip_byte(offset=4_000_000)
    finally:
        driver.control.set_latency(fixed_us=FIXED_US)
    assert process.wait(DEADLINE_S) == 6
    found = read(folder / "out")
    assert found["outcome"] == "memory changed"
    assert ("memory changed", "MEMORY_CHANGED") in [(step["outcome"], step["reason"]) for step in found["steps"]]
    assert "MUST NOT FREEZE" in (folder / "out" / "proof.md").read_text().upper()


def test_without_a_driver_every_step_says_why_it_did_not_run(driver: EmulatedNvidia, folder: Path) -> None:
    bare = {**environment(driver, folder), "LD_LIBRARY_PATH": ""}
    command = [str(SCRIPT), "--out", str(folder / "out"), *SMALL]
    done = subprocess.run(command, env=bare, capture_output=True, timeout=DEADLINE_S, check=False)
    assert done.returncode == 1
    outcomes = {step["name"]: step["reason"] for step in read(folder / "out")["steps"]}
    assert outcomes["end to end"] == outcomes["cycles"] == "NO_GPU"
    assert outcomes["doctor"] == "CHECKS_FAILED"


# ---- the launcher --------------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the scripts, at another path and without any environment."""
    shutil.copytree(ROOT / "scripts", tmp_path / "checkout" / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "checkout"


def launch(checkout: Path) -> subprocess.CompletedProcess[str]:
    command = [str(checkout / "scripts" / "gpu-proof"), "--out", str(checkout / "out")]
    own = {name: value for name, value in os.environ.items() if not name.startswith(("HIBERNODE_", "PYTHON"))}
    return subprocess.run(command, env=own, capture_output=True, text=True, timeout=30, check=False)


def test_missing_packages_are_named_with_the_way_to_get_them(checkout: Path) -> None:
    done = launch(checkout)
    assert done.returncode == 1
    assert "there are no packages" in done.stderr
    assert "scripts/gpu-proof --pack" in done.stderr


@pytest.mark.parametrize("place", [".proof-env", ".venv"])
def test_packages_of_another_python_are_refused_before_anything_runs(checkout: Path, place: str) -> None:
    if place == ".venv":
        (checkout / ".venv" / "lib" / "python3.99" / "site-packages" / "grpc").mkdir(parents=True)
    else:
        (checkout / place).mkdir()
        noted = {"python": "3.99", "machine": os.uname().machine}
        (checkout / place / "pack.json").write_text(json.dumps(noted, indent=1))
    done = launch(checkout)
    assert done.returncode == 1
    assert "are for Python 3.99" in done.stderr


def test_packages_of_another_machine_are_refused(checkout: Path) -> None:
    (checkout / ".proof-env").mkdir()
    (checkout / ".proof-env" / "pack.json").write_text(json.dumps({"python": "3.11", "machine": "sparc"}, indent=1))
    assert "are for sparc" in launch(checkout).stderr


@pytest.mark.parametrize(
    "words",
    [
        ["--sizes", "1"],
        ["--out", "x", "--sizes", "one"],
        ["--out", "x", "--sizes", "0"],
        ["--out", "x", "--budget", "5"],
    ],
)
def test_wrong_options_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(words)
    assert ended.value.code == 2
    assert "error:" in capsys.readouterr().err
