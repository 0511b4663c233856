"""Builds the libraries and the program from `src/` with cc, once per source and driver version."""

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
    """An output file, its sources and linker flags."""

    path: str
    sources: tuple[str, ...]
    flags: tuple[str, ...]


_LIBCUDA = (
    *("channel", "pool", "activity", "gate", "process", "restore_thread", "context", "memory"),
    *("device", "stream", "pinned", "checkpoint", "entry"),
)
# nodelete: the library's threads and atfork handlers must survive a dlclose.
_SHARED = ("-shared", "-Wl,-z,nodelete", "-Wl,--no-undefined")
_PRODUCTS = (
    _Product(f"{LIBRARIES}/libcuda.so.1", _LIBCUDA, (*_SHARED, "-Wl,-soname,libcuda.so.1", "-lpthread", "-ldl")),
    _Product(
        f"{LIBRARIES}/libnvidia-ml.so.1",
        ("channel", "pool", "nvml", "nvml_devices", "nvml_events"),
        (*_SHARED, "-Wl,-soname,libnvidia-ml.so.1", "-lpthread", "-ldl"),
    ),
    # The rpath finds its libcuda without LD_LIBRARY_PATH, as with a driver installed on the host.
    _Product(f"{PROGRAMS}/cuda-checkpoint", ("cuda_checkpoint",), ("-Wl,-rpath,$ORIGIN/../lib", "-ldl")),
)


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/hibernode/emulated`, or else in ~/.cache."""
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
    """Return a folder with lib/ and bin/ for this driver version, building it if needed. Blocks for seconds.

    Safe in parallel: each process builds separately, and the first rename wins. Raises PreconditionError
    EMULATED_DRIVER_NEEDS_CC or EMULATED_DRIVER_BUILD_FAILED, UnavailableError EMULATED_DRIVER_BUILD_FAILED."""
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
            if not done.is_dir():  # else another process was faster with the same sources
                raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return done


def install(built: Path, directory: Path) -> None:
    """Copy lib/ and bin/ into an emulated driver's directory: links out of it would break in a bind mount.

    Files are replaced by rename, so running programs keep the version they have mapped."""
    for product in _PRODUCTS:
        target = directory / product.path
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_name(f".{target.name}.{os.getpid()}")
        shutil.copy(built / product.path, fresh)
        fresh.rename(target)
