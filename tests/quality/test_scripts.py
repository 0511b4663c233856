"""The scripts: plain sh that parses, is executable, and prints help without any set-up."""

from __future__ import annotations

import os
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from .conftest import ROOT

SHELL_FILES = sorted(path for path in (ROOT / "scripts").iterdir() if path.is_file())
COMMANDS = [path for path in SHELL_FILES if path.suffix != ".sh"]
EXPECTED = {"demo", "test", "bench", "check", "gen-protos", "gpu-proof", "install"}


def test_all_commands_exist() -> None:
    assert {path.name for path in COMMANDS} >= EXPECTED


@pytest.mark.parametrize("path", SHELL_FILES, ids=lambda path: path.name)
def test_script_parses(path: Path) -> None:
    done = subprocess.run(["sh", "-n", str(path)], capture_output=True, text=True, timeout=10, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", [*COMMANDS, ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_script_is_executable(path: Path) -> None:
    assert os.access(path, os.X_OK), f"chmod +x {path.relative_to(ROOT)}"


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.name)
def test_script_explains_itself(path: Path, flag: str, tmp_path: Path) -> None:
    """In a copy without an environment: help must not start a set-up."""
    copy = tmp_path / "checkout"
    shutil.copytree(ROOT / "scripts", copy / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [str(copy / "scripts" / path.name), flag], capture_output=True, text=True, timeout=10, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: scripts/{path.name}")
    assert not (copy / ".venv").exists()


def test_bench_refuses_an_unknown_benchmark() -> None:
    script = ROOT / "scripts" / "bench"
    done = subprocess.run([str(script), "no_such"], capture_output=True, text=True, timeout=10, check=False)
    assert done.returncode == 2
    assert "no benchmark is called 'no_such'" in done.stderr
    assert not done.stdout


def test_ci_runs_the_command_in_the_readme() -> None:
    assert "scripts/test" in (ROOT / ".ci" / "run").read_text()
    assert "scripts/test" in (ROOT / "README.md").read_text()


def test_lower_bounds_match_the_generator() -> None:
    """The generator's versions of agent/v1 are the oldest that may run it (agent/docs/design.md)."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    generator = next(
        line.partition("==")[2] for line in project["optional-dependencies"]["dev"] if line.startswith("grpcio-tools==")
    )
    family = [line for line in project["dependencies"] if line.startswith("grpcio")]
    assert len(family) == 4
    assert {line.partition(">=")[2] for line in family} == {generator}
    generated = (ROOT / "agent" / "v1" / "types_pb2.py").read_text()
    protobuf = next(line for line in project["dependencies"] if line.startswith("protobuf>="))
    bound = protobuf.removeprefix("protobuf>=").partition(",")[0]
    assert f"# Protobuf Python Version: {bound}\n" in generated
