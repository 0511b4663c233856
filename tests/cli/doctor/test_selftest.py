"""`hibernode doctor --selftest` as a program, on a driver with a known speed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest

from agent.adapters.kernel.cgroup import find_v2_mount, open_slice
from agent.adapters.nvml.locks import GpuLocks
from agent.cli.doctor.reporting_child import parse_message
from agent.cli.doctor.selftest_report import show_report
from agent.core.gpus.speeds import CHECKPOINT_PER_RESTORE
from agent.emulated.control import EmulatedDriver, ProcessView
from agent.selftest.target_process import SLICE_NAME
from tests.cli.conftest import Run
from tests.fakes.emulated_driver import EmulatedNvidia, emulated_nvidia

DEADLINE_S = 40.0
SMALL = ("--gib", "0.03125", "--runs", "1")
SLOW = 50_000_000  # bytes a second: a checkpoint of 32 MiB takes 1 s, its restore 0.7 s

T = TypeVar("T")


@pytest.fixture(scope="module")
def driver() -> Iterator[EmulatedNvidia]:
    with emulated_nvidia("--gpus", "2", "--gib", "1") as running:
        yield running


@dataclass(frozen=True)
class Host:
    """A GPU host with the command."""

    nvidia: EmulatedNvidia

    @property
    def control(self) -> EmulatedDriver:
        return self.nvidia.control

    def command(self, *arguments: str | Path) -> list[str]:
        return [sys.executable, "-m", "agent.cli.main", "doctor", "--selftest", *map(str, arguments)]

    def run(self, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments),
            env={**self.nvidia.environment, **environment},
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )

    def report(self, *arguments: str) -> dict[str, Any]:
        done = self.run(*arguments, "--json")
        assert done.returncode == 0, done.stdout + done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    @contextmanager
    def started(self, *arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
        with subprocess.Popen(
            self.command(*arguments),
            env=dict(self.nvidia.environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                yield process
            finally:
                process.kill()

    def wait_for(self, state: str) -> ProcessView:
        """Waits until the program under test is in that state of the driver."""
        return until(lambda: next((one for one in self.control.processes() if one.state == state), None))

    def assert_clean(self) -> None:
        """Waits until no CUDA program and no cgroup is left."""
        until(lambda: not self.control.processes())
        slice_ = open_slice(SLICE_NAME)
        until(lambda: slice_ is None or not slice_.uids())


def until(check: Callable[[], T | None]) -> T:
    deadline = time.monotonic() + DEADLINE_S
    while not (found := check()):
        assert time.monotonic() < deadline, "not reached in time"
        time.sleep(0.005)
    return found


@pytest.fixture
def host(driver: EmulatedNvidia) -> Iterator[Host]:
    driver.control.set_latency()
    driver.control.clear_faults()
    frozen_calls = driver.control.frozen_calls()
    yield Host(driver)
    Host(driver).assert_clean()
    assert driver.control.frozen_calls() == frozen_calls  # no calls on a frozen program


# ---- measurements -------------------------------------------------------------------------------------------------


@pytest.mark.real_time
@pytest.mark.parametrize("bandwidth", [500_000_000, 1_000_000_000])
def test_the_figures_are_those_of_the_driver(host: Host, bandwidth: int) -> None:
    """Figures follow the driver's speed. A busy machine only makes runs slower, so the fastest is compared."""
    host.control.set_latency(bandwidth_bytes_s=bandwidth)
    found = host.report("--gib", "0.125", "--runs", "2")
    best = {name: found["summary"]["driver"][name]["max"] * 1e9 for name in ("restore_gb_s", "checkpoint_gb_s")}
    assert best["restore_gb_s"] == pytest.approx(bandwidth, rel=0.1)
    assert best["checkpoint_gb_s"] == pytest.approx(bandwidth / CHECKPOINT_PER_RESTORE, rel=0.1)
    for run in found["runs"]:
        assert run["freeze_s"] > run["lock_s"] + run["checkpoint_s"] + run["cgroup_freeze_s"]
        assert run["wake_s"] > run["thaw_s"] + run["restore_s"] + run["unlock_s"]
        assert run["released_bytes"] >= found["size_bytes"]


def test_the_report_for_programs(host: Host) -> None:
    found = host.report(*SMALL, "--gpu", "1")
    gpu = host.control.devices()[1]
    assert found["host"]["gpu"]["model"] == gpu.name
    assert gpu.name.startswith("Emulated ")  # the figures are marked as emulated
    assert (found["host"]["gpu"]["uuid"], found["host"]["driver"]) == (gpu.uuid, "580.65.06")
    assert (found["size_bytes"], found["checkpointers"]) == (1 << 25, ["driver"])
    assert [(run["run"], run["counted"], run["bytes_equal"]) for run in found["runs"]] == [
        (0, False, True),
        (1, True, True),
    ]
    assert found["verdict"] == {"proof": "PROVED", "reason": "", "message": "", "fix": ""}
    assert all(check["level"] != "FAIL" for check in found["checks"])
    copies = found["summary"]["pinned"]
    assert copies["to_host_gb_s"]["median"] > 0 < copies["to_device_gb_s"]["median"]


def test_the_report_for_people(host: Host) -> None:
    done = host.run(*SMALL)
    assert done.returncode == 0
    words = done.stdout
    assert "PROVED on Emulated T4, driver 580.65.06" in words
    for line in ("freeze, total", "  checkpoint", "  restore", "wake, total", "pinned copy to GPU"):
        assert f"\n{line}" in words
    assert "warm-up, driver: frozen in" in done.stderr  # progress goes to stderr
    assert "every byte equal" in done.stderr


def test_report_names_what_was_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    """A driver without pinned memory, and a library that prints to the process's stdout."""
    figure = {"median": 1.25, "min": 1.2, "max": 1.3}
    names = ("freeze_s", "lock_s", "checkpoint_s", "cgroup_freeze_s", "wake_s", "thaw_s", "restore_s", "unlock_s")
    figures = dict.fromkeys((*names, "checkpoint_gb_s", "restore_gb_s"), figure)
    show_report(
        {
            "host": {"gpu": {"model": "Emulated T4"}, "driver": "555.58.02"},
            "size_bytes": 1 << 30,
            "allocations": 12,
            "checkpointers": ["utility"],
            "checks": [],
            "runs": [{"counted": True, "pinned": {"unavailable": "this driver has no cuMemHostAlloc"}}],
            "summary": {"utility": figures},
            "ratio": {},
            "verdict": {"proof": "PROVED"},
        }
    )
    out = capsys.readouterr().out
    assert "no pinned copy for comparison: this driver has no cuMemHostAlloc" in out
    assert "1 run after a warm-up" in out
    assert "1.25 s (1.2-1.3)" in out
    assert parse_message(b"a library's banner") == {"done": "a library's banner"}
    assert parse_message(b'{"step": "freezing"}') == {"step": "freezing"}


def test_both_checkpointers_in_one_run(host: Host) -> None:
    found = host.report("--gib", "0.03125", "--runs", "2", "--against", "utility")
    order = [(run["run"], run["checkpointer"]) for run in found["runs"]]
    assert order[2:] == [(1, "driver"), (1, "utility"), (2, "utility"), (2, "driver")]  # they go first alternately
    assert found["ratio"]["wake_s"]["min"] > 0
    assert set(found["summary"]) == {"driver", "utility", "pinned"}
    done = host.run(*SMALL, "--against", "utility")
    assert "UTILITY / DRIVER" in done.stdout


# ---- failures of a host ------------------------------------------------------------------------------------------


def test_changed_byte_is_the_worst_outcome(host: Host) -> None:
    host.control.set_latency(bandwidth_bytes_s=SLOW)
    with host.started(*SMALL) as process:
        host.wait_for("CHECKPOINTED")
        host.control.flip_byte(offset=12_000_000)
        out, _err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 6
    assert "THIS HOST MUST NOT FREEZE INSTANCES" in out
    assert "pages of 4 KiB that differ: 1" in out
    assert "idle: never" in out


def test_program_that_dies_frozen_is_a_failure(host: Host) -> None:
    host.control.set_latency(bandwidth_bytes_s=SLOW)
    with host.started(*SMALL, "--json") as process:
        os.kill(host.wait_for("CHECKPOINTED").pid, signal.SIGKILL)
        out, _err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 1
    assert json.loads(out)["verdict"]["proof"] == "FAILED"
    assert json.loads(out)["checks"][-1]["name"] == "freeze, wake"


@pytest.mark.parametrize(("operation", "step"), [("lock", "lock"), ("checkpoint", "checkpoint"), ("restore", "wake")])
def test_driver_refusal_is_a_failure_that_names_the_step(host: Host, operation: str, step: str) -> None:
    host.control.fault(operation, "NOT_SUPPORTED", times=0)
    done = host.run(*SMALL)
    host.control.clear_faults()
    assert done.returncode == 1
    assert "FAILED on Emulated T4" in done.stdout
    assert f"the {step} " in done.stdout
    assert "answered 801" in done.stdout


def test_hanging_driver_ends_at_the_deadline(host: Host, tmp_path: Path) -> None:
    config = tmp_path / "agent.yaml"
    config.write_text("gpu: {lock_timeout: 200ms, operation_timeout: 1s}")
    host.control.fault("checkpoint", "HANG")
    done = host.run(*SMALL, "--config", config, "--json")
    host.control.clear_faults()
    assert done.returncode == 1
    assert json.loads(done.stdout)["verdict"]["reason"] == "DRIVER_OPERATION_LOST"


def test_repeated_call_is_reported(host: Host) -> None:
    """All bytes are correct, but an unlock had to be repeated: proved, with a warning."""
    host.control.fault("unlock", "NOT_READY", skip=1)
    found = host.report(*SMALL)
    host.control.clear_faults()
    assert found["verdict"]["proof"] == "PROVED"
    (line,) = (check for check in found["checks"] if check["level"] == "WARN")
    assert line["name"] == "driver calls"
    assert "answered 600" in line["reason"]


@pytest.mark.root
def test_without_a_cgroup_it_is_proved_with_signals(host: Host) -> None:
    """In a mount namespace with read-only cgroups."""
    mount = find_v2_mount(Path("/proc/self/mountinfo").read_text())
    if os.geteuid() != 0 or mount is None or shutil.which("unshare") is None:
        pytest.skip("needs root, cgroup v2 and unshare(1)")
    script = 'mount -o remount,bind,ro "$0" && exec "$@"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, str(mount.point), *host.command(*SMALL, "--json")],
        env=dict(host.nvidia.environment),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["host"]["freezer"] == "signal"
    assert "SIGSTOP" in next(check["reason"] for check in found["checks"] if check["name"] == "freezer")


# ---- requirements ------------------------------------------------------------------------------------------------


def failing(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, str]]:
    assert done.returncode == 4, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert (found["verdict"]["proof"], found["runs"]) == ("NOT_RUN", [])
    return {check["name"]: check for check in found["checks"] if check["level"] == "FAIL"}


def test_gpu_in_use_by_an_agent_is_not_tested(host: Host) -> None:
    locks = GpuLocks()
    locks.acquire([host.control.devices()[0].uuid])
    try:
        missing = failing(host.run(*SMALL, "--gpu", "0", "--json"))
    finally:
        locks.release()
    assert set(missing) == {"gpu lock"}
    assert "stop the agent" in missing["gpu lock"]["fix"]


def test_too_little_gpu_memory_names_the_free_amount(host: Host) -> None:
    missing = failing(host.run("--gib", "1.5", "--json"))
    assert "1.00 of 1.00 GiB free; the test needs 1.50" in missing["gpu memory"]["reason"]
    assert "--gib 0.5 or less" in missing["gpu memory"]["fix"]


def test_all_missing_requirements_are_reported_at_once(host: Host) -> None:
    missing = failing(host.run("--gib", "2000", "--gpu", "9", "--json"))
    assert set(missing) >= {"host memory", "gpu"}
    assert host.control.devices()[1].uuid in missing["gpu"]["fix"]


def test_a_host_without_a_driver(host: Host) -> None:
    assert "driver" in failing(host.run(*SMALL, "--json", LD_LIBRARY_PATH=""))


def test_comparison_skips_what_the_agent_would_not_do(host: Host) -> None:
    """Without persistence mode a restore by the program kills its target."""
    gpus = [device.uuid for device in host.control.devices()]
    for uuid in gpus:
        host.control.set_device(uuid, persistence=False)
    try:
        missing = failing(host.run(*SMALL, "--against", "utility", "--json"))
        assert host.run(*SMALL).returncode == 0  # the driver's workers call cuInit first
    finally:
        for uuid in gpus:
            host.control.set_device(uuid, persistence=True)
    assert set(missing) == {"utility: persistence"}
    assert "leave --against out" in missing["utility: persistence"]["fix"]


def test_agents_configuration_is_used(host: Host, tmp_path: Path) -> None:
    config = tmp_path / "agent.yaml"
    config.write_text("gpu: {host_memory_reserve: 900TiB}")
    assert set(failing(host.run(*SMALL, "--json", "--config", config))) == {"host memory"}
    config.write_text("gpu: {host_memory_reserv: 1GiB}")
    done = host.run(*SMALL, "--config", config)
    assert (done.returncode, done.stdout) == (2, "")
    assert "host_memory_reserv" in done.stderr


@pytest.mark.parametrize("words", [("--gib", "2"), ("--runs", "1"), ("--gpu", "0"), ("--against", "utility")])
def test_selftest_options_without_selftest(run: Run, words: tuple[str, str]) -> None:
    done = run("doctor", *words)
    assert (done.code, done.out) == (2, "")
    assert "--selftest" in done.err


# ---- clean-up ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "number", "code"),
    [
        ("RUNNING", signal.SIGINT, 130),
        ("LOCKED", signal.SIGINT, 130),
        ("CHECKPOINTED", signal.SIGTERM, 130),
        ("CHECKPOINTED", signal.SIGKILL, -9),
    ],
)
def test_ended_command_cleans_up(host: Host, state: str, number: signal.Signals, code: int) -> None:
    host.control.set_latency(bandwidth_bytes_s=SLOW)
    with host.started(*SMALL) as process:
        host.wait_for(state)
        process.send_signal(number)
        process.communicate(timeout=DEADLINE_S)
    assert process.returncode == code
    host.assert_clean()


def test_killed_process_is_cleaned_up(host: Host) -> None:
    """The kernel ends the program, frozen or not, and the command removes the empty cgroup."""
    host.control.set_latency(bandwidth_bytes_s=SLOW)
    with host.started(*SMALL) as process:
        target = host.wait_for("CHECKPOINTED")
        status = Path(f"/proc/{target.pid}/status").read_text()
        os.kill(int(status.split("\nPPid:")[1].split()[0]), signal.SIGKILL)
        _out, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 5
    assert "SELFTEST_ENDED" in err
    host.assert_clean()
