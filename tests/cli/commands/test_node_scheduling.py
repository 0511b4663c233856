"""`hibernode node cordon|uncordon|drain`."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.commands.test_node_commands import MINIMAL
from tests.cli.conftest import Run


@pytest.fixture
def at_drain(at_home: Run, tmp_path: Path) -> Iterator[Run]:
    """Deploys functions of which the fake fleet has instances; uncordons all nodes afterwards."""
    for name in ("movable", "cramped"):
        (tmp_path / "s.yaml").write_text(MINIMAL.replace("NAME", name))
        assert at_home("deploy", "-t", tmp_path / "s.yaml").code == 0
    yield at_home
    for name in ("gpu-host-1", "gpu-host-2"):
        at_home("node", "uncordon", name)
    for name in ("movable", "cramped"):
        at_home("functions", "rm", name)


def test_node_is_cordoned_and_uncordoned(at_drain: Run) -> None:
    done = at_drain("node", "cordon", "gpu-host-1")
    assert (done.code, done.out) == (0, "")
    assert "gpu-host-1 is cordoned" in done.err
    assert [line[:3] for line in at_drain("node", "--fleet").words] == [
        ["NODE", "STATE", "SCHEDULING"],
        ["gpu-host-1", "READY", "CORDONED"],
        ["gpu-host-2", "LOST", "NORMAL"],
    ]
    nodes = at_drain("node", "--fleet", "-o", "json").json["nodes"]
    assert [one["scheduling"] for one in nodes] == ["CORDONED", "NORMAL"]
    done = at_drain("node", "uncordon", "gpu-host-1", "-o", "json")
    assert (done.code, done.json["scheduling"]) == (0, "NORMAL")


def test_drain_returns_at_once(at_drain: Run) -> None:
    done = at_drain("node", "drain", "gpu-host-1", "-o", "json")
    assert (done.code, done.json["scheduling"]) == (0, "DRAINED")
    assert "`hibernode ps --fleet` shows what is left" in done.err


def test_drain_wait_prints_each_step_and_what_stays(at_drain: Run) -> None:
    done = at_drain("node", "drain", "gpu-host-1", "--wait", "--force")
    assert (done.code, done.out) == (0, "")
    lines = [line for line in done.err.splitlines() if " ... (" not in line]  # without progress lines
    assert lines == [
        "gpu-host-1 has 3 instance(s) left (1 of cramped, 2 of movable), 1 of them finishing their requests",
        "cramped: node gpu-host-2 has no free GPU (NO_FREE_GPU)",
        "gpu-host-1 has 2 instance(s) left (1 of cramped, 1 of movable), 0 of them finishing their requests",
        "gpu-host-1 has 1 instance(s) left (1 of cramped), 0 of them finishing their requests",
        "warning: i-hand: not created by this scheduler, so they stay; run `hibernode rm` on gpu-host-1 to end them",
        "gpu-host-1 is drained",
    ]


def test_drain_without_room_ends_with_the_reason(at_drain: Run) -> None:
    done = at_drain("node", "drain", "gpu-host-1", "--wait", "--timeout", "1.2")
    assert (done.code, done.out) == (5, "")
    last = done.err.splitlines()[-1]
    assert "(DRAIN_TIMEOUT)" in last
    assert "1 of cramped" in last
    assert "cramped: node gpu-host-2 has no free GPU (NO_FREE_GPU)" in last


def test_lost_node_is_neither_waited_for_nor_drained(at_drain: Run) -> None:
    done = at_drain("node", "drain", "gpu-host-2", "--wait", "-o", "json")
    assert done.code == 5
    assert "gpu-host-2 is lost" in done.err
    assert "is drained" not in done.err


def test_cancelled_drain_fails(at_drain: Run) -> None:
    done = at_drain("node", "drain", "gpu-host-3", "--wait")
    assert done.code == 4
    assert "the drain of gpu-host-3 was cancelled by another command (DRAIN_TAKEN_BACK)" in done.err


@pytest.mark.parametrize("command", ["cordon", "uncordon", "drain"])
def test_unknown_node_is_exit_3(at_home: Run, command: str) -> None:
    done = at_home("node", command, "gpu-host-9")
    assert (done.code, done.out) == (3, "")
    assert "(NODE_NOT_FOUND)" in done.err


def test_completion_knows_the_subcommands(program: list[str]) -> None:
    environment = {"_HIBERNODE_COMPLETE": "bash_complete", "COMP_WORDS": "hibernode node ", "COMP_CWORD": "2"}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=30, check=False)
    assert done.stdout.split() == ["plain,cordon", "plain,drain", "plain,uncordon"]
