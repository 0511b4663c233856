"""Checks of `hibernode doctor` on this host, each a `CapabilityLine`. They only create and remove
one empty cgroup."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from agent.cli.console.output import clean, show_table, show_text
from agent.core.gpus.capabilities import CHECK_KERNEL_LOG
from agent.core.snapshots import CapabilityLine
from agent.core.types import GIB

CHECK_DEADLINE_S = 25.0
KILL_DEADLINE_S = 2.0
MAX_ANSWER_BYTES = 1 << 20


def host_lines(config: Path | None) -> list[CapabilityLine]:
    """All checks that need no agent. `config`: the agent's file; None = its defaults."""
    gpu_bytes, lines = gpu_lines(config)
    if gpu_bytes:
        lines.append(memory_line(gpu_bytes, Path("/proc/meminfo")))
    return [*lines, *system_lines()]


def show_lines(lines: Sequence[CapabilityLine]) -> None:
    """Prints a table of checks, then each fix on its own line, so that its commands can be copied. Failures first."""
    show_table(("CHECK", "LEVEL", "FOUND"), ((one.name, one.level, one.reason) for one in lines))
    to_do = sorted((line for line in lines if line.fix), key=lambda line: line.level != "FAIL")
    show_text("".join(["\n", *(f"fix for {line.name}: {clean(line.fix)}\n" for line in to_do)]) if to_do else "")


def system_lines() -> list[CapabilityLine]:
    """Checks of the host apart from its GPUs."""
    return [cgroup_line(Path("/proc/self")), compiler_line()]


def gpu_lines(config: Path | None) -> tuple[int, list[CapabilityLine]]:
    """Total GPU memory in bytes, and the agent's checks of driver and GPUs. They run in a separate process
    (`daemons/host_check.py`), which is abandoned if it hangs in the driver and can't be killed."""
    # -P: never import a folder `agent` of the working directory.
    command = [sys.executable, "-P", "-m", "agent.daemons.host_check"]
    answer, last_words = _run(command if config is None else [*command, "--config", str(config)])
    if answer is None:
        text = f"the driver does not answer within {CHECK_DEADLINE_S:g} s"
        return 0, [CapabilityLine("driver", "FAIL", text, CHECK_KERNEL_LOG)]
    try:
        document: dict[str, Any] = json.loads(answer.splitlines()[-1])
        lines = [CapabilityLine(**check) for check in document["checks"]]
        return int(document["gpu_memory_bytes"]), lines
    except (ValueError, KeyError, TypeError, IndexError):
        text = f"the check of the driver failed: {last_words or 'no message'}"
        fix = "check nvidia-smi; reinstall the NVIDIA driver, 580 or newer"
        return 0, [CapabilityLine("driver", "FAIL", text, fix)]


def _run(command: list[str]) -> tuple[bytes | None, str]:
    """The program's stdout (None: it did not end in time), and its last line of stderr or the signal that ended it."""
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            answer, error = process.communicate(timeout=CHECK_DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            with suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=KILL_DEADLINE_S)
            if process.poll() is None:
                process.returncode = 0  # stuck in the kernel: Popen must not wait for it
            return None, ""
    lines = error.decode(errors="replace").strip().splitlines()
    died = f"signal {-process.returncode}" if process.returncode < 0 else ""
    return answer[:MAX_ANSWER_BYTES], lines[-1][:300] if lines else died


def memory_line(gpu_bytes: int, meminfo: Path) -> CapabilityLine:
    """Compares host memory with GPU memory, since a frozen instance's GPU memory is in host memory."""
    host = next(
        (int(line.split()[1]) << 10 for line in meminfo.read_text().splitlines() if line.startswith("MemTotal:")), 0
    )
    text = f"{host / GIB:.0f} GiB on the host, {gpu_bytes / GIB:.0f} GiB on the GPUs"
    if gpu_bytes > host:
        fix = "add memory, or expect some instances to stay awake with HOST_MEMORY_SHORT"
        return CapabilityLine("memory", "WARN", f"{text}: not all of it can be frozen at once", fix)
    return _ok("memory", text)


def cgroup_line(proc_self: Path) -> CapabilityLine:
    """Checks that cgroup v2 is writable and has a freezer, by creating a group."""
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
        return _warn_cgroup(f"no cgroup freezer at {parent}", "use kernel 5.2 or newer")
    return _warn_cgroup(f"cannot create a cgroup at {point}", fix)


def _v2_mount(mountinfo: str) -> Path | None:
    for line in mountinfo.splitlines():
        fields = line.split(" ")
        if "-" in fields and fields[fields.index("-") + 1] == "cgroup2":
            return Path(fields[4].replace("\\040", " "))
    return None


def compiler_line() -> CapabilityLine:
    """Checks for a C compiler, which the emulated driver needs."""
    for name in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        if name and shutil.which(name):
            return _ok("compiler", f"{shutil.which(name)}, for the emulated driver")
    return CapabilityLine(
        "compiler", "WARN", "no C compiler: the emulated driver can't be built", "apt-get install gcc libc6-dev"
    )


def _ok(name: str, reason: str) -> CapabilityLine:
    return CapabilityLine(name, "OK", reason, "")


def _warn_cgroup(found: str, fix: str) -> CapabilityLine:
    text = f"{found}: processes are stopped one by one (SIGSTOP) instead of frozen, and containers can't be frozen"
    return CapabilityLine("cgroup", "WARN", text, fix)
