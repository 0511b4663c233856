"""Tests the gateway's socket, passed as systemd does: as descriptor 3, with three variables, to another process."""

from __future__ import annotations

import array
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.adapters.daemon.socket_activation import open_listener

HOST = "127.0.0.1"
NEXT_DAEMON = """\
import os, sys
os.environ["LISTEN_PID"] = str(os.getpid())
from agent.adapters.daemon.socket_activation import open_listener
listener = open_listener("gateway", "127.0.0.1", int(sys.argv[1]), 5)
print(listener.getsockname()[1], os.get_inheritable(3), flush=True)
listener.settimeout(5)
listener.accept()[0].sendall(b"from the next one")
"""


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The receiving end of notifications."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "notify"))
        receiver.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield receiver


def free_port() -> int:
    with socket.create_server((HOST, 0)) as probe:
        return int(probe.getsockname()[1])


def stored(systemd: socket.socket) -> tuple[bytes, int]:
    """The message and the descriptor sent with it."""
    message, ancillary, _, _ = systemd.recvmsg(1024, socket.CMSG_SPACE(4))
    (_, _, data), *_ = ancillary
    return message, array.array("i", data)[0]


def test_connection_between_two_daemons_is_served_by_the_second(systemd: socket.socket) -> None:
    port = free_port()
    first = open_listener("gateway", HOST, port, 5)
    assert first is not None
    message, kept = stored(systemd)
    assert message == b"FDSTORE=1\nFDNAME=gateway"
    first.close()
    with socket.create_connection((HOST, port), timeout=5) as client:
        environment = {**os.environ, "LISTEN_FDS": "1", "LISTEN_FDNAMES": "gateway"}

        def hand_over() -> None:
            os.dup2(kept, 3)

        second = subprocess.run(
            [sys.executable, "-c", NEXT_DAEMON, str(port)],
            env=environment,
            preexec_fn=hand_over,
            pass_fds=[3],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert second.returncode == 0, second.stderr
        assert second.stdout.split() == [str(port), "False"]
        assert client.recv(64) == b"from the next one"
    os.close(kept)


@pytest.mark.parametrize(("host", "port"), [(HOST, 0), ("localhost", 8600)])
def test_variable_address_is_not_kept(systemd: socket.socket, host: str, port: int) -> None:
    assert open_listener("gateway", host, port, 5) is None


STANDBY = """\
import os
os.environ["LISTEN_PID"] = str(os.getpid())
from agent.adapters.daemon.socket_activation import open_listener, release
release("gateway")
print(open_listener("gateway", "127.0.0.1", 0, 5))
"""


def test_standby_releases_the_kept_socket(systemd: socket.socket) -> None:
    """An open socket that nothing serves would hang clients of the active scheduler."""
    with socket.create_server((HOST, 0)) as left:
        environment = {**os.environ, "LISTEN_FDS": "1", "LISTEN_FDNAMES": "gateway"}
        address, descriptor = left.getsockname(), left.fileno()

        def hand_over() -> None:
            os.dup2(descriptor, 3)

        done = subprocess.run(
            [sys.executable, "-c", STANDBY], env=environment, preexec_fn=hand_over, pass_fds=[3],
            capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
    assert (done.returncode, done.stdout.strip()) == (0, "None"), done.stderr
    assert systemd.recv(1024) == b"FDSTOREREMOVE=1\nFDNAME=gateway"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, timeout=5)


def test_without_systemd_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert open_listener("gateway", HOST, free_port(), 5) is None


def test_a_port_in_use_is_an_error(systemd: socket.socket) -> None:
    with socket.create_server((HOST, 0)) as other, pytest.raises(OSError, match="in use"):
        open_listener("gateway", HOST, other.getsockname()[1], 5)
