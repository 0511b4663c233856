"""The freezer of cgroup v1, by which an engine pauses containers on hybrid hosts.

A task frozen there does not die of SIGKILL until it is thawed (unlike v2): thaw it before a kill.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from agent.adapters.kernel.cgroup import parse_membership, parse_mounts
from agent.adapters.kernel.process_table import PROC

CONTROLLER = "freezer"


def thaw(pid: int, proc: Path = PROC) -> None:
    """Undo a v1 freeze of the cgroup that `pid` is in. Does nothing without v1, or at the top of the hierarchy."""
    path = cgroup_of(pid, proc)
    if path is not None:
        thaw_cgroup(path)


def thaw_cgroup(path: Path) -> None:
    """Thaw it. The kernel does so at once."""
    with suppress(OSError):  # gone with its last process
        (path / "freezer.state").write_text("THAWED", encoding="ascii")


def is_frozen(path: Path) -> bool:
    """Whether it is stopped, or about to be (FREEZING)."""
    try:
        return (path / "freezer.state").read_bytes().strip() != b"THAWED"
    except OSError:
        return False


def cgroup_of(pid: int, proc: Path = PROC) -> Path | None:
    """The process's own v1 freezer cgroup; None if it is in the top one or there is none."""
    try:
        membership = parse_membership((proc / str(pid) / "cgroup").read_text(encoding="utf-8"))
        mounts = parse_mounts((proc / "self/mountinfo").read_text(encoding="utf-8"))
    except (FileNotFoundError, ProcessLookupError):
        return None
    named = membership.get(CONTROLLER, "/")
    for mount in mounts:
        if mount.version == 1 and CONTROLLER in mount.controllers and named != "/":
            return mount.locate(named)
    return None
