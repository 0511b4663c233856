"""The capability lines of hosts, and whether they allow idle mode."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agent.core.gpus.capabilities import Capabilities, find_capabilities, host_lines
from agent.core.gpus.host_facts import HostFacts, NvmlTrouble, driver_branch, is_open_module, may_trace
from agent.core.snapshots import CapabilityLine
from agent.core.types import GIB, ComputeMode, Gpu

H100 = Gpu("GPU-0", 0, "NVIDIA H100", 80 * GIB)
SECOND = replace(H100, uuid="GPU-1", index=1)
GOOD = HostFacts("580.65.06", (H100, SECOND), 0, "x86_64", cuda=13000)
PROGRAM = "/usr/bin/cuda-checkpoint"
CUDA = {535: 12020, 550: 12040, 555: 12050, 570: 12080, 575: 12090, 580: 13000, 590: 13010, 595: 13020, 610: 13030}


def host(branch: int, **facts: object) -> HostFacts:
    """A host without problems except `facts`."""
    return replace(GOOD, driver_version=f"{branch}.42.01", cuda=CUDA[branch], **facts)  # type: ignore[arg-type]


def line(found: Capabilities, name: str) -> CapabilityLine:
    return next(line for line in found.lines if line.name == name)


def failing(found: Capabilities) -> set[str]:
    return {line.name for line in found.lines if line.level == "FAIL"}


def test_a_safe_host_can_do_everything_and_needs_no_fix() -> None:
    found = find_capabilities(GOOD)
    assert (found.idle_mode, found.checkpointer, found.migration, found.init_before_restore, found.refusal) == (
        True,
        "driver",
        True,
        False,
        "",
    )
    assert {line.level for line in found.lines} == {"OK"}
    assert {line.fix for line in found.lines} == {""}


def test_the_names_of_the_lines_are_an_interface() -> None:
    names = (
        "driver architecture kernel_module cuda checkpoint migration privileges persistence mig vgpu compute_mode mps"
    )
    assert [line.name.replace(" ", "_") for line in find_capabilities(GOOD).lines] == names.split()


@pytest.mark.parametrize("setting", ["auto", "driver", "utility"])
@pytest.mark.parametrize("program", ["", PROGRAM])
@pytest.mark.parametrize("branch", CUDA)
def test_checkpointer_by_driver_setting_and_program(branch: int, setting: str, program: str) -> None:
    """The expected checkpointer, written as a table."""
    api = {"driver"} if branch >= 570 else set()
    utility = {"utility"} if branch >= 555 and program else set()
    wanted = {"auto": ["driver", "utility"], "driver": ["driver"], "utility": ["utility"]}[setting]
    expected = next((kind for kind in wanted if kind in api | utility), "")
    found = find_capabilities(host(branch, checkpointer=setting, utility=program))
    assert found.checkpointer == expected
    assert found.idle_mode is bool(expected)
    assert found.migration is (bool(expected) and branch >= 580)
    assert line(found, "checkpoint").level == ("OK" if expected else "FAIL")
    assert bool(found.refusal) is not bool(expected)


@pytest.mark.parametrize(
    ("facts", "said", "fix"),
    [
        (host(535), "can't checkpoint in separate steps", "install driver 580 or newer"),
        (host(550, utility=PROGRAM), "can't checkpoint in separate steps", "install driver 580 or newer"),
        (host(555), "there is no cuda-checkpoint program", "github.com/NVIDIA/cuda-checkpoint"),
        (host(555, utility_problem="/x belongs to user 7"), "/x belongs to user 7", "gpu.utility_path"),
        (host(555, checkpointer="driver"), "which gpu.checkpointer: driver asks for", "set gpu.checkpointer: auto"),
        (host(580, checkpointer="utility"), "there is no cuda-checkpoint", "set gpu.checkpointer: auto"),
        (replace(GOOD, cuda=12020), "no checkpoint API", "remove the cuda-compat package"),
        (replace(GOOD, cuda=12060), "there is no cuda-checkpoint", "remove the cuda-compat package"),
        (replace(GOOD, cuda=12060, checkpointer="driver"), "no checkpoint API", "remove the cuda-compat package"),
    ],
)
def test_fix_without_a_checkpointer_fits_the_driver(facts: HostFacts, said: str, fix: str) -> None:
    found = find_capabilities(facts)
    assert found.checkpointer == ""
    assert said in line(found, "checkpoint").reason
    assert fix in line(found, "checkpoint").fix


def test_an_older_libcuda_hides_the_api_and_leaves_the_program() -> None:
    found = find_capabilities(replace(GOOD, cuda=12060, utility=PROGRAM))
    assert (found.checkpointer, found.idle_mode) == ("utility", True)
    assert line(found, "cuda").level == "WARN"
    assert "CUDA 12.6" in line(found, "cuda").reason


OPEN = """NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  595.71.05  Release Build  (dvs-builder@U22)
GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04)
"""
CLOSED = """NVRM version: NVIDIA UNIX x86_64 Kernel Module  595.71.05  Thu Feb 22 01:44:30 UTC 2026
GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04)
"""


@pytest.mark.parametrize(
    ("branch", "text", "level"), [(595, OPEN, "WARN"), (595, CLOSED, "OK"), (595, "", "OK"), (580, OPEN, "OK")]
)
def test_only_the_open_module_of_a_branch_that_hangs_is_warned_of(branch: int, text: str, level: str) -> None:
    found = find_capabilities(host(branch, open_module=is_open_module(text)))
    assert (line(found, "kernel module").level, found.idle_mode) == (level, True)


@pytest.mark.parametrize(
    ("status", "may"),
    [
        ("Name:\tpython3\nCapPrm:\t0000000000000000\nCapEff:\t000001ffffffffff\n", True),
        ("CapPrm:\t000001ffffffffff\nCapEff:\t000001fffff7ffff\n", False),
        ("CapEff:\t00000000a80425fb\n", False),  # Docker's default
        ("Name:\tpython3\n", True),
    ],
)
def test_ptrace_capability_is_read_from_the_effective_set(status: str, may: bool) -> None:
    assert may_trace(status) is may


@pytest.mark.parametrize("scope", [0, 1, 2])
def test_yama_stops_no_agent_that_has_the_capability(scope: int) -> None:
    assert line(find_capabilities(replace(GOOD, ptrace_scope=scope)), "privileges").level == "OK"


def test_an_unknown_cuda_version_is_judged_by_the_driver() -> None:
    found = find_capabilities(replace(GOOD, cuda=0))
    assert (found.checkpointer, line(found, "cuda").level) == ("driver", "WARN")


@pytest.mark.parametrize(
    ("facts", "name", "level", "fix"),
    [
        (host(570), "driver", "WARN", "install driver 580"),
        (host(570), "migration", "WARN", "install driver 580"),
        (replace(GOOD, gpus=()), "driver", "FAIL", "lspci"),
        (replace(GOOD, driver_version=""), "driver", "FAIL", "install the NVIDIA driver"),
        (replace(GOOD, driver_version="rolling"), "driver", "FAIL", "install driver 580"),
        (replace(GOOD, euid=1000), "privileges", "WARN", "sudo"),
        (replace(GOOD, host_pids=False), "privileges", "FAIL", "--pid=host"),
        (replace(GOOD, may_trace=False), "privileges", "WARN", "CAP_SYS_PTRACE"),
        (replace(GOOD, ptrace_scope=3), "privileges", "WARN", "/etc/sysctl.d"),
        (host(595, open_module=True), "kernel module", "WARN", "run no scheduler"),
        (replace(GOOD, gpus=(replace(H100, mig=True),)), "mig", "FAIL", "nvidia-smi -i 0 -mig 0"),
        (replace(GOOD, gpus=(replace(H100, virtual=True),)), "vgpu", "FAIL", "passthrough"),
        (replace(GOOD, mps=True), "mps", "FAIL", "echo quit | nvidia-cuda-mps-control"),
        (
            replace(GOOD, gpus=(H100, replace(SECOND, compute_mode=ComputeMode.PROHIBITED))),
            "compute mode",
            "FAIL",
            "nvidia-smi -i 1 -c DEFAULT",
        ),
        (
            replace(GOOD, gpus=(replace(H100, compute_mode=ComputeMode.EXCLUSIVE),)),
            "compute mode",
            "WARN",
            "nvidia-smi -i 0 -c DEFAULT",
        ),
        (replace(GOOD, gpus=(replace(H100, persistence=False),)), "persistence", "WARN", "nvidia-smi -i 0 -pm 1"),
        (
            host(555, utility=PROGRAM, gpus=(H100, replace(SECOND, persistence=False))),
            "persistence",
            "FAIL",
            "nvidia-smi -i 1 -pm 1",
        ),
        (host(580, machine="aarch64"), "architecture", "FAIL", "install driver 595"),
        (host(590, machine="arm64"), "architecture", "FAIL", "install driver 595"),
        (host(595, machine="aarch64"), "architecture", "OK", ""),
        (replace(GOOD, machine="riscv64"), "architecture", "FAIL", "64-bit x86"),
        (replace(GOOD, machine="a 32-bit system"), "architecture", "FAIL", "64-bit x86"),
    ],
)
def test_each_shortcoming_has_its_line_and_a_fix(facts: HostFacts, name: str, level: str, fix: str) -> None:
    found = find_capabilities(facts)
    assert line(found, name).level == level
    assert fix in line(found, name).fix
    assert found.idle_mode is (level != "FAIL")
    assert failing(found) == ({name} if level == "FAIL" else set())
    assert all(bool(line.fix) is (line.level != "OK") for line in found.lines)


MISCONFIGURED: dict[str, dict[str, object]] = {
    "mig": {"gpus": (replace(H100, mig=True),)},
    "vgpu": {"gpus": (replace(H100, virtual=True),)},
    "compute mode": {"gpus": (replace(H100, compute_mode=ComputeMode.PROHIBITED),)},
    "mps": {"mps": True},
    "privileges": {"host_pids": False},
    "architecture": {"machine": "ppc64le"},
}


@pytest.mark.parametrize("name", MISCONFIGURED)
@pytest.mark.parametrize("branch", CUDA)
def test_misconfiguration_forbids_idle_mode_with_any_driver(branch: int, name: str) -> None:
    """The line has a fix even if the driver has a problem too."""
    found = find_capabilities(host(branch, utility=PROGRAM, **MISCONFIGURED[name]))
    assert not found.idle_mode
    assert not found.migration
    assert line(found, name).level == "FAIL"
    assert line(found, name).fix
    assert line(found, name).fix in found.refusal or line(found, "checkpoint").fix in found.refusal
    assert found.checkpointer == ("" if branch < 555 else "utility" if branch < 570 else "driver")  # for recovery


@pytest.mark.parametrize("branch", [570, 575, 580, 595])
def test_without_persistence_mode_a_restore_needs_cuinit_first(branch: int) -> None:
    found = find_capabilities(host(branch, gpus=(H100, replace(SECOND, persistence=False))))
    assert (found.idle_mode, found.init_before_restore) == (True, True)
    assert not find_capabilities(host(branch)).init_before_restore


@pytest.mark.parametrize("trouble", NvmlTrouble)
def test_nvml_failure_has_one_fix(trouble: NvmlTrouble) -> None:
    found = find_capabilities(HostFacts("", (), 0, "x86_64", trouble=trouble, trouble_text="its own word"))
    assert (found.idle_mode, found.checkpointer, failing(found)) == (False, "", {"driver"})
    assert "its own word" in found.lines[0].reason
    assert found.lines[0].fix
    assert {line.name for line in found.lines} == {"driver", "architecture", "privileges"}  # nothing about no devices


def test_gpus_are_named_by_index_as_nvidia_smi_takes_them() -> None:
    gpus = (H100, replace(H100, index=3, mig=True), replace(H100, index=5, mig=True))
    found = line(find_capabilities(replace(GOOD, gpus=gpus)), "mig")
    assert "GPU 3,5 " in found.reason
    assert found.fix == "nvidia-smi -i 3,5 -mig 0"


def test_refusal_names_the_first_failure_and_counts_the_others() -> None:
    alone = find_capabilities(replace(GOOD, mps=True))
    assert alone.refusal == f"{line(alone, 'mps').reason} (to do: echo quit | nvidia-cuda-mps-control)"
    several = find_capabilities(host(535, mps=True, machine="riscv64"))
    assert several.refusal.endswith("; 2 more: hibernode doctor)")


def test_one_gpu_has_nowhere_to_migrate_and_nothing_to_fix() -> None:
    assert line(find_capabilities(host(570, gpus=(H100,))), "migration").level == "OK"


@pytest.mark.parametrize(
    ("version", "branch"), [("580.65.06", 580), ("", 0), ("unknown", 0), ("610", 610), ("\u0665\u0668\u0660.1", 0)]
)
def test_the_branch_is_the_first_number(version: str, branch: int) -> None:
    assert driver_branch(version) == branch


def test_host_lines_add_the_cgroup_and_an_unavailable_checkpointer() -> None:
    found = find_capabilities(GOOD)
    fenced, trees = host_lines(found, "/sys/fs/cgroup/hibernode-1", ""), host_lines(found, "", "no worker started")
    assert (fenced[-1].name, fenced[-1].level) == ("cgroup", "OK")
    assert [(line.name, line.level) for line in trees[-2:]] == [("cgroup", "WARN"), ("idle mode", "FAIL")]
    assert trees[: len(found.lines)] == found.lines
