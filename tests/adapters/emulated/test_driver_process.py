"""The driver process: directory, lock, control socket and build."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from agent.core.errors import InvalidArgumentError, PreconditionError, UnavailableError
from agent.emulated.build import build
from agent.emulated.control import EmulatedDriver
from agent.emulated.env import exports
from agent.emulated.latency import Latency
from agent.emulated.options import Options, parse_bandwidth
from agent.emulated.profiles import find_profile
from agent.emulated.protocol import MessageOp
from tests.adapters.emulated.conftest import StartDriver
from tests.adapters.emulated.harness import MIB, ROOT, CudaProgram, RunningDriver, freeze, wake


def test_second_driver_in_a_directory_is_refused(driver: RunningDriver, build_cache: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "agent.cli.main", "emulated", "up", "--dir", str(driver.directory)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "XDG_CACHE_HOME": str(build_cache)},
        timeout=20,
        check=False,
    )
    assert done.returncode == 4
    assert "EMULATED_DRIVER_RUNNING" in done.stderr
    assert driver.control.devices()


def test_restart_removes_sockets_and_keeps_uuids(start_driver: StartDriver, tmp_path: Path) -> None:
    home, other = tmp_path / "home", tmp_path / "other"
    first = start_driver(directory=home)
    uuids = [device.uuid for device in first.control.devices()]
    first.process.terminate()
    first.process.wait(10)
    assert sorted(path.name for path in home.iterdir()) == ["bin", "identity", "lib", "lock"]
    again = start_driver(directory=home)
    assert [device.uuid for device in again.control.devices()] == uuids
    assert not {device.uuid for device in start_driver(directory=other).control.devices()} & set(uuids)


def test_directory_with_a_long_path(start_driver: StartDriver, tmp_path: Path) -> None:
    driver = start_driver(directory=tmp_path / ("d" * 120))
    driver.application().must("alloc", size=MIB)
    assert driver.used_bytes() == MIB


def test_env_prints_shell_exports_that_prepend(driver: RunningDriver) -> None:
    printed = subprocess.run(
        [sys.executable, "-m", "agent.cli.main", "emulated", "env", "--dir", str(driver.directory)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "LD_LIBRARY_PATH": "/opt/own", "PATH": os.environ["PATH"]},
        timeout=20,
        check=True,
    ).stdout
    settings = dict(word.split("=", 1) for word in shlex.split(printed) if "=" in word)
    assert settings["LD_LIBRARY_PATH"] == f"{driver.directory}/lib:/opt/own"
    assert settings["PATH"] == f"{driver.directory}/bin:{os.environ['PATH']}"
    twice = exports(driver.directory, exports(driver.directory, {"PATH": "/usr/bin"}))
    assert twice["PATH"] == f"{driver.directory}/bin:/usr/bin"


def test_library_finds_its_driver_without_the_variable(driver: RunningDriver) -> None:
    program = driver.program(HIBERNODE_EMULATED_SOCKET="")
    program.must("init")
    assert len(program.must("devices")["devices"]) == 2


def test_log_has_bytes_and_time_of_every_operation(driver: RunningDriver, tool: CudaProgram) -> None:
    app = driver.application()
    app.must("alloc", size=4 * MIB)
    freeze(tool, app.pid)
    middle = driver.oplog()[-1].seq
    wake(tool, app.pid)
    everything = driver.oplog()
    assert [(r.op, r.pid, r.bytes, r.result) for r in everything] == [
        ("lock", app.pid, 0, 0),
        ("checkpoint", app.pid, 4 * MIB, 0),
        ("restore", app.pid, 4 * MIB, 0),
        ("unlock", app.pid, 0, 0),
    ]
    assert all(0 < record.us < 5_000_000 for record in everything)
    assert [record.op for record in driver.control.oplog(since=middle)] == ["restore", "unlock"]
    assert driver.control.oplog(since=everything[-1].seq) == []


def test_latency_model_sets_a_minimum(driver: RunningDriver, tool: CudaProgram) -> None:
    app = driver.application()
    app.must("alloc", size=4 * MIB)
    driver.control.set_latency(fixed_us=2_000, bandwidth_bytes_s=100 * MIB)
    freeze(tool, app.pid)
    wake(tool, app.pid)
    took = {record.op: record.us for record in driver.oplog()}
    assert took["lock"] >= 2_000
    assert took["checkpoint"] >= 2_000 + 100_000
    assert took["restore"] >= 2_000 + 40_000
    assert took["unlock"] >= 2_000


def test_a_card_is_as_slow_as_those_that_were_measured() -> None:
    """14.7 GB on an A10G, 76 GB on an A100; what its contexts take comes on top (facts/gpu-checkpoint.md, 6)."""
    for card, size, freeze_s, wake_s in (("a10g", 14_700_000_000, 7.6, 3.2), ("a100", 76_000_000_000, 38.0, 10.9)):
        latency = Options(Path("/tmp"), card=card).latency
        assert latency.of(MessageOp.CHECKPOINT, size) / 1e6 == pytest.approx(freeze_s + 0.5, rel=0.05)
        assert latency.of(MessageOp.RESTORE, size) / 1e6 == pytest.approx(wake_s + 1.0, rel=0.05)
        assert latency.of(MessageOp.LOCK, size) == 0
    with pytest.raises(InvalidArgumentError, match="EMULATED_OPTION_INVALID"):
        Options(Path("/tmp"), card="a100", bandwidth_bytes_s=1)
    assert Options(Path("/tmp")).latency == Latency(), "by default it is as fast as memory"


def test_flipped_byte_shows_live_and_after_a_restore(driver: RunningDriver, tool: CudaProgram) -> None:
    app, other = driver.application(), driver.application(device=1)
    blocks = [app.must("alloc", size=1000)["address"] for _ in range(2)]
    for address in blocks:
        app.must("fill", address=address, size=1000, value=0)
    other.must("alloc", size=64)
    uuid = driver.control.devices()[0].uuid
    assert driver.control.flip_byte(pid=app.pid, offset=1003) == app.pid
    assert app.must("read", address=blocks[1] + 2, size=3, raw=True)["hex"] == "00ff00"
    freeze(tool, app.pid)
    assert driver.control.flip_byte(uuid=uuid, offset=7) == app.pid
    wake(tool, app.pid)
    assert app.must("read", address=blocks[0] + 6, size=3, raw=True)["hex"] == "00ff00"
    with pytest.raises(PreconditionError, match="EMULATED_NO_BYTE"):
        driver.control.flip_byte(pid=app.pid, offset=2000)


def test_control_without_a_driver_and_with_malformed_input(driver: RunningDriver, tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="EMULATED_DRIVER_DOWN"):
        EmulatedDriver(tmp_path / "nowhere").devices()
    with pytest.raises(PreconditionError, match="EMULATED_COMMAND_UNKNOWN"):
        driver.control._request("explode")
    with pytest.raises(PreconditionError, match="EMULATED_OPTION_INVALID"):
        driver.control.oplog(since=-1)


def test_options_are_checked(tmp_path: Path) -> None:
    assert parse_bandwidth("8GB/s") == 8 * 10**9
    assert parse_bandwidth("0.5 MiB/s") == MIB // 2
    assert parse_bandwidth("0") == 0
    for text in ("fast", "8XB/s", "-1GB/s"):
        with pytest.raises(InvalidArgumentError, match="EMULATED_OPTION_INVALID"):
            parse_bandwidth(text)
    with pytest.raises(InvalidArgumentError, match="gpus must be"):
        Options(tmp_path, gpus=0)
    with pytest.raises(InvalidArgumentError, match="EMULATED_PROFILE_UNKNOWN"):
        find_profile("999")


def test_concurrent_builds_are_all_complete(build_cache: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from agent.emulated.build import build; "
        "from agent.emulated.profiles import find_profile; print(build(find_profile('580'), Path(sys.argv[1])))"
    )

    def one(_index: int) -> str:
        return subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "cache")],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=50,
            check=True,
        ).stdout.strip()

    with ThreadPoolExecutor(2) as pool:
        built = set(pool.map(one, range(2)))
    assert len(built) == 1
    folder = Path(built.pop())
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [folder.name]
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == [
        "bin/cuda-checkpoint",
        "lib/libcuda.so.1",
        "lib/libnvidia-ml.so.1",
    ]


def test_missing_compiler_error_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(PreconditionError, match="apt-get install gcc libc6-dev") as raised:
        build(find_profile("580"), tmp_path)
    assert raised.value.reason == "EMULATED_DRIVER_NEEDS_CC"
