"""Tests systemd's notification socket with a socket of the test in its place."""

from __future__ import annotations

import asyncio
import socket
import time
from pathlib import Path

import pytest

from agent.adapters.daemon.sd_notify import notify, watchdog_interval_s
from agent.daemons.process import feed_watchdog


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_notifications_arrive(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = str(tmp_path / "notify") if kind == "path" else f"@hibernode-test-{tmp_path.name}-{id(tmp_path)}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(name.replace("@", "\0", 1) if kind == "abstract" else name)
        systemd.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        assert notify("READY=1")
        assert systemd.recv(64) == b"READY=1"


def test_without_systemd_nothing_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    assert not notify("READY=1")


@pytest.mark.parametrize(("usec", "interval"), [("30000000", 15.0), ("", None), ("0", None), ("soon", None)])
def test_the_watchdog_is_fed_twice_as_often_as_it_asks(
    usec: str, interval: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", usec)
    assert watchdog_interval_s() == interval


async def test_only_a_running_loop_feeds_the_watchdog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "20000")
        feeding = asyncio.create_task(feed_watchdog())
        async with asyncio.timeout(5):
            for _ in range(3):
                assert await asyncio.get_running_loop().sock_recv(systemd, 64) == b"WATCHDOG=1"
        time.sleep(0.1)  # noqa: ASYNC251 - stuck, for five times as long as systemd would wait
        with pytest.raises(BlockingIOError):
            systemd.recv(64)
        feeding.cancel()
        await asyncio.gather(feeding, return_exceptions=True)
