"""How the tests are shared among several workers (pytest-xdist), where pytest is asked for some (`-n 2`).

A file goes to one worker, slow rooms first, so that no worker ends with minutes of work while the others are idle.
Tests share a host with those of the other workers. Most are apart from each other by their folders, ports, drivers and
cgroups. Those marked `alone` (what they do is seen by the whole host) or `real_time` (they measure) run while no other
worker runs a test; files that use one and the same thing of the host go to the same worker.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent
WORKER = "PYTEST_XDIST_WORKER"  # set in each worker's process

SLOW_FIRST = (
    "engines",
    "booted",
    "e2e",
    "quality",
    "faults",
    "cli/test_demo.py",
    "scheduler",
    "contract",
    "adapters",
    "cli",
)
"""Rooms and files that take longest by the clock; all others follow."""

TOGETHER = {
    "tests/engines/": "engines",  # one Docker and one Podman, which a worker's process starts for itself
    "tests/booted/": "booted",  # one booted systemd for all
    "tests/cli/doctor/test_selftest.py": "selftest",  # one slice of cgroups for all selftests of a host
    "tests/selftest/test_target_process.py": "selftest",
}
"""Files, and folders (`/` at the end)."""


def _rank(path: str) -> int:
    """The place of the file among those that are begun first."""
    below = path.removeprefix("tests/")
    return next((n for n, first in enumerate(SLOW_FIRST) if below == first or below.startswith(f"{first}/")), 99)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Whole files, in the order in which they were collected."""
    from xdist.scheduler import LoadScopeScheduling

    def scope(nodeid: str) -> str:
        path = nodeid.partition("::")[0]
        return TOGETHER.get(path) or TOGETHER.get(f"{path.rpartition('/')[0]}/") or path

    config.option.loadscopereorder = False
    scheduler = LoadScopeScheduling(config, log)
    scheduler._split_scope = scope
    return scheduler


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if WORKER in os.environ:
        items.sort(key=lambda item: _rank(item.nodeid.partition("::")[0]))


def pytest_sessionfinish() -> None:
    """Engines and their containers go with the tests that started them; those of a worker that crashed go here."""
    if WORKER not in os.environ:
        from tests.engines.engines import sweep

        sweep()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Fixtures included; waiting for the others does not count for the test's timeout."""
    if WORKER not in os.environ:
        return (yield)
    alone = any(item.get_closest_marker(name) for name in ("alone", "real_time"))
    with _one_room(alone):
        return (yield)


@contextmanager
def _one_room(alone: bool) -> Iterator[None]:
    """Everybody may be in the room at once, or one alone. Each comes through the door one by one, and who waits to be
    alone waits in the door: nobody else comes in before. Locks go with the worker's process; each test has a timeout,
    so nobody waits for ever."""
    with ExitStack() as stack:
        door, room = (stack.enter_context((TESTS / name).open("rb")) for name in ("__init__.py", "workers.py"))
        with _locked(door, fcntl.LOCK_EX):
            stack.enter_context(_locked(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH))
        yield


@contextmanager
def _locked(file: BufferedReader, how: int) -> Iterator[None]:
    """Given back by a call: a child that a test has forked may still hold the descriptor."""
    fcntl.flock(file, how)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)
