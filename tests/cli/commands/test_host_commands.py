"""`hibernode agent`, `scheduler` and `emulated`."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.adapters.engine.gpus import cdi_device_names
from agent.config import load
from agent.settings import AgentConfig
from tests.cli.conftest import Run
from tests.fakes.emulated_driver import EmulatedNvidia


@pytest.mark.parametrize("daemon", ["agent", "scheduler"])
def test_the_command_becomes_the_daemon(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, daemon: str) -> None:
    """The process stays the same, so that a service manager's signals reach the daemon."""
    became: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda _path, arguments: became.append(arguments))
    config = tmp_path / f"{daemon}.yaml"
    config.write_text("{}\n")
    assert run(daemon, "--config", config).code == 0
    command = ["-P", "-X", f"hibernode={daemon}", "-m", f"agent.daemons.{daemon}", "--config", str(config)]
    assert became == [[sys.executable, *command]], "and `ps aux | grep hibernode` finds it"


def test_missing_configuration(run: Run, tmp_path: Path) -> None:
    done = run("agent", "--config", tmp_path / "nowhere.yaml")
    assert done.code == 2
    assert "nowhere.yaml can't be read; name a file with --config" in done.err


def test_emulated_env_prints_what_eval_takes(run: Run, tmp_path: Path, driver: Path) -> None:
    folder = tmp_path / "it's here"
    folder.symlink_to(driver)
    done = run("emulated", "env", "--dir", folder)
    assert done.code == 0
    script = f'{done.out}\nprintf "%s" "$HIBERNODE_EMULATED_SOCKET"'
    shown = subprocess.run(["sh", "-c", script], capture_output=True, text=True, timeout=10, check=True)
    assert shown.stdout == f"{folder}/driver.sock"


def test_emulated_env_prints_a_valid_section_for_agents(run: Run, tmp_path: Path, driver: Path) -> None:
    done = run("emulated", "env", "--dir", driver, "--format", "yaml")
    assert done.code == 0
    config = tmp_path / "agent.yaml"
    config.write_text(done.out)
    gpu = load(config, AgentConfig).gpu
    assert gpu.attach == "mounts"
    assert gpu.mounts.environment["LD_LIBRARY_PATH"] == f"{driver}/lib"
    paths = [f"{driver}/lib", f"{driver}/driver.sock"]
    assert list(gpu.mounts.binds) == [f"{path}:{path}:ro" for path in paths]  # not control.sock


def test_emulated_env_prints_a_cdi_specification(run: Run, tmp_path: Path, nvidia: EmulatedNvidia) -> None:
    done = run("emulated", "env", "--dir", nvidia.directory, "--format", "cdi")
    assert done.code == 0
    (tmp_path / "emulated.json").write_text(done.out)
    uuids = {device.uuid for device in nvidia.control.devices()}
    assert cdi_device_names([tmp_path]) == {*uuids, "all"}
    document = json.loads(done.out)
    assert all(device["containerEdits"]["env"] for device in document["devices"])  # CDI refuses empty ones
    assert not any("control.sock" in mount["hostPath"] for mount in document["containerEdits"]["mounts"])


@pytest.mark.parametrize("form", ["sh", "yaml", "cdi"])
@pytest.mark.parametrize("left_by_a_crash", [False, True])
def test_emulated_env_without_a_running_driver_prints_nothing_to_stdout(
    run: Run, tmp_path: Path, form: str, left_by_a_crash: bool
) -> None:
    if left_by_a_crash:
        (tmp_path / "ready").touch()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as left:
            left.bind(str(tmp_path / "driver.sock"))
    done = run("emulated", "env", "--dir", tmp_path, "--format", form)
    assert (done.code, done.out) == (5, "")
    assert f"start one with `hibernode emulated up --dir {tmp_path}`. (EMULATED_DRIVER_DOWN)" in done.err


def test_emulated_wait_returns_once_the_driver_is_up(program: list[str], tmp_path: Path, run: Run) -> None:
    early = [*program, "emulated", "wait", "--dir", str(tmp_path), "--timeout", "60s"]
    with subprocess.Popen(early) as waiting:
        assert run("emulated", "env", "--dir", tmp_path).code == 5
        assert waiting.poll() is None
        with subprocess.Popen([*program, "emulated", "up", "--dir", str(tmp_path)], stdin=subprocess.DEVNULL) as driver:
            assert waiting.wait(timeout=60) == 0
            assert run("emulated", "env", "--dir", tmp_path).code == 0
            driver.send_signal(signal.SIGTERM)
            assert driver.wait(timeout=20) == 0
    assert run("emulated", "env", "--dir", tmp_path).code == 5


def test_emulated_wait_gives_up_at_its_deadline(run: Run, tmp_path: Path) -> None:
    done = run("emulated", "wait", "--dir", tmp_path, "--timeout", "100ms")
    assert (done.code, done.out) == (5, "")
    assert f"no emulated driver answers in {tmp_path} after 0.1 s; see what `hibernode emulated up" in done.err
    assert "(EMULATED_DRIVER_TIMEOUT)" in done.err


def test_emulated_up_refuses_unknown_profiles(run: Run, tmp_path: Path) -> None:
    done = run("emulated", "up", "--dir", tmp_path, "--profile", "999")
    assert done.code == 2
    assert "(EMULATED_PROFILE_UNKNOWN)" in done.err


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of an emulated driver started by the command; SIGINT ends it."""
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


def test_emulated_ps_shows_the_drivers_state(driver: Path, run: Run) -> None:
    done = run("emulated", "ps", "--dir", driver)
    assert [line[:3] for line in done.words[1:3]] == [["0", "Emulated", "L20"], ["1", "Emulated", "L20"]]
    assert run("emulated", "ps", "--dir", driver, "-o", "json").json["processes"] == []
    done = run("emulated", "flip-byte", "--dir", driver)
    assert (done.code, done.out) == (4, "")
    assert "(EMULATED_NO_BYTE)" in done.err


def test_no_driver(run: Run, tmp_path: Path) -> None:
    done = run("emulated", "ps", "--dir", tmp_path)
    assert done.code == 5
    assert "start one with `hibernode emulated up --dir /" in done.err
