"""Volumes: allowed and forbidden folders, and attempts to evade the check."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agent.adapters.engine.volumes import SYSTEM_PATHS, ResolvedVolume, forbidden_paths, resolve_volumes
from agent.core.errors import InstanceError
from agent.core.types import Volume


@pytest.fixture
def lent(tmp_path: Path) -> Path:
    """An allowed folder with contents, next to a forbidden one."""
    (tmp_path / "lent/models").mkdir(parents=True)
    (tmp_path / "private").mkdir()
    (tmp_path / "lent/file").write_text("x")
    return tmp_path / "lent"


def resolve(
    host_path: str | Path,
    container_path: str = "/mnt/x",
    *,
    allowed: Path,
    forbidden: tuple[str, ...] = (),
    read_only: bool = True,
    mountinfo: Path = Path("/dev/null"),
) -> ResolvedVolume:
    volume = Volume(str(host_path), container_path, read_only)
    return resolve_volumes([volume], [str(allowed)], forbidden, mountinfo=mountinfo)[0]


def refusal(host_path: str | Path, container_path: str = "/mnt/x", *, allowed: Path, **more: tuple[str, ...]) -> str:
    with pytest.raises(InstanceError) as caught:
        resolve(host_path, container_path, allowed=allowed, **more)  # type: ignore[arg-type]
    assert caught.value.reason == "VOLUME_REFUSED"
    return caught.value.message


def test_folder_below_an_allowed_one(lent: Path) -> None:
    assert resolve(lent / "models", "/mnt/models", allowed=lent) == ResolvedVolume(
        str(lent / "models"), "/mnt/models", read_only=True
    )
    assert resolve(lent, "/mnt//x/./y/", allowed=lent, read_only=False) == ResolvedVolume(
        str(lent), "/mnt/x/y", read_only=False
    )


def test_no_volumes_without_a_setting(lent: Path) -> None:
    with pytest.raises(InstanceError, match=r"add the folder to runtime\.volumes_allowed"):
        resolve_volumes([Volume(str(lent), "/mnt/x")], [], ())
    assert resolve_volumes([], [], ()) == ()


def test_links_are_resolved_on_both_sides(lent: Path, tmp_path: Path) -> None:
    (lent / "out").symlink_to(tmp_path / "private")
    assert "it leads to" in refusal(lent / "out", allowed=lent)
    assert "not below a folder" in refusal(lent / ".." / "private", allowed=lent)
    (tmp_path / "alias").symlink_to(lent)
    assert resolve(tmp_path / "alias/models", allowed=lent).source == str(lent / "models")
    assert resolve(lent / "models", allowed=tmp_path / "alias").source == str(lent / "models")


def test_common_name_prefix_is_not_enough(lent: Path, tmp_path: Path) -> None:
    (tmp_path / "lent-to-nobody").mkdir()
    refusal(tmp_path / "lent-to-nobody", allowed=lent)


def test_missing_folder_and_file_are_refused(lent: Path) -> None:
    assert "not a directory" in refusal(lent / "file", allowed=lent)
    assert "create the folder on the node first" in refusal(lent / "missing", allowed=lent)
    (lent / "loop").symlink_to(lent / "loop")
    refusal(lent / "loop", allowed=lent)
    os.mkfifo(lent / "pipe")
    assert "not a directory" in refusal(lent / "pipe", allowed=lent)


@pytest.mark.parametrize("path", ["/", "/proc", "/proc/self", "/sys/fs", "/dev", "/run", "/var/run", "/boot", "/etc"])
def test_system_folders_are_refused_even_if_all_is_allowed(path: str) -> None:
    if not Path(path).is_dir():
        pytest.skip(f"this host has no {path}")
    assert "which no instance may see" in refusal(path, allowed=Path("/"), forbidden=forbidden_paths())


def test_folders_above_or_inside_our_own_are_refused(lent: Path) -> None:
    state = lent / "models/state"
    (state / "instances").mkdir(parents=True)
    own = forbidden_paths(state, lent / "models/engine.sock")
    assert f"above {state}" in refusal(lent, allowed=lent, forbidden=own)
    assert f"above {state}" in refusal(lent / "models", allowed=lent, forbidden=own)
    assert f"inside {state}" in refusal(state / "instances", allowed=lent, forbidden=own)
    (lent / "other").mkdir()
    assert resolve(lent / "other", allowed=lent, forbidden=own).source == str(lent / "other")


def test_forbidden_paths_are_resolved(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "alias").symlink_to(tmp_path / "state")
    found = forbidden_paths(tmp_path / "alias", "")
    assert str(tmp_path / "state") in found
    assert {"/proc", "/sys", "/dev"} <= set(found)
    assert "/var/lib/docker" in SYSTEM_PATHS


@pytest.mark.parametrize(
    "path", ["/", "//", "/.", "/proc", "/proc/x", "/sys", "/dev/shm", "relative", "/a/../dev", "/a\0"]
)
def test_reserved_container_paths_are_refused(lent: Path, path: str) -> None:
    assert "container path" in refusal(lent, path, allowed=lent)


def test_two_volumes_at_one_path(lent: Path) -> None:
    volumes = [Volume(str(lent), "/mnt/x"), Volume(str(lent / "models"), "/mnt/x/")]
    with pytest.raises(InstanceError, match="is used twice"):
        resolve_volumes(volumes, [str(lent)], ())


def test_read_only_volume_with_a_writable_mount_is_refused(lent: Path, tmp_path: Path) -> None:
    """Docker before 25 makes only the topmost mount read-only."""
    inside = lent / "models/deep"
    mountinfo = tmp_path / "mountinfo"
    mountinfo.write_text(f"1 0 0:1 / / rw - ext4 /dev/vda rw\n2 1 0:2 / {inside} rw,relatime - ext4 /dev/vdb rw\n")
    with pytest.raises(InstanceError, match="would stay writable"):
        resolve(lent, allowed=lent, mountinfo=mountinfo)
    assert not resolve(lent, allowed=lent, mountinfo=mountinfo, read_only=False).read_only
    mountinfo.write_text(f"2 1 0:2 / {inside} ro,relatime - ext4 /dev/vdb rw\n")
    assert resolve(lent, allowed=lent, mountinfo=mountinfo).read_only


def test_mount_points_with_spaces(lent: Path, tmp_path: Path) -> None:
    mountinfo = tmp_path / "mountinfo"
    mountinfo.write_text(f"2 1 0:2 / {lent}/with\\040space rw - ext4 /dev/vdb rw\n")
    with pytest.raises(InstanceError, match="with space is a separate mount"):
        resolve(lent, allowed=lent, mountinfo=mountinfo)
