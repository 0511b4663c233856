"""Emulated drivers for the tests. Their libraries are in the user's cache, built once for the same sources."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from agent.emulated.build import default_cache
from tests.adapters.emulated.harness import CudaProgram, RunningDriver

StartDriver = Callable[..., RunningDriver]


@pytest.fixture(scope="session")
def build_cache() -> Path:
    if not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        pytest.skip("the emulated driver needs a C compiler: apt-get install gcc libc6-dev")
    return default_cache().parents[1]


@pytest.fixture
def start_driver(build_cache: Path, tmp_path: Path) -> Iterator[StartDriver]:
    """Start drivers with the arguments of `up`; several may run, each in its own directory."""
    with ExitStack() as stack:
        count = itertools.count()

        def start(*arguments: str, directory: Path | None = None) -> RunningDriver:
            where = directory or tmp_path / f"driver{next(count)}"
            driver = RunningDriver(where, build_cache, "--gib", "1", *arguments)
            stack.callback(driver.close)
            return driver

        yield start


@pytest.fixture(scope="session")
def shared_driver(build_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDriver]:
    driver = RunningDriver(tmp_path_factory.mktemp("driver") / "dir", build_cache, "--gib", "1")
    yield driver
    driver.close()


@pytest.fixture
def driver(shared_driver: RunningDriver) -> Iterator[RunningDriver]:
    """Two GPUs of 1 GiB under driver 580, shared by all tests that use it; they must not stop it."""
    shared_driver.begin_test()
    yield shared_driver
    shared_driver.end_test()


@pytest.fixture
def tool(driver: RunningDriver) -> CudaProgram:
    return driver.tool()
