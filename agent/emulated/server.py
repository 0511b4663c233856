"""Runs an emulated driver in the foreground: directory, sockets, shutdown."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import resource
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from agent.core.errors import PreconditionError
from agent.emulated.build import build, install
from agent.emulated.connection import Connection
from agent.emulated.control_server import MAX_LINE, ControlServer
from agent.emulated.driver import Driver
from agent.emulated.options import Options
from agent.emulated.paths import CONTROL_SOCKET, DRIVER_SOCKET, LOCK_FILE, READY_FILE, socket_path
from agent.log import get_logger

_BACKLOG = 512
_PAUSE_S = 0.1
MAX_CONNECTIONS = 4096


@contextmanager
def _directory_lock(directory: Path) -> Iterator[None]:
    """Hold the directory's lock. The kernel releases it with the process, however that ends."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / LOCK_FILE).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PreconditionError(
                "EMULATED_DRIVER_RUNNING",
                f"An emulated driver already runs in {directory}; stop it or choose another --dir.",
                directory=str(directory),
            ) from None
        yield


class _Acceptor:
    """Accepts connections of the libraries; those beyond MAX_CONNECTIONS are closed at once."""

    def __init__(self, path: Path, driver: Driver, loop: asyncio.AbstractEventLoop) -> None:
        self._driver = driver
        self._loop = loop
        self._open: set[Connection] = set()
        self._sock = _bind(path, socket.SOCK_SEQPACKET, 0o666)  # open to every user, like /dev/nvidia*
        self._sock.setblocking(False)
        self._sock.listen(_BACKLOG)
        loop.add_reader(self._sock.fileno(), self._accept)

    def _accept(self) -> None:
        try:
            while True:
                sock, _ = self._sock.accept()
                if len(self._open) >= MAX_CONNECTIONS:
                    sock.close()
                    continue
                self._open.add(Connection(sock, self._loop, self._driver.on_message, self._closed))
        except BlockingIOError:
            pass
        except OSError:  # out of descriptors: connections wait in the backlog
            self._loop.remove_reader(self._sock.fileno())
            self._loop.call_later(_PAUSE_S, self._resume)

    def _resume(self) -> None:
        if self._sock.fileno() >= 0:
            self._loop.add_reader(self._sock.fileno(), self._accept)

    def _closed(self, connection: Connection) -> None:
        self._open.discard(connection)
        self._driver.on_close(connection)

    def close(self) -> None:
        self._loop.remove_reader(self._sock.fileno())
        self._sock.close()
        for connection in list(self._open):
            connection.close()


async def run(options: Options) -> None:
    """Run the driver until SIGINT or SIGTERM. At its end every CUDA process loses its GPU, and the sockets are removed.

    Once it answers, the file `ready` (JSON: pid, driver_version, gpus) appears and "emulated.ready" is logged. Raises
    PreconditionError EMULATED_DRIVER_RUNNING and what `build` and `Options` raise."""
    log = get_logger()
    directory = options.directory.absolute()
    with _directory_lock(directory):
        (directory / READY_FILE).unlink(missing_ok=True)
        loop = asyncio.get_running_loop()
        _allow_descriptors()
        driver = Driver(options, loop)
        install(await asyncio.to_thread(build, driver.profile, options.cache_directory), directory)
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        acceptor = _Acceptor(directory / DRIVER_SOCKET, driver, loop)
        control = ControlServer(driver)
        control_socket = _bind(directory / CONTROL_SOCKET, socket.SOCK_STREAM, 0o600)
        listener = await asyncio.start_unix_server(control.serve, sock=control_socket, limit=MAX_LINE)
        gpus = [device.uuid_text for device in driver.devices]
        _write_ready(directory, {"pid": os.getpid(), "driver_version": driver.profile.version, "gpus": gpus})
        log.info("emulated.ready", directory=str(directory), driver_version=driver.profile.version, gpus=gpus)
        try:
            await stop.wait()
        finally:
            listener.close()
            await control.close()
            acceptor.close()
            await driver.close()
            for name in (READY_FILE, DRIVER_SOCKET, CONTROL_SOCKET):
                (directory / name).unlink(missing_ok=True)
            frozen = driver.checkpointing.frozen_calls
            if frozen.count:  # each would have hung on hardware: its caller uses the wrong order
                calls = [f"{call.op} {call.pid}" for call in frozen.newest()]
                log.warning("emulated.frozen_calls", count=frozen.count, calls=calls)
            log.info("emulated.stopped", directory=str(directory))


def _bind(path: Path, kind: socket.SocketKind, mode: int) -> socket.socket:
    """Bind a unix socket with these permissions, replacing one that a crash left behind."""
    sock = socket.socket(socket.AF_UNIX, kind)
    path.unlink(missing_ok=True)
    with socket_path(path) as address:
        sock.bind(address)
    path.chmod(mode)
    return sock


def _allow_descriptors() -> None:
    """Raise the limit of descriptors to the hard limit: each CUDA process needs six."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _write_ready(directory: Path, content: dict[str, object]) -> None:
    fresh = directory / f".{READY_FILE}.{os.getpid()}"
    fresh.write_text(json.dumps(content) + "\n")
    fresh.rename(directory / READY_FILE)
