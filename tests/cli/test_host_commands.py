"""Commands about this host: becoming a daemon, the emulated driver, the doctor."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.cli import doctor_checks
from agent.core.snapshots import CapabilityLine
from agent.core.types import GIB, Gpu
from tests.cli.conftest import Run


@pytest.mark.parametrize("daemon", ["agent", "scheduler"])
def test_the_command_becomes_the_daemon(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, daemon: str) -> None:
    """The same process: a service manager that started the command talks to the daemon itself."""
    became: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda _path, arguments: became.append(arguments))
    config = tmp_path / f"{daemon}.yaml"
    config.write_text("{}\n")
    assert run(daemon, "--config", config).code == 0
    assert became == [[sys.executable, "-P", "-m", f"agent.daemons.{daemon}", "--config", str(config)]]


def test_a_configuration_that_is_not_there(run: Run, tmp_path: Path) -> None:
    done = run("agent", "--config", tmp_path / "nowhere.yaml")
    assert done.code == 2
    assert "nowhere.yaml can't be read; name a file with --config" in done.err


def test_emulated_env_prints_what_eval_takes(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "it's here"
    done = run("emulated", "env", "--dir", folder)
    assert done.code == 0
    script = f'{done.out}\nprintf "%s" "$HIBERNODE_EMULATED_SOCKET"'
    shown = subprocess.run(["sh", "-c", script], capture_output=True, text=True, timeout=10, check=True)
    assert shown.stdout == f"{folder}/driver.sock"


def test_emulated_up_refuses_what_it_can_not_be(run: Run, tmp_path: Path) -> None:
    done = run("emulated", "up", "--dir", tmp_path, "--profile", "999")
    assert done.code == 2
    assert "(EMULATED_PROFILE_UNKNOWN)" in done.err


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of an emulated driver, started by the command; it ends on SIGINT."""
    folder = tmp_path_factory.mktemp("driver")
    command = [sys.executable, "-m", "agent.cli.main", "emulated", "up", "--dir", str(folder), "--model", "L20"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            while "emulated.ready" not in (line := process.stderr.readline()):
                assert line, "the driver ended before it was ready"
            yield folder
        finally:
            process.send_signal(signal.SIGINT)
            assert "emulated.frozen_calls" not in process.stderr.read()
            assert process.wait(timeout=20) == 0


def test_the_doctor_sees_the_emulated_driver_as_it_sees_a_real_one(
    driver: Path, program: list[str], run: Run, tmp_path: Path
) -> None:
    script = f'{run("emulated", "env", "--dir", driver).out}\nexec "$@"'
    done = subprocess.run(
        ["sh", "-c", script, "sh", *program, "doctor", "--local", "--output", "json"],
        env={**os.environ, "HIBERNODE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=40,
        check=False,
    )
    levels = {one["name"]: (one["level"], one["reason"]) for one in json.loads(done.stdout)["checks"]}
    assert levels["driver"] == ("OK", "driver 580.65.06, 2 GPUs")
    assert levels["checkpoint"] == ("OK", "by the driver's API")
    assert done.returncode == (0 if os.geteuid() == 0 else 4)


def test_the_drivers_own_truth(driver: Path, run: Run) -> None:
    done = run("emulated", "ps", "--dir", driver)
    assert [line[:3] for line in done.words[1:3]] == [["0", "Emulated", "L20"], ["1", "Emulated", "L20"]]
    assert run("emulated", "ps", "--dir", driver, "-o", "json").json["processes"] == []
    done = run("emulated", "flip-byte", "--dir", driver)
    assert (done.code, done.out) == (4, "")
    assert "(EMULATED_NO_BYTE)" in done.err


def test_no_driver_there(run: Run, tmp_path: Path) -> None:
    done = run("emulated", "ps", "--dir", tmp_path)
    assert done.code == 5
    assert "start one with `hibernode emulated up --dir`" in done.err


def test_doctor_asks_the_agent_and_fails_with_it(at_home: Run) -> None:
    done = at_home("doctor")
    assert done.code == 4
    assert ["mig", "FAIL"] in [line[:2] for line in done.words]
    assert "nvidia-smi -mig 0" in done.out
    found = at_home("doctor", "-o", "json").json
    assert found["ok"] is False
    assert [one["name"] for one in found["checks"]] == ["agent", "driver", "mig", "cgroup", "compiler"]
    assert {"name", "level", "reason", "fix"} == set(found["checks"][0])


def test_doctor_without_an_agent_looks_itself(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    fine = CapabilityLine("driver", "OK", "driver 580.65.06, 1 GPUs", "")
    monkeypatch.setattr(doctor_checks, "gpu_lines", lambda: ([], [fine]))
    done = run("doctor")
    assert done.code == 0  # warnings do not count
    assert done.words[1][:6] == ["agent", "WARN", "not", "asked:", "no", "agent"]
    assert ["driver", "OK"] in [line[:2] for line in done.words]


def test_doctor_does_not_look_here_when_another_host_was_meant(run: Run) -> None:
    done = run("doctor", "--agent", "127.0.0.1:1")
    assert (done.code, done.out) == (5, "")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("{'driver_version': '', 'gpus': [], 'problem': 'not found'}", "no NVIDIA driver answers"),
        ("None.x", "NVML ended in the middle"),
    ],
)
def test_doctor_and_a_driver_that_is_not_well(monkeypatch: pytest.MonkeyPatch, answer: str, said: str) -> None:
    """NVML is asked in a process of its own, so that one that crashes takes nobody along."""
    real = subprocess.run

    def instead(_command: list[str], **options: object) -> object:
        return real([sys.executable, "-c", f"import json; print(json.dumps({answer}))"], **options)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "run", instead)
    gpus, lines = doctor_checks.gpu_lines()
    assert gpus == []
    assert lines[0].level == "FAIL"
    assert said in lines[0].reason
    assert lines[0].fix


def test_doctor_and_a_driver_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(command: list[str], **_options: object) -> object:
        raise subprocess.TimeoutExpired(command, 20)

    monkeypatch.setattr(subprocess, "run", hang)
    _gpus, (line,) = doctor_checks.gpu_lines()
    assert "does not answer within 20 s" in line.reason


def test_doctor_compares_host_memory_with_that_of_the_gpus(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(f"MemTotal: {64 << 20} kB\nMemFree: 1 kB\n")
    small, large = (Gpu("GPU-a", 0, "T4", 16 * GIB), Gpu("GPU-b", 1, "H100", 80 * GIB))
    assert doctor_checks.memory_line([small], meminfo).level == "OK"
    line = doctor_checks.memory_line([small, large], meminfo)
    assert (line.level, line.reason) == (
        "WARN",
        "64 GiB on the host, 96 GiB on the GPUs: not all of it can sleep at once",
    )


def test_doctor_on_a_host_without_cgroup_v2(tmp_path: Path) -> None:
    (tmp_path / "mountinfo").write_text("29 23 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n")
    (tmp_path / "cgroup").write_text("1:cpu:/\n")
    line = doctor_checks.cgroup_line(tmp_path)
    assert (line.level, line.fix) == ("WARN", "mount -t cgroup2 none /sys/fs/cgroup/unified")
    assert "SIGSTOP" in line.reason


def test_doctor_leaves_nothing_behind(tmp_path: Path) -> None:
    """Where no group can be made, and where one can but without a freezer (an ordinary folder)."""
    tree = tmp_path / "cgroup2"
    tree.mkdir()
    (tmp_path / "mountinfo").write_text(f"30 23 0:27 / {tree} rw - cgroup2 cgroup2 rw\n")
    (tmp_path / "cgroup").write_text("0::/\n")
    assert "freezer is missing" in doctor_checks.cgroup_line(tmp_path).reason
    assert list(tree.iterdir()) == []
    tree.rmdir()
    assert "no cgroup can be made" in doctor_checks.cgroup_line(tmp_path).reason
