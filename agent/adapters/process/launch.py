"""Launches a workload: resolves its user, plans its environment, and drives the handshake with `launcher.py`.

The plan travels over a socket, never in arguments or a file, because the environment holds secrets.
"""

from __future__ import annotations

import asyncio
import os
import pwd
import re
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from agent.adapters.runtime.bundles import WorkloadUser
from agent.adapters.runtime.environment import instance_environment
from agent.core.errors import ConfigError, InstanceError, InvalidArgumentError
from agent.core.instance_variables import LISTEN_PORT
from agent.ports import StartSpec

_PORT = re.compile(rf"\$(?:\{{{LISTEN_PORT}\}}|{LISTEN_PORT}\b)")
"""In arguments it is replaced, since each instance has another port. No other variable is: a shell can do that."""
LAUNCHER = Path(__file__).with_name("launcher.py")
ANSWER_LIMIT_BYTES = 4096
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def require_explicit_root(name: str) -> None:
    """Raise ConfigError if functions would run as root only because no user is configured."""
    if not name and os.geteuid() == 0:
        raise ConfigError(
            "RUNTIME_USER_MISSING",
            "runtime.process.user: the agent runs as root, and so would every function; name an account that owns "
            "nothing, or set `user: root` explicitly",
        )


def resolve_user(name: str) -> WorkloadUser | None:
    """The configured user; None (the agent's own) if it is empty or already that. Raises ConfigError."""
    if not name:
        return None
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        raise ConfigError(
            "RUNTIME_USER_UNKNOWN", f"runtime.process.user: there is no user {name!r}; create it or name another"
        ) from None
    if os.geteuid() == entry.pw_uid:
        return None
    if os.geteuid() != 0:
        raise ConfigError(
            "RUNTIME_USER_NEEDS_ROOT",
            f"runtime.process.user: only an agent that runs as root can start workloads as {name!r}; "
            "leave the key out to run them as the agent's own user",
        )
    groups = tuple(os.getgrouplist(name, entry.pw_gid))
    return WorkloadUser(name, entry.pw_uid, entry.pw_gid, groups)


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """All that the launcher needs to become the workload. `open_files`: its soft limit, -1 = none; None leaves it."""

    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(repr=False)
    folder: Path
    user: WorkloadUser | None
    open_files: int | None = None

    def encode(self) -> bytes:
        """The format that `launcher.py` reads. Raises InvalidArgumentError BAD_COMMAND for values no program can be
        given."""
        records = [("A", value) for value in self.argv]
        records += [("V", f"{name}={value}") for name, value in self.environment.items()]
        records.append(("D", str(self.folder)))
        if self.open_files is not None:
            records.append(("L", str(self.open_files)))
        if self.user:
            records += [("U", str(self.user.uid)), ("G", str(self.user.gid))]
            records += [("S", str(group)) for group in self.user.groups]
        if any("\0" in value for _kind, value in records) or any("=" in name for name in self.environment):
            raise InvalidArgumentError(
                "BAD_COMMAND", "entrypoint, command and environment must not hold NUL, variable names no '='"
            )
        return b"".join(kind.encode() + os.fsencode(value) + b"\0" for kind, value in records) + b".\0"


def make_plan(
    spec: StartSpec,
    *,
    port: int,
    folder: Path,
    user: WorkloadUser | None,
    state_uuid: str,
    open_files: int | None = None,
) -> LaunchPlan:
    """A clean environment: nothing of the agent's own, the function's variables, then ours (`instance_environment`).
    The workload listens on 127.0.0.1."""
    gpus = "all" if spec.all_gpus and spec.gpu_uuids else ",".join(spec.gpu_uuids)
    login = user.name if user else _own_login()
    environment = {
        "PATH": DEFAULT_PATH,
        "HOME": str(folder),
        **({"USER": login, "LOGNAME": login} if login else {}),
        "LANG": "C.UTF-8",
        **instance_environment(
            spec, port=port, state_uuid=state_uuid, visible_devices=gpus or "void", sees_all_gpus=True
        ),
    }
    function = spec.instance.function
    argv = tuple(_PORT.sub(str(port), word) for word in function.entrypoint + function.command)
    return LaunchPlan(argv, environment, folder, user, open_files)


def _own_login() -> str:
    """The name of the agent's own user; "" for a number without an account."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return ""


def spawn(uid: str, cgroup: str, log_fd: int) -> tuple[int, socket.socket]:
    """Start the launcher in its own session; returns its pid (unreaped child) and the control socket. Raises OSError.

    Call it on the loop's thread. Popen without preexec_fn uses vfork, so gRPC's fork handlers do not run.
    """
    ours, theirs = socket.socketpair()
    try:
        with theirs:
            ours.setblocking(False)
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(LAUNCHER), str(theirs.fileno()), cgroup, uid],
                stdin=subprocess.DEVNULL,
                stdout=log_fd,
                stderr=log_fd,
                pass_fds=(theirs.fileno(),),
                cwd="/",
                # Only what the interpreter may need to start; the workload gets a clean environment.
                env={name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ},
                start_new_session=True,
            )
    except BaseException:
        ours.close()
        raise
    # ExitWatch reaps it through its pidfd. With a returncode set, Popen neither waits for it nor warns when the agent
    # exits before the container.
    process.returncode = 0
    return process.pid, ours


async def release(control: socket.socket, plan: LaunchPlan) -> None:
    """Send the plan and wait until the workload's program runs. Raises InstanceError START_FAILED.

    The caller has recorded the launcher, bounds this by a deadline, and closes `control`.
    """
    loop = asyncio.get_running_loop()
    try:
        await loop.sock_sendall(control, plan.encode())
        answer = b""
        while len(answer) < ANSWER_LIMIT_BYTES and (part := await loop.sock_recv(control, ANSWER_LIMIT_BYTES)):
            answer += part
    except ConnectionError:
        answer = b""
    if answer == b"X":
        return
    detail = answer.partition(b"E")[2].decode(errors="replace")
    if not detail:
        detail = "the launcher ended before the program started; its log may say why"
    raise InstanceError("START_FAILED", f"the instance could not be started: {detail}")
