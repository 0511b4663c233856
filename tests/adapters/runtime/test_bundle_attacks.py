"""Tests what a workload can leave in its scratch folder for the root process that removes it."""

from __future__ import annotations

import os
import resource
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.adapters.kernel import remove_tree
from agent.adapters.runtime.bundles import Bundles

DEEPER_THAN_PYTHON_RECURSES = 3000


@pytest.fixture
def bundles(tmp_path: Path) -> Bundles:
    made = Bundles(tmp_path / "state", "1c7e")
    made.create("resize-a", None)
    return made


@pytest.fixture
def few_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def dig(folder: Path, levels: int) -> None:
    """Nested folders, each with a file, deeper than any path can name."""
    here = os.open(folder, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir("d", dir_fd=here)
        inner = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(os.open("file", os.O_WRONLY | os.O_CREAT, 0o600, dir_fd=inner))
        os.close(here)
        here = inner
    os.close(here)


def test_deep_tree_needs_neither_stack_nor_descriptors(bundles: Bundles, few_descriptors: None) -> None:
    dig(bundles.scratch("resize-a"), DEEPER_THAN_PYTHON_RECURSES)
    bundles.remove("resize-a")
    assert bundles.read("resize-a") is None


def test_links_are_removed_not_followed(bundles: Bundles, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    (precious / "inner").mkdir(parents=True)
    (precious / "inner/file").write_text("kept")
    precious.chmod(0o755)
    scratch = bundles.scratch("resize-a")
    (scratch / "deep").mkdir()
    for link in ("to-folder", "deep/to-folder"):
        (scratch / link).symlink_to(precious)
    os.link(precious / "inner/file", scratch / "hard")
    bundles.remove("resize-a")
    assert bundles.read("resize-a") is None
    assert (precious / "inner/file").read_text() == "kept"
    assert stat.S_IMODE(precious.stat().st_mode) == 0o755


def test_folder_replaced_by_a_link_meanwhile_is_not_followed(
    bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another workload of the same user swaps a folder between its check and its opening."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("kept")
    victim = bundles.scratch("resize-a") / "victim"
    victim.mkdir()
    look = remove_tree._entries

    def swapped(folder: int) -> list[tuple[str, bool]]:
        found = look(folder)
        if victim.is_dir() and not victim.is_symlink() and ("victim", True) in found:
            victim.rmdir()
            victim.symlink_to(precious)
        return found

    monkeypatch.setattr(remove_tree, "_entries", swapped)
    bundles.remove("resize-a")
    assert (precious / "file").read_text() == "kept"
    assert bundles.read("resize-a") is None


def test_odd_names_pipes_and_closed_folders_are_removed(bundles: Bundles) -> None:
    scratch = bundles.scratch("resize-a")
    os.mkfifo(scratch / "pipe")
    (scratch / "shut/inner/more").mkdir(parents=True)
    (scratch / "shut/inner/more/file").touch()
    os.close(os.open(os.fsencode(scratch) + b"/\xff\n\x1b[2J", os.O_CREAT | os.O_WRONLY))
    for folder in ("shut/inner/more", "shut/inner", "shut"):
        (scratch / folder).chmod(0)
    bundles.remove("resize-a")
    assert bundles.read("resize-a") is None
    bundles.remove("resize-a")  # idempotent
