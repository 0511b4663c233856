"""The checkout, and linters as test cases."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

Lint = Callable[..., None]


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def tracked() -> list[Path]:
    """Every file of the project: tracked by git, or new and not ignored, so that tests fail before the commit."""
    # The checkout may belong to another user, in which case git would refuse to list it.
    command = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=False, timeout=30)
    assert listed.returncode == 0, f"the files are listed by git: {listed.stderr.decode()}"
    paths = {ROOT / name for name in listed.stdout.decode().split("\0") if name}
    return sorted(path for path in paths if path.is_file())


@pytest.fixture(scope="session")
def tool() -> Callable[[str], str]:
    """The path of a program installed beside this Python."""

    def find(name: str) -> str:
        path = Path(sys.executable).with_name(name)
        assert path.exists(), f"{name} is not installed beside {sys.executable}: install the project's dev extra"
        return str(path)

    return find


@pytest.fixture(scope="session")
def lint() -> Lint:
    """Run a linter from the checkout's root; its output is the failure."""

    def run(*command: str, fix: str, cwd: Path = ROOT, timeout: float = 50) -> None:
        done = subprocess.run(
            command, cwd=cwd, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL, check=False
        )
        if done.returncode != 0:
            output = (done.stdout + done.stderr).strip()
            pytest.fail(f"{' '.join(command)} (exit {done.returncode})\n{output[-6000:]}\nfix: {fix}", pytrace=False)

    return run
