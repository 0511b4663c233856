"""Settings that both daemons share (addresses, bounds), and checks of single values."""

from __future__ import annotations

import ipaddress
from typing import Annotated, Literal

import msgspec

from agent.config import Section, Size, bad_key
from agent.core.types import MIB

Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["json", "console"]


def positive(**values: int) -> None:
    """Refuse the first value that is not above zero; its name is the key."""
    for key, value in values.items():
        if value <= 0:
            raise bad_key(key, "must be more than zero")


def absolute(key: str, path: str) -> None:
    """Refuse a relative path; "" is left to the caller."""
    if path and not path.startswith("/"):
        raise bad_key(key, f"must be an absolute path, got {path!r}")


def is_loopback(host: str) -> bool:
    """Whether the address is loopback. Of names only localhost is; others are not resolved."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def refuse_open_bind(insecure: bool, **hosts: str) -> None:
    """Refuse a bind beyond loopback unless `insecure: true`: nothing is encrypted."""
    for key, host in hosts.items():
        if not host:
            raise bad_key(f"{key}.host", "must not be empty; write 127.0.0.1, or an address of this machine")
        if not insecure and not is_loopback(host):
            raise bad_key(
                f"{key}.host",
                f"{host!r} can be reached from other machines, unencrypted; "
                "bind 127.0.0.1, or set insecure: true if the network itself is trusted",
            )


class ListenSettings(Section, frozen=True):
    """An address to listen on; port 0 = any, written to <state_dir>/endpoints.json."""

    host: str = "127.0.0.1"
    port: Port = 0


class LimitSettings(Section, frozen=True):
    """Bounds of one HTTP request, answered with 400 or 413 beyond, and of one daemon's connections."""

    header_bytes: Size = Size(8 * 1024)
    path_bytes: Size = Size(4 * 1024)
    body_bytes: Size = Size(32 * MIB)
    connections: Annotated[int, msgspec.Meta(ge=1)] = 4096

    def __post_init__(self) -> None:
        positive(header=self.header_bytes, path=self.path_bytes, body=self.body_bytes)
