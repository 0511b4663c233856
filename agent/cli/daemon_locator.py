"""Finds a daemon's address and token: from the options, else from the files in the daemon's state directory."""

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
    """Target (`host:port` or `unix:/path`) and token of a daemon; no token is ""."""

    target: str
    token: str

    def __repr__(self) -> str:
        return f"DaemonAddress({self.target})"


def find_daemon(daemon: Daemon, options: CliOptions) -> DaemonAddress:
    """The daemon's gRPC address: from the options, else its unix socket if accessible, else TCP with the token.

    Raises UnavailableError if no daemon has run in the home, PermissionDeniedError if its files are not readable.
    """
    given = options.agent if daemon == "agent" else options.scheduler
    if given:
        return DaemonAddress(given, _token_for(given, daemon, options))
    found = read_endpoints(daemon, options.home)
    socket = found.get("socket", "")
    if socket and not options.token_file and os.access(socket, os.R_OK | os.W_OK):
        return DaemonAddress(f"unix:{socket}", "")
    if not found.get("grpc") and daemon == "scheduler":
        message = f"the scheduler in {options.home} is on standby; name the active one with --scheduler"
        raise UnavailableError("SCHEDULER_STANDBY", message, home=str(options.home))
    if not found.get("grpc"):
        message = f"{daemon} in {options.home} has no TCP address, and this user may not access its socket {socket}"
        raise PermissionDeniedError("SOCKET_NOT_ALLOWED", f"{message}; use sudo, or join the group hibernode")
    file = options.token_file or found.get("token_file") or str(options.home / daemon / "token")
    return DaemonAddress(found["grpc"], read_token(Path(file)))


def find_gateway(options: CliOptions) -> str:
    """The gateway's `host:port`."""
    given = options.gateway or read_endpoints("scheduler", options.home).get("gateway", "")
    if not given:
        raise UnavailableError("GATEWAY_UNKNOWN", "the scheduler has no gateway; name its address with --gateway")
    return given.removeprefix("http://").rstrip("/")


def read_endpoints(daemon: Daemon, home: Path) -> dict[str, str]:
    """Reads the addresses that a daemon wrote at its start (`<state_dir>/endpoints.json`)."""
    path = home / daemon / "endpoints.json"
    try:
        with path.open("rb") as file:
            document = json.loads(file.read(MAX_FILE_BYTES))
    except FileNotFoundError as error:
        message = (
            f"no {daemon} has been started in {home}; start one with `hibernode {daemon} --config FILE`, "
            f"or name it with --home (HIBERNODE_HOME) or --{daemon} ADDRESS"
        )
        raise UnavailableError(f"{daemon.upper()}_NOT_RUNNING", message, home=str(home)) from error
    except PermissionError as error:
        message = f"this user may not read {path}; use sudo, or name --{daemon} ADDRESS and --token-file FILE"
        raise PermissionDeniedError("ENDPOINTS_NOT_ALLOWED", message, path=str(path)) from error
    except (OSError, ValueError) as error:
        message = f"{path} is invalid ({error}); restart the {daemon}, or name --{daemon} ADDRESS"
        raise ConfigError("ENDPOINTS_INVALID", message, path=str(path)) from error
    if not isinstance(document, dict):
        raise ConfigError("ENDPOINTS_INVALID", f"{path} is not a JSON object; restart the {daemon}")
    return {str(key): str(value) for key, value in document.items() if value is not None}


def read_token(path: Path) -> str:
    """Reads a token. The file's mode is the daemon's business (adapters/daemon/token_file.py).

    Raises PermissionDeniedError or InvalidArgumentError.
    """
    try:
        with path.open("rb") as file:
            content = file.read(4096).strip()
    except PermissionError as error:
        message = f"this user may not read the token {path}; use sudo, or join the group hibernode"
        raise PermissionDeniedError("TOKEN_NOT_ALLOWED", message, path=str(path)) from error
    except OSError as error:
        message = f"cannot read the token file {path}: {error.strerror}; name the right one with --token-file"
        raise InvalidArgumentError("TOKEN_FILE_UNREADABLE", message, path=str(path)) from error
    if not content or not all(0x21 <= byte <= 0x7E for byte in content):
        message = f"{path} does not contain a single token; name the right file with --token-file"
        raise InvalidArgumentError("TOKEN_FILE_INVALID", message, path=str(path))
    return content.decode("ascii")


def _token_for(target: str, daemon: Daemon, options: CliOptions) -> str:
    if options.token_file:
        return read_token(Path(options.token_file))
    from agent.wire.addresses import is_loopback, split  # gRPC only where a daemon is called

    # The home's token is only sent to this machine; a unix socket needs none.
    if target.startswith("unix:") or not is_loopback(split(target)[0]):
        return ""
    token = options.home / daemon / "token"
    return read_token(token) if token.exists() else ""
