"""Makes a folder with the packages that Hibernode needs at run time, to carry to a machine without a network:
`python -m agent.selftest.proof.pack DIR`, by `scripts/gpu-proof --pack DIR`.

    DIR/site/       the packages, without tests, debug information, sources of compiled parts and caches
    DIR/bin/        the cuda-checkpoint program, if one is named
    DIR/pack.json   Python version and machine of the compiled parts, versions, the checkout's commit and checksum
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path, PurePath
from typing import Any

from agent.core.types import MIB
from agent.selftest.proof.origin import PACK_FILE, commit_of, sources_sha256

CHECKOUT = Path(__file__).parents[3]
MOST_BYTES = 64 * MIB
PIP_S = 600.0

_LEFT_OUT = re.compile(
    r"(^|/)(__pycache__|tests?|testing|benchmarks?)/|\.(pyc|pyi|pyx|pxd|c|cc|cpp|h|hpp|a)$|^\.\./|^/"
)
_PLATFORMS = ("2_34", "2_28", "2_27", "2_17")


class PackError(Exception):
    """The folder could not be made; the message says what to do."""


def requirements() -> list[str]:
    """What the project needs at run time, as pip reads it."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    return list(project["dependencies"])


def closure(wanted: Iterable[str], found: Mapping[str, metadata.Distribution]) -> list[metadata.Distribution]:
    """The distributions that `wanted` need, by what is installed: requirements of extras, and those of other systems
    or Pythons, are left out because they are not installed. Raises PackError if a wanted one is missing."""
    chosen: dict[str, metadata.Distribution] = {}
    waiting = [(name_of(requirement), True) for requirement in wanted]
    while waiting:
        name, needed = waiting.pop()
        if name in chosen:
            continue
        if name not in found:
            if needed:
                raise PackError(f"{name} is not installed here; run scripts/test once, which installs the packages")
            continue
        chosen[name] = found[name]
        waiting += [(name_of(one), False) for one in found[name].requires or () if "extra ==" not in one]
    return [chosen[name] for name in sorted(chosen)]


def name_of(requirement: str) -> str:
    """`grpcio` of `grpcio>=1.80; python_version < "4"`, in the form in which names are compared."""
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found is not None, requirement
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def is_left_out(path: str) -> bool:
    """Whether running needs no such file."""
    return bool(_LEFT_OUT.search(path)) and not path.endswith("structlog/testing.py")


def copy_packages(chosen: Iterable[metadata.Distribution], site: Path) -> dict[str, str]:
    """Copies the files of each; returns the versions. Raises PackError for one without a list of its files."""
    versions = {}
    for one in chosen:
        if not one.files:
            raise PackError(f"{one.name} has no list of its files; install it with pip")
        versions[one.name] = one.version
        for file in one.files:
            if not is_left_out(PurePath(file).as_posix()):
                target = site / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(str(one.locate_file(file)), target)
    return versions


def strip_libraries(site: Path) -> None:
    """Takes debug information out of compiled parts, a fifth of all bytes; nothing without strip(1) (binutils)."""
    strip = shutil.which("strip")
    libraries = [str(path) for path in site.rglob("*.so")]
    if strip and libraries:
        subprocess.run([strip, "--strip-debug", *libraries], check=False, capture_output=True, timeout=PIP_S)


def install_for(python: str, into: Path) -> None:
    """Let pip put the packages for another Python version there. Raises PackError."""
    tags = [f"--platform=manylinux_{tag}_{platform.machine()}" for tag in _PLATFORMS]
    command = [
        *(sys.executable, "-m", "pip", "install", "-q", "--no-compile", "--only-binary=:all:", f"--target={into}"),
        *(f"--python-version={python}", "--implementation=cp", *tags, f"--platform=manylinux2014_{platform.machine()}"),
        *requirements(),
    ]
    try:
        subprocess.run(command, check=True, timeout=PIP_S, stdout=sys.stderr)
    except (OSError, subprocess.SubprocessError) as error:
        raise PackError(f"pip could not get the packages for Python {python}: {error}") from error


def compressed_bytes(folder: Path) -> int:
    """The size of the folder as .tar.gz."""

    class Counter(io.RawIOBase):
        size = 0

        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int:
            self.size += len(data)
            return len(data)

    counter = Counter()
    with (
        gzip.GzipFile(fileobj=counter, mode="wb", compresslevel=6) as packed,
        tarfile.open(fileobj=packed, mode="w|") as archive,
    ):
        archive.add(folder, arcname=folder.name)
    return counter.size


def plain_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def pack(folder: Path, python: str, utility: Path | None) -> dict[str, Any]:
    """Makes `folder`, which must be new, empty or an older pack. Raises PackError."""
    if folder.exists() and any(folder.iterdir()) and not (folder / PACK_FILE).exists():
        raise PackError(f"{folder} is not empty and no pack; name another folder")
    shutil.rmtree(folder, ignore_errors=True)
    site = folder / "site"
    site.mkdir(parents=True)
    own = f"{sys.version_info.major}.{sys.version_info.minor}"
    with tempfile.TemporaryDirectory(prefix="hibernode-pack-") as scratch:
        if python != own:
            install_for(python, Path(scratch))
        places = [scratch] if python != own else sys.path
        found = {name_of(one.name): one for one in metadata.distributions(path=places)}
        versions = copy_packages(closure(requirements(), found), site)
    strip_libraries(site)
    if utility is not None:
        (folder / "bin").mkdir()
        shutil.copy(utility, folder / "bin" / "cuda-checkpoint")
        (folder / "bin" / "cuda-checkpoint").chmod(0o755)
    commit = commit_of(CHECKOUT)
    noted = {
        "python": python,
        "machine": platform.machine(),
        "versions": versions,
        "commit": commit[0] if commit else None,
        "commit_note": commit[1] if commit else "",
        "sources_sha256": sources_sha256(CHECKOUT),
    }
    (folder / PACK_FILE).write_text(json.dumps(noted, indent=1) + "\n")
    return noted


def check_size(folder: Path, most_bytes: int = MOST_BYTES) -> str:
    """The sizes as text. Raises PackError, and removes the folder, if it is too large to carry."""
    compressed, plain = compressed_bytes(folder), plain_bytes(folder)
    text = f"{plain / MIB:.1f} MiB, {compressed / MIB:.1f} MiB compressed"
    if compressed > most_bytes:
        shutil.rmtree(folder)
        raise PackError(f"the packages are too large to carry: {text}, at most {most_bytes / MIB:.0f} MiB compressed")
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/gpu-proof --pack", allow_abbrev=False)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--python", default=f"{sys.version_info.major}.{sys.version_info.minor}", metavar="3.12")
    parser.add_argument("--utility", type=Path, metavar="FILE", help="a cuda-checkpoint program to carry")
    found = parser.parse_args(arguments)
    if not re.fullmatch(r"3\.\d{2}", found.python) or int(found.python[2:]) < 11:
        parser.error("--python must be a version such as 3.12, at least 3.11")
    try:
        noted = pack(found.folder, found.python, found.utility)
        size = check_size(found.folder)
    except (PackError, OSError) as error:
        print(f"gpu-proof: {error}", file=sys.stderr)  # noqa: T201
        return 1
    what = f"{len(noted['versions'])} packages for Python {noted['python']} on {noted['machine']}"
    print(f"{found.folder}: {what}, {size}")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
