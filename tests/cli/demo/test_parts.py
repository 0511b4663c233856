"""Parts of the demo: its statistics and its guard."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from agent.cli.demo import guard
from agent.cli.demo.files import Sample, difference, pick_samples
from agent.cli.demo.report import DemoReport, driver_times_ms, percentile, spread, union_ns
from agent.cli.demo.world import LONGEST_SOCKET, prepare_home
from agent.core.errors import PreconditionError
from agent.wire.addresses import MAX_SOCKET_PATH_BYTES

DEADLINE_S = 20.0


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [([], 0.5, 0.0), ([7.0], 0.5, 7.0), ([7.0], 0.99, 7.0), ([3, 1, 2], 0.5, 2), ([3, 1, 2, 4], 0.5, 2)],
)
def test_percentiles_are_values_that_were_measured(values: list[float], share: float, expected: float) -> None:
    assert percentile(values, share) == expected


def test_p99_of_a_hundred_is_the_last_but_one() -> None:
    assert percentile(list(range(1, 101)), 0.99) == 99
    assert spread([1.23456, 9.0]) == {"p50": 1.235, "p99": 9.0, "n": 2}


def test_a_wake_costs_the_driver_a_restore_and_the_unlock_after_it() -> None:
    def op(name: str, pid: int, us: int, result: int = 0) -> SimpleNamespace:
        return SimpleNamespace(op=name, pid=pid, us=us, result=result)

    operations = [
        op("lock", 1, 100),
        op("unlock", 1, 70),  # a cancelled freeze
        op("restore", 1, 2000),
        op("restore", 2, 3000, result=999),
        op("restore", 2, 4000),
        op("unlock", 1, 500),
        op("unlock", 2, 250),
    ]
    assert driver_times_ms(operations) == [2.5, 4.25]


def test_overlapping_requests_of_one_instance_count_once(tmp_path: Path) -> None:
    log = tmp_path / "requests.jsonl"
    spans = [("a", 10, 20), ("a", 15, 30), ("b", 12, 18), ("a", 40, 41), ("a", 16, 17)]
    log.write_text("".join(json.dumps({"instance": i, "start_ns": s, "end_ns": e}) + "\n" for i, s, e in spans))
    assert union_ns(log) == (30 - 10) + (41 - 40) + (18 - 12)


def test_json_object_has_the_promised_keys() -> None:
    found = DemoReport().as_json()
    promised = "requests failed freezes wakes wake_ms driver_ms active_s idle_s cost always_on_cost answers_identical"
    assert set(promised.split()) <= set(found)
    assert {"p50", "p99"} <= set(found["wake_ms"]) & set(found["driver_ms"])
    json.dumps(found)


def test_picks_files_of_many_types_and_detects_differences() -> None:
    pytest.importorskip("magika", reason="the extra `demo` is not installed")
    samples = pick_samples(12)
    assert len(samples) == 12
    assert len({sample.path.suffix for sample in samples}) == 12
    assert len({sample.expected["label"] for sample in samples}) >= 4
    assert difference(samples[0].expected, samples[0]) == ""
    assert difference({**samples[0].expected, "score": 0.5}, samples[0]).startswith("score 0.5 instead of")
    assert difference({}, Sample(Path("x"), b"", {"label": "txt"})) == "label None instead of txt"


# ---- the guard -----------------------------------------------------------------------------------------------------


def _guard(state_dir: Path, word: str) -> subprocess.Popen[bytes]:
    program = [sys.executable, "-I", "-S", guard.__file__, str(state_dir), word]
    return subprocess.Popen(program, stdin=subprocess.PIPE)


@pytest.fixture
def orphan(tmp_path: Path) -> subprocess.Popen[bytes]:
    """A stopped instance of an agent whose demo was killed."""
    (tmp_path / "agent").mkdir()
    (tmp_path / "agent" / "uuid").write_text("7a7a-demo\n")
    environment = {**os.environ, "HIBERNODE_INSTANCE": "7a7a-demo/i-1"}
    return subprocess.Popen(["/bin/sh", "-c", "kill -STOP $$; sleep 60"], env=environment)


def test_guard_ends_instances_of_a_killed_demo(tmp_path: Path, orphan: subprocess.Popen[bytes]) -> None:
    guard = _guard(tmp_path, "remove")
    assert guard.stdin is not None
    guard.stdin.close()
    assert orphan.wait(DEADLINE_S) == -9
    assert guard.wait(DEADLINE_S) == 0
    assert not tmp_path.exists()


def test_guard_changes_nothing_after_an_orderly_end(tmp_path: Path, orphan: subprocess.Popen[bytes]) -> None:
    guard = _guard(tmp_path, "remove")
    guard.communicate(b"bye\n", timeout=DEADLINE_S)
    assert orphan.poll() is None
    assert tmp_path.exists()
    orphan.kill()
    orphan.wait(DEADLINE_S)


def test_the_guard_waits_while_the_demo_lives(tmp_path: Path) -> None:
    guard = _guard(tmp_path, "keep")
    time.sleep(0.1)  # nothing happens, so there is no event to wait for
    assert guard.poll() is None
    guard.communicate(b"bye\n", timeout=DEADLINE_S)


# ---- the folder ----------------------------------------------------------------------------------------------------


def test_a_temporary_folder_leaves_room_for_the_paths_of_sockets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long $TMPDIR, such as a CI job's, makes no demo fail."""
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    home = prepare_home(None)
    try:
        assert len(os.fsencode(home / LONGEST_SOCKET)) <= MAX_SOCKET_PATH_BYTES
        assert (home / "agent" / "token").exists()
    finally:
        shutil.rmtree(home)
    assert not list(long.iterdir())


def test_a_long_folder_that_was_asked_for_is_refused(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 100)
    with pytest.raises(PreconditionError, match="shorter --state-dir"):
        prepare_home(long)
    assert not long.exists()
