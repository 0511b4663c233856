"""Addresses: parsing, and which need TLS."""

from __future__ import annotations

import pytest

from agent.core.errors import ConfigError
from agent.wire.addresses import check_bind, check_target, is_loopback, join, split, unix_target
from agent.wire.clients import DaemonChannel


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost"])
def test_loopback_needs_no_tls(host: str) -> None:
    assert is_loopback(host)
    check_bind(host, tls=False, insecure=False)


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "", "10.0.0.7", "gpu-host", "localhost.example.com", "127.0.0.1.nip.io"]
)
def test_other_addresses_need_tls_or_insecure(host: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_bind(host, tls=False, insecure=False)
    assert refused.value.reason == "BIND_INSECURE"
    assert "insecure: true" in refused.value.message
    check_bind(host, tls=True, insecure=False)
    check_bind(host, tls=False, insecure=True)


def test_a_token_is_not_sent_to_another_machine_in_the_clear() -> None:
    check_target("unix:/run/hibernode/agent.sock", tls=False, insecure=False)
    check_target("[::1]:8611", tls=False, insecure=False)
    check_target("gpu-host:8611", tls=False, insecure=True)
    with pytest.raises(ConfigError) as refused:
        DaemonChannel("gpu-host:8611", token="operator-token-0123456789")
    assert refused.value.reason == "TARGET_INSECURE"
    assert "operator-token" not in str(refused.value)


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 8611), ("::1", 0), ("gpu-host", 65535)])
def test_split_reverses_join(host: str, port: int) -> None:
    assert split(join(host, port)) == (host, port)


@pytest.mark.parametrize(
    "address", ["", "8611", ":8611", "host:", "host:port", "host:65536", "host:-1", "::1:8611", "[]:1"]
)
def test_invalid_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError) as refused:
        split(address)
    assert refused.value.reason == "ADDRESS_INVALID"


def test_a_socket_path_fits_the_kernel_or_is_refused() -> None:
    assert unix_target("/run/a.sock") == "unix:/run/a.sock"
    assert len(unix_target("/" + "x" * 106)) == 112
    for path in ("/" + "x" * 107, "run/a.sock", ""):
        with pytest.raises(ConfigError):
            unix_target(path)
