"""Tests the state directory: one owner, one UUID, and nothing readable by others."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path

import pytest

from agent.adapters.daemon import state_dir
from agent.adapters.daemon.state_dir import StateDir, write_atomically
from agent.core.errors import ConfigError, PreconditionError


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_state_dir_is_private_and_keeps_its_uuid(tmp_path: Path) -> None:
    path = tmp_path / "var" / "agent"
    with StateDir(path) as first:
        drawn = first.uuid
    with StateDir(path) as second:
        assert second.uuid == drawn
    assert mode(path) == 0o700
    with StateDir(tmp_path / "other") as other:
        assert other.uuid != drawn


def test_passable_state_dir_cannot_be_listed(tmp_path: Path) -> None:
    path = tmp_path / "agent"
    path.mkdir(mode=0o700)
    with StateDir(path, passable=True) as state:
        state.write_endpoints({"grpc": "127.0.0.1:1"})
        assert mode(path) == 0o711
        assert {file.name: mode(file) for file in path.iterdir()} == {
            "lock": 0o600,
            "uuid": 0o644 & ~_umask(),
            "endpoints.json": 0o644 & ~_umask(),
        }


def _umask() -> int:
    current = os.umask(0o022)
    os.umask(current)
    return current


def test_state_dir_has_one_owner_at_a_time(tmp_path: Path) -> None:
    with StateDir(tmp_path):
        with pytest.raises(PreconditionError) as caught:
            StateDir(tmp_path)
        assert caught.value.reason == "STATE_DIR_IN_USE"
    StateDir(tmp_path).close()


@pytest.mark.parametrize("open_to", [0o777, 0o770, 0o1777])
def test_state_dir_writable_by_others_is_refused(tmp_path: Path, open_to: int) -> None:
    path = tmp_path / "agent"
    path.mkdir()
    path.chmod(open_to)
    with pytest.raises(ConfigError, match="go-w") as caught:
        StateDir(path)
    assert caught.value.reason == "STATE_DIR_UNSAFE"
    assert not list(path.iterdir())


@pytest.mark.root
def test_state_dir_of_another_user_is_refused(tmp_path: Path) -> None:
    """In /tmp another user can be first, with a token of their own."""
    if os.geteuid() != 0:
        pytest.skip("only root can make a directory of another user")
    path = tmp_path / "agent"
    path.mkdir(mode=0o700)
    os.chown(path, 65534, 65534)
    with pytest.raises(ConfigError, match="another user"):
        StateDir(path, passable=True)
    assert not list(path.iterdir())


def test_link_in_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    path = tmp_path / "agent"
    path.mkdir(mode=0o700)
    (path / "lock").symlink_to(tmp_path / "victim")
    with pytest.raises(ConfigError):
        StateDir(path)
    assert not (tmp_path / "victim").exists()


def test_endpoints_are_removed_with_their_daemon(tmp_path: Path) -> None:
    with StateDir(tmp_path) as state:
        state.write_endpoints({"ingress": "127.0.0.1:8610"})
        assert json.loads((tmp_path / "endpoints.json").read_text()) == {"ingress": "127.0.0.1:8610"}
    assert not (tmp_path / "endpoints.json").exists()


def test_non_directory_is_refused_with_a_message(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ConfigError) as caught:
        StateDir(file)
    assert caught.value.reason == "STATE_DIR_UNUSABLE"


def test_full_disk_is_refused_and_releases_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes, mode: int = 0o644) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(state_dir, "write_atomically", full)
        with pytest.raises(ConfigError, match="No space left on device"):
            StateDir(tmp_path)
    StateDir(tmp_path).close()


def test_write_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "endpoints.json"
    write_atomically(target, b"old")

    def fails(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails)
        with pytest.raises(OSError, match="Input/output"):
            write_atomically(target, b"new")
    assert target.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["endpoints.json"], "no draft stays"


def test_disk_full_at_the_end_of_the_start_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with StateDir(tmp_path / "agent") as state:
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(ConfigError, match=r"cannot write into state_dir .*: No space left on device") as refused:
            state.write_endpoints({"grpc": "127.0.0.1:1"})
        assert refused.value.reason == "STATE_DIR_UNUSABLE"
        assert sorted(file.name for file in state.path.iterdir()) == ["lock", "uuid"], "no draft is left"


@pytest.mark.parametrize("damage", [b"", b"\xff\xff", b"4f0c"])
def test_a_damaged_uuid_is_refused_and_left_as_it_is(tmp_path: Path, damage: bytes) -> None:
    """With another one the agent would take its own containers for those of another state directory."""
    StateDir(tmp_path).close()
    (tmp_path / "uuid").write_bytes(damage)
    with pytest.raises(ConfigError, match="restore it") as caught:
        StateDir(tmp_path)
    assert caught.value.reason == "STATE_DIR_DAMAGED"
    assert (tmp_path / "uuid").read_bytes() == damage
    (tmp_path / "uuid").unlink()
    StateDir(tmp_path).close()
