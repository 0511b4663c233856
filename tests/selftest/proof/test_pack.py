"""Carried packages: what is copied, what is refused, and which commit a copy without git was made from."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from agent.selftest.proof import pack
from agent.selftest.proof.origin import commit_of, origin_of, sources_sha256

INSTALLED = {pack.name_of(one.name): one for one in metadata.distributions()}


@pytest.mark.parametrize(
    ("requirement", "name"),
    [
        ("grpcio>=1.85.1", "grpcio"),
        ("SQLAlchemy>=2", "sqlalchemy"),
        ('typing_extensions; python_version < "3.13"', "typing-extensions"),
    ],
)
def test_names_are_compared_in_one_form(requirement: str, name: str) -> None:
    assert pack.name_of(requirement) == name


def test_the_closure_has_what_is_needed_and_no_tools() -> None:
    chosen = {pack.name_of(one.name) for one in pack.closure(pack.requirements(), INSTALLED)}
    assert chosen >= {"grpcio", "protobuf", "yarl", "multidict", "nvidia-ml-py", "typing-extensions"}
    assert not chosen & {"pytest", "mypy", "ruff", "numpy", "hibernode", "pip"}


def test_a_package_that_is_not_installed_is_named() -> None:
    with pytest.raises(pack.PackError, match="no-such-package is not installed"):
        pack.closure(["no_such_package>=1"], INSTALLED)


@pytest.mark.parametrize("path", ["a/tests/b.py", "a/__pycache__/b.pyc", "uvloop/loop.c", "../../bin/hib", "a/b.pyi"])
def test_what_running_does_not_need_is_left_out(path: str) -> None:
    assert pack.is_left_out(path)


@pytest.mark.parametrize("path", ["a/b.so", "a/b.py", "a/testing_ground.py", "structlog/testing.py", "a/LICENSE"])
def test_what_running_needs_is_copied(path: str) -> None:
    assert not pack.is_left_out(path)


def test_the_packages_work_alone(tmp_path: Path) -> None:
    """Without site-packages: every module of the proof and both daemons can be imported."""
    noted = pack.pack(tmp_path / "pack", f"{sys.version_info.major}.{sys.version_info.minor}", None)
    assert "MiB compressed" in pack.check_size(tmp_path / "pack")
    proof = "agent.selftest.proof.__main__, agent.selftest.proof.end_to_end, agent.selftest.proof.facts"
    code = f"import {proof}, agent.daemons.agent, agent.daemons.scheduler, grpc; print(grpc.__file__)"
    search = f"{pack.CHECKOUT}:{tmp_path / 'pack' / 'site'}"
    done = subprocess.run(
        [sys.executable, "-S", "-P", "-c", code],
        env={"PYTHONPATH": search},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "pack") in done.stdout
    assert noted["versions"]["grpcio"] == metadata.version("grpcio")
    pack.pack(tmp_path / "pack", noted["python"], None)  # over an older pack


def test_too_much_to_carry_is_refused_and_removed(tmp_path: Path) -> None:
    folder = tmp_path / "pack"
    folder.mkdir()
    (folder / "site").write_bytes(bytes(range(256)))
    with pytest.raises(pack.PackError, match="too large to carry"):
        pack.check_size(folder, most_bytes=100)
    assert not folder.exists()


def test_a_folder_of_others_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(pack.PackError, match="not empty and no pack"):
        pack.pack(tmp_path, "3.11", None)
    assert (tmp_path / "mine").exists()


# ---- origin --------------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A checkout without git."""
    checkout = tmp_path / "copy"
    (checkout / "agent").mkdir(parents=True)
    (checkout / "agent" / "a.py").write_text("A = 1\n")
    return checkout


def test_a_copy_has_the_noted_commit_only_while_its_sources_are_those(copy: Path, tmp_path: Path) -> None:
    carried = tmp_path / "carried"
    carried.mkdir()
    noted = {"commit": "c0ffee", "commit_note": "without local changes", "sources_sha256": sources_sha256(copy)}
    (carried / "pack.json").write_text(json.dumps(noted))
    assert origin_of(copy, str(carried))["commit"] == "c0ffee"
    (copy / "agent" / "a.py").write_text("A = 2\n")
    found = origin_of(copy, str(carried))
    assert found["commit"] is None
    assert found["sources_sha256"] in found["commit_note"]
    assert origin_of(copy, "")["commit"] is None


def test_a_copy_within_another_repository_is_not_that_one(copy: Path, tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True, timeout=10)
    assert commit_of(copy) is None
