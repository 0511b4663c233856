"""Contents of a booted test host: a Debian root file system, and the wheels installed in it.

Both are cached in `${XDG_CACHE_HOME:-~/.cache}/hibernode/booted`, named after their inputs. They are made once, with
the machine's apt and pip settings, and used without a network.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from agent.adapters.kernel.cgroup import find_v2_mount

ROOT = Path(__file__).parents[2]
SUITE = "bookworm"
PYTHON = "3.11"
# Builds the emulated driver inside, against the host's own glibc.
PACKAGES = ("systemd", "systemd-sysv", "dbus", "python3", "python3-venv", "gcc", "libc6-dev", "procps", "iproute2")
LEFT_OUT = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*")
MAKE_DEADLINE_S = 400
CHECKOUT = ("agent", "scripts", "systemd", "protos", "pyproject.toml", "README.md", "LICENSE")
"""Parts of a checkout that scripts/install needs."""


class NotHere(Exception):
    """This machine can't boot a host; the text gives the reason and a fix."""


def why_not() -> str:
    """Why no host can boot on this machine; "" if it can."""
    if os.geteuid() != 0:
        return "needs root: systemd-nspawn boots a system"
    for program, package in (
        ("systemd-nspawn", "systemd-container"),
        ("mmdebstrap", "mmdebstrap"),
        ("nsenter", "util-linux"),
    ):
        if shutil.which(program) is None:
            return f"{program} is not installed (Debian, Ubuntu: apt-get install {package}; scripts/test --all does it)"
    if find_v2_mount(Path("/proc/self/mountinfo").read_text()) is None:
        return "no cgroup v2 hierarchy is mounted, nor one beside v1: systemd can't be booted with one of its own"
    return ""


def unpacked(folder: Path) -> None:
    """Unpack a fresh root file system into `folder`. Raises NotHere."""
    key = _key(SUITE, PACKAGES, LEFT_OUT, platform.machine())
    tarball = _cached(f"root-{key}.tar", _make_root)
    _run(["tar", "-x", "--numeric-owner", "-f", str(tarball), "-C", str(folder)], "unpack the root file system")


def wheelhouse() -> Path:
    """A folder with all wheels for scripts/install. Raises NotHere."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    return _cached(f"wheels-{_key(wanted, PYTHON, platform.machine())}", lambda path: _download(path, wanted))


def copy_checkout(target: Path) -> None:
    """Copy the installed parts of this checkout."""
    target.mkdir(parents=True)
    for name in CHECKOUT:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, target / name)


def _make_root(path: Path) -> None:
    left_out = [f"--dpkgopt=path-exclude={pattern}" for pattern in LEFT_OUT]
    packages = f"--include={','.join(PACKAGES)}"
    _run(["mmdebstrap", "--quiet", "--variant=minbase", packages, *left_out, SUITE, str(path)], "make a Debian root")


def _download(path: Path, wanted: list[str]) -> None:
    """Download with pip's configured index, proxy and certificates."""
    path.mkdir()
    machine = platform.machine()
    platforms = [f"--platform={name}_{machine}" for name in ("manylinux_2_28", "manylinux_2_17", "manylinux2014")]
    command = [sys.executable, "-m", "pip", "download", "-q", "--only-binary=:all:", f"--python-version={PYTHON}"]
    _run([*command, "--implementation=cp", *platforms, "-d", str(path), *wanted], "download wheels")


def _key(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _cached(name: str, make: Callable[[Path], None]) -> Path:
    """A cached file or folder. `make` writes to a temporary name, one process at a time, so an existing one is
    complete."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hibernode" / "booted"
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache):
        if not (cache / name).exists():
            with tempfile.TemporaryDirectory(prefix=".making-", dir=cache) as folder:
                make(Path(folder) / name)
                (Path(folder) / name).rename(cache / name)
    return cache / name


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _run(command: list[str], what: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=MAKE_DEADLINE_S, check=False)
    except subprocess.TimeoutExpired:
        raise NotHere(f"could not {what} within {MAKE_DEADLINE_S} s") from None
    if done.returncode != 0:
        raise NotHere(f"could not {what}: {command[0]} says: {done.stderr.strip()[-600:]}")
