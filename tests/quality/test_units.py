"""The systemd units: accepted by systemd itself, and no more exposed than they were."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from agent.adapters.gpu_locks import LOCK_FOLDER

UNITS = ["hibernode-agent.service", "hibernode-scheduler.service"]

# The score of `systemd-analyze security`: 0 is sealed, 10 is wide open. The agent is root by its task.
MOST_EXPOSED = {"hibernode-agent.service": 7.8, "hibernode-scheduler.service": 1.5}


@pytest.fixture(scope="module")
def analyze() -> str:
    path = shutil.which("systemd-analyze")
    if path is None:
        pytest.skip("systemd-analyze is not installed on this machine")
    return path


@pytest.mark.parametrize("name", UNITS)
def test_systemd_accepts_the_unit(name: str, analyze: str, root: Path, tmp_path: Path) -> None:
    """With a program in the place of the installed one, which systemd-analyze wants to see."""
    unit = tmp_path / name
    text = (root / "systemd" / name).read_text()
    assert "ExecStart=/opt/hibernode/bin/hibernode " in text
    unit.write_text(text.replace("ExecStart=/opt/hibernode/bin/hibernode ", f"ExecStart={shutil.which('true')} "))
    done = subprocess.run([analyze, "verify", str(unit)], capture_output=True, text=True, timeout=30, check=False)
    own = [line for line in done.stderr.splitlines() if name in line]
    assert done.returncode == 0, done.stderr
    assert not own, "\n".join(own)


@pytest.mark.parametrize("name", UNITS)
def test_the_unit_is_no_more_exposed_than_it_was(name: str, analyze: str, root: Path) -> None:
    done = subprocess.run(
        [analyze, "security", "--offline=true", "--no-pager", str(root / "systemd" / name)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    score = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert score, done.stdout + done.stderr
    assert float(score[1]) <= MOST_EXPOSED[name]


@pytest.mark.parametrize("option", ["--dry-run", "--uninstall"])
def test_install_stands_nowhere_and_leaves_nothing_writable(option: str, root: Path, tmp_path: Path) -> None:
    """A `venv.py` where root happens to stand must not become root's, nor a loose umask everybody's /opt/hibernode."""
    traced = ["sh", "-x", str(root / "scripts/install"), "--dry-run", option]
    done = subprocess.run(traced, cwd=tmp_path, capture_output=True, text=True, timeout=10, check=True)
    steps = [line.lstrip("+ ") for line in done.stderr.splitlines() if line.startswith("+")]
    first_action = next(number for number, step in enumerate(steps) if step.startswith("do_"))
    assert {"cd /", "umask 022"} <= set(steps[:first_action])


def test_the_agent_may_write_where_it_keeps_its_gpu_locks(root: Path) -> None:
    """ProtectSystem=strict makes all of it read-only but what is named, and without its locks no agent starts."""
    unit = (root / "systemd/hibernode-agent.service").read_text()
    writable = re.search(r"^ReadWritePaths=(.*)$", unit, re.MULTILINE)
    assert writable
    assert f"-{LOCK_FOLDER}" in writable[1].split()


@pytest.mark.parametrize("options", [["--dry-run"], ["--dry-run", "--uninstall"]])
def test_install_says_what_it_would_do(options: list[str], root: Path) -> None:
    script = str(root / "scripts" / "install")
    done = subprocess.run([script, *options], capture_output=True, text=True, timeout=10, check=False)
    assert done.returncode == 0, done.stderr
    for name in UNITS:
        assert f"/etc/systemd/system/{name}" in done.stdout
    purges = "rm -rf /etc/hibernode" in done.stdout
    assert not purges, "configuration goes only with --purge"
