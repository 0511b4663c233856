"""A listening socket that outlives its daemon: systemd stores it (sd_notify(3), FDSTORE) and passes it to the next one.

Between two daemons, connections wait in the kernel instead of being refused, so that a restart or upgrade is only a
pause for clients. The unit needs `FileDescriptorStoreMax=`; without it or without systemd nothing is stored. A stop,
unlike a restart, closes the socket.
"""

from __future__ import annotations

import array
import ipaddress
import os
import socket
from contextlib import suppress

from agent.adapters.daemon.sd_notify import notify, notify_socket

FIRST_PASSED = 3  # SD_LISTEN_FDS_START


def open_listener(name: str, host: str, port: int, backlog: int) -> socket.socket | None:
    """The socket that an earlier daemon listened on at this address, or a new one that systemd is asked to store.

    None if it can't be stored: no notification socket, port 0 (any), or a host name, which may be several addresses.
    Raises OSError if a new one can't be bound.
    """
    inherited = _inherited(name)
    family = _family(host) if port and os.environ.get("NOTIFY_SOCKET") else None
    if inherited is not None:
        known_host, known_port = inherited.getsockname()[:2]
        if family is not None and (ipaddress.ip_address(known_host), known_port) == (ipaddress.ip_address(host), port):
            return inherited
        inherited.close()  # the configuration has changed
        notify(f"FDSTOREREMOVE=1\nFDNAME={name}")
    if family is None:
        return None
    listener = socket.create_server((host, port), family=family, backlog=backlog)
    with suppress(OSError):  # serves without being stored
        _store(name, listener)
    return listener


def release(name: str) -> None:
    """Close the socket of an earlier daemon. For a daemon that will not listen: connections would wait for ever."""
    inherited = _inherited(name)
    if inherited is not None:
        inherited.close()
        notify(f"FDSTOREREMOVE=1\nFDNAME={name}")


def _family(host: str) -> socket.AddressFamily | None:
    try:
        version = ipaddress.ip_address(host).version
    except ValueError:
        return None
    return socket.AF_INET6 if version == 6 else socket.AF_INET


def _inherited(name: str) -> socket.socket | None:
    """The socket that systemd passed under this name (sd_listen_fds_with_names(3)), now closed on exec. Works once."""
    count = os.environ.pop("LISTEN_FDS", "")
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or not count.isdecimal():
        return None
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    found = None
    for number in range(int(count)):
        descriptor = FIRST_PASSED + number
        os.set_inheritable(descriptor, False)
        if found is None and number < len(names) and names[number] == name:
            found = socket.socket(fileno=descriptor)
    return found


def _store(name: str, listener: socket.socket) -> None:
    with notify_socket() as channel:
        descriptors = array.array("i", [listener.fileno()])
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors.tobytes())]
        channel.sendmsg([f"FDSTORE=1\nFDNAME={name}".encode()], ancillary)
