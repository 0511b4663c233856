"""`hibernode doctor` on broken hosts: emulated drivers with faults, and libraries that fail in other ways. Each problem
has a fix, within 30 s."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.emulated_driver import EmulatedNvidia, emulated_nvidia

DEADLINE_S = 30.0

Host = Callable[[str], EmulatedNvidia]


@dataclass(frozen=True)
class Diagnosis:
    """The doctor's exit code and checks."""

    code: int
    checks: list[dict[str, str]]
    err: str

    def __getitem__(self, name: str) -> dict[str, str]:
        return next(check for check in self.checks if check["name"] == name)

    @property
    def failed(self) -> list[str]:
        return [check["name"] for check in self.checks if check["level"] == "FAIL"]


def examine(environment: Mapping[str, str], *arguments: str | Path, **how: Any) -> Diagnosis:
    """Runs `hibernode doctor --local` as a program, and asserts what holds for every result."""
    command = [sys.executable, "-m", "agent.cli.main", "doctor", "--local", "--output", "json", *map(str, arguments)]
    done = subprocess.run(
        command, env=dict(environment), capture_output=True, text=True, timeout=DEADLINE_S, check=False, **how
    )
    assert done.stdout, done.stderr
    document = json.loads(done.stdout)
    found = Diagnosis(done.returncode, document["checks"], done.stderr)
    assert document["ok"] is not bool(found.failed)
    assert done.returncode == (4 if found.failed else 0)
    assert all(set(check) == {"name", "level", "reason", "fix"} for check in found.checks)
    assert all(check["fix"] for check in found.checks if check["level"] != "OK")
    return found


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    """A host with two GPUs with MIG, by driver profile. Shared between tests, which revert their changes."""
    made: dict[str, EmulatedNvidia] = {}
    with ExitStack() as stack:

        def get(profile: str) -> EmulatedNvidia:
            if profile not in made:
                arguments = ("--gpus", "2", "--gib", "1", "--model", "H100", "--profile", profile)
                made[profile] = stack.enter_context(emulated_nvidia(*arguments))
            return made[profile]

        yield get


def first_gpu(driver: EmulatedNvidia) -> str:
    return driver.control.devices()[0].uuid


def configured(folder: Path, **gpu: str) -> tuple[str, Path]:
    config = folder / "agent.yaml"
    config.write_text("gpu:\n" + "".join(f"  {key}: {value}\n" for key, value in gpu.items()))
    return "--config", config


def test_a_good_host(host: Host) -> None:
    found = examine(host("580").environment)
    assert found.failed == []
    assert (found["driver"]["reason"], found["cuda"]["reason"]) == ("driver 580.65.06, 2 GPUs", "CUDA 13.0")
    assert found["checkpoint"]["reason"] == "by the driver's API"
    assert found["memory"]["reason"].endswith("2 GiB on the GPUs")


def test_host_without_container_engine_passes_with_a_note(host: Host, tmp_path: Path) -> None:
    config = tmp_path / "agent.yaml"
    config.write_text(f"runtime: {{engine: {{socket: {tmp_path}/engine.sock}}}}\n")
    found = examine(host("580").environment, "--config", config)
    assert found.failed == []
    assert found["engine"]["level"] == "WARN"
    assert "functions with an image can't run here" in found["engine"]["reason"]
    config.write_text("runtime: {engine: {socket: 'off'}}\n")
    assert examine(host("580").environment, "--config", config)["engine"]["level"] == "OK"


@pytest.mark.parametrize("profile", ["535", "550"])
def test_a_driver_that_is_too_old(host: Host, profile: str) -> None:
    found = examine(host(profile).environment)
    assert found.failed == ["checkpoint"]
    assert found["checkpoint"]["fix"] == "install driver 580 or newer"


def test_driver_555_needs_a_program(host: Host, tmp_path: Path) -> None:
    driver = host("555")
    without = examine(driver.environment)
    assert without.failed == ["checkpoint"]
    assert "there is no program /usr/bin/cuda-checkpoint" in without["checkpoint"]["reason"]
    assert "set gpu.utility_path" in without["checkpoint"]["fix"]
    program = driver.directory / "bin" / "cuda-checkpoint"
    found = examine(driver.environment, *configured(tmp_path, utility_path=str(program)))
    assert found.failed == []
    assert found["checkpoint"]["reason"] == f"by the program {program}, a process for each step"
    assert found["driver"]["level"] == "WARN"
    asked = examine(driver.environment, *configured(tmp_path, checkpointer="driver"))
    assert "which gpu.checkpointer: driver asks for" in asked["checkpoint"]["reason"]


def test_checkpoint_program_writable_by_others_is_refused(host: Host, tmp_path: Path) -> None:
    program = tmp_path / "cuda-checkpoint"
    shutil.copy(host("555").directory / "bin" / "cuda-checkpoint", program)
    program.chmod(0o777)
    found = examine(host("555").environment, *configured(tmp_path, utility_path=str(program)))
    assert f"chmod go-w {program}" in found["checkpoint"]["reason"]


def test_driver_570_passes_with_a_warning(host: Host) -> None:
    found = examine(host("570").environment)
    assert found.failed == []
    assert [found[name]["level"] for name in ("driver", "migration")] == ["WARN", "WARN"]


def test_persistence_mode_off(host: Host, tmp_path: Path) -> None:
    """The driver's API has a workaround; the program kills its target."""
    new, old = host("580"), host("555")
    for driver in (new, old):
        driver.control.set_device(first_gpu(driver), persistence=False)
    try:
        warned = examine(new.environment)
        program = str(old.directory / "bin" / "cuda-checkpoint")
        refused = examine(old.environment, *configured(tmp_path, utility_path=program))
    finally:
        for driver in (new, old):
            driver.control.set_device(first_gpu(driver), persistence=True)
    assert (warned.failed, warned["persistence"]["level"]) == ([], "WARN")
    assert refused.failed == ["persistence"]
    for found in (warned, refused):
        assert found["persistence"]["fix"].startswith("nvidia-smi -i 0 -pm 1;")


@pytest.mark.parametrize(
    ("name", "change", "back", "fix"),
    [
        ("mig", {"mig": True}, {"mig": False}, "nvidia-smi -i 0 -mig 0"),
        ("compute mode", {"compute_mode": "PROHIBITED"}, {"compute_mode": "DEFAULT"}, "nvidia-smi -i 0 -c DEFAULT"),
    ],
)
def test_gpu_mode_that_forbids_freezing(
    host: Host, name: str, change: dict[str, Any], back: dict[str, Any], fix: str
) -> None:
    driver = host("580")
    driver.control.set_device(first_gpu(driver), **change)
    try:
        found = examine(driver.environment)
    finally:
        driver.control.set_device(first_gpu(driver), **back)
    assert (found.failed, found[name]["fix"]) == ([name], fix)


def test_a_device_that_does_not_answer(host: Host) -> None:
    driver = host("580")
    driver.control.set_device(first_gpu(driver), silent=True)
    try:
        found = examine(driver.environment)
    finally:
        driver.control.set_device(first_gpu(driver), silent=False)
    assert found.failed == ["driver"]
    assert "does not answer" in found["driver"]["reason"]
    assert found["driver"]["fix"].startswith("dmesg | grep -iE 'nvrm|xid'")


def test_lost_gpu_is_named_and_others_keep_serving(host: Host) -> None:
    driver = host("580")
    driver.control.set_device(first_gpu(driver), nvml_error=15)
    try:
        found = examine(driver.environment)
    finally:
        driver.control.set_device(first_gpu(driver), nvml_error=0)
    assert found.failed == []
    assert found["driver"]["level"] == "WARN"
    assert "can't reach 1 of 2 GPUs" in found["driver"]["reason"]
    assert "dmesg" in found["driver"]["fix"]


def test_no_driver_at_all() -> None:
    found = examine({**os.environ, "LD_LIBRARY_PATH": ""})
    assert found.failed == ["driver"]
    assert found["driver"]["reason"] == "no NVIDIA driver: libnvidia-ml.so.1 is not found"
    assert "install the NVIDIA driver, 580 or newer" in found["driver"]["fix"]
    assert {"persistence", "mig", "checkpoint", "memory"}.isdisjoint(check["name"] for check in found.checks)


def test_nvml_without_libcuda(host: Host, tmp_path: Path) -> None:
    """With only half of the driver's packages installed, versions are valid but nothing can be checkpointed."""
    driver = host("580")
    shutil.copy(driver.directory / "lib" / "libnvidia-ml.so.1", tmp_path)
    found = examine({**driver.environment, "LD_LIBRARY_PATH": str(tmp_path)})
    assert found.failed == ["idle mode"]
    assert "libcuda.so.1 can't be loaded" in found["idle mode"]["reason"]
    assert "ldconfig -p" in found["idle mode"]["fix"]


@pytest.mark.parametrize(
    ("body", "problem", "fix"),
    [
        ("return 9;", "kernel module is not loaded", "modprobe nvidia"),
        ("return 18;", "different versions", "reboot"),
        ("return 4;", "may not open", "run as root"),
        ("return 999;", "can't be read (Unknown Error)", "nvidia-smi"),
        ("*(volatile int *)0 = 1; return 0;", "the check of the driver failed", "reinstall"),
        ("for (;;) pause();", "does not answer", "dmesg"),
    ],
)
def test_an_nvml_that_fails(tmp_path: Path, body: str, problem: str, fix: str) -> None:
    source = tmp_path / "nvml.c"
    source.write_text(
        "#include <unistd.h>\n"
        f"int nvmlInitWithFlags(unsigned flags) {{ {body} }}\n"
        f"int nvmlInit_v2(void) {{ {body} }}\n"
        'const char *nvmlErrorString(int code) { return "Unknown Error"; }\n'
    )
    library = tmp_path / "libnvidia-ml.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    found = examine({**os.environ, "LD_LIBRARY_PATH": str(tmp_path)})
    assert found.failed == ["driver"]
    assert problem in found["driver"]["reason"]
    assert fix in found["driver"]["fix"]


@pytest.mark.root
@pytest.mark.alone
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can run MPS's name as root's program")
def test_an_mps_daemon(host: Host, tmp_path: Path) -> None:
    """The name is only relevant for a program of root; tenants may name theirs freely."""
    program = tmp_path / "nvidia-cuda-mps-server"
    shutil.copy("/bin/sleep", program)
    found = []
    for owner in (0, 65534):
        os.chown(program, owner, owner)
        with subprocess.Popen([str(program), "60"]) as mps:
            try:
                found.append(examine(host("580").environment))
            finally:
                mps.kill()
    assert [one.failed for one in found] == [["mps"], []]
    assert found[0]["mps"]["fix"] == "echo quit | nvidia-cuda-mps-control"


def test_not_root(host: Host, tmp_path: Path) -> None:
    """A warning: the driver's refusal is rolled back. (Another user could neither read this interpreter nor reach the
    driver's folder, so the process only believes to be one.)"""
    (tmp_path / "sitecustomize.py").write_text("import os\nos.geteuid = lambda: 1000\n")
    found = examine({**host("580").environment, "PYTHONPATH": str(tmp_path)})
    assert (found["privileges"]["level"], found.failed) == ("WARN", [])
    assert "this is user 1000, not root" in found["privileges"]["reason"]
    assert "sudo" in found["privileges"]["fix"]


def test_a_configuration_that_is_wrong(host: Host, tmp_path: Path) -> None:
    found = examine(host("580").environment, *configured(tmp_path, checkpointer="best"))
    assert found.failed == ["config"]
    assert "gpu.checkpointer" in found["config"]["reason"]
    assert str(tmp_path / "agent.yaml") in found["config"]["fix"]
    assert found["driver"]["level"] == "OK"
