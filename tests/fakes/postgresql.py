"""A real PostgreSQL server for tests, from the host's installation, without fsync.

It listens on a unix socket in its own folder without a password, and on loopback with one. Text is sorted by ICU rules
where the version can, as a user's server may do.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

PATIENCE_S = 30.0
USER = "hibernode"
PASSWORD = "hunter2-of-the-tests"
_QUICK = ("fsync=off", "full_page_writes=off", "synchronous_commit=off", "max_connections=50", "shared_buffers=16MB")


def missing() -> str:
    """Why no server can be started here; "" if it can."""
    if importlib.util.find_spec("psycopg") is None:
        return "psycopg is not installed (the extra postgres)"
    if _programs() is None:
        return "no PostgreSQL here: install it (Debian, Ubuntu: apt-get install postgresql)"
    return ""


def _programs() -> Path | None:
    """Where initdb and postgres lie: Debian keeps them out of PATH, by version."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    if found:
        return found[-1].parent
    in_path = shutil.which("initdb")
    return Path(in_path).resolve().parent if in_path else None


class PostgreSQL:
    """One server with a folder of its own. `close` removes both."""

    def __init__(self) -> None:
        programs = _programs()
        assert programs is not None
        self._programs = programs
        self.folder = Path(tempfile.mkdtemp(prefix="hibernode-pg-"))
        self._count = 0
        self._process: subprocess.Popen[bytes] | None = None
        if "user" in self._who:
            os.chown(self.folder, self._who["user"], self._who["group"])
        self._make()
        self.start()
        self.run(f"CREATE ROLE guest LOGIN PASSWORD '{PASSWORD}'")

    @cached_property
    def _who(self) -> dict[str, Any]:
        """Whose processes they are: root may not run PostgreSQL."""
        if os.geteuid() != 0:
            return {}
        names = {entry.pw_name: entry for entry in pwd.getpwall()}
        user = names.get("postgres") or names["nobody"]
        return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}

    def _make(self) -> None:
        done = subprocess.run([self._programs / "postgres", "--version"], capture_output=True, text=True, check=True)
        major = int(done.stdout.split()[2].partition(".")[0])
        sorting = ["--locale-provider=icu", "--icu-locale=en"] if major >= 15 else []
        command = [str(self._programs / "initdb"), "-D", str(self.folder / "data"), "-U", USER, "--encoding=UTF8"]
        subprocess.run(
            [*command, "--no-sync", "--auth-local=trust", "--auth-host=scram-sha-256", "--locale=C.UTF-8", *sorting],
            check=True,
            capture_output=True,
            timeout=PATIENCE_S,
            cwd="/",
            **self._who,
        )

    def start(self) -> None:
        """Start it, where it was before if it ran before, and wait until it answers."""
        if not hasattr(self, "port"):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self.port = int(probe.getsockname()[1])
        settings = (
            f"unix_socket_directories={self.folder}",
            "listen_addresses=127.0.0.1",
            f"port={self.port}",
            *_QUICK,
        )
        # The kernel ends it with the thread that calls this, even if the test is killed.
        tied = ["setpriv", "--pdeathsig", "INT"] if shutil.which("setpriv") else []
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [*tied, self._programs / "postgres", "-D", self.folder / "data", *(f"--{one}" for one in settings)],
                stdout=log,
                stderr=log,
                cwd="/",
                **self._who,
            )
        give_up = time.monotonic() + PATIENCE_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > give_up:
                raise RuntimeError(f"PostgreSQL did not start: {(self.folder / 'log').read_text()[-2000:]}")
            time.sleep(0.02)

    def stop(self) -> None:
        """End it at once: SIGINT, PostgreSQL's "fast", closes all connections."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(PATIENCE_S)
            self._process = None

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self.folder)

    def url(self, database: str) -> str:
        """Over the socket, without a password."""
        return f"postgresql+psycopg://{USER}@/{database}?host={self.folder}&port={self.port}"

    def url_with_password(self, database: str, password: str = PASSWORD) -> str:
        """Over loopback, with the password."""
        return f"postgresql://guest:{password}@127.0.0.1:{self.port}/{database}"

    def run(self, *statements: str, database: str = "postgres") -> list[tuple[Any, ...]]:
        """Each in a transaction of its own; the rows of the last one."""
        import psycopg

        rows: list[tuple[Any, ...]] = []
        with psycopg.connect(
            host=str(self.folder), port=self.port, user=USER, dbname=database, autocommit=True
        ) as connection:
            for statement in statements:
                cursor = connection.execute(statement.encode())
                rows = cursor.fetchall() if cursor.description else []
        return rows

    @contextmanager
    def database(self) -> Iterator[str]:
        """The name of a new, empty database; dropped afterwards despite open sessions."""
        self._count += 1
        name = f"t{self._count}"
        self.run(f"CREATE DATABASE {name}")
        try:
            yield name
        finally:
            self.run(f"DROP DATABASE {name} WITH (FORCE)")

    def _answers(self) -> bool:
        import psycopg

        try:
            self.run("SELECT 1")
        except psycopg.OperationalError:
            return False
        return True
