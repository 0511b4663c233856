"""The image of the example `ocr`, built without a registry from its Dockerfile.

Only FROM and the RUN that installs packages are replaced (Debian with Python, `pip install --target`); COPY lines are
executed, the others configure the image. Debian with the packages (half a gigabyte) is cached for the user; the
example's own files are added at each import.

    images.load(engine, ocr_image.OCR)
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import IO

from tests.engines import images

OCR = "localhost/hibernode-ocr:1"
CONTEXT = images.ROOT / "agent"
EXAMPLE = CONTEXT / "examples" / "ocr"
CONFIGURATION = ("ENV ", "EXPOSE ", "WORKDIR ", "CMD ")
PIP_DEADLINE_S = 600.0


def ocr_content(file: IO[bytes]) -> list[str]:
    """Write the image's root file system; returns the Dockerfile's configuration lines."""
    lines = (EXAMPLE / "Dockerfile").read_text().splitlines()
    with debian_with_packages() as base:
        shutil.copyfileobj(base, file, 1 << 20)
    file.seek(0)
    with tarfile.open(fileobj=file, mode="a") as archive:
        for line in lines:
            if line.startswith("COPY "):
                _, source, target = line.split()
                _copy(archive, CONTEXT / source, target.removeprefix("/"))
    return [line for line in lines if line.startswith(CONFIGURATION)]


images.CONTENTS[OCR] = ocr_content


def _copy(archive: tarfile.TarFile, source: Path, target: str) -> None:
    archive.add(source, target + source.name if target.endswith("/") else target, filter=_ours)


def _ours(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if "__pycache__" in member.name else _rootly(member)


def _rootly(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    return member


# ---- Debian with Python's packages ---------------------------------------------------------------------------------


def debian_with_packages() -> IO[bytes]:
    """A tar of Debian with Python and the example's requirements.txt, open for reading. Built once, and again when an
    input or this file changes, which removes the previous one.

    Raises AssertionError with pip's output if a package is unavailable."""
    debian = images.debian_tar(("python3",))
    wanted = EXAMPLE / "requirements.txt"
    made_of = (debian.name.encode(), wanted.read_bytes(), Path(__file__).read_bytes())
    path = images.cache_folder() / f"ocr-{hashlib.sha256(b' '.join(made_of)).hexdigest()[:12]}.tar"
    with (images.cache_folder() / "ocr.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            for older in images.cache_folder().glob("ocr-*"):
                older.unlink()
            partial = path.with_suffix(".partial")
            shutil.copyfile(debian, partial)
            _add_packages(partial, wanted)
            partial.rename(path)
        return path.open("rb")


def _add_packages(path: Path, wanted: Path) -> None:
    with tarfile.open(path, "a") as archive, tempfile.TemporaryDirectory() as folder:
        version = _python_of(archive)
        _install(wanted, folder, version)
        for package in sorted(Path(folder).iterdir()):  # without the folder itself: Docker rejects duplicate paths
            archive.add(package, f"usr/local/lib/python{version}/dist-packages/{package.name}", filter=_rootly)


def _python_of(archive: tarfile.TarFile) -> str:
    """The Python version that packages must fit, such as "3.11": the target of the link /usr/bin/python3."""
    link = next(name for name in ("./usr/bin/python3", "usr/bin/python3") if name in archive.getnames())
    return archive.getmember(link).linkname.removeprefix("python")


def _install(wanted: Path, folder: str, version: str) -> None:
    """Install with the pip next to this Python and its settings, for the image's Python. Wheels only: no compiler."""
    command = [
        sys.executable, "-m", "pip", "install", "--quiet", "--no-input", "--no-deps", "--only-binary=:all:",
        "--python-version", version, "--target", folder, "-r", str(wanted),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_DEADLINE_S, check=False)
    assert done.returncode == 0, f"pip can't install {wanted.name}: {done.stderr[-1500:]}"


def model_digest() -> str:
    """The example's `model` while no byte of device memory is lost, computed from the image's files."""
    from agent.examples.ocr.model import DIGEST_CHARS

    digest = hashlib.sha256()
    with debian_with_packages() as file, tarfile.open(fileobj=file) as archive:
        for part in ("det", "cls", "rec"):
            model = next(name for name in archive.getnames() if name.endswith(f"_{part}_infer.onnx"))
            content = archive.extractfile(model)
            assert content is not None
            digest.update(content.read())
    return digest.hexdigest()[:DIGEST_CHARS]
