"""Rules about files that no linter knows."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest

WARN_LINES = 400
MAX_LINES = 600
REASON = re.compile(r"^(?:#|//) size: \S.{10,}$", re.MULTILINE)
"""How a longer file says in one line why it is one room all the same."""
CODE = {".py", ".c", ".h", ".sh", ".proto"}
BINARY = {".png", ".ico", ".woff2"}


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def is_generated(path: Path, root: Path) -> bool:
    return path.is_relative_to(root / "agent" / "v1")


def too_long(text: str) -> bool:
    """Over `MAX_LINES`, and no reason is given in the file."""
    return len(text.splitlines()) > MAX_LINES and not REASON.search(text)


@pytest.mark.filterwarnings("default::UserWarning")
def test_a_file_is_one_room(tracked: list[Path], root: Path) -> None:
    """A file holds one idea. Over `WARN_LINES` lines it is worth a look, over `MAX_LINES` it needs a reason."""
    long: list[str] = []
    for path in tracked:
        if not (path.suffix in CODE or path.is_relative_to(root / "scripts")) or is_generated(path, root):
            continue
        text = text_of(path)
        name, lines = path.relative_to(root), len(text.splitlines())
        if too_long(text):
            long.append(f"{name}: {lines} lines")
        elif lines > WARN_LINES:
            warnings.warn(f"{name}: {lines} lines; is it still one idea?", UserWarning, stacklevel=1)
    assert not long, (
        f"split by idea, or say why not in a line `# size: ...` (at most {MAX_LINES} lines):\n" + "\n".join(long)
    )


def test_a_file_over_the_limit_needs_a_reason() -> None:
    line = "x = 1\n"
    assert not too_long(line * MAX_LINES)
    assert too_long(line * (MAX_LINES + 1))
    assert not too_long("# size: the table of results is one thing\n" + line * MAX_LINES)


def forbidden(root: Path) -> dict[str, re.Pattern[str]]:
    """What no file may hold. Written so that this file does not hold it either."""
    hosts = "|".join(re.escape(host) for host in ("pypi" + ".org", "files.python" + "hosted", "registry.npm" + "js"))
    return {
        "the path of a checkout": re.compile(re.escape(str(root)) + r"\b"),
        "a package registry's host name": re.compile(hosts),
        "a loose end without an issue, as in TO" + "DO(#12)": re.compile(
            r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X)\b(?!\(#\d+\))"
        ),
        "a conflict marker": re.compile(r"^(?:<{7}|>{7}) ", re.MULTILINE),
    }


def test_nothing_forbidden_is_in_a_file(tracked: list[Path], root: Path) -> None:
    found: list[str] = []
    for path in tracked:
        if path.suffix in BINARY:
            continue
        text = text_of(path)
        for what, pattern in forbidden(root).items():
            found += [
                f"{path.relative_to(root)}:{text.count(chr(10), 0, hit.start()) + 1}: {what}: {hit[0]}"
                for hit in pattern.finditer(text)
            ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("see {root}/agent", "the path of a checkout"),
        ("pip install -i https://pypi" + ".org/simple", "a package registry's host name"),
        ("# TO" + "DO later", "a loose end without an issue, as in TO" + "DO(#12)"),
        ("<" * 7 + " HEAD", "a conflict marker"),
    ],
)
def test_the_search_for_forbidden_words_finds_them(line: str, what: str, root: Path) -> None:
    assert forbidden(root)[what].search(line.format(root=root))


def test_a_loose_end_with_an_issue_may_stay(root: Path) -> None:
    assert not any(pattern.search("# TO" + "DO(#12): later") for pattern in forbidden(root).values())


def test_test_folders_are_packages(tracked: list[Path], root: Path) -> None:
    """Names of test modules repeat from room to room; only packages keep them apart."""
    folders = {path.parent for path in tracked if path.suffix == ".py" and path.is_relative_to(root / "tests")}
    missing = [str(folder.relative_to(root)) for folder in sorted(folders) if not (folder / "__init__.py").exists()]
    assert not missing, f"add an empty __init__.py to: {', '.join(missing)}"


def test_every_package_of_the_agent_says_what_it_is(tracked: list[Path], root: Path) -> None:
    """A folder of code without __init__.py would be left out of the wheel; one without a docstring explains nothing."""
    folders = {path.parent for path in tracked if path.suffix == ".py" and path.is_relative_to(root / "agent")}
    mute = [
        str(folder.relative_to(root))
        for folder in sorted(folders)
        if not (folder / "__init__.py").exists() or not text_of(folder / "__init__.py").lstrip().startswith('"""')
    ]
    assert not mute, f"__init__.py with a docstring is missing in: {', '.join(mute)}"


def test_changelog_has_a_place_for_what_is_new(root: Path) -> None:
    assert "## Unreleased" in text_of(root / "CHANGELOG.md").splitlines()
