"""A Docker Engine to compare with: an existing one, or a private one for the duration of a benchmark.

Nothing is installed or pulled: the image is one static program that sleeps, built with `cc`. The Engine API is called
over its unix socket with the blocking HTTP client that also calls the gateway.
"""

from __future__ import annotations

import http.client
import io
import json
import os
import shutil
import socket
import subprocess
import tarfile
import tempfile
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEFAULT_SOCKET = "/var/run/docker.sock"
ANSWER_S = 60.0
START_S = 60.0
STOP_S = 30.0
IMAGE = "hibernode-bench-sleep:latest"
PROGRAM = "/program"
SLEEPER = "#include <unistd.h>\nint main(void) { for (;;) pause(); }\n"


class NoDocker(Exception):
    """No engine is available; the text says why."""


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=ANSWER_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Engine:
    """A blocking client of the Docker Engine API with one keep-alive connection."""

    def __init__(self, socket_path: str) -> None:
        self._connection = _UnixConnection(socket_path)

    def call(self, method: str, path: str, body: bytes | None = None, kind: str = "application/json") -> Any:
        """Raises NoDocker with the engine's message if it answers 400 or more, OSError if it does not answer."""
        self._connection.request(method, path, body, {"Content-Type": kind} if body is not None else {})
        answer = self._connection.getresponse()
        content = answer.read()
        if answer.status >= 400:
            raise NoDocker(f"{method} {path}: {answer.status} {content.decode(errors='replace').strip()[:300]}")
        try:
            return json.loads(content)
        except ValueError:
            return None  # empty, or progress lines of an import

    def close(self) -> None:
        self._connection.close()


@dataclass(slots=True)
class PausedContainer:
    """A container that sleeps, to pause and unpause. `where` names its engine."""

    engine: Engine
    name: str
    where: str
    version: str

    def pause(self) -> None:
        self.engine.call("POST", f"/containers/{self.name}/pause")

    def unpause_ns(self) -> int:
        """Unpauses it and returns the time of the call in ns."""
        began = time.monotonic_ns()
        self.engine.call("POST", f"/containers/{self.name}/unpause")
        return time.monotonic_ns() - began


@contextmanager
def paused_container() -> Iterator[PausedContainer]:
    """A paused container of an existing or private engine, removed at the end. Raises NoDocker."""
    with ExitStack() as stack:
        path, where = find_engine(stack)
        engine = Engine(path)
        stack.callback(engine.close)
        try:
            version = engine.call("GET", "/version")
            name = stack.enter_context(_container(engine))
        except OSError as error:
            raise NoDocker(f"the engine at {path} does not answer: {error}") from error
        container = PausedContainer(engine, name, where, f"{version['Version']} (API {version['ApiVersion']})")
        container.pause()
        yield container


def find_engine(stack: ExitStack, *, bridge: bool = False) -> tuple[str, str]:
    """The socket and a description of an engine; `stack` ends a private one. `bridge`: its containers can have a
    network. Raises NoDocker."""
    given = os.environ.get("DOCKER_HOST", "")
    if given:
        if not given.startswith("unix://"):
            raise NoDocker(f"DOCKER_HOST is {given.partition('://')[0]}://; only unix:// is supported")
        return given.removeprefix("unix://"), "DOCKER_HOST"
    if Path(DEFAULT_SOCKET).exists():
        return DEFAULT_SOCKET, DEFAULT_SOCKET
    if shutil.which("dockerd") is None:
        raise NoDocker(f"no DOCKER_HOST, no {DEFAULT_SOCKET}, and no dockerd to start")
    if os.geteuid() != 0:
        raise NoDocker("starting dockerd needs root")
    return stack.enter_context(_private_engine(bridge=bridge)), "private dockerd"


@contextmanager
def _private_engine(*, bridge: bool) -> Iterator[str]:
    """The socket of a dockerd with all its files in a temporary folder; without `bridge` it changes no network."""
    with tempfile.TemporaryDirectory(prefix="hibernode-docker-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        path = folder / "docker.sock"
        command = [
            *("dockerd", "--data-root", f"{folder}/data", "--exec-root", f"{folder}/exec"),
            *("-H", f"unix://{path}", "--pidfile", f"{folder}/pid"),
            *(() if bridge else ("--bridge", "none", "--iptables=false")),
        ]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            _wait_for_engine(process, path, folder / "log")
            yield str(path)
        finally:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_for_engine(process: subprocess.Popen[bytes], path: Path, log: Path) -> None:
    ends = time.monotonic() + START_S
    while True:
        if process.poll() is not None or time.monotonic() > ends:
            raise NoDocker(f"dockerd did not start: {log.read_text(errors='replace')[-500:].strip()}")
        engine = Engine(str(path))
        with suppress(OSError, NoDocker):
            engine.call("GET", "/_ping")
            return
        engine.close()
        time.sleep(0.1)


@contextmanager
def _container(engine: Engine) -> Iterator[str]:
    """A started container without network, removed with its image at the end."""
    with imported_image(engine, IMAGE, SLEEPER):
        spec = {"Image": IMAGE, "Cmd": [PROGRAM], "HostConfig": {"NetworkMode": "none"}}
        name = engine.call("POST", "/containers/create", json.dumps(spec).encode())["Id"]
        try:
            engine.call("POST", f"/containers/{name}/start")
            yield name
        finally:
            engine.call("DELETE", f"/containers/{name}?force=1")


@contextmanager
def imported_image(engine: Engine, image: str, source: str) -> Iterator[None]:
    """An image `name:tag` of one static program `PROGRAM` compiled from C, removed at the end."""
    repository, _, tag = image.partition(":")
    change = urllib.parse.quote(f'CMD ["{PROGRAM}"]')
    path = f"/images/create?fromSrc=-&repo={repository}&tag={tag}&changes={change}"
    engine.call("POST", path, _root(source), "application/x-tar")
    try:
        yield
    finally:
        engine.call("DELETE", f"/images/{image}?force=1")


def _root(source: str) -> bytes:
    """A root file system with one static program, as a tar."""
    compiler = shutil.which("cc")
    if compiler is None:
        raise NoDocker("no cc to build the container's program")
    with tempfile.TemporaryDirectory(prefix="hibernode-image-") as name:
        text, program = Path(name, "program.c"), Path(name, "program")
        text.write_text(source)
        try:
            subprocess.run(
                [compiler, "-static", "-O", "-o", program, text], check=True, capture_output=True, timeout=60
            )
        except (subprocess.SubprocessError, OSError) as error:
            raise NoDocker(f"cannot build the container's program: {error}") from error
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w") as tar:
            tar.add(program, PROGRAM.lstrip("/"))
        return content.getvalue()
