"""Where daemons are and which token opens them: from the options, else from what a daemon wrote into its home."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from agent.cli.options import CliOptions
from agent.core.errors import ConfigError, InvalidArgumentError, PermissionDeniedError, UnavailableError

Daemon = Literal["agent", "scheduler"]

MAX_FILE_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class DaemonAddress:
    """What to call (`host:port` or `unix:/path`) and the token to send, "" for none."""

    target: str
    token: str

    def __repr__(self) -> str:
        return f"Place({self.target})"


def find_daemon(daemon: Daemon, asked: CliOptions) -> DaemonAddress:
    """The daemon's gRPC address: the option's, else the unix socket where we may use it, else TCP with the token.

    Raises UnavailableError where no daemon has run, PermissionDeniedError for what we may not read.
    """
    given = asked.agent if daemon == "agent" else asked.scheduler
    if given:
        return DaemonAddress(given, _token_for(given, daemon, asked))
    found = read_endpoints(daemon, asked.home)
    socket = found.get("socket", "")
    if socket and not asked.token_file and os.access(socket, os.R_OK | os.W_OK):
        return DaemonAddress(f"unix:{socket}", "")
    if not found.get("grpc") and daemon == "scheduler":
        message = f"the scheduler in {asked.home} stands by for another one; name the active one with --scheduler"
        raise UnavailableError("SCHEDULER_STANDBY", message, home=str(asked.home))
    if not found.get("grpc"):
        message = f"{daemon} in {asked.home} offers no TCP address, and its socket {socket} is not open to this user"
        raise PermissionDeniedError("SOCKET_NOT_ALLOWED", f"{message}; use sudo, or join the group hibernode")
    file = asked.token_file or found.get("token_file") or str(asked.home / daemon / "token")
    return DaemonAddress(found["grpc"], read_token(Path(file)))


def find_gateway(asked: CliOptions) -> str:
    """`host:port` of the gateway."""
    given = asked.gateway or read_endpoints("scheduler", asked.home).get("gateway", "")
    if not given:
        raise UnavailableError("GATEWAY_UNKNOWN", "the scheduler has no gateway; name its address with --gateway")
    return given.removeprefix("http://").rstrip("/")


def read_endpoints(daemon: Daemon, home: Path) -> dict[str, str]:
    """The addresses a daemon wrote when it started (`<state_dir>/endpoints.json`)."""
    path = home / daemon / "endpoints.json"
    try:
        with path.open("rb") as file:
            document = json.loads(file.read(MAX_FILE_BYTES))
    except FileNotFoundError as error:
        message = (
            f"no {daemon} has been started in {home}: start one with `hibernode {daemon} --config FILE`, "
            f"or say where it is with --home (HIBERNODE_HOME) or --{daemon} ADDRESS"
        )
        raise UnavailableError(f"{daemon.upper()}_NOT_RUNNING", message, home=str(home)) from error
    except PermissionError as error:
        message = f"{path} may not be read by this user; use sudo, or name --{daemon} ADDRESS and --token-file FILE"
        raise PermissionDeniedError("ENDPOINTS_NOT_ALLOWED", message, path=str(path)) from error
    except (OSError, ValueError) as error:
        message = f"{path} can't be used ({error}); start the {daemon} again, or name --{daemon} ADDRESS"
        raise ConfigError("ENDPOINTS_INVALID", message, path=str(path)) from error
    if not isinstance(document, dict):
        raise ConfigError("ENDPOINTS_INVALID", f"{path} is not what a daemon writes; start the {daemon} again")
    return {str(key): str(value) for key, value in document.items() if value is not None}


def read_token(path: Path) -> str:
    """The token in a file. Raises PermissionDeniedError or InvalidArgumentError with what to do.

    Who may read the file is checked by the daemon that made it (adapters/daemon/token_file.py); here it is only read.
    """
    try:
        with path.open("rb") as file:
            content = file.read(4096).strip()
    except PermissionError as error:
        message = f"the token {path} may not be read by this user; use sudo, or join the group hibernode"
        raise PermissionDeniedError("TOKEN_NOT_ALLOWED", message, path=str(path)) from error
    except OSError as error:
        message = f"the token file {path} can't be read: {error.strerror}; name the right one with --token-file"
        raise InvalidArgumentError("TOKEN_FILE_UNREADABLE", message, path=str(path)) from error
    if not content or not all(0x21 <= byte <= 0x7E for byte in content):
        message = f"{path} does not hold one token; name the right file with --token-file"
        raise InvalidArgumentError("TOKEN_FILE_INVALID", message, path=str(path))
    return content.decode("ascii")


def _token_for(target: str, daemon: Daemon, asked: CliOptions) -> str:
    if asked.token_file:
        return read_token(Path(asked.token_file))
    from agent.wire.addresses import is_loopback, split  # gRPC only where a daemon is called

    # The home's token goes to this machine only; a unix socket needs none.
    if target.startswith("unix:") or not is_loopback(split(target)[0]):
        return ""
    token = asked.home / daemon / "token"
    return read_token(token) if token.exists() else ""
