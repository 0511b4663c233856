"""Finds the TCP addresses that given processes listen on, in their own network namespaces.

Source: /proc/PID/net/tcp and tcp6 (proc_net_tcp.txt of the kernel), whose lines begin with the listening sockets, and
the links in /proc/PID/fd, which say whose sockets they are. What may not be read, or has ended, is left out.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from agent.adapters.kernel.process_table import PROC

_LISTEN = b"0A"
_TABLE_BYTES = 1 << 20
_MOST_DESCRIPTORS = 65_536
MOST_ADDRESSES = 8


def listening(pids: Collection[int], proc: Path = PROC) -> list[str]:
    """Addresses such as `0.0.0.0:9000` or `[::]:9000`, at most `MOST_ADDRESSES`, by port. Slow: call it outside the
    loop's thread."""
    sockets: dict[str, set[bytes]] = {}
    readers: dict[str, int] = {}
    left = _MOST_DESCRIPTORS
    for pid in sorted(pids):
        with suppress(OSError):
            namespace = os.readlink(proc / str(pid) / "ns/net")
            names = os.listdir(proc / str(pid) / "fd")[:left]
            left -= len(names)
            readers.setdefault(namespace, pid)
            sockets.setdefault(namespace, set()).update(_sockets(proc / str(pid) / "fd", names))
    found: set[tuple[int, str]] = set()
    for namespace, inodes in sockets.items():
        for table in ("tcp", "tcp6"):
            with suppress(OSError):
                found |= _listeners(proc / str(readers[namespace]) / "net" / table, inodes)
    return [f"{host}:{port}" for port, host in sorted(found)[:MOST_ADDRESSES]]


def _sockets(folder: Path, names: list[str]) -> set[bytes]:
    """The inodes of the sockets among the descriptors."""
    inodes: set[bytes] = set()
    for name in names:
        with suppress(OSError):
            kind, _, inode = os.readlink(folder / name).partition(":")
            if kind == "socket":
                inodes.add(inode.strip("[]").encode())
    return inodes


def _listeners(table: Path, inodes: set[bytes]) -> set[tuple[int, str]]:
    with table.open("rb", buffering=0) as file:
        lines = _read(file.fileno()).splitlines()[1:]
    found: set[tuple[int, str]] = set()
    for line in lines:
        fields = line.split()
        if len(fields) > 9 and fields[3] == _LISTEN and fields[9] in inodes:
            address, _, port = fields[1].partition(b":")
            found.add((int(port, 16), _host(bytes.fromhex(address.decode()))))
    return found


def _read(descriptor: int) -> bytes:
    """The file's beginning; /proc gives a page at a time."""
    parts, size = [], 0
    while size < _TABLE_BYTES and (part := os.read(descriptor, 1 << 16)):
        parts.append(part)
        size += len(part)
    return b"".join(parts)


def _host(address: bytes) -> str:
    """The kernel prints 32-bit words in the host's byte order, which is little-endian on every supported machine."""
    words = b"".join(address[at : at + 4][::-1] for at in range(0, len(address), 4))
    parsed = ipaddress.ip_address(words)
    return f"[{parsed}]" if parsed.version == 6 else str(parsed)
