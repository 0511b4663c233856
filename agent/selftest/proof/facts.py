"""The facts of a host that its proof is read with: `python -m agent.selftest.proof.facts`.

Reports as `agent/selftest/reporting.py` says; a process of its own, because the driver can hang its callers.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from agent import __version__
from agent.adapters.cuda.utility_program import find_utility
from agent.adapters.kernel.cgroup import open_slice
from agent.adapters.kernel.host_memory import ProcHostMemory
from agent.adapters.nvml.gpus import NvmlGpus
from agent.adapters.nvml.host_facts import host_facts, survey_gpus
from agent.adapters.nvml.pcie import pcie_links
from agent.core.errors import HibernodeError
from agent.core.gpus.capabilities import find_capabilities
from agent.selftest.reporting import emit, report_of
from agent.settings import GpuSettings

TORCH_S = 60.0
"""Importing PyTorch takes this long on a machine that has not read it before."""

_IMPORT_TORCH = "import torch; torch.cuda.init(); print('torch', torch.__version__, torch.version.cuda)"
_CAPABILITIES = {19: "SYS_PTRACE", 21: "SYS_ADMIN", 1: "DAC_OVERRIDE", 24: "SYS_RESOURCE"}
"""Bits of those that freezing uses."""
_PACKAGES = ("grpcio", "protobuf", "nvidia-ml-py", "uvloop", "msgspec", "psutil", "SQLAlchemy")


async def gather(stack: AsyncExitStack) -> dict[str, Any]:
    """All facts. Never raises for what a host lacks: it is in `missing`, a sentence each."""
    gpus = NvmlGpus()
    stack.push_async_callback(gpus.close)
    emit("step", "asking the driver")
    survey = await survey_gpus(gpus)
    try:
        free = await gpus.memory_free()
    except HibernodeError:
        free = {}
    links = pcie_links()
    capabilities = find_capabilities(host_facts(survey, GpuSettings()))
    emit("step", "looking for PyTorch")
    found: dict[str, Any] = {
        "driver": {
            "version": survey.driver.version if survey.driver else None,
            "cuda": survey.driver.cuda if survey.driver else None,
            "module": module_kind(_read("/proc/driver/nvidia/version")),
            "problem": survey.error.message if survey.error else None,
        },
        "gpus": [
            {
                **{key: getattr(gpu, key) for key in ("model", "uuid", "index", "memory_bytes", "persistence", "mig")},
                "free_bytes": free.get(gpu.uuid),
                "compute_mode": gpu.compute_mode.name,
                "pcie": asdict(links[gpu.uuid]) if gpu.uuid in links else None,
            }
            for gpu in survey.gpus
        ],
        "checkpointer": capabilities.checkpointer or None,
        "utility": _utility(),
        "torch": find_torch(),
        "host": host(),
        "versions": {"hibernode": __version__, "python": platform.python_version(), **_versions()},
    }
    found["missing"] = missing(found)
    return found


def host() -> dict[str, Any]:
    """The machine without its GPUs."""
    status = _read("/proc/self/status")
    slice_ = open_slice("proof")
    return {
        "kernel": platform.release(),
        "machine": platform.machine(),
        "system": _system(_read("/etc/os-release")),
        "cpu": _first(r"(?m)^model name\s*: (.*)$", _read("/proc/cpuinfo")),
        "cpus": len(os.sched_getaffinity(0)),
        "numa_nodes": len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))) or None,
        "memory_bytes": psutil.virtual_memory().total,
        "memory_available_bytes": ProcHostMemory().available_bytes(),
        "cgroup": str(slice_.path_of("x").parent) if slice_ is not None else None,
        "yama_ptrace_scope": _number(_read("/proc/sys/kernel/yama/ptrace_scope")),
        "user_id": os.geteuid(),
        "capabilities": capabilities_of(_first(r"(?m)^CapEff:\s*(\w+)$", status)),
        "loopback": _loopback(),
    }


def module_kind(version: str) -> str | None:
    """`open`, `proprietary`, or None if the kernel module does not say it."""
    if "Open Kernel Module" in version:
        return "open"
    return "proprietary" if "Kernel Module" in version else None


def capabilities_of(effective: str | None) -> list[str]:
    """Which of the capabilities that freezing uses are in the mask of /proc/self/status."""
    mask = int(effective or "0", 16)
    return sorted(name for bit, name in _CAPABILITIES.items() if mask >> bit & 1)


def missing(facts: Mapping[str, Any]) -> list[str]:
    """What a complete proof would need and this run lacks, a sentence each."""
    own = facts["host"]
    lines = [
        (not facts["gpus"], f"No GPU answers: {facts['driver']['problem'] or 'the driver lists none'}."),
        (own["user_id"] != 0, "This user is not root: only processes of its own can be frozen."),
        (own["cgroup"] is None, "No cgroup can be written: processes are stopped by SIGSTOP instead."),
        (bool(own["user_id"] and own["yama_ptrace_scope"]), "Yama restricts ptrace for users other than root."),
        (not own["loopback"], "The loopback interface is down: no scheduler or agent can be started."),
        (facts["utility"]["path"] is None, f"No cuda-checkpoint program: {facts['utility']['problem']}."),
        (facts["torch"]["python"] is None, f"No PyTorch: {facts['torch']['problem']}."),
    ]
    return [text for is_missing, text in lines if is_missing]


def find_torch() -> dict[str, Any]:
    """A Python of this machine that can import PyTorch and use a GPU with it; `problem` says why there is none."""
    programs = [found for name in ("python3", "python") if (found := shutil.which(name))]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    problem = "there is no python3 in PATH"
    for program in dict.fromkeys([*programs, sys.executable]):
        try:
            done = subprocess.run(
                [program, "-P", "-c", _IMPORT_TORCH],
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=TORCH_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            problem = f"{os.path.basename(program)}: {type(error).__name__}"
            continue
        if done.returncode == 0 and done.stdout.startswith("torch "):
            _, version, cuda = done.stdout.split()[:3]
            return {"python": program, "version": version, "cuda": cuda, "problem": None}
        problem = f"{os.path.basename(program)}: {(done.stderr.strip().splitlines() or ['no message'])[-1][:200]}"
    return {"python": None, "version": None, "cuda": None, "problem": problem}


def _utility() -> dict[str, Any]:
    places = (GpuSettings().utility_path, shutil.which("cuda-checkpoint"))
    path = next((path for path in places if path and os.path.exists(path)), None)
    if path is None:
        return {"path": None, "sha256": None, "problem": "it is not installed and not in PATH"}
    real, problem = find_utility(Path(path))
    digest = hashlib.sha256(real.read_bytes()).hexdigest() if real is not None else None
    return {"path": str(real) if real is not None else None, "sha256": digest, "problem": problem or None}


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def _loopback() -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", 0))
            probe.listen()
            with socket.create_connection(probe.getsockname(), 2):
                return True
        except OSError:
            return False


def _system(os_release: str) -> str | None:
    return _first(r'(?m)^PRETTY_NAME="?([^"\n]*)"?$', os_release)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _first(pattern: str, text: str) -> str | None:
    found = re.search(pattern, text)
    return found[1] if found else None


def _number(text: str) -> int | None:
    return int(text) if text.strip().isdecimal() else None


if __name__ == "__main__":
    report_of(gather)
