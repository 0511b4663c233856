"""What a workload is started with: its user, its environment, its arguments, and the form the launcher reads them in.

The plan travels over a socket, never in arguments or a file: the environment holds secrets.
"""

from __future__ import annotations

import os
import pwd
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from agent.adapters.runtime.bundles import WorkloadUser
from agent.adapters.runtime.environment import instance_environment
from agent.core.errors import ConfigError, InvalidArgumentError
from agent.ports import StartSpec

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def require_explicit_root(name: str) -> None:
    """Whoever may deploy a function would be root on this host, and not because somebody said so. ConfigError."""
    if not name and os.geteuid() == 0:
        raise ConfigError(
            "RUNTIME_USER_MISSING",
            "runtime.process.user: the agent runs as root, and so would every function; name an account that owns "
            "nothing, or say `user: root` if that is meant",
        )


def resolve_user(name: str) -> WorkloadUser | None:
    """The configured user; None (stay who we are) when it is empty or already us. ConfigError otherwise."""
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
    """All the launcher needs to become the workload."""

    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(repr=False)
    folder: Path
    user: WorkloadUser | None

    def encode(self) -> bytes:
        """See `launch.py`. InvalidArgumentError BAD_COMMAND when a value can't be given to a program at all."""
        records = [("A", value) for value in self.argv]
        records += [("V", f"{name}={value}") for name, value in self.environment.items()]
        records.append(("D", str(self.folder)))
        if self.user:
            records += [("U", str(self.user.uid)), ("G", str(self.user.gid))]
            records += [("S", str(group)) for group in self.user.groups]
        if any("\0" in value for _kind, value in records) or any("=" in name for name in self.environment):
            raise InvalidArgumentError(
                "BAD_COMMAND", "entrypoint, command and environment must not hold NUL, variable names no '='"
            )
        return b"".join(kind.encode() + os.fsencode(value) + b"\0" for kind, value in records) + b".\0"


def make_plan(spec: StartSpec, *, port: int, folder: Path, user: WorkloadUser | None, state_uuid: str) -> LaunchPlan:
    """The workload's clean environment: nothing of the agent's own, the function's variables, then ours on top
    (`instance_environment`). It listens on 127.0.0.1."""
    gpus = "all" if spec.all_gpus and spec.gpu_uuids else ",".join(spec.gpu_uuids)
    environment = {
        "PATH": DEFAULT_PATH,
        "HOME": str(folder),
        "USER": user.name if user else "",
        "LANG": "C.UTF-8",
        **instance_environment(spec, port=port, state_uuid=state_uuid, visible_devices=gpus or "void"),
    }
    if not environment["USER"]:
        del environment["USER"]
    function = spec.instance.function
    return LaunchPlan(function.entrypoint + function.command, environment, folder, user)
