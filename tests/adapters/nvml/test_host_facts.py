"""Tests the facts gathered about a host: NVML failures by kind, MPS by its programs, pid namespaces."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pynvml
import pytest

from agent.adapters.nvml.host_facts import host_facts, mps_runs, sees_host_pids, survey_gpus, survey_gpus_with_retry
from agent.core.errors import UnavailableError
from agent.core.gpus.host_facts import NvmlTrouble
from agent.core.types import GIB, Gpu
from agent.ports import DriverInfo
from agent.settings import GpuSettings
from tests.fakes.gpus import FakeGpus

T4 = Gpu("GPU-0", 0, "T4", 16 * GIB)


@dataclass
class SickGpus(FakeGpus):
    """NVML that fails: at once, or after it has reported its driver."""

    error: UnavailableError | None = None
    speaks_first: bool = False
    asked: list[str] = field(default_factory=list)

    async def driver(self) -> DriverInfo:
        if self.error is not None and not self.speaks_first:
            raise self.error
        return DriverInfo("580.65.06", 13000)

    async def list_gpus(self) -> Sequence[Gpu]:
        if self.error is not None:
            raise self.error
        return [T4]


async def test_survey_waits_for_a_failing_device() -> None:
    gpus = FakeGpus()
    gpus.errors[gpus.gpus[1].uuid] = "failing for a moment"
    looking = asyncio.create_task(survey_gpus_with_retry(gpus))
    async with asyncio.timeout(5):
        while "list_gpus" not in gpus.calls:  # noqa: ASYNC110 - until it has looked once
            await asyncio.sleep(0)
    gpus.errors.clear()
    assert [gpu.index for gpu in (await looking).gpus] == [0, 1]


@pytest.mark.parametrize(("error", "patience_s"), [("lost", 60.0), ("failing for long", 0.05)])
async def test_survey_does_not_wait_for_a_lost_device(error: str, patience_s: float) -> None:
    gpus = FakeGpus()
    gpus.errors[gpus.gpus[1].uuid] = error
    async with asyncio.timeout(5):
        assert [gpu.index for gpu in (await survey_gpus_with_retry(gpus, patience_s)).gpus] == [0]


async def test_survey_of_a_host_without_driver_returns_at_once() -> None:
    async with asyncio.timeout(5):
        assert (await survey_gpus_with_retry(FakeGpus(unavailable=True), 60.0)).error is not None


def nvml_error(code: int) -> UnavailableError:
    error = UnavailableError("NVML_UNAVAILABLE", "the GPUs can't be read")
    error.__cause__ = pynvml.NVMLError(code)
    return error


@pytest.mark.parametrize(
    ("code", "trouble"),
    [
        (12, NvmlTrouble.MISSING),
        (9, NvmlTrouble.NOT_LOADED),
        (18, NvmlTrouble.MISMATCH),
        (4, NvmlTrouble.DENIED),
        (15, NvmlTrouble.LOST),
        (16, NvmlTrouble.LOST),
        (10, NvmlTrouble.SILENT),
        (999, NvmlTrouble.OTHER),
    ],
)
async def test_nvml_error_codes_map_to_kinds_of_trouble(code: int, trouble: NvmlTrouble) -> None:
    sight = await survey_gpus(SickGpus(error=nvml_error(code)))
    assert (sight.driver, sight.gpus, sight.trouble) == (None, (), trouble)
    assert bool(sight.trouble_text) is (trouble is NvmlTrouble.OTHER)


async def test_nvml_silence_is_a_kind_of_trouble() -> None:
    sight = await survey_gpus(SickGpus(error=UnavailableError("NVML_UNAVAILABLE", "did not answer within 5 s")))
    assert sight.trouble is NvmlTrouble.SILENT


async def test_driver_version_is_kept_when_the_listing_fails() -> None:
    sight = await survey_gpus(SickGpus(error=nvml_error(15), speaks_first=True))
    facts = host_facts(sight, GpuSettings())
    assert (facts.driver_version, facts.cuda, facts.gpus, facts.trouble) == ("580.65.06", 13000, (), NvmlTrouble.LOST)


async def test_facts_of_a_healthy_host(tmp_path: Path) -> None:
    program = tmp_path / "cuda-checkpoint"
    program.touch(0o755)
    settings = GpuSettings(checkpointer="utility", utility_path=str(program))
    facts = host_facts(await survey_gpus(SickGpus()), settings)
    assert (facts.trouble, facts.gpus, facts.euid) == (None, (T4,), os.geteuid())
    assert (facts.checkpointer, facts.utility, facts.utility_problem) == ("utility", str(program), "")


async def test_facts_that_only_the_kernel_tells(tmp_path: Path) -> None:
    survey = await survey_gpus(SickGpus())
    for name, text in (
        ("self/status", "CapEff:\t0000000000000000\n"),
        ("sys/kernel/yama/ptrace_scope", "3\n"),
        ("driver/nvidia/version", "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  595.71.05\n"),
    ):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    facts = host_facts(survey, GpuSettings(), tmp_path)
    assert (facts.may_trace, facts.ptrace_scope, facts.open_module) == (False, 3, True)
    facts = host_facts(survey, GpuSettings(), tmp_path / "nothing")
    assert (facts.may_trace, facts.ptrace_scope, facts.open_module) == (True, 0, False)


async def test_facts_without_the_utility() -> None:
    facts = host_facts(await survey_gpus(SickGpus()), GpuSettings(utility_path="/nonexistent/cuda-checkpoint"))
    assert (facts.utility, facts.utility_problem) == ("", "there is no program /nonexistent/cuda-checkpoint")


@pytest.mark.root
@pytest.mark.alone
@pytest.mark.skipif(os.geteuid() != 0, reason="only root's own program counts as MPS")
@pytest.mark.parametrize(
    ("name", "owner", "counts"),
    [
        ("nvidia-cuda-mps-control", 0, True),
        ("nvidia-cuda-mps-server", 0, True),
        ("nvidia-cuda-mps-server", 65534, False),  # a tenant's program of that name must not turn idle mode off
        ("nvidia-cuda-mps-exporter", 0, False),
    ],
)
def test_mps_is_detected_by_its_programs(tmp_path: Path, name: str, owner: int, counts: bool) -> None:
    shutil.copy("/bin/sleep", tmp_path / name)
    os.chown(tmp_path / name, owner, owner)
    assert not mps_runs()
    with subprocess.Popen([str(tmp_path / name), "60"]) as process:
        found = mps_runs()
        process.kill()
    assert found is counts


def test_host_pids_are_seen_only_in_the_initial_namespace(tmp_path: Path) -> None:
    """In a container without --pid=host NVML's pids are not ours; a user-space driver sees our own."""
    (tmp_path / "self" / "ns").mkdir(parents=True)
    (tmp_path / "self" / "ns" / "pid").touch()
    assert sees_host_pids(tmp_path)
    (tmp_path / "driver" / "nvidia").mkdir(parents=True)
    (tmp_path / "driver" / "nvidia" / "version").touch()
    assert not sees_host_pids(tmp_path)
