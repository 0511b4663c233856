"""`hibernode simulate`: comparison of policies on an access log."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Run


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """One request every 30 s for 30 min."""
    path = tmp_path / "access.csv"
    path.write_text("time,function,duration\n" + "".join(f"{30 * n},ocr,500ms\n" for n in range(60)))
    return path


def test_policies_and_freeze_times_are_compared(run: Run, trace: Path, tmp_path: Path) -> None:
    picture = tmp_path / "savings.svg"
    done = run(
        "simulate", trace, "--policy", "pack", "--policy", "round_robin", "--freeze-after", "5s", "--freeze-after",
        "never", "--wake", "2s", "--freeze", "500ms", "--svg", picture, "-o", "json",
    )  # fmt: skip
    assert done.code == 0, done.err
    runs = done.json["runs"]
    assert [(one["policy"], one["freeze_after_s"]) for one in runs] == [
        ("pack", 5.0), ("pack", None), ("round_robin", 5.0), ("round_robin", None),
    ]  # fmt: skip
    sleepy, awake = runs[0], runs[1]
    assert (sleepy["requests"], sleepy["wakes"], awake["wakes"]) == (60, 59, 0)
    assert (awake["p50_s"], sleepy["p50_s"]) == (0.5, 2.5)
    assert awake["awake_share"] == 1.0
    assert sleepy["awake_share"] < 0.3
    assert float(sleepy["cost"]) == pytest.approx(float(awake["cost"]), rel=0.01), "idle is idle, awake or asleep"
    assert float(sleepy["cost"]) < 0.3 * float(sleepy["always_on_cost"])
    drawn = picture.read_text()
    assert drawn.startswith("<?xml")
    assert "<script" not in drawn
    assert all(hasattr(finder, "find_spec") for finder in sys.meta_path), "the library's import hook is gone"
    assert not re.findall(r"""(?:href|src)=["']?http""", drawn), "nothing is loaded from elsewhere"


@pytest.mark.parametrize(
    ("options", "wake_s"),
    [
        ((), 4.655),
        (("--card", "a100"), 3.454),
        (("--gpu-memory", "2GiB"), 1.457),
        (("--card", "b200", "--wake", "3s"), 3),
    ],
)
def test_a_wake_takes_what_the_card_takes(run: Run, trace: Path, options: tuple[str, ...], wake_s: float) -> None:
    """0.5 s of work after the wake, 30 s after the last request."""
    done = run("simulate", trace, "--policy", "pack", "--freeze-after", "1s", *options, "-o", "json")
    assert done.json["runs"][0]["p50_s"] == pytest.approx(0.5 + wake_s, abs=0.001)


def test_a_table_for_people(run: Run, trace: Path) -> None:
    done = run("simulate", trace)
    assert done.code == 0
    assert "POLICY" in done.out
    assert "round_robin" in done.out
    assert "% saved" in done.out
    assert "times faster than real time" in done.err


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--policy", "fastest"), "fastest"),
        (("--freeze-after", "25h"), "24h"),
        (("--freeze-after", "soon"), "soon"),
        (("--instances", "0"), "--instances"),
        (("--gpu-memory", "much"), "much"),
        (("--price-book", "nowhere.yaml"), "nowhere.yaml"),
        (("--gpu-model", "T400"), "'T400' has no price; the price book has T4,"),
        (("--wake-factor", "nan"), "got nan"),
        (("--wake", "-1"), "--wake"),
        (("--freeze-after", "1s") * 40, "more than 64"),
    ],
)
def test_invalid_options_are_refused(run: Run, trace: Path, options: tuple[str, ...], text: str) -> None:
    done = run("simulate", trace, *options)
    assert done.code == 2
    assert text in done.err


def test_broken_line_is_reported_before_the_simulation(run: Run, trace: Path) -> None:
    trace.write_text(trace.read_text() + "1801,ocr,-1\n")
    done = run("simulate", trace)
    assert (done.code, done.out) == (2, "")
    assert "access.csv:62: column duration must be like 0.35" in done.err
