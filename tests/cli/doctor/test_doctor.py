"""`hibernode doctor`: checks by the agent or on the host, and the conclusion."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from agent.cli.doctor import checks, command
from agent.core.snapshots import CapabilityLine
from agent.core.types import GIB
from tests.cli.conftest import Run

FINE = CapabilityLine("driver", "OK", "driver 580.65.06, 1 GPU", "")
OLD = CapabilityLine(
    "checkpoint", "FAIL", "driver 535 can't checkpoint in separate steps", "install driver 580 or newer"
)


def looking_gives(monkeypatch: pytest.MonkeyPatch, *lines: CapabilityLine) -> list[Path | None]:
    """Replaces the checks of the host; the list has the configurations they were called with."""
    asked: list[Path | None] = []

    def look(config: Path | None) -> tuple[int, list[CapabilityLine]]:
        asked.append(config)
        return 16 * GIB, list(lines)

    monkeypatch.setattr(checks, "gpu_lines", look)
    return asked


def test_agent_failure_is_a_failure(at_home: Run) -> None:
    done = at_home("doctor")
    assert done.code == 4
    assert ["mig", "FAIL"] in [line[:2] for line in done.words]
    assert "\nfix for mig: nvidia-smi -mig 0\n" in done.out
    assert "No instance can be frozen here until this is fixed: mig." in done.err
    assert "restart it (systemctl restart hibernode-agent)" in done.err
    found = at_home("doctor", "-o", "json").json
    assert found["ok"] is False
    assert [one["name"] for one in found["checks"]] == ["agent", "gpu 1", "driver", "mig", "cgroup", "compiler"]
    assert {"name", "level", "reason", "fix"} == set(found["checks"][0])


def test_without_an_agent_the_host_is_checked(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    looking_gives(monkeypatch, FINE)
    done = run("doctor")
    assert done.code == 0  # warnings do not count
    assert done.words[1][:6] == ["agent", "WARN", "not", "asked:", "no", "agent"]
    assert ["driver", "OK"] in [line[:2] for line in done.words]
    assert done.err.strip() == "Instances can be frozen here."


def test_conclusion_names_failed_checks(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    looking_gives(monkeypatch, FINE, OLD)
    done = run("doctor", "--local")
    assert done.code == 4
    assert done.err.strip() == "No instance can be frozen here until this is fixed: checkpoint."
    assert run("doctor", "--local", "-o", "json").err == ""


def test_fixes_are_separate_lines_with_failures_first(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    weak = CapabilityLine("persistence", "WARN", "off", "nvidia-smi -i 0,1,2,3,4,5,6,7 -pm 1; systemctl enable \x1b[2J")
    looking_gives(monkeypatch, weak, OLD)
    fixes = [line for line in run("doctor", "--local").out.splitlines() if line.startswith("fix for ")]
    assert fixes[:2] == [
        "fix for checkpoint: install driver 580 or newer",
        "fix for persistence: nvidia-smi -i 0,1,2,3,4,5,6,7 -pm 1; systemctl enable ?[2J",
    ]


def test_named_agent_that_is_down_does_not_check_this_host(run: Run) -> None:
    done = run("doctor", "--agent", "127.0.0.1:1")
    assert (done.code, done.out) == (5, "")


def test_host_check_uses_the_agents_configuration(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = looking_gives(monkeypatch, FINE)
    standing, named = tmp_path / "agent.yaml", tmp_path / "other.yaml"
    monkeypatch.setattr(command, "AGENT_CONFIG", standing)
    run("doctor", "--local")
    standing.touch()
    named.touch()
    run("doctor", "--local")
    assert run("doctor", "--config", named).code == 0
    assert asked == [None, standing, named]
    done = run("doctor", "--config", tmp_path / "nowhere.yaml")
    assert (done.code, done.out) == (2, "")
    assert "nowhere.yaml can't be read" in done.err


# ---- the process that checks the driver -----------------------------------------------------------------------------


def look_by(monkeypatch: pytest.MonkeyPatch, code: str) -> list[CapabilityLine]:
    """The result if the process runs `code`."""
    real = subprocess.Popen

    def instead(_command: list[str], **options: object) -> object:
        return real([sys.executable, "-I", "-S", "-c", code], **options)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "Popen", instead)
    gpu_bytes, lines = checks.gpu_lines(None)
    assert gpu_bytes == 0
    return lines


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("import os; os.kill(os.getpid(), 11)", "the check of the driver failed: signal 11"),
        ("import sys; sys.exit('libnvidia-ml.so.1: symbol lookup error')", "symbol lookup error"),
        ("print('{}')", "the check of the driver failed: no message"),
        ("print('[1, 2')", "the check of the driver failed"),
    ],
)
def test_driver_that_crashes_its_caller(monkeypatch: pytest.MonkeyPatch, code: str, problem: str) -> None:
    (line,) = look_by(monkeypatch, code)
    assert (line.name, line.level) == ("driver", "FAIL")
    assert problem in line.reason
    assert line.fix


def test_output_of_libraries_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    check = '{"name": "mig", "level": "OK", "reason": "MIG mode is off", "fix": ""}'
    code = f"""print('NOTE: preloaded\\n{{}}\\n{{"checks": [{check}], "gpu_memory_bytes": 0}}')"""
    assert [line.name for line in look_by(monkeypatch, code)] == ["mig"]


@pytest.mark.parametrize("killable", [True, False])
def test_hanging_driver_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, killable: bool) -> None:
    """Nor is the end of its process, which may be stuck in the kernel."""
    monkeypatch.setattr(checks, "CHECK_DEADLINE_S", 0.2)
    monkeypatch.setattr(checks, "KILL_DEADLINE_S", 0.2)
    stuck: list[subprocess.Popen[bytes]] = []
    kill = subprocess.Popen.kill
    if not killable:
        monkeypatch.setattr(subprocess.Popen, "kill", lambda process: stuck.append(process))  # noqa: PLW0108
    (line,) = look_by(monkeypatch, "import time; time.sleep(600)")
    assert "does not answer within 0.2 s" in line.reason
    assert "dmesg" in line.fix
    for process in stuck:
        process.returncode = None
        kill(process)
        process.wait()


# ---- the host besides its GPUs --------------------------------------------------------------------------------------


def test_host_memory_is_compared_with_gpu_memory(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(f"MemTotal: {64 << 20} kB\nMemFree: 1 kB\n")
    assert checks.memory_line(16 * GIB, meminfo).level == "OK"
    line = checks.memory_line(96 * GIB, meminfo)
    assert (line.level, line.reason) == (
        "WARN",
        "64 GiB on the host, 96 GiB on the GPUs: not all of it can be frozen at once",
    )


def test_a_host_without_cgroup_v2(tmp_path: Path) -> None:
    (tmp_path / "mountinfo").write_text("29 23 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n")
    (tmp_path / "cgroup").write_text("1:cpu:/\n")
    line = checks.cgroup_line(tmp_path)
    assert (line.level, line.fix) == ("WARN", "mount -t cgroup2 none /sys/fs/cgroup/unified")
    assert "SIGSTOP" in line.reason


def test_cgroup_check_removes_its_group(tmp_path: Path) -> None:
    """Where no group can be created, and where one has no freezer (an ordinary folder)."""
    tree = tmp_path / "cgroup2"
    tree.mkdir()
    (tmp_path / "mountinfo").write_text(f"30 23 0:27 / {tree} rw - cgroup2 cgroup2 rw\n")
    (tmp_path / "cgroup").write_text("0::/\n")
    assert "no cgroup freezer at" in checks.cgroup_line(tmp_path).reason
    assert list(tree.iterdir()) == []
    tree.rmdir()
    assert "cannot create a cgroup" in checks.cgroup_line(tmp_path).reason


def test_cordoned_gpu_is_a_failure_only_if_all_are() -> None:
    lost = "XID_79: the GPU has fallen off the bus"

    (line,) = command.cordoned_lines([(0, lost), (1, "")])

    assert (line.name, line.level) == ("gpu 0", "WARN")
    assert lost in line.reason
    assert "--gpu-reset -i 0" in line.fix
    assert [one.level for one in command.cordoned_lines([(0, lost), (1, lost)])] == ["FAIL", "FAIL"]
    assert not command.cordoned_lines([(0, ""), (1, "")])
