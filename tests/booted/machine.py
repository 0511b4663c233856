"""A host with systemd as its init, in namespaces of its own: `Machine.boot()`, `.run(...)`, `.close()`.

systemd-nspawn boots the root file system in a cgroup of its own, with a network that has a loopback and nothing else.
Commands enter its namespaces (`nsenter`) beside the services. Whatever happens inside, `close` ends all of it by one
write to cgroup.kill and removes what was made.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from agent.adapters.kernel.cgroup import find_v2_mount, is_empty, parse_mounts, send_kill, subtree
from tests.booted import root

PREFIX = "hibernode-booted-"
BOOT_DEADLINE_S = 60.0
END_DEADLINE_S = 20.0
COMMAND_S = 60.0
INSIDE = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8"}


class CommandFailed(AssertionError):
    """A command inside ended with another code than 0."""


class Machine:
    """One booted host; `path` leads to a file of it. `folder`/checkout is this checkout as it was at the boot."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
        self.init = 0
        mount = find_v2_mount(Path("/proc/self/mountinfo").read_text())
        assert mount is not None, "root.why_not() has looked"
        self._cgroup = mount.point / self.folder.name
        self._nspawn: subprocess.Popen[bytes] | None = None

    def path(self, inside: str) -> Path:
        """Where a file of the host is from outside; once it has booted also those below its mounts (/run, /tmp)."""
        top = Path(f"/proc/{self.init}/root") if self.init else self.folder / "root"
        return top / inside.lstrip("/")

    # ---- boot and end -----------------------------------------------------------------------------------------------

    def boot(self) -> None:
        """Unpack, boot, wait until systemd has started everything. Raises NotHere, or AssertionError."""
        root.copy_checkout(self.folder / "checkout")  # once: it may be edited while its tests run
        (self.folder / "root").mkdir()
        root.unpacked(self.folder / "root")
        self.path("etc/hostname").write_text("gpu-1\n")
        self._cgroup.mkdir()
        into = 'echo $$ >"$1/cgroup.procs" && shift && exec "$@"'
        nspawn = [
            "systemd-nspawn",
            "-q",
            "--register=no",
            "--keep-unit",
            "--private-network",
            "-D",
            str(self.folder / "root"),
            "-b",
        ]
        with (self.folder / "console.log").open("wb") as console:
            self._nspawn = subprocess.Popen(
                ["sh", "-c", into, "sh", str(self._cgroup), *nspawn],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                env={**os.environ, "SYSTEMD_NSPAWN_LOCK": "0"},
                start_new_session=True,
            )
        self.until("the container has an init", self._find_init, BOOT_DEADLINE_S)
        self.until("systemd has booted", self._booted, BOOT_DEADLINE_S)

    def _find_init(self) -> bool:
        assert self._nspawn is not None
        if self._nspawn.poll() is not None:
            raise root.NotHere(f"systemd-nspawn can't boot here: {self._console()}")
        for child in psutil.Process(self._nspawn.pid).children():
            with contextlib.suppress(psutil.Error):
                if child.name() == "systemd":
                    self.init = child.pid
        return self.init != 0

    def _booted(self) -> bool:
        assert self._nspawn is not None
        if self._nspawn.poll() is not None:
            raise root.NotHere(f"the container ended while booting: {self._console()}")
        return self.try_run("systemctl", "is-system-running").stdout.strip() in ("running", "degraded")

    def _console(self) -> str:
        return (self.folder / "console.log").read_text(errors="replace")[-800:]

    def close(self) -> None:
        """End everything inside, remove everything made. What survives SIGKILL is an error."""
        try:
            remove(self._cgroup, self.folder)
        finally:
            if self._nspawn is not None:
                self._nspawn.kill()
                self._nspawn.wait(END_DEADLINE_S)

    # ---- inside -----------------------------------------------------------------------------------------------------

    def try_run(
        self, *command: str, environment: dict[str, str] | None = None, deadline_s: float = COMMAND_S, text: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside as root; its answer whatever its exit code. `text` is its standard input."""
        return subprocess.run(
            [*self.entry("-a"), *command],
            input=text,
            capture_output=True,
            text=True,
            env={**INSIDE, **(environment or {})},
            timeout=deadline_s,
            check=False,
        )

    def run(
        self, *command: str, environment: dict[str, str] | None = None, deadline_s: float = COMMAND_S, text: str = ""
    ) -> str:
        """Its standard output. Raises CommandFailed."""
        done = self.try_run(*command, environment=environment, deadline_s=deadline_s, text=text)
        if done.returncode != 0:
            raise CommandFailed(
                f"{' '.join(command)}: exit {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
            )
        return done.stdout

    def entry(self, *namespaces: str) -> Sequence[str]:
        """What to put before a command that shall run in these namespaces of the host (options of nsenter)."""
        return ["nsenter", "-t", str(self.init), *namespaces, "--"]

    def write(self, inside: str, text: str, mode: int = 0o644) -> None:
        """A file of root's."""
        path = self.path(inside)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)

    # ---- systemd ----------------------------------------------------------------------------------------------------

    def show(self, unit: str, name: str) -> str:
        """One property of a unit."""
        return self.run("systemctl", "show", "-P", name, unit).strip()

    def main_pid(self, unit: str) -> int:
        """As the host numbers it; 0 if it does not run."""
        return int(self.show(unit, "MainPID"))

    def journal(self, unit: str, lines: int = 60) -> str:
        """The end of what the unit has said."""
        return self.try_run("journalctl", "-u", unit, "--no-pager", "-o", "cat", "-n", str(lines)).stdout

    def until(self, what: str, reached: Callable[[], bool], deadline_s: float = COMMAND_S) -> None:
        """See `until`, for tests that have a machine at hand."""
        until(what, reached, deadline_s)


def until(what: str, reached: Callable[[], bool], deadline_s: float) -> None:
    """Ask again and again, for at most `deadline_s`."""
    ends = time.monotonic() + deadline_s
    while not reached():
        if time.monotonic() > ends:
            raise AssertionError(f"not within {deadline_s:g} s: {what}")
        time.sleep(0.05)


def remove(cgroup: Path, folder: Path) -> None:
    """End what runs in the cgroup; remove it from every hierarchy, and the folder."""

    def emptied() -> bool:
        if is_empty(cgroup):
            return True
        send_kill(cgroup)
        return False

    until(f"everything in {cgroup.name} has ended", emptied, END_DEADLINE_S)
    for mount in parse_mounts(Path("/proc/self/mountinfo").read_text()):
        for path in subtree(mount.point / cgroup.name):
            with contextlib.suppress(OSError):
                path.rmdir()
    shutil.rmtree(folder, ignore_errors=True)
    left = [path for path in (cgroup, folder) if path.exists()]
    assert not left, f"still there: {left}"


def sweep() -> None:
    """What a run that was killed has left: hosts whose test process is gone."""
    mount = find_v2_mount(Path("/proc/self/mountinfo").read_text())
    assert mount is not None, "root.why_not() has looked"
    names = {path.name for top in (mount.point, Path(tempfile.gettempdir())) for path in top.glob(f"{PREFIX}*-*")}
    for name in names:
        owner = name.removeprefix(PREFIX).partition("-")[0]
        if owner.isdecimal() and not psutil.pid_exists(int(owner)):
            remove(mount.point / name, Path(tempfile.gettempdir()) / name)
