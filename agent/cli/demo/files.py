"""Selects files of many types on this machine, with the answers of a model that is never frozen."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from agent.core.errors import PreconditionError

MIN_BYTES, MAX_BYTES = 64, 512 * 1024
MAX_PER_ROOT = 3_000
_SKIPPED = frozenset({"site-packages", "dist-packages", "test", "tests", "locale", "ssl"})
# Well-known types come first.
_FAVOURITES = (
    *(".py", ".so", ".pyc", ".json", ".html", ".css", ".js", ".png", ".svg", ".gz", ".zip", ".pdf", ".xml", ".sh"),
    *(".c", ".h", ".md", ".txt", ".yaml", ".toml", ".conf", ".service", ".pem", ".crt", ".csv", ".db", ".ttf", ".mo"),
    *(".exe", ".whl", ".ini", ".cfg", ".pl", ".rst", ".bat", ".jpg", ".gif", ".po", ".pyi", ".proto", ".onnx", ".tcl"),
)


@dataclass(frozen=True, slots=True)
class Sample:
    """A file, and the answer of a model that is never frozen."""

    path: Path
    content: bytes
    expected: dict[str, object]


def pick_samples(count: int) -> list[Sample]:
    """`count` readable files, one per extension, well-known types first. Takes about a second.

    Raises PreconditionError DEMO_NEEDS_MAGIKA without the extra `demo`.
    """
    try:
        from magika import Magika

        from agent.examples.filetype import model
    except ImportError as error:
        raise PreconditionError(
            "DEMO_NEEDS_MAGIKA",
            f"the demo's model is not installed ({error.name}); run `scripts/demo`, which installs it, "
            "or `pip install 'hibernode[demo]'`",
        ) from error
    magika = Magika()
    digest = model.digest_of(model.model_path().read_bytes())
    samples = []
    for path in _choose(count):
        content = path.read_bytes()
        samples.append(Sample(path, content, model.describe(magika.identify_bytes(content), digest)))
    return samples


def _choose(count: int) -> list[Path]:
    found: dict[str, Path] = {}
    for path in _candidates():
        found.setdefault(path.suffix.lower() or f"none in {path.parent}", path)
    rank = {suffix: number for number, suffix in enumerate(_FAVOURITES)}
    return [found[kind] for kind in sorted(found, key=lambda kind: (rank.get(kind, len(rank)), kind))][:count]


def _candidates() -> Iterator[Path]:
    """Files of folders that every Linux machine has, and of this Python."""
    stdlib = sysconfig.get_paths()["stdlib"]
    roots = ("/etc", "/usr/bin", stdlib, "/usr/include", "/usr/share", "/usr/lib")
    for root in roots:
        yield from islice(_files(root, [MAX_PER_ROOT]), MAX_PER_ROOT)


def _files(folder: str, budget: list[int]) -> Iterator[Path]:
    """Readable files of a suitable size in a fixed order. `budget[0]`: entries left to visit."""
    try:
        with os.scandir(folder) as entries:
            inside = sorted(entries, key=lambda entry: entry.name)
    except OSError:
        return
    for entry in inside:
        budget[0] -= 1
        if budget[0] < 0:
            return
        if entry.is_dir(follow_symlinks=False):
            if entry.name not in _SKIPPED:
                yield from _files(entry.path, budget)
        elif entry.is_file(follow_symlinks=False) and _suits(entry):
            yield Path(entry.path)


def _suits(entry: os.DirEntry[str]) -> bool:
    try:
        return MIN_BYTES <= entry.stat(follow_symlinks=False).st_size <= MAX_BYTES and os.access(entry.path, os.R_OK)
    except OSError:
        return False


def difference(answer: Mapping[str, object], sample: Sample) -> str:
    """Describes how the answer differs from the expected one; "" if it does not."""
    expected = sample.expected
    keys = [*expected, *(key for key in answer if key not in expected)]
    return ", ".join(
        f"{key} {answer.get(key)} instead of {expected.get(key)}"
        for key in keys
        if answer.get(key) != expected.get(key)
    )
