"""What doctor says about a host, and whether its instances may sleep."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agent.core.capabilities import Capabilities, HostFacts, driver_branch, find_capabilities, host_lines
from agent.core.types import GIB, Gpu

H100 = Gpu("GPU-0", 0, "NVIDIA H100", 80 * GIB)
GOOD = HostFacts("580.65.06", (H100, replace(H100, uuid="GPU-1", index=1)), 0, "x86_64")


def level(found: Capabilities, name: str) -> str:
    return next(line.level for line in found.lines if line.name == name)


def test_a_safe_host_can_do_everything_and_needs_no_fix() -> None:
    found = find_capabilities(GOOD)
    assert (found.idle_mode, found.api, found.migration) == (True, True, True)
    assert {line.level for line in found.lines} == {"OK"}
    assert {line.fix for line in found.lines} == {""}


@pytest.mark.parametrize(
    ("version", "idle_mode", "api", "migration"),
    [
        ("", False, False, False),
        ("535.183.01", False, False, False),
        ("550.163.01", False, False, False),
        ("555.58.02", False, False, False),
        ("570.172.08", True, True, False),
        ("575.57.08", True, True, False),
        ("580.65.06", True, True, True),
        ("610.10", True, True, True),
    ],
)
def test_what_each_driver_allows(version: str, idle_mode: bool, api: bool, migration: bool) -> None:
    found = find_capabilities(replace(GOOD, driver_version=version))
    assert (found.idle_mode, found.api, found.migration) == (idle_mode, api, migration)


@pytest.mark.parametrize(
    ("facts", "name", "expected"),
    [
        (replace(GOOD, driver_version="570.172.08"), "driver", "WARN"),
        (replace(GOOD, driver_version="555.58.02"), "checkpoint", "FAIL"),
        (replace(GOOD, gpus=()), "driver", "FAIL"),
        (replace(GOOD, euid=1000), "privileges", "WARN"),
        (replace(GOOD, gpus=(replace(H100, mig=True),)), "mig", "FAIL"),
        (replace(GOOD, gpus=(replace(H100, persistence=False),)), "persistence", "WARN"),
        (replace(GOOD, machine="aarch64"), "checkpoint", "FAIL"),
        (replace(GOOD, machine="aarch64", driver_version="595.10"), "checkpoint", "OK"),
        (replace(GOOD, machine="riscv64"), "checkpoint", "FAIL"),
    ],
)
def test_each_shortcoming_has_its_line_and_a_fix(facts: HostFacts, name: str, expected: str) -> None:
    found = find_capabilities(facts)
    assert level(found, name) == expected
    assert found.idle_mode is (expected != "FAIL")
    assert all(line.fix for line in found.lines if line.level != "OK")


def test_gpus_are_named_by_index() -> None:
    gpus = (H100, replace(H100, index=3, mig=True), replace(H100, index=5, mig=True))
    line = find_capabilities(replace(GOOD, gpus=gpus)).lines[-1]
    assert "3,5" in line.reason
    assert line.fix.startswith("nvidia-smi -i 3,5 -mig 0")


@pytest.mark.parametrize(("version", "branch"), [("580.65.06", 580), ("", 0), ("unknown", 0), ("610", 610)])
def test_the_branch_is_the_first_number(version: str, branch: int) -> None:
    assert driver_branch(version) == branch


def test_the_host_adds_where_instances_live_and_what_stands_in_the_way() -> None:
    found = find_capabilities(GOOD)
    fenced, trees = host_lines(found, "/sys/fs/cgroup/hibernode-1", ""), host_lines(found, "", "no worker started")
    assert (fenced[-1].name, fenced[-1].level) == ("cgroup", "OK")
    assert [(line.name, line.level) for line in trees[-2:]] == [("cgroup", "WARN"), ("idle mode", "FAIL")]
    assert trees[: len(found.lines)] == found.lines
