"""The emulated NVIDIA driver for tests: one process, the environment under which programs see it, and CUDA programs.

Everything runs in processes of its own with `EmulatedNvidia.environment`, so the code under test has no branch for it:
daemons, targets and driver workers inherit it. A test that needs NVML in its own process calls `see_nvml_here()`, which
loads the library by its full path first: the loader then uses it for its soname. That works for one driver per process.

No test may make a checkpoint call on a process in a frozen cgroup: it would hang on hardware. Every running driver is
checked after each test; a test that provokes such calls takes them itself (`control.take_frozen_calls()`).
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from agent.adapters.kernel import cgroup, process_table
from agent.core.types import Handle
from agent.emulated.control import EmulatedDriver
from agent.emulated.env import SOCKET_VARIABLE, exports
from tests.fakes.gpu_locks import forget_locks

START_DEADLINE_S = 60.0  # the first start on a machine compiles three libraries
ANSWER_DEADLINE_S = 20.0
TARGET = Path(__file__).with_name("cuda_target.py")


@dataclass(frozen=True)
class EmulatedNvidia:
    """A running driver: its directory, the whole environment of programs that see it, and its control client."""

    directory: Path
    environment: Mapping[str, str]
    control: EmulatedDriver

    def see_nvml_here(self) -> None:
        """Make this process load `libnvidia-ml.so.1` of this driver."""
        os.environ[SOCKET_VARIABLE] = self.environment[SOCKET_VARIABLE]
        ctypes.CDLL(str(self.directory / "lib" / "libnvidia-ml.so.1"), mode=ctypes.RTLD_GLOBAL)


_running: list[EmulatedNvidia] = []


def assert_no_frozen_calls(control: EmulatedDriver) -> None:
    """Fails with the operations and pids, if calls were made on frozen processes that no test has taken."""
    calls = [f"{call.op} of {call.pid}" for call in control.take_frozen_calls()]
    assert not calls, f"calls on a process in a frozen cgroup, which hang on hardware: {', '.join(calls)}"


@contextmanager
def emulated_nvidia(*arguments: str) -> Iterator[EmulatedNvidia]:
    """Run a driver with further arguments of `up` until the block ends."""
    with tempfile.TemporaryDirectory(prefix="hibernode-driver-") as folder:
        directory = Path(folder)
        with (directory / "log").open("wb") as log:
            command = [sys.executable, "-m", "agent.cli.main", "emulated", "up", "--dir", folder, *arguments]
            process = subprocess.Popen(command, stdout=log, stderr=log)
        uuids: list[str] = []
        try:
            wait_for_file(directory / "ready", process, directory / "log")
            with EmulatedDriver(directory) as control:
                uuids = [device.uuid for device in control.devices()]
                driver = EmulatedNvidia(directory, {**os.environ, **exports(directory)}, control)
                _running.append(driver)
                try:
                    yield driver
                finally:
                    _running.remove(driver)
                assert_no_frozen_calls(control)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(ANSWER_DEADLINE_S)
            forget_locks(uuids)


@pytest.fixture(scope="session")
def nvidia() -> Iterator[EmulatedNvidia]:
    """The driver that a test process shares: 580, two GPUs of 1 GiB, as fast as memory."""
    with emulated_nvidia("--gpus", "2", "--gib", "1") as driver:
        yield driver


@pytest.fixture(autouse=True)
def nothing_left_in_the_driver() -> Iterator[None]:
    """After each test: no fault is left for the next one, no program finds the driver of a test before by its
    environment, and no call was made on a frozen process."""
    seen = os.environ.get(SOCKET_VARIABLE)
    yield
    if seen is None:
        os.environ.pop(SOCKET_VARIABLE, None)
    else:
        os.environ[SOCKET_VARIABLE] = seen
    for driver in _running:
        if (driver.directory / "ready").exists():  # a test may have ended it on purpose
            driver.control.clear_faults()
            assert_no_frozen_calls(driver.control)


def wait_for_file(path: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_DEADLINE_S
    while not path.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(f"the emulated driver is not ready: {log.read_text()}")
        time.sleep(0.01)


class CudaTarget:
    """A running `cuda_target.py`. With `cgroup_path` it lives in that cgroup from its first instruction."""

    def __init__(self, environment: Mapping[str, str], cgroup_path: Path | None = None) -> None:
        procs = str(cgroup_path / "cgroup.procs") if cgroup_path else "/dev/null"
        enter = f'echo $$ > {procs}; exec "$0" "$@"'
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", enter, sys.executable, str(TARGET)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=dict(environment),
            text=True,
        )
        self.pid = self._process.pid
        assert self.read() == "ready"

    def fill(self, size_bytes: int, seed: int = 7) -> int:
        """Random bytes in device memory; the device address. 0 bytes: only a context."""
        return int(self.ask(f"fill {size_bytes} {seed}").removeprefix("filled "))

    def verify(self) -> bool:
        """Does device memory still hold every byte at the same address? Hangs while the program is frozen."""
        return self.ask("verify") == "intact"

    def child(self) -> int:
        """The pid of a forked child with CUDA of its own."""
        return int(self.ask("child").removeprefix("child "))

    def ask(self, command: str, deadline_s: float = ANSWER_DEADLINE_S) -> str:
        self.tell(command)
        return self.read(deadline_s)

    def tell(self, command: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()

    def answered(self) -> bool:
        """Is an answer waiting?"""
        with selectors.DefaultSelector() as selector:
            assert self._process.stdout is not None
            selector.register(self._process.stdout, selectors.EVENT_READ)
            return bool(selector.select(0))

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()

    def read(self, deadline_s: float = ANSWER_DEADLINE_S) -> str:
        """The next answer."""
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(deadline_s):
                raise AssertionError(f"no answer within {deadline_s} s")
        return self._process.stdout.readline().strip()


@dataclass
class CudaInstances:
    """CUDA programs as instances, each in a cgroup of its own where one can be written."""

    environment: Mapping[str, str]
    boot_id: str = field(default_factory=process_table.boot_id)
    state_uuid: str = field(default_factory=lambda: str(uuid.uuid4()))
    targets: dict[str, CudaTarget] = field(default_factory=dict)
    paths: dict[str, Path] = field(default_factory=dict)
    slice_: cgroup.CgroupSlice | None = None

    def __post_init__(self) -> None:
        self.slice_ = cgroup.open_slice(self.state_uuid)

    def start(self, uid: str, vram_bytes: int | None) -> tuple[CudaTarget, Handle]:
        """A program with `vram_bytes` of device memory (0: a context only, None: no CUDA), and the handle by which a
        freezer knows it."""
        path = self.slice_.create(uid) if self.slice_ else None
        mark = {"HIBERNODE_INSTANCE": f"{self.state_uuid}/{uid}"}
        target = CudaTarget({**self.environment, **mark}, path)
        self.targets[uid] = target
        if vram_bytes is not None:
            target.fill(vram_bytes)
        identity = process_table.identify(target.pid, self.boot_id)
        assert identity is not None
        return target, Handle(uid, identity, "127.0.0.1", 9000, cgroup=str(path) if path else "")

    async def pids(self, handle: Handle) -> list[int]:
        """`Runtime.pids`."""
        if handle.cgroup:
            return cgroup.procs(Path(handle.cgroup))
        mark = f"HIBERNODE_INSTANCE={self.state_uuid}/{handle.uid}"
        return [stat.pid for stat in process_table.members(handle.process, self.boot_id, mark)]

    async def close(self) -> None:
        """End all programs and remove their cgroups."""
        for target in self.targets.values():
            await asyncio.to_thread(target.end)
        if self.slice_ is not None:
            for uid in self.slice_.uids():
                await cgroup.remove(self.slice_.path_of(uid), 5.0)
            self.slice_.remove_if_empty()
