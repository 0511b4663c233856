"""Traces of container engines on a host: network links, mounts, cgroups, firewall rules."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from agent.adapters.kernel import cgroup

CONTAINER_CGROUP = re.compile(r"(docker-|libpod-)?([0-9a-f]{64})(\.scope)?")
CGROUP_DEPTH = 4
"""Greatest depth of containers below a hierarchy's root: machine.slice/libpod-<id>.scope/container."""
TABLES = ("filter", "nat")
OURS = re.compile(r"DOCKER|NETAVARK|NV_|hib-|docker0")
"""Rules and chains of the engines."""


@dataclass(frozen=True)
class HostTraces:
    """Names of network links, mount points below a folder, cgroups of containers, firewall rules, at one moment."""

    links: frozenset[str]
    mounts: frozenset[str]
    cgroups: frozenset[str]
    rules: frozenset[tuple[str, str]]


def take(folder: Path = Path("/nowhere")) -> HostTraces:
    links = frozenset(entry.name for entry in os.scandir("/sys/class/net"))
    return HostTraces(
        links, frozenset(mounts_below(folder)), frozenset(container_cgroups()), frozenset(firewall_rules())
    )


def mounts_below(folder: Path) -> list[str]:
    points = [line.split(" ")[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return [point for point in points if point.startswith(f"{folder}/")]


def unmount_below(folder: Path) -> None:
    for point in reversed(mounts_below(folder)):
        subprocess.run(["umount", "--lazy", point], capture_output=True, timeout=20, check=False)


def routed_networks() -> list[str]:
    """`10.a.` of every host route into 10.0.0.0/8 (/proc/net/route, in host byte order)."""
    lines = Path("/proc/net/route").read_text().splitlines()[1:]
    targets = [int(line.split()[1], 16).to_bytes(4, sys.byteorder) for line in lines]
    return [f"10.{target[1]}." for target in targets if target[0] == 10]


# ---- cgroups -------------------------------------------------------------------------------------------------------


def container_cgroups() -> list[str]:
    """The topmost cgroup of every container on the host, in every hierarchy."""
    found = []
    for mount in cgroup.parse_mounts(Path("/proc/self/mountinfo").read_text()):
        for folder, below, _files in os.walk(mount.point):
            ours = [name for name in below if CONTAINER_CGROUP.fullmatch(name)]
            found += [f"{folder}/{name}" for name in ours]
            deep = len(Path(folder).relative_to(mount.point).parts) + 1 >= CGROUP_DEPTH
            below[:] = [] if deep else [name for name in below if name not in ours]
    return found


def cgroups_of(container_id: str) -> list[str]:
    return [path for path in container_cgroups() if container_id in path]


def is_empty_cgroup(path: str) -> bool:
    """Whether the cgroup exists without processes: its creator left it behind."""
    try:
        return not any(procs.read_text().strip() for procs in Path(path).rglob("cgroup.procs"))
    except OSError:  # removed meanwhile
        return False


def kill_cgroup(path: str) -> None:
    """SIGKILL all its processes, frozen or not; v2 only."""
    with suppress(OSError):
        if (Path(path) / "cgroup.kill").exists():
            cgroup.send_kill(Path(path))
            cgroup.write_freeze(Path(path), False)


# ---- firewall ------------------------------------------------------------------------------------------------------


def firewall_rules() -> list[tuple[str, str]]:
    """(table, rule or chain) as printed by `iptables -S`."""
    found = []
    for table in TABLES:
        done = _iptables(table, "-S")
        found += [(table, line) for line in done.splitlines() if OURS.search(line) or line.startswith("-P")]
    return found


def remove_firewall_rules(before: frozenset[tuple[str, str]]) -> None:
    """Remove rules added since, unless another engine runs and needs its chains."""
    if any(process.info["name"] == "dockerd" for process in psutil.process_iter(["name"])):
        return
    added = [entry for entry in firewall_rules() if entry not in before]
    for table, line in added:
        if line.startswith("-A"):
            _iptables(table, "-D", *_words(line.removeprefix("-A ")))
    for table, line in added:
        if line.startswith("-N"):
            _iptables(table, "-F", line.split()[1])
    for table, line in added:
        if line.startswith("-N"):
            _iptables(table, "-X", line.split()[1])
    for table, line in before:
        if line.startswith("-P"):
            _iptables(table, *line.split())


def _words(rule: str) -> list[str]:
    """The arguments of a printed rule; comments are quoted."""
    return [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', rule)]


def _iptables(table: str, *arguments: str) -> str:
    with suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(
            ["iptables", "--wait", "5", "-t", table, *arguments],
            capture_output=True, text=True, timeout=20, check=False,
        )  # fmt: skip
        return done.stdout
    return ""
