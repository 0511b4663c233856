"""Fixtures: a home with fake daemons, and the command run in this process or as a program."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from agent.cli.main import main

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Ran:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def words(self) -> list[list[str]]:
        """The words of each line of stdout."""
        return [line.split() for line in self.out.splitlines()]


Run = Callable[..., Ran]


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The HIBERNODE_HOME of a fake agent, scheduler and gateway."""
    folder = tmp_path_factory.mktemp("home")
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.fakes.daemon", str(folder)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdin is not None
        try:
            assert process.stdout.readline() == "ready\n"
            yield folder
        finally:
            process.stdin.close()
            process.wait(timeout=20)


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs `hibernode ARGUMENTS` in this process, without daemons unless their home is named."""
    monkeypatch.setenv("HIBERNODE_HOME", str(tmp_path / "empty-home"))
    monkeypatch.delenv("HIBERNODE_DEBUG", raising=False)

    def command(*arguments: str | Path) -> Ran:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        sys.stdout.flush()
        out, err = capfd.readouterr()
        code = ended.value.code
        assert isinstance(code, int)
        return Ran(code, out, err)

    return command


@pytest.fixture
def at_home(run: Run, home: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs commands in the home of the fake daemons."""
    monkeypatch.setenv("HIBERNODE_HOME", str(home))
    return run


@pytest.fixture
def program() -> list[str]:
    """The command line of the program, for tests that need a process."""
    return [sys.executable, "-m", "agent.cli.main"]


@pytest.fixture
def environment(home: Path) -> dict[str, str]:
    """The environment of `program`, with the fake daemons' home."""
    return {**os.environ, "HIBERNODE_HOME": str(home)}
