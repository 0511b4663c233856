"""Addresses at which daemons listen and are called, and the rules for those without TLS."""

from __future__ import annotations

import ipaddress
import re
from urllib.parse import unquote

from agent.core.errors import ConfigError, InvalidArgumentError

MAX_SOCKET_PATH_BYTES = 107  # sun_path of Linux, without its final NUL
_HOST_NAME = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63}){0,15}\.?", re.ASCII)
# gRPC reads `unix:1234` as a socket's path, not as host and port.
_SCHEMES = frozenset({"dns", "unix", "unix-abstract", "ipv4", "ipv6", "vsock", "xds", "google-c2p", "passthrough"})


def is_loopback(host: str) -> bool:
    """True if `host` can only be this machine; a name other than `localhost` may be any machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_bind(host: str, tls: bool, insecure: bool) -> None:
    """Raises ConfigError BIND_INSECURE for an address that other machines can reach, without TLS or `insecure`."""
    if tls or insecure or is_loopback(host):
        return
    message = (
        f"refusing to listen on {host!r}: tokens would travel unencrypted; "
        "listen on 127.0.0.1, or set `insecure: true` in the configuration if the network itself is trusted"
    )
    raise ConfigError("BIND_INSECURE", message, host=host)


def check_target(target: str, tls: bool, insecure: bool) -> None:
    """Raises ConfigError TARGET_INSECURE if a token would travel in the clear to another machine."""
    if tls or insecure or target.startswith("unix:") or is_loopback(split(target)[0]):
        return
    message = (
        f"refusing to send a token unencrypted to {target}; "
        "use a tunnel, or set `insecure: true` in the configuration if the network itself is trusted"
    )
    raise ConfigError("TARGET_INSECURE", message, target=target)


def peer_host(peer: str) -> str:
    """The address in gRPC's peer string (`ipv4:10.0.0.7:4711`, `ipv6:%5B::1%5D:4711`); 127.0.0.1 for a unix socket, ""
    for anything else."""
    kind, _, rest = peer.partition(":")
    if kind == "unix":
        return "127.0.0.1"
    host = unquote(rest).rpartition(":")[0].strip("[]").partition("%")[0]
    return host if kind in ("ipv4", "ipv6") and _ip(host) is not None else ""


def registered_target(address: str, peer: str, insecure: bool) -> str:
    """The `host:port` at which the scheduler calls an agent that registered `address` from the machine `peer`.

    The address decides where requests and creates are sent, so it must be a TCP port of a machine: no unix socket (its
    callers are trusted) or other gRPC scheme; no port of the scheduler's own machine unless the agent runs there; no
    link-local or multicast address. For 0.0.0.0 and :: it is the address that the agent came from. Raises
    InvalidArgumentError ADDRESS_REFUSED, ConfigError TARGET_INSECURE or ADDRESS_INVALID.
    """
    host, port = split(address)
    ip = _ip(host)
    if ip is not None and ip.is_unspecified:
        host, ip = peer, _ip(peer)
    elif ip is None and (not _HOST_NAME.fullmatch(host) or host.lower() in _SCHEMES):
        raise _refused(address, "is not the name of a machine")
    if port == 0 or not host:
        raise _refused(address, "has no port, or its machine is not known")
    name = host.lower().rstrip(".")
    local = ip.is_loopback if ip is not None else name == "localhost" or name.endswith(".localhost")
    if ip is not None and not local and (ip.is_link_local or ip.is_multicast or ip.is_reserved):
        raise _refused(address, "is a link-local, multicast or reserved address")
    if local and not is_loopback(peer):
        raise _refused(address, f"is the scheduler's own machine, but the agent reports from {peer or 'elsewhere'}")
    target = join(host, port)
    check_target(target, tls=False, insecure=insecure)
    return target


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
    """The gRPC target of a unix socket. Raises ConfigError SOCKET_PATH_TOO_LONG or SOCKET_PATH_RELATIVE."""
    if not path.startswith("/"):
        message = f"the socket's path {path!r} must be absolute"
        raise ConfigError("SOCKET_PATH_RELATIVE", message, path=path)
    if len(path.encode()) > MAX_SOCKET_PATH_BYTES:
        message = f"the socket's path is longer than {MAX_SOCKET_PATH_BYTES} bytes; use a shorter state directory"
        raise ConfigError("SOCKET_PATH_TOO_LONG", message, path=path)
    return f"unix:{path}"


def _ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The parsed address, None for a name; an IPv4-mapped IPv6 address becomes the IPv4 address."""
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return None
    return (ip.ipv4_mapped or ip) if isinstance(ip, ipaddress.IPv6Address) else ip


def _refused(address: str, why: str) -> InvalidArgumentError:
    text = f"the registered address {address[:200]!r} {why}; set host in the agent's ingress and grpc configuration"
    return InvalidArgumentError("ADDRESS_REFUSED", text, address=address[:200])
