"""Images for the engine tests, made without a registry: root file systems as tar files, imported through the engine's
API.

`BUSYBOX` serves files with busybox's httpd, without CUDA. `ECHO` is Debian with Python and the example `echo`. `BAD`
misbehaves as its first argument says. `debian_tar` helps to build more.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Literal
from urllib.parse import urlencode

from tests.engines.engines import Engine

ROOT = Path(__file__).parents[2]
BUSYBOX = "localhost/hibernode-busybox:1"
ECHO = "localhost/hibernode-echo:1"
BAD = "localhost/hibernode-bad:1"

APPLETS = (
    "sh", "httpd", "cat", "cp", "date", "dd", "echo", "env", "grep", "head", "hostname", "id", "ifconfig", "ip", "kill",
    "ls", "mkdir", "mkfifo", "mount", "nc", "ping", "ps", "pwd", "rm", "sed", "setsid", "seq", "sleep", "stat", "stty",
    "tail", "test", "touch", "tr", "true", "tty", "yes",  # not wget: a static one crashes on name lookups
)  # fmt: skip
BUSYBOX_PAGE = b"hello from busybox\n"
BUSYBOX_COMMAND = ("/bin/sh", "-c", 'exec httpd -f -p "${PORT:-9000}" -h /www')

BAD_SCRIPT = b"""\
#!/bin/sh
# What a deployed image may do to its host. The first argument says which.
serve() { exec httpd -f -p "${PORT:-9000}" -h /www; }
case $1 in
never-listens) exec sleep 86399 ;;
ignores-sigterm) trap '' TERM; httpd -p "${PORT:-9000}" -h /www; while :; do sleep 86399; done ;;
floods-log) yes "a line of the flood" & serve ;;
forks) (while :; do sleep 86399 & done) & exec sleep 86399 ;;
leaves-strays) for n in 1 2 3; do setsid sleep 86399 & done; serve ;;
exits) echo "no configuration found"; exit 3 ;;
eats-memory) exec dd if=/dev/zero of=/dev/null bs=256M ;;
eats-memory-when-told)
    httpd -p "${PORT:-9000}" -h /www
    while [ ! -e /tmp/eat ]; do sleep 0.1; done
    exec dd if=/dev/zero of=/dev/null bs=256M ;;
esac
"""
EAT = b"#!/bin/sh\ntouch /tmp/eat\necho 'Content-Type: text/plain'\necho\necho eating\n"


def load(engine: Engine, image: str) -> None:
    """Load `image` into the engine; built on first use."""
    if engine.api("GET", f"/images/{image}/json").status != 200:
        with tempfile.TemporaryFile() as file:
            changes = CONTENTS[image](file)
            file.seek(0)
            import_tar(engine, file, image, changes)


def import_tar(engine: Engine, content: IO[bytes], image: str, changes: list[str]) -> None:
    """Import an image of one layer. `changes` are lines of a Dockerfile (CMD, ENV, USER, WORKDIR ...)."""
    name, _, tag = image.rpartition(":")
    query = [("fromSrc", "-"), ("repo", name), ("tag", tag), *(("changes", change) for change in changes)]
    answer = engine.must("POST", f"/images/create?{urlencode(query)}", content=content, deadline_s=300.0)
    if engine.api("GET", f"/images/{image}/json").status != 200:  # Podman ignores the tag
        imported = answer["status"]
        engine.must("POST", f"/images/{imported}/tag", query={"repo": name, "tag": tag})


# ---- contents ------------------------------------------------------------------------------------------------------


class _Archive:
    """A tar file written member by member; root owns everything."""

    def __init__(self, file: IO[bytes], mode: Literal["w", "a"] = "w") -> None:
        self.tar = tarfile.open(fileobj=file, mode=mode)  # noqa: SIM115 - its users close it

    def put(self, path: str, content: bytes, mode: int = 0o644) -> None:
        member = tarfile.TarInfo(path)
        member.size, member.mode = len(content), mode
        self.tar.addfile(member, io.BytesIO(content))

    def folder(self, path: str, mode: int = 0o755) -> None:
        member = tarfile.TarInfo(path)
        member.type, member.mode = tarfile.DIRTYPE, mode
        self.tar.addfile(member)

    def link(self, path: str, target: str) -> None:
        member = tarfile.TarInfo(path)
        member.type, member.linkname = tarfile.SYMTYPE, target
        self.tar.addfile(member)


def _busybox(file: IO[bytes]) -> _Archive:
    archive = _Archive(file)
    for folder in ("bin", "dev", "etc", "proc", "root", "sys", "var", "www", "www/cgi-bin"):
        archive.folder(folder)
    archive.folder("tmp", 0o1777)
    program = shutil.which("busybox")
    assert program, "busybox not found (Debian: busybox-static)"
    archive.put("bin/busybox", Path(program).read_bytes(), 0o755)
    for applet in APPLETS:
        archive.link(f"bin/{applet}", "busybox")
    archive.put("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n")
    archive.put("etc/group", b"root:x:0:\nnogroup:x:65534:\n")
    archive.put("www/index.html", BUSYBOX_PAGE)
    return archive


def _command(*words: str) -> str:
    return "CMD [" + ",".join('"' + word.replace('"', '\\"') + '"' for word in words) + "]"


def busybox_content(file: IO[bytes]) -> list[str]:
    archive = _busybox(file)
    archive.tar.close()
    return [_command(*BUSYBOX_COMMAND), "ENV PATH=/bin", "EXPOSE 9000"]


def bad_content(file: IO[bytes]) -> list[str]:
    archive = _busybox(file)
    archive.put("bad", BAD_SCRIPT, 0o755)
    archive.put("www/cgi-bin/eat", EAT, 0o755)
    archive.tar.close()
    return ['ENTRYPOINT ["/bad"]', _command("never-listens"), "ENV PATH=/bin"]


def echo_content(file: IO[bytes]) -> list[str]:
    """Write Debian's Python and the examples; they import nothing of the agent."""
    add_to_debian(file, ("python3",), ROOT / "agent", ("__init__.py", "examples"), "opt/hibernode/agent")
    return [
        _command("python3", "-m", "agent.examples.echo"),
        "ENV PYTHONPATH=/opt/hibernode",
        "ENV PYTHONDONTWRITEBYTECODE=1",
        "ENV LISTEN_HOST=0.0.0.0",
    ]


CONTENTS: dict[str, Callable[[IO[bytes]], list[str]]] = {
    BUSYBOX: busybox_content,
    BAD: bad_content,
    ECHO: echo_content,
}


def add_to_debian(file: IO[bytes], packages: tuple[str, ...], source: Path, names: tuple[str, ...], below: str) -> None:
    """Write Debian with `packages`, and these files and folders of `source` below a path of the image."""
    with debian_tar(packages).open("rb") as base:
        shutil.copyfileobj(base, file)
    file.seek(0)
    archive = _Archive(file, "a")
    for name in names:
        archive.tar.add(source / name, f"{below}/{name}", filter=_rootly)
    archive.tar.close()


def _rootly(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    if "__pycache__" in member.name:
        return None
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    return member


# ---- Debian --------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folder = Path(home) / "hibernode"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def debian_tar(packages: tuple[str, ...]) -> Path:
    """A Debian root file system with these packages, uncompressed; made once (20 s) and cached for the user. Uses the
    host's release if that is Debian, because the host's compiler builds the emulated driver."""
    suite = _suite()
    key = hashlib.sha256(repr((suite, packages, EXCLUDED)).encode()).hexdigest()[:12]
    path = cache_folder() / f"{suite}-{key}.tar"
    with (cache_folder() / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            partial = path.with_suffix(".partial")
            command = [
                "mmdebstrap", "--variant=minbase", "--format=tar", f"--include={','.join(packages)}",
                *(f"--dpkgopt=path-exclude={excluded}" for excluded in EXCLUDED), suite, str(partial),
            ]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
            if done.returncode != 0:
                partial.unlink(missing_ok=True)
                raise AssertionError(f"mmdebstrap: {done.stderr[-1500:]}")
            partial.rename(path)
    return path


EXCLUDED = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*")


def _suite() -> str:
    release = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    return release.get("VERSION_CODENAME", "bookworm") if release.get("ID") == "debian" else "bookworm"
