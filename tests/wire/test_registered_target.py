"""Addresses that a node may register. An intruder on the node controls them, too."""

from __future__ import annotations

import pytest

from agent.core.errors import ConfigError, InvalidArgumentError
from agent.wire.addresses import peer_host, registered_target


@pytest.mark.parametrize(
    ("peer", "host"),
    [
        ("ipv4:10.0.0.7:4711", "10.0.0.7"),
        ("ipv6:%5B2001:db8::7%5D:4711", "2001:db8::7"),
        ("ipv6:[::1]:4711", "::1"),
        ("unix:", "127.0.0.1"),
        ("ipv4:nobody", ""),
        ("", ""),
    ],
)
def test_peer_host(peer: str, host: str) -> None:
    assert peer_host(peer) == host


@pytest.mark.parametrize(
    ("address", "peer", "target"),
    [
        ("127.0.0.1:8610", "127.0.0.1", "127.0.0.1:8610"),
        ("[::1]:8610", "::1", "[::1]:8610"),
        ("10.0.0.7:8610", "10.0.0.7", "10.0.0.7:8610"),
        ("gpu-7.rack.example:8610", "10.0.0.7", "gpu-7.rack.example:8610"),
        ("0.0.0.0:8610", "10.0.0.7", "10.0.0.7:8610"),
        ("[::]:8610", "2001:db8::7", "[2001:db8::7]:8610"),
    ],
)
def test_registered_target(address: str, peer: str, target: str) -> None:
    assert registered_target(address, peer, insecure=True) == target


@pytest.mark.parametrize(
    "address",
    [
        "unix:/run/hibernode/agent.sock",
        "unix:1234",
        "unix-abstract:1234",
        "dns:443",
        "127.0.0.1:8611",
        "127.1.2.3:8611",
        "localhost:8611",
        "LOCALHOST.:8611",
        "[::1]:8611",
        "[::ffff:127.0.0.1]:8611",
        "169.254.169.254:80",
        "224.0.0.1:80",
        "10.0.0.7:0",
        "user@10.0.0.8:80",
        "10.0.0.7",
        "a b:80",
        ":80",
    ],
)
def test_remote_node_cannot_register_the_schedulers_machine(address: str) -> None:
    with pytest.raises((InvalidArgumentError, ConfigError)):
        registered_target(address, "10.0.0.7", insecure=True)


def test_token_is_not_sent_in_the_clear() -> None:
    with pytest.raises(ConfigError) as caught:
        registered_target("10.0.0.7:8610", "10.0.0.7", insecure=False)
    assert caught.value.reason == "TARGET_INSECURE"


def test_unspecified_address_without_a_peer_is_refused() -> None:
    with pytest.raises(InvalidArgumentError):
        registered_target("0.0.0.0:8610", "", insecure=True)
