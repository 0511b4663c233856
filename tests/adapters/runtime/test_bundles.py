"""Bundles that can't be read: torn by a power failure, or of another version."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.adapters.runtime.bundles import Bundles
from agent.core.types import Handle, ProcessId

HANDLE = Handle("i-1", ProcessId("boot-a", 4242, 99), "127.0.0.1", 9000, "/sys/fs/cgroup/x", "/log")


@pytest.fixture
def bundles(tmp_path: Path) -> Bundles:
    made = Bundles(tmp_path, "state-uuid")
    made.create_bare("i-1")
    made.write(HANDLE)
    return made


def test_a_torn_record_belongs_to_no_process_of_this_boot(bundles: Bundles, tmp_path: Path) -> None:
    path = tmp_path / "instances/i-1/handle.json"
    path.write_bytes(path.read_bytes()[:20])
    found = bundles.read("i-1")
    assert found is not None
    assert (found.handle, found.foreign) == (None, False)


def test_a_record_of_a_newer_version_is_never_touched(bundles: Bundles, tmp_path: Path) -> None:
    """Its processes may run: without a handle and not foreign it would be removed as an orphan."""
    path = tmp_path / "instances/i-1/handle.json"
    path.write_bytes(path.read_bytes().replace(b"4242", b'{"pidfd":4242}').replace(b'"version":1', b'"version":2'))
    found = bundles.read("i-1")
    assert found is not None
    assert (found.handle, found.foreign) == (None, True)


def test_a_field_of_a_newer_version_is_passed_over(bundles: Bundles, tmp_path: Path) -> None:
    path = tmp_path / "instances/i-1/handle.json"
    path.write_bytes(path.read_bytes().replace(b'{"version":', b'{"colour":"blue","version":'))
    found = bundles.read("i-1")
    assert found is not None
    assert found.handle == HANDLE
