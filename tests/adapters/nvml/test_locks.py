"""Tests that a GPU has one agent, by a lock that ends with the process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agent.adapters.nvml.locks import GpuLocks
from agent.core.errors import PreconditionError


def test_gpu_is_locked_by_one_agent(tmp_path: Path) -> None:
    first, second = GpuLocks(tmp_path), GpuLocks(tmp_path)
    first.acquire(["GPU-A", "GPU-B"])
    with pytest.raises(PreconditionError) as caught:
        second.acquire(["GPU-C", "GPU-B"])
    assert caught.value.reason == "GPU_IN_USE"
    third = GpuLocks(tmp_path)
    third.acquire(["GPU-C"])  # the refused agent holds none of them
    first.release()
    second.acquire(["GPU-A", "GPU-B"])
    for locks in (second, third):
        locks.release()


def test_link_in_place_of_a_lock_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    (tmp_path / "hibernode-GPU-A.lock").symlink_to(victim)
    with pytest.raises(PreconditionError) as caught:
        GpuLocks(tmp_path).acquire(["GPU-A"])
    assert caught.value.reason == "GPU_LOCK_UNUSABLE"
    assert not victim.exists()


def test_uuid_cannot_escape_the_folder(tmp_path: Path) -> None:
    locks = GpuLocks(tmp_path)
    locks.acquire(["MIG-GPU/../../x"])
    assert [file.parent for file in tmp_path.iterdir()] == [tmp_path]
    locks.release()


@pytest.mark.root
def test_root_uses_only_run_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a second folder, two agents could each lock in one of their own."""
    if os.geteuid() != 0:
        pytest.skip("others may have to use /tmp")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    (tmp_path / "lock").write_text("no folder")
    locks = GpuLocks(tmp_path / "lock")
    with pytest.raises(PreconditionError) as caught:
        locks.acquire(["GPU-A"])
    assert caught.value.reason == "GPU_LOCK_UNUSABLE"
    assert [file.name for file in tmp_path.iterdir()] == ["lock"]
