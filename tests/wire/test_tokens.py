"""Tokens and token files: their principals, and that no output shows them."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from agent.adapters.daemon.token_file import ensure_token, read_token
from agent.core.errors import ConfigError, UnauthenticatedError
from agent.wire.tokens import Principal, Role, TokenTable, bearer, caller, node_tokens, usable_tokens

OLGA = Principal("olga", Role.OPERATOR)
TOKEN = "operator-token-0123456789"


def test_each_token_has_one_principal() -> None:
    table = TokenTable(
        [(TOKEN, OLGA), *node_tokens({"node-1": "first-node-token-123", "node-2": "second-node-token-1"})]
    )
    assert table.principal_of(TOKEN) == OLGA
    assert table.principal_of("second-node-token-1") == Principal("node-2", Role.NODE)
    for guess in ("", TOKEN[:-1], TOKEN + "x", TOKEN.upper(), "ü" * 20):
        assert table.principal_of(guess) is None


def test_empty_table_admits_no_caller() -> None:
    with pytest.raises(UnauthenticatedError):
        TokenTable([]).authenticate(bearer(TOKEN))


@pytest.mark.parametrize("token", ["", "short"])
def test_short_token_is_refused(token: str) -> None:
    with pytest.raises(ConfigError) as refused:
        TokenTable([(token, OLGA)])
    assert refused.value.reason == "TOKEN_TOO_SHORT"


def test_two_nodes_cannot_share_a_token() -> None:
    with pytest.raises(ConfigError) as refused:
        TokenTable(node_tokens({"node-1": TOKEN, "node-2": TOKEN}))
    assert refused.value.reason == "TOKEN_NOT_UNIQUE"
    assert TOKEN not in str(refused.value)


def test_a_table_never_shows_its_tokens() -> None:
    table = TokenTable([(TOKEN, OLGA)])
    assert TOKEN not in repr(table) + str(vars(table))


def test_no_caller_outside_of_a_call() -> None:
    with pytest.raises(UnauthenticatedError):
        caller()


# ---- files ----------------------------------------------------------------------------------------------------


def test_first_start_creates_the_file_and_the_next_keeps_it(tmp_path: Path) -> None:
    path = tmp_path / "token"
    previous = os.umask(0)
    try:
        token = ensure_token(path)
    finally:
        os.umask(previous)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(token) >= 43  # 256 bits
    assert ensure_token(path) == read_token(path) == token
    assert list(tmp_path.iterdir()) == [path]


def test_concurrent_starts_agree_on_one_token(tmp_path: Path) -> None:
    path = tmp_path / "token"
    with ThreadPoolExecutor(8) as starts:
        tokens = set(starts.map(lambda _: ensure_token(path), range(32)))
    assert len(tokens) == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644])
def test_a_file_open_to_others_is_refused_with_the_fix(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "token"
    token = ensure_token(path)
    path.chmod(mode)
    for use in (read_token, ensure_token):
        with pytest.raises(ConfigError) as refused:
            use(path)
        assert refused.value.reason == "TOKEN_FILE_TOO_OPEN"
        assert "chmod 600" in refused.value.message
        assert token not in str(refused.value)


@pytest.mark.parametrize("content", [b"", b"\n", b"two tokens", b"t\xc3\xb6ken-of-sixteen-or-more", b"x" * 5000])
def test_a_file_that_holds_no_token_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "token"
    path.touch(0o600)
    path.write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        read_token(path)
    assert refused.value.reason == "TOKEN_FILE_INVALID"


def test_missing_file_or_no_regular_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as missing:
        read_token(tmp_path / "nothing")
    assert missing.value.reason == "TOKEN_FILE_UNREADABLE"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe, 0o600)  # must not hang
    with pytest.raises(ConfigError) as wrong:
        read_token(pipe)
    assert wrong.value.reason == "TOKEN_FILE_INVALID"
    with pytest.raises(ConfigError) as unwritable:
        ensure_token(tmp_path / "no-such-folder" / "token")
    assert unwritable.value.reason == "TOKEN_FILE_UNWRITABLE"


def test_a_bad_token_keeps_only_its_own_node_out() -> None:
    tokens = {
        "good": "a-good-token-of-a-node",
        "short": "short",
        "operator": TOKEN,
        "twin-1": "the-same-token-twice-1",
        "twin-2": "the-same-token-twice-1",
    }
    good, wrong = usable_tokens(tokens, TOKEN)
    assert good == {"good": "a-good-token-of-a-node"}
    assert [one.reason for one in wrong] == ["TOKEN_TOO_SHORT", *["TOKEN_NOT_UNIQUE"] * 3]
    assert not any(token in str(one) for one in wrong for token in tokens.values() if token != "short")
    TokenTable([(TOKEN, OLGA), *node_tokens(good)])
