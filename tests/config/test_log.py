"""Logs: one bounded line per event; secrets are masked at any depth; stdout stays clean."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
import structlog

from agent.log import MASK, configure, get_logger, is_secret_key


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """JSON logs of level info into memory; afterwards everything is as it was."""
    before, handlers, level = structlog.get_config(), logging.getLogger().handlers[:], logging.getLogger().level
    out = io.StringIO()
    configure("info", "json", stream=out)
    yield out
    structlog.configure(**before)
    logging.getLogger().handlers[:] = handlers
    logging.getLogger().setLevel(level)


def line(stream: io.StringIO) -> dict[str, object]:
    (only,) = stream.getvalue().splitlines()
    parsed = json.loads(only)
    assert isinstance(parsed, dict)
    return parsed


def test_an_event_is_one_line_of_json_with_utc_time(stream: io.StringIO) -> None:
    get_logger(node="gpu-1").info("instance.frozen", uid="i-1", driver_ns=7)
    said = line(stream)
    moment = datetime.fromisoformat(str(said.pop("timestamp")))
    assert moment.tzinfo == UTC
    assert said == {"event": "instance.frozen", "level": "info", "node": "gpu-1", "uid": "i-1", "driver_ns": 7}


def test_lines_below_the_level_are_not_made(stream: io.StringIO) -> None:
    get_logger().debug("gate.granted")
    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    "key",
    ["token", "access_token", "Authorization", "password", "passwd", "x-api-key"]
    + ["environment", "environ", "env", "SECRET", "cookie", "private_key"],
)
def test_secrets_are_masked_by_their_key_at_any_depth(key: str, stream: io.StringIO) -> None:
    get_logger().info("deploy.taken", **{key: "hunter2"}, spec={"list": [{key: {"a": "hunter2"}}]})
    assert "hunter2" not in stream.getvalue()
    assert line(stream)[key] == MASK


@pytest.mark.parametrize("key", ["token_file", "token_path", "uid", "event", "secret_count", "envelope"])
def test_harmless_keys_are_shown(key: str) -> None:
    assert not is_secret_key(key)


def test_values_are_bounded(stream: io.StringIO) -> None:
    deep: dict[str, object] = {}
    deep["self"] = deep
    get_logger().info("x.y", text="a" * 100_000, items=list(range(10_000)), body=b"raw" * 9, deep=deep)
    said = line(stream)
    assert len(stream.getvalue()) < 5_000
    assert str(said["text"]).endswith("... (100000 characters)")
    assert said["body"] == "<27 bytes>"
    assert "... (10000 items)" in str(said["items"])


def test_a_traceback_is_kept_and_bounded(stream: io.StringIO) -> None:
    try:
        raise RuntimeError("x" * 100_000 + "the end")
    except RuntimeError:
        get_logger().exception("worker.died")
    said = line(stream)
    assert str(said["exception"]).endswith("the end")
    assert len(stream.getvalue()) < 20_000


def test_messages_of_libraries_have_the_same_form(stream: io.StringIO) -> None:
    logging.getLogger("asyncio").warning("slow %s", "callback")
    logging.getLogger("asyncio").info("not this")
    assert line(stream)["event"] == "slow callback"


def test_configuring_again_does_not_double_lines(stream: io.StringIO) -> None:
    configure("info", "json", stream=stream)
    logging.getLogger("asyncio").warning("once")
    assert line(stream)["event"] == "once"


@pytest.mark.parametrize("setup", ["", "configure('info', 'json');", "configure('info', 'console');"])
def test_stdout_stays_clean(setup: str) -> None:
    program = f"from agent.log import *; {setup} get_logger().info('a.b', token='hunter2', n=1)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True, env={"NO_COLOR": "1"}
    )
    assert done.stdout == ""
    assert "a.b" in done.stderr
    assert "hunter2" not in done.stderr


def test_console_values_cannot_steer_the_terminal_or_forge_a_line(stream: io.StringIO) -> None:
    configure("info", "console", stream=stream)
    said = "Logs: \x1b[2J\n2026-01-01 [info] node.ready é"
    get_logger().info("instance.failed", message=said, title="\x1b]0;owned\x07\x9b2J")
    (only,) = stream.getvalue().splitlines()
    assert "Logs: ?[2J\\n2026-01-01 [info] node.ready é" in only
    assert "title=?]0;owned??2J" in only
    assert only.isprintable()
