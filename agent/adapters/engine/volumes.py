"""Checks and resolves the host folders that an instance mounts.

After resolving links, a volume must lie below a folder of `runtime.volumes_allowed`, and must neither contain nor lie
inside a path of `forbidden_paths`.

Known gap: between this check and the engine's mount, anyone who can write in an allowed folder (an instance with a
writable volume there) can replace a directory by a link, and the engine follows it. Allow only folders that
administrators alone change, or whose writable volumes are not mounted in part by others. The engine must see the same
file system as the agent: an agent in its own mount namespace (PrivateTmp, a container) checks a different folder.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from agent.core.errors import InstanceError
from agent.core.types import Volume

SYSTEM_PATHS = (
    "/proc", "/sys", "/dev", "/run", "/var/run", "/boot", "/etc/shadow", "/etc/hibernode", "/root/.ssh",
    "/var/lib/docker", "/var/lib/containers", "/var/lib/containerd", "/var/lib/kubelet", "/var/lib/hibernode",
)  # fmt: skip
"""No instance sees these, or anything above or below them: kernel, devices, sockets, secrets, other containers."""

_TAKEN_INSIDE = ("/proc", "/sys", "/dev")


@dataclass(frozen=True, slots=True)
class ResolvedVolume:
    """A volume as the engine gets it. `source` contains no links."""

    source: str
    target: str
    read_only: bool


def forbidden_paths(*own: str | Path) -> tuple[str, ...]:
    """SYSTEM_PATHS and `own` (state directory, engine socket and data root, agent socket), with links resolved."""
    return tuple(dict.fromkeys(os.path.realpath(path) for path in (*SYSTEM_PATHS, *own) if str(path)))


def resolve_volumes(
    volumes: Sequence[Volume],
    allowed: Sequence[str],
    forbidden: Sequence[str],
    *,
    mountinfo: Path = Path("/proc/self/mountinfo"),
) -> tuple[ResolvedVolume, ...]:
    """Resolve all volumes. Raises InstanceError VOLUME_REFUSED with the first problem and its fix. Blocks on disk: a
    folder on a network file system may hang, so call it in a thread."""
    if not volumes:
        return ()
    roots = [os.path.realpath(path) for path in allowed]
    mounts = _mounts(mountinfo) if any(volume.read_only for volume in volumes) else ()
    found: list[ResolvedVolume] = []
    for volume in volumes:
        source = _source(volume, roots, forbidden)
        if volume.read_only:
            _refuse_writable_mounts(volume, source, mounts)
        target = _target(volume)
        if any(target == other.target for other in found):
            raise _refused(volume, f"container path {target} is used twice; give each volume its own")
        found.append(ResolvedVolume(source, target, volume.read_only))
    return tuple(found)


def _source(volume: Volume, roots: Sequence[str], forbidden: Sequence[str]) -> str:
    if not volume.host_path.startswith("/") or "\0" in volume.host_path:
        raise _refused(volume, "the host path must be absolute")
    if not roots:
        raise _refused(volume, "this node allows none; add the folder to runtime.volumes_allowed in agent.yaml")
    try:
        source = os.path.realpath(volume.host_path, strict=True)
        is_folder = stat.S_ISDIR(os.stat(source).st_mode)
    except OSError as error:
        raise _refused(volume, f"{error.strerror or error}; create the folder on the node first") from None
    if not is_folder:
        raise _refused(volume, "it is not a directory; name the folder that contains it")
    via = "" if source == os.path.normpath(volume.host_path) else f" (it leads to {source})"
    if not any(_inside(source, root) for root in roots):
        raise _refused(volume, f"it is not below a folder of runtime.volumes_allowed{via}; add one to agent.yaml")
    for path in forbidden:
        if _inside(source, path) or _inside(path, source):
            where = "inside" if _inside(source, path) else "above"
            raise _refused(volume, f"it is {where} {path}{via}, which no instance may see; use a folder of its own")
    return source


def _target(volume: Volume) -> str:
    path = volume.container_path
    if not path.startswith("/") or "\0" in path or ".." in PurePosixPath(path).parts:
        raise _refused(volume, f"container path {path!r} must be absolute and without `..`")
    target = "/" + "/".join(part for part in path.split("/") if part not in ("", "."))
    if target == "/" or any(_inside(target, taken) for taken in _TAKEN_INSIDE):
        raise _refused(volume, f"container path {target} belongs to the engine; choose another, such as /mnt/data")
    return target


def _refuse_writable_mounts(volume: Volume, source: str, mounts: Iterable[tuple[str, bool]]) -> None:
    """Engines before Docker 25 make only the topmost mount read-only: others below it would stay writable."""
    for point, read_only in mounts:
        if point != source and _inside(point, source) and not read_only:
            raise _refused(
                volume,
                f"{point} is a separate mount below it and would stay writable; declare it as its own volume, "
                "or make this volume writable",
            )


def _mounts(mountinfo: Path) -> tuple[tuple[str, bool], ...]:
    """(mount point, whether it is read-only) of every mount."""
    try:
        lines = mountinfo.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return ()
    rows = [line.split(" ") for line in lines]
    return tuple((_unescape(row[4]), "ro" in row[5].split(",")) for row in rows if len(row) > 5)


def _unescape(text: str) -> str:
    for octal, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(octal, character)
    return text


def _inside(path: str, folder: str) -> bool:
    """Whether `path` is `folder` or lies below it. Both are absolute and normalised."""
    return folder in ("/", path) or path.startswith(folder + "/")


def _refused(volume: Volume, why: str) -> InstanceError:
    return InstanceError("VOLUME_REFUSED", f"volume {volume.host_path[:200]}: {why}", host_path=volume.host_path[:200])
