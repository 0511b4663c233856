"""The listening sockets of given processes, by the kernel's own tables."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from agent.adapters.kernel.listening import MOST_ADDRESSES, listening

SERVE = """
import socket, subprocess
subprocess.run(["ip", "link", "set", "lo", "up"])
server = socket.create_server(("", 9000))
print("ready", flush=True)
input()
"""


def test_addresses_of_this_process_in_order_of_their_ports() -> None:
    before = set(listening([os.getpid()]))
    with (
        socket.create_server(("127.0.0.1", 0)) as four,
        socket.create_server(("::1", 0), family=socket.AF_INET6) as six,
    ):
        expected = {f"127.0.0.1:{four.getsockname()[1]}", f"[::1]:{six.getsockname()[1]}"}
        client = socket.create_connection(four.getsockname())
        assert set(listening([os.getpid()])) - before == expected, "a connection does not listen"
        client.close()
    assert set(listening([os.getpid()])) == before


def test_no_address_of_another_process_and_a_bounded_number() -> None:
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(MOST_ADDRESSES + 1)]
    assert len(listening([os.getpid()])) == MOST_ADDRESSES
    assert listening([1 << 22]) == []
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert listening([other.pid]) == []
    other.communicate(b"\n")
    for server in servers:
        server.close()


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="needs root, to make a network namespace")
def test_a_process_in_a_network_of_its_own() -> None:
    words = ["unshare", "--net", sys.executable, "-c", SERVE]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as inside:
        assert inside.stdout is not None
        assert inside.stdout.readline() == b"ready\n"
        assert listening([inside.pid]) == ["0.0.0.0:9000"]
        inside.communicate(b"\n")


def test_damaged_tables_and_missing_processes_are_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "7"
    (folder / "fd").mkdir(parents=True)
    (folder / "net").mkdir()
    (folder / "ns").mkdir()
    os.symlink("net:[1]", folder / "ns/net")
    os.symlink("socket:[42]", folder / "fd/3")
    os.symlink("/dev/null", folder / "fd/4")
    line = "   0: 0100007F:2328 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 42 1\n"
    (folder / "net/tcp").write_text("  sl  local_address\n   cut\n" + line + line.replace(" 42 ", " 43 "))
    assert listening([7, 8], tmp_path) == ["127.0.0.1:9000"]
