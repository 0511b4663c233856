"""Where daemons listen and are called, and which of it may go without TLS."""

from __future__ import annotations

import ipaddress

from agent.core.errors import ConfigError

# sun_path of Linux, with its final NUL.
MAX_SOCKET_PATH_BYTES = 107


def is_loopback(host: str) -> bool:
    """Whether `host` can only be this machine. A name other than `localhost` may be any machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_bind(host: str, tls: bool, insecure: bool) -> None:
    """Raises ConfigError BIND_INSECURE for an address that others can reach, without TLS, and not asked for."""
    if tls or insecure or is_loopback(host):
        return
    message = (
        f"refusing to listen on {host!r} without TLS: tokens would travel in the clear; "
        "listen on 127.0.0.1, configure TLS, or set `insecure: true` for a trusted network"
    )
    raise ConfigError("BIND_INSECURE", message, host=host)


def check_target(target: str, tls: bool, insecure: bool) -> None:
    """Raises ConfigError TARGET_INSECURE where a token would travel in the clear to another machine."""
    if tls or insecure or target.startswith("unix:") or is_loopback(split(target)[0]):
        return
    message = (
        f"refusing to send a token to {target} without TLS; "
        "use its unix socket or a tunnel, configure TLS, or set `insecure: true` for a trusted network"
    )
    raise ConfigError("TARGET_INSECURE", message, target=target)


def join(host: str, port: int) -> str:
    """`host:port`, with brackets around an IPv6 address."""
    bare = host.strip("[]")
    return f"[{bare}]:{port}" if ":" in bare else f"{bare}:{port}"


def split(address: str) -> tuple[str, int]:
    """Host (without brackets) and port of `host:port`. Raises ConfigError ADDRESS_INVALID."""
    host, colon, port = address.rpartition(":")
    bare = host.strip("[]")
    bracketed = host.startswith("[") and host.endswith("]")
    if not colon or not bare or not port.isdecimal() or int(port) > 65535 or (":" in bare and not bracketed):
        message = f"{address!r} is not an address; write host:port or [IPv6]:port"
        raise ConfigError("ADDRESS_INVALID", message, address=address)
    return bare, int(port)


def unix_target(path: str) -> str:
    """gRPC's name for a unix socket. Raises ConfigError SOCKET_PATH_TOO_LONG or SOCKET_PATH_RELATIVE."""
    if not path.startswith("/"):
        message = f"the socket's path {path!r} must be absolute"
        raise ConfigError("SOCKET_PATH_RELATIVE", message, path=path)
    if len(path.encode()) > MAX_SOCKET_PATH_BYTES:
        message = f"the socket's path is longer than {MAX_SOCKET_PATH_BYTES} bytes; use a shorter state directory"
        raise ConfigError("SOCKET_PATH_TOO_LONG", message, path=path)
    return f"unix:{path}"
