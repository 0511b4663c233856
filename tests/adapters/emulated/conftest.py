"""Emulated drivers for the tests: the libraries are built once a session, in a folder that pytest removes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.adapters.emulated.harness import CudaProgram, RunningDriver

StartDriver = Callable[..., RunningDriver]


@pytest.fixture(scope="session")
def build_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        pytest.skip("the emulated driver needs a C compiler: apt-get install gcc libc6-dev")
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def start_driver(build_cache: Path, tmp_path: Path) -> Iterator[StartDriver]:
    """Start a driver with the arguments of `up`; several may run beside one another, each in its own directory."""
    running: list[RunningDriver] = []

    def start(*arguments: str, directory: Path | None = None) -> RunningDriver:
        driver = RunningDriver(directory or tmp_path / f"driver{len(running)}", build_cache, "--gib", "1", *arguments)
        running.append(driver)
        return driver

    yield start
    for driver in running:
        driver.close()


@pytest.fixture
def driver(start_driver: StartDriver) -> RunningDriver:
    """Two GPUs of 1 GiB under driver 580."""
    return start_driver()


@pytest.fixture
def tool(driver: RunningDriver) -> CudaProgram:
    return driver.tool()
