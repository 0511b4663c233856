"""Builds the libraries and the program from `src/` with cc, once for each source and driver version."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from agent.core.errors import PreconditionError, UnavailableError
from agent.emulated.paths import LIBRARIES, PROGRAMS
from agent.emulated.profiles import Profile

SOURCES = Path(__file__).with_name("src")
DEADLINE_S = 120
_FLAGS = ("-O2", "-std=gnu11", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")


@dataclass(frozen=True, slots=True)
class _Product:
    """One file to build: where it goes, from which sources, with which linker flags."""

    path: str
    sources: tuple[str, ...]
    flags: tuple[str, ...]


_LIBCUDA = (
    *("channel", "pool", "activity", "gate", "process", "restore_thread", "context", "memory"),
    *("device", "stream", "pinned", "checkpoint", "entry"),
)
# nodelete: threads and atfork handlers live in the library, so that it must survive a dlclose.
_SHARED = ("-shared", "-Wl,-z,nodelete", "-Wl,--no-undefined")
_PRODUCTS = (
    _Product(f"{LIBRARIES}/libcuda.so.1", _LIBCUDA, (*_SHARED, "-Wl,-soname,libcuda.so.1", "-lpthread", "-ldl")),
    _Product(
        f"{LIBRARIES}/libnvidia-ml.so.1",
        ("channel", "pool", "nvml", "nvml_devices", "nvml_events"),
        (*_SHARED, "-Wl,-soname,libnvidia-ml.so.1", "-lpthread", "-ldl"),
    ),
    # Its own libcuda is found beside it where LD_LIBRARY_PATH is not set, as with a driver installed on the host.
    _Product(f"{PROGRAMS}/cuda-checkpoint", ("cuda_checkpoint",), ("-Wl,-rpath,$ORIGIN/../lib", "-ldl")),
)


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/hibernode/emulated`, else below ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "hibernode" / "emulated"


def find_compiler() -> str:
    """Path of the C compiler. Raises PreconditionError EMULATED_DRIVER_NEEDS_CC."""
    for name in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise PreconditionError(
        "EMULATED_DRIVER_NEEDS_CC",
        "The emulated driver is built from C sources on first use and needs a C compiler: "
        "`apt-get install gcc libc6-dev` (or your distribution's gcc and C library headers).",
    )


def _key(compiler: str, profile: Profile) -> str:
    digest = hashlib.sha256(repr((compiler, _FLAGS, _PRODUCTS, profile.defines())).encode())
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in {".c", ".h"}:
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:32]


def _compile(compiler: str, product: _Product, profile: Profile, into: Path) -> None:
    output = into / product.path
    output.parent.mkdir(exist_ok=True)
    sources = [str(SOURCES / f"{name}.c") for name in product.sources]
    command = [compiler, *_FLAGS, *profile.defines(), "-o", str(output), *sources, *product.flags]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnavailableError("EMULATED_DRIVER_BUILD_FAILED", f"{compiler} did not finish: {error}") from error
    if done.returncode:
        raise PreconditionError(
            "EMULATED_DRIVER_BUILD_FAILED",
            f"{compiler} could not build {product.path}; are the C library headers installed "
            f"(`apt-get install libc6-dev`)? It said: {done.stderr[-2000:]}",
        )


def build(profile: Profile, cache: Path | None = None) -> Path:
    """A folder with lib/ and bin/ for this driver version, built now or before. Blocking: seconds the first time.

    Any number of processes may do this at once: each builds apart, the first rename wins. Raises PreconditionError
    EMULATED_DRIVER_NEEDS_CC or EMULATED_DRIVER_BUILD_FAILED, UnavailableError EMULATED_DRIVER_BUILD_FAILED.
    """
    compiler = find_compiler()
    cache = cache or default_cache()
    done = cache / _key(compiler, profile)
    if done.is_dir():
        return done
    cache.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=".building-", dir=cache))
    try:
        fresh.chmod(0o755)
        for product in _PRODUCTS:
            _compile(compiler, product, profile, fresh)
        try:
            fresh.rename(done)
        except OSError:
            if not done.is_dir():  # else somebody else was faster with the same sources
                raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return done


def install(built: Path, directory: Path) -> None:
    """Copy lib/ and bin/ into an emulated driver's directory: a bind mount would not follow links out of it.

    Each file is replaced by a rename, so that a program that has the old one mapped keeps it.
    """
    for product in _PRODUCTS:
        target = directory / product.path
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_name(f".{target.name}.{os.getpid()}")
        shutil.copy(built / product.path, fresh)
        fresh.rename(target)
