"""`hibernode demo` as a program; each run is a short one (`--quick`)."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import psutil
import pytest

from agent.cli.demo.command import _on_path
from agent.examples.echo.__main__ import expected_answer

pytest.importorskip("magika", reason="the extra `demo` is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(150)]

DEADLINE_S = 90.0
HIBERNODE = (sys.executable, "-P", "-m", "agent.cli.main")
ECHO = """\
edition: 3.0.0
name: second
resources:
  echo:
    component: fc3
    props:
      functionName: echo
      runtime: custom-container
      timeout: 20
      gpuConfig: {gpuType: fc.gpu.ada.1, gpuMemorySize: 1024}
      customContainerConfig: {image: host, entrypoint: [PYTHON, -m, agent.examples.echo]}
      environmentVariables: {VRAM_MIB: "2"}
      instanceLifecycleConfig: {initializer: {handler: index.initialize, timeout: 20}}
      hibernode: {freezeAfter: 200ms}
"""


class Demo:
    """A running demo, its folder and its output."""

    def __init__(self, folder: Path, *options: str, **environment: str) -> None:
        self.stdout, self.stderr = folder / "stdout", folder / "stderr"
        self.folder = folder
        self.temporary = Path(tempfile.mkdtemp(prefix="demo-"))  # short, since it contains sockets
        own = {"TMPDIR": str(self.temporary), "TEST_OF_DEMO": str(folder)}
        with self.stdout.open("wb") as stdout, self.stderr.open("wb") as stderr:
            self.process = subprocess.Popen(
                [*HIBERNODE, "demo", "--quick", *options],
                stdout=stdout,
                stderr=stderr,
                env={**os.environ, **own, **environment},
                start_new_session=True,
            )

    def until(self, what: str, reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not reached():
            assert time.monotonic() < deadline, f"not in time: {what}\n{self.stderr.read_text()}"
            time.sleep(0.05)  # another program without a notification

    def printed(self, text: str) -> Callable[[], bool]:
        return lambda: text in self.stderr.read_text() or self.process.poll() is not None

    def end(self) -> int:
        return self.process.wait(DEADLINE_S)

    def json(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.stdout.read_bytes())
        return found

    def left(self) -> list[str]:
        """Its live processes; instances have its folder in their environment."""
        found = []
        for process in psutil.process_iter():
            try:
                environment, command = process.environ(), " ".join(process.cmdline())
            except (psutil.Error, OSError):
                continue
            values = " ".join(environment.values())
            if str(self.folder) in values or str(self.temporary) in values:
                found.append(command)
        return found

    def nothing_left(self) -> bool:
        return not self.left()

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., Demo]]:
    demos: list[Demo] = []

    def start(*options: str, **environment: str) -> Demo:
        demos.append(Demo(tmp_path, *options, **environment))
        return demos[-1]

    yield start
    for demo in demos:
        demo.kill()
    for demo in demos:
        demo.until("its guard cleans up", demo.nothing_left)
        shutil.rmtree(demo.temporary)


def _hibernode(home: Path, *arguments: str) -> Any:
    done = subprocess.run([*HIBERNODE, *arguments, "--home", str(home)], capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout) if "json" in arguments else done.stdout.decode()


def _cost(usage: dict[str, Any]) -> Decimal:
    """The formula of `hibernode usage --help`."""
    priced = ("gpu_active_gib_s", "gpu_idle_gib_s", "vcpu_active_s", "vcpu_idle_s", "memory_gib_s", "disk_gib_s")
    names = ("gpu_active", "gpu_idle", "vcpu_active", "vcpu_idle", "memory", "disk")
    total = Decimal(0)
    for row in usage["rows"]:
        factors = {name: Decimal(row["factors"][name]) for name in (*names, "invocation")}
        total += sum(Decimal(row[amount]) * factors[name] for amount, name in zip(priced, names, strict=True))
        total += row["invocations"] * factors["invocation"]
    return round(total, 6)


def test_demo_completes_and_stays_up_as_a_home(run: Callable[..., Demo], tmp_path: Path) -> None:
    home = tmp_path / "home"
    demo = run("--json", "--keep", "--state-dir", str(home))
    demo.until("the demo is complete", demo.printed("The demo keeps running until Ctrl-C"))
    report = demo.json()
    assert (report["requests"], report["failed"], report["answers_identical"]) == (10 + 3 * 2, 0, True)
    assert report["freezes"] >= 8
    assert report["wakes"] >= 6
    assert report["wake_ms"]["n"] == report["driver_ms"]["n"] == report["wakes"]
    assert 0 < report["driver_ms"]["p50"] <= report["wake_ms"]["p50"]
    assert 0 < report["app_active_s"] <= report["active_s"] < report["idle_s"]
    assert report["usage_complete"]

    usage = _hibernode(home, "usage", "--output", "json")
    assert float(_cost(usage)) == pytest.approx(report["cost"], abs=2e-6)
    assert (float(usage["total_cost"]), float(usage["total_always_on_cost"])) == (
        report["cost"],
        report["always_on_cost"],
    )
    assert report["cost"] < report["always_on_cost"] / 2
    assert sum(row["active_ns"] for row in usage["rows"]) / 1e9 == pytest.approx(report["active_s"])

    (tmp_path / "echo.yaml").write_text(ECHO.replace("PYTHON", sys.executable))
    url = _hibernode(home, "deploy", "-t", str(tmp_path / "echo.yaml"), "--wait").strip()
    with urllib.request.urlopen(f"{url}/answer?n=3", timeout=30) as response:
        assert response.read().decode() == expected_answer(3)

    second = run("--state-dir", str(home))
    assert second.end() == 4
    assert "a demo runs in" in second.stderr.read_text()
    assert len(_hibernode(home, "ps", "--output", "json")["instances"]) == 4, "the first one is unchanged"

    demo.process.send_signal(signal.SIGTERM)
    assert demo.end() == 0
    assert demo.left() == []
    assert not (home / "agent" / "endpoints.json").exists()
    driver_log = (home / "logs" / "driver.log").read_text()
    assert "emulated.stopped" in driver_log
    assert "emulated.frozen_calls" not in driver_log, "calls on a frozen process, which hang on hardware"


def test_a_second_run_in_a_folder_shows_only_its_own_figures(run: Callable[..., Demo], tmp_path: Path) -> None:
    home = tmp_path / "home"
    first = run("--json", "--state-dir", str(home))
    assert first.end() == 0
    earlier = first.json()
    demo = run("--json", "--keep", "--state-dir", str(home))
    demo.until("the demo is complete", demo.printed("The demo keeps running until Ctrl-C"))
    report = demo.json()
    assert (report["requests"], report["instances"], report["usage_complete"]) == (earlier["requests"], 3, True)
    assert report["wake_ms"]["n"] == report["driver_ms"]["n"] == report["wakes"]
    assert 0 < report["app_active_s"] <= report["active_s"]
    assert float(_cost(report["usage"])) == pytest.approx(report["cost"], abs=2e-6)

    both = _hibernode(home, "usage", "--output", "json")
    (row,) = both["rows"]
    assert row["invocations"] == sum(one["invocations"] for r in (earlier, report) for one in r["usage"]["rows"])
    demo.process.send_signal(signal.SIGTERM)
    assert demo.end() == 0


def test_corruption_while_frozen_is_detected(run: Callable[..., Demo]) -> None:
    demo = run("--json", "--flip-byte")
    assert demo.end() == 1
    report = demo.json()
    assert not report["answers_identical"]
    assert report["failed"] == 0
    assert demo.stderr.read_text().count("every byte is unchanged") == 2, "the other two are unchanged"
    assert "differs from the answer without freezing: " in demo.stderr.read_text()
    assert demo.left() == []
    assert list(demo.temporary.glob("hibernode-demo-*")) == []


def test_a_killed_demo_leaves_nothing(run: Callable[..., Demo]) -> None:
    demo = run("--json")
    demo.until("an instance is frozen", demo.printed("frozen in"))
    assert any("agent.examples.filetype" in command for command in demo.left())
    demo.process.kill()
    demo.until("nothing is left", demo.nothing_left)
    assert list(demo.temporary.glob("hibernode-demo-*")) == []


def test_interrupted_at_once_it_leaves_nothing(run: Callable[..., Demo]) -> None:
    demo = run("--json")
    demo.until("it begins", demo.printed("starting"))
    demo.process.send_signal(signal.SIGINT)
    assert demo.end() == 130
    assert demo.stdout.read_bytes() == b""
    assert demo.left() == []
    assert list(demo.temporary.glob("hibernode-demo-*")) == []


def test_continues_after_its_reader_closes_the_pipe(run: Callable[..., Demo], tmp_path: Path) -> None:
    """`hibernode demo | head -1` still runs and ends properly."""
    reader, writer = os.pipe()
    home = tmp_path / "home"
    options = ("demo", "--quick", "--keep", "--state-dir", str(home))
    with (tmp_path / "err").open("wb") as stderr:
        process = subprocess.Popen([*HIBERNODE, *options], stdout=writer, stderr=stderr, start_new_session=True)
    os.close(writer)
    try:
        assert b"building" in os.read(reader, 200)
        os.close(reader)
        deadline = time.monotonic() + DEADLINE_S
        while "The demo keeps running" not in (tmp_path / "err").read_text():
            assert process.poll() is None, (tmp_path / "err").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)  # another program without a notification
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE_S) == 0
        assert "Traceback" not in (tmp_path / "err").read_text()
    finally:
        process.kill()


def test_prints_path_export_if_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """scripts/demo installs `hibernode` in .venv/bin, which is not on PATH."""
    scripts = Path(sys.executable).parent
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert _on_path() == f"  export PATH={scripts}:$PATH\n"
    monkeypatch.setenv("PATH", f"{scripts}:/usr/bin:/bin")
    assert _on_path() == ""


def test_without_a_compiler_names_the_package(run: Callable[..., Demo], tmp_path: Path) -> None:
    demo = run("--json", PATH="/nonexistent", CC="", XDG_CACHE_HOME=str(tmp_path / "empty"))
    assert demo.end() == 5
    stderr = demo.stderr.read_text()
    assert "the driver ended with" in stderr
    assert "gcc" in stderr
    assert demo.left() == []
