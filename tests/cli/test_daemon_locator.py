"""Finding daemons and tokens, and the errors without them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from agent.cli.daemon_locator import DaemonAddress, find_daemon, find_gateway, read_token
from agent.cli.options import CliOptions
from agent.core.errors import ConfigError, InvalidArgumentError, PermissionDeniedError, UnavailableError
from tests.cli.conftest import Run
from tests.fakes.daemon import TOKEN


def options(home: Path, **more: str) -> CliOptions:
    addresses = {"agent": "", "scheduler": "", "gateway": "", "token_file": "", **more}
    return CliOptions(home=home, insecure=False, output="table", **addresses)


@pytest.fixture
def daemons(tmp_path: Path) -> Path:
    """A home of an agent without a socket, and of a scheduler."""
    for daemon, found in (("agent", {"grpc": "127.0.0.1:8611"}), ("scheduler", {"gateway": "http://127.0.0.1:8600/"})):
        (tmp_path / daemon).mkdir()
        (tmp_path / daemon / "endpoints.json").write_text(json.dumps(found))
        (tmp_path / daemon / "token").write_text("token-of-the-home-1234\n")
    return tmp_path


def test_no_daemon_has_been_started(run: Run) -> None:
    done = run("ps")
    assert (done.code, done.out) == (5, "")
    assert "no agent has been started in" in done.err
    assert "--home (HIBERNODE_HOME) or --agent ADDRESS (AGENT_NOT_RUNNING)" in done.err
    assert "(SCHEDULER_NOT_RUNNING)" in run("functions").err


def test_daemon_does_not_answer(run: Run) -> None:
    done = run("ps", "--agent", "127.0.0.1:1")
    assert done.code == 5
    assert "no agent answers at 127.0.0.1:1; start it with `hibernode agent --config FILE`" in done.err


def test_home_option_before_or_after_the_command(run: Run, home: Path) -> None:
    assert run("--home", home, "ps", "-q").code == 0
    assert run("ps", "-q", "--home", home).code == 0
    assert run("--home", "/nowhere", "ps", "-q", "--home", home).code == 0
    assert run("--output", "json", "--home", home, "ps").json["instances"]


def test_the_socket_needs_no_token(home: Path) -> None:
    assert find_daemon("agent", options(home)) == DaemonAddress(f"unix:{home}/agent.sock", "")


def test_without_a_socket_the_token_is_sent(daemons: Path) -> None:
    assert find_daemon("agent", options(daemons)) == DaemonAddress("127.0.0.1:8611", "token-of-the-home-1234")


def test_over_tcp_with_the_token(run: Run, home: Path) -> None:
    address = json.loads((home / "agent" / "endpoints.json").read_text())["grpc"]
    done = run("ps", "-q", "--agent", address, "--token-file", home / "agent" / "token")
    assert (done.code, done.out.split()[0]) == (0, "i-run")
    done = run("ps", "--agent", address)
    assert done.code == 4
    assert "requires a token; name its file with --token-file (TOKEN_MISSING)" in done.err


def test_a_wrong_token_is_exit_4_and_is_not_shown(run: Run, home: Path, tmp_path: Path) -> None:
    address = json.loads((home / "agent" / "endpoints.json").read_text())["grpc"]
    (tmp_path / "token").write_text("not-the-right-token-at-all")
    done = run("ps", "--agent", address, "--token-file", tmp_path / "token")
    assert done.code == 4
    assert "(TOKEN_UNKNOWN)" in done.err
    assert "not-the-right" not in done.err


def test_token_of_the_home_is_not_sent_to_other_machines(daemons: Path) -> None:
    """A host named without a token file must not receive the home's token."""
    assert find_daemon("agent", options(daemons, agent="127.0.0.1:9")).token == "token-of-the-home-1234"
    assert find_daemon("agent", options(daemons, agent="gpu-host-2:8611")).token == ""


def test_token_is_not_sent_unencrypted_without_the_option(run: Run, home: Path) -> None:
    done = run("ps", "--agent", "192.0.2.1:8611", "--token-file", home / "agent" / "token")
    assert done.code == 2
    assert "(TARGET_INSECURE)" in done.err
    assert "or --insecure if the network itself is trusted" in done.err
    assert "insecure: true" not in done.err, "that is for the daemons"
    assert "TLS" not in done.err, "there is none"


def test_address_does_not_show_its_token() -> None:
    assert TOKEN not in repr(DaemonAddress("127.0.0.1:1", TOKEN))


def test_the_gateway_is_an_address(daemons: Path) -> None:
    assert find_gateway(options(daemons)) == "127.0.0.1:8600"
    assert find_gateway(options(daemons, gateway="http://gw.example:80/")) == "gw.example:80"
    shutil.rmtree(daemons / "scheduler")
    with pytest.raises(UnavailableError, match="no scheduler has been started"):
        find_gateway(options(daemons))


@pytest.mark.parametrize("content", ["", "[]", "{", "null"])
def test_invalid_endpoints_file(daemons: Path, content: str) -> None:
    (daemons / "agent" / "endpoints.json").write_text(content)
    with pytest.raises(ConfigError, match="restart the agent"):
        find_daemon("agent", options(daemons))


@pytest.mark.parametrize("content", [b"", b"two words", b"\xff\xff", b"line\nline"])
def test_a_token_file_without_a_token(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "token").write_bytes(content)
    with pytest.raises(InvalidArgumentError, match="does not contain a single token"):
        read_token(tmp_path / "token")


@pytest.mark.parametrize(
    ("file", "problem"),
    [("endpoints.json", "use sudo, or name --agent ADDRESS"), ("token", "use sudo, or join the group hibernode")],
)
def test_unreadable_file_names_the_fix(daemons: Path, monkeypatch: pytest.MonkeyPatch, file: str, problem: str) -> None:
    """Simulates the permission error, since the tests run as root."""
    real = Path.open

    def refuse(path: Path, mode: str = "r") -> object:
        if path.name == file:
            raise PermissionError(13, "Permission denied")
        return real(path, mode)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(PermissionDeniedError, match=problem):
        find_daemon("agent", options(daemons))
