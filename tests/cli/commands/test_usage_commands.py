"""`hibernode usage`: groupings, CSV, and reconciliation of windows."""

from __future__ import annotations

import csv
import io

import pytest

from agent.cli.commands.usage_csv import COLUMNS, usage_csv
from agent.v1 import usage_service_pb2 as pb
from tests.cli.conftest import Run


@pytest.mark.parametrize(
    ("by", "head"),
    [
        ("function", ["FUNCTION", "GPU", "MODEL"]),
        ("instance", ["INSTANCE", "NODE", "FUNCTION", "GPU", "MODEL"]),
        ("node", ["NODE", "GPU", "MODEL"]),
        ("gpu-model", ["GPU", "MODEL", "ACTIVE", "S"]),
    ],
)
def test_columns_name_the_grouping(at_home: Run, by: str, head: list[str]) -> None:
    done = at_home("usage", "--by", by)
    assert (done.code, done.err) == (0, "")
    assert done.words[0][: len(head)] == head
    assert done.words[-1][0] == "TOTAL"
    assert "GPU GB*S ACTIVE" in done.out
    for quantity in ("480.0", "960.0") if by in ("function", "instance") else ("1440.0", "2880.0"):
        assert quantity in done.out, "of three functions, each a row or all in one"


def test_csv_has_the_names_and_the_exact_numbers_of_the_json(at_home: Run) -> None:
    done = at_home("usage", "--output", "csv")
    assert (done.code, done.err) == (0, "")
    rows = list(csv.DictReader(io.StringIO(done.out)))
    answer = at_home("usage", "--output", "json", "--no-windows").json
    assert [row["function"] for row in rows] == ["chat", "ocr", "tts"]
    for row, wanted in zip(rows, answer["rows"], strict=True):
        factors = wanted.pop("factors")
        assert row.pop("unit") == answer["unit"]
        assert {name for name in row if "." in name} == {f"factors.{name}" for name in factors}
        assert row["factors.gpu_active"] == factors["gpu_active"] == "2.1"
        assert row["estimated"] == "false"
        same = set(wanted) - {"estimated"}
        assert {name: row[name] for name in same} == {name: str(wanted[name]) for name in same}


def test_csv_is_rfc_4180_with_a_fixed_header() -> None:
    """Programs may read columns by position: a new column goes at the end of its group and into this test."""
    text = usage_csv([pb.UsageRow(function="ocr", gpu_model='A "quoted", long\nname')], "CU")
    head, row, end = text.split("\r\n")
    assert end == ""
    assert head == (
        "function,instance_uid,node,gpu_model,window_count,active_ns,idle_ns,unbilled_ns,invocations,"
        "gpu_active_gib_s,gpu_idle_gib_s,vcpu_active_s,vcpu_idle_s,memory_gib_s,disk_gib_s,cost,always_on_cost,"
        "estimated,unpriced_windows,factors.gpu_active,factors.gpu_idle,factors.vcpu_active,factors.vcpu_idle,factors.memory,"
        "factors.disk,factors.invocation,factors.valid_from,unit"
    )
    assert row.startswith('ocr,,,"A ""quoted"", long / name",0,0,0,0,0,')
    assert usage_csv([], "CU") == head + "\r\n"


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r"])
def test_name_is_not_a_formula(start: str) -> None:
    evil = f"{start}HYPERLINK(1)"
    (row,) = csv.DictReader(io.StringIO(usage_csv([pb.UsageRow(gpu_model=evil, cost="1.5")], evil)))
    assert row["gpu_model"][0] == row["unit"][0] == "'"
    assert row["gpu_model"].endswith("HYPERLINK(1)")
    assert row["cost"] == "1.5"
    assert len(row) == len(COLUMNS)


def test_csv_is_for_usage_only(at_home: Run) -> None:
    for arguments in (["ps", "-o", "csv"], ["usage", "--local", "-o", "csv"], ["usage", "-o", "csv", "reconcile"]):
        done = at_home(*arguments)
        assert (done.code, done.out) == (2, "")


def test_inconsistent_windows_are_listed_with_exit_4(at_home: Run) -> None:
    done = at_home("usage", "reconcile")
    assert done.code == 4
    assert [line[0] for line in done.words] == ["INSTANCE", "i-chat", "i-ocr", "TOTAL"]
    assert done.words[1][1:7] == ["chat", "gpu-1", "10", "6", "9.000", "0"]
    assert done.words[-1][:3] == ["TOTAL", "3", "instances"]
    assert done.err.count("i-chat: GAP of 1.500 s at window 7") == 5
    assert "i-chat: more findings; --output json lists the first 100" in done.err
    found = at_home("usage", "reconcile", "-o", "json")
    assert found.code == 4
    assert [one["gap_count"] for one in found.json["instances"]] == [6, 0]
    assert found.json["instances"][0]["findings"][0]["kind"] == "GAP"
    assert found.json["total"]["gap_ns"] == 9_000_000_000


@pytest.mark.parametrize("function", ["ocr", "tts"])
def test_estimates_alone_are_exit_0(at_home: Run, function: str) -> None:
    done = at_home("usage", "reconcile", "--function", function)
    assert (done.code, done.err) == (0, "")


def test_misplaced_options_are_refused(at_home: Run) -> None:
    done = at_home("usage", "--function", "ocr", "reconcile")
    assert done.code == 2
    assert "give the options of reconcile after its name" in done.err
