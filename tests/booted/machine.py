"""A host with systemd as its init in its own namespaces: `Machine.boot()`, `.run(...)`, `.close()`.

systemd-nspawn boots the root file system in a separate cgroup, with only a loopback network. Commands enter the
namespaces (`nsenter`) next to the services. `close` always ends everything by writing to cgroup.kill, and removes what
was created.
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
    """A command on the host failed."""


class Machine:
    """One booted host; `path` gives access to its files. `folder`/checkout is the checkout at boot time."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
        self.init = 0
        mount = find_v2_mount(Path("/proc/self/mountinfo").read_text())
        assert mount is not None, "root.why_not() has looked"
        self._cgroup = mount.point / self.folder.name
        self._nspawn: subprocess.Popen[bytes] | None = None

    def path(self, inside: str) -> Path:
        """The outside path of a file on the host; after the boot also below its mounts (/run, /tmp)."""
        top = Path(f"/proc/{self.init}/root") if self.init else self.folder / "root"
        return top / inside.lstrip("/")

    # ---- boot and end -----------------------------------------------------------------------------------------------

    def boot(self) -> None:
        """Unpack, boot, and wait for systemd to finish. Raises NotHere, or AssertionError."""
        root.copy_checkout(self.folder / "checkout")  # a copy: the checkout may change during the tests
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
        """End and remove everything. A process that survives SIGKILL is an error."""
        try:
            remove(self._cgroup, self.folder)
        finally:
            if self._nspawn is not None:
                self._nspawn.kill()
                self._nspawn.wait(END_DEADLINE_S)

    # ---- commands ---------------------------------------------------------------------------------------------------

    def try_run(
        self, *command: str, environment: dict[str, str] | None = None, deadline_s: float = COMMAND_S, text: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as root, with `text` as its standard input; any exit code is accepted."""
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
        """Run a command and return its standard output. Raises CommandFailed."""
        done = self.try_run(*command, environment=environment, deadline_s=deadline_s, text=text)
        if done.returncode != 0:
            raise CommandFailed(
                f"{' '.join(command)}: exit {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
            )
        return done.stdout

    def entry(self, *namespaces: str) -> Sequence[str]:
        """The command prefix that enters these namespaces of the host (options of nsenter)."""
        return ["nsenter", "-t", str(self.init), *namespaces, "--"]

    def write(self, inside: str, text: str, mode: int = 0o644) -> None:
        """Write a file, owned by root."""
        path = self.path(inside)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)

    # ---- systemd ----------------------------------------------------------------------------------------------------

    def show(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.run("systemctl", "show", "-P", name, unit).strip()

    def main_pid(self, unit: str) -> int:
        """The main pid in the host's numbering; 0 if it does not run."""
        return int(self.show(unit, "MainPID"))

    def journal(self, unit: str, lines: int = 60) -> str:
        """The end of a unit's journal."""
        return self.try_run("journalctl", "-u", unit, "--no-pager", "-o", "cat", "-n", str(lines)).stdout

    def until(self, what: str, reached: Callable[[], bool], deadline_s: float = COMMAND_S) -> None:
        """Like the function `until`."""
        until(what, reached, deadline_s)


def until(what: str, reached: Callable[[], bool], deadline_s: float) -> None:
    """Poll for at most `deadline_s`."""
    ends = time.monotonic() + deadline_s
    while not reached():
        if time.monotonic() > ends:
            raise AssertionError(f"not within {deadline_s:g} s: {what}")
        time.sleep(0.05)


def remove(cgroup: Path, folder: Path) -> None:
    """End the processes of a cgroup; remove it from every hierarchy, and the folder."""

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
    """Remove hosts of killed runs, whose test process is gone."""
    mount = find_v2_mount(Path("/proc/self/mountinfo").read_text())
    assert mount is not None, "root.why_not() has looked"
    names = {path.name for top in (mount.point, Path(tempfile.gettempdir())) for path in top.glob(f"{PREFIX}*-*")}
    for name in names:
        owner = name.removeprefix(PREFIX).partition("-")[0]
        if owner.isdecimal() and not psutil.pid_exists(int(owner)):
            remove(mount.point / name, Path(tempfile.gettempdir()) / name)
