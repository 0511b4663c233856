"""What holds for every test of the project."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.fakes import postgresql

# Started in the background by a shell, pytest ignores Ctrl-C, and so would every program that a test interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# As the scripts and units do: grpc's fork handlers only print warnings into the output of tests that start programs.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

# A busy machine makes an example slow, not wrong: pytest-timeout bounds the whole test. In CI the examples are the
# same in every run, so that a failure there can be had here; at home they are new each time and find more.
settings.register_profile("home", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("home"), derandomize=True, database=None, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "home")

# `workers`: what holds when several run at once. The fixture `nvidia`: one emulated driver for all who ask for it.
pytest_plugins = ("tests.workers", "tests.fakes.emulated_driver")


@pytest.fixture(scope="session")
def postgres() -> Iterator[postgresql.PostgreSQL]:
    """A server for all tests of this process."""
    if why := postgresql.missing():
        pytest.skip(why)
    server = postgresql.PostgreSQL()
    try:
        yield server
    finally:
        server.close()
