"""What `hibernode doctor` finds out about this host by itself. Each check is a `CapabilityLine`; none changes anything
but one empty cgroup that is made and removed again."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from agent.core.capabilities import HostFacts, find_capabilities
from agent.core.snapshots import CapabilityLine
from agent.core.types import GIB, Gpu

NVML_DEADLINE_S = 20


def host_lines() -> list[CapabilityLine]:
    """Everything that can be said without an agent."""
    gpus, lines = gpu_lines()
    return [*lines, memory_line(gpus, Path("/proc/meminfo")), *system_lines()]


def system_lines() -> list[CapabilityLine]:
    """What the agent needs of the host besides its GPUs."""
    return [cgroup_line(Path("/proc/self")), compiler_line()]


def gpu_lines() -> tuple[list[Gpu], list[CapabilityLine]]:
    """Driver and GPUs by NVML (or by the emulated driver, where its exports are set), judged as the agent does."""
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "agent.cli.doctor_nvml"],
            capture_output=True,
            timeout=NVML_DEADLINE_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        text = f"NVML does not answer within {NVML_DEADLINE_S} s"
        return [], [_fail("driver", text, "look for XID errors in the kernel log; a reset or a reboot may be due")]
    try:
        facts = json.loads(done.stdout)
    except ValueError:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        return [], [_fail("driver", f"NVML ended in the middle: {said[-1] if said else 'no word'}", "reinstall it")]
    gpus = [Gpu(**gpu) for gpu in facts["gpus"]]
    found = find_capabilities(HostFacts(facts["driver_version"], gpus, os.geteuid(), platform.machine()))
    lines = list(found.lines)
    if facts["problem"]:
        first = lines[0]
        lines[0] = CapabilityLine(first.name, "FAIL", f"{first.reason} ({facts['problem']})", first.fix or "see above")
    if not gpus:  # nothing to say about devices that are not there
        lines = [line for line in lines if line.name not in ("persistence", "mig", "migration", "checkpoint")]
    return gpus, lines


def memory_line(gpus: Iterable[Gpu], meminfo: Path) -> CapabilityLine:
    """A frozen instance's GPU memory lies in host memory."""
    host = next(
        (int(line.split()[1]) << 10 for line in meminfo.read_text().splitlines() if line.startswith("MemTotal:")), 0
    )
    needed = sum(gpu.memory_bytes for gpu in gpus)
    text = f"{host / GIB:.0f} GiB on the host, {needed / GIB:.0f} GiB on the GPUs"
    if needed > host:
        fix = "add memory, or expect instances to stay awake with HOST_MEMORY_SHORT"
        return CapabilityLine("memory", "WARN", f"{text}: not all of it can sleep at once", fix)
    return _ok("memory", text)


def cgroup_line(proc_self: Path) -> CapabilityLine:
    """cgroup v2 with its freezer, writable: made sure of by making a group."""
    fix = "run as root, with /sys/fs/cgroup writable (in a container: mount it rw, or --privileged --cgroupns=host)"
    point = _v2_mount((proc_self / "mountinfo").read_text())
    if point is None:
        return _warn_cgroup("cgroup v2 is not mounted", "mount -t cgroup2 none /sys/fs/cgroup/unified")
    own = next((line[3:] for line in (proc_self / "cgroup").read_text().splitlines() if line.startswith("0::")), "/")
    for parent in dict.fromkeys((point, point / own.lstrip("/"))):
        probe = parent / f"hibernode-doctor-{os.getpid()}"
        try:
            probe.mkdir()
        except OSError:
            continue
        try:
            if os.access(probe / "cgroup.freeze", os.W_OK):
                return _ok("cgroup", f"v2 at {parent}, writable, with freezer")
        finally:
            probe.rmdir()
        return _warn_cgroup(f"the kernel's freezer is missing at {parent}", "use kernel 5.2 or newer")
    return _warn_cgroup(f"no cgroup can be made at {point}", fix)


def _v2_mount(mountinfo: str) -> Path | None:
    for line in mountinfo.splitlines():
        fields = line.split(" ")
        if "-" in fields and fields[fields.index("-") + 1] == "cgroup2":
            return Path(fields[4].replace("\\040", " "))
    return None


def compiler_line() -> CapabilityLine:
    """Only the emulated driver needs one."""
    for name in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        if name and shutil.which(name):
            return _ok("compiler", f"{shutil.which(name)}, for the emulated driver")
    return CapabilityLine(
        "compiler", "WARN", "no C compiler: the emulated driver can't be built", "apt-get install gcc libc6-dev"
    )


def _ok(name: str, reason: str) -> CapabilityLine:
    return CapabilityLine(name, "OK", reason, "")


def _fail(name: str, reason: str, fix: str) -> CapabilityLine:
    return CapabilityLine(name, "FAIL", reason, fix)


def _warn_cgroup(found: str, fix: str) -> CapabilityLine:
    text = f"{found}: processes are stopped one by one (SIGSTOP) instead of frozen, and containers can't be frozen"
    return CapabilityLine("cgroup", "WARN", text, fix)
