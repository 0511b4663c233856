"""The document's outcome and figures, and the page that is made from it alone."""

from __future__ import annotations

import json
from typing import Any

import pytest

from agent.selftest.proof.document import make_document, outcome_of
from agent.selftest.proof.facts import capabilities_of, missing, module_kind
from agent.selftest.proof.page import make_page

MADE = {
    "date": "2026-11-30T12:00:00+00:00",
    "commit": None,
    "commit_note": "no git",
    "took_s": 1.0,
    "budget_s": 480.0,
}


def facts(model: str = "Emulated T4") -> dict[str, Any]:
    gpu = {"model": model, "uuid": "GPU-1", "index": 0, "memory_bytes": 1 << 34, "persistence": True, "mig": False}
    return {
        "driver": {"version": "580.65.06", "cuda": 13000, "module": None, "problem": None},
        "gpus": [{**gpu, "free_bytes": 1 << 34, "compute_mode": "DEFAULT", "pcie": None}],
        "checkpointer": "driver",
        "utility": {"path": None, "sha256": None, "problem": "it is not installed"},
        "torch": {"python": None, "version": None, "cuda": None, "problem": "no module | named torch"},
        "host": {
            "kernel": "6.1",
            "machine": "x86_64",
            "system": None,
            "cpu": None,
            "cpus": 2,
            "numa_nodes": None,
            "memory_bytes": 1 << 35,
            "memory_available_bytes": 1 << 34,
            "cgroup": None,
            "yama_ptrace_scope": 1,
            "user_id": 1000,
            "capabilities": [],
            "loopback": True,
        },
        "versions": {"hibernode": "0.1.0", "grpcio": None},
        "missing": [],
    }


def run(number: int, freeze_s: float, pinned_gb_s: float = 0.0) -> dict[str, Any]:
    times = dict.fromkeys(("lock_s", "checkpoint_s", "cgroup_freeze_s", "thaw_s", "restore_s", "unlock_s"), 0.1)
    memory = {"gpu_free_bytes": 0, "program_bytes": 0, "agent_bytes": 0}
    speeds = {"to_host_gb_s": pinned_gb_s, "to_device_gb_s": pinned_gb_s * 2, "unavailable": ""}
    return {
        "run": number,
        "counted": number > 0,
        "checkpointer": "driver",
        "bytes_equal": True,
        **times,
        "freeze_s": freeze_s,
        "wake_s": freeze_s / 2,
        "checkpoint_gb_s": 4.0,
        "restore_gb_s": 8.0,
        "released_bytes": 1,
        "pinned": speeds,
        "memory": memory,
    }


def selftest(size_bytes: int, *runs: dict[str, Any]) -> dict[str, Any]:
    return {"size_bytes": size_bytes, "checkpointers": ["driver"], "runs": list(runs)}


def step(name: str, outcome: str = "passed", data: dict[str, Any] | None = None, reason: str = "") -> dict[str, Any]:
    remark = f"because of {name}" if reason else ""
    return {
        "name": name,
        "outcome": outcome,
        "reason": reason,
        "message": remark,
        "allowed_s": 5.0,
        "took_s": 1.0,
        "data": data,
    }


GB = 10**9
STEPS = [
    step("facts", data=facts()),
    step("selftest 1 GiB", data=selftest(GB, run(0, 99.0), run(1, 0.3, 16.0), run(2, 0.3, 8.0))),
    step("selftest 8 GiB", data=selftest(3 * GB, run(0, 99.0), run(1, 0.7, 16.0))),
    step("selftest 32 GiB", "not run", reason="NO_TIME_LEFT"),
]


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        (["passed"], "passed"),
        (["passed", "not run"], "passed"),
        (["not run"], "failed"),  # nothing was proved
        (["passed", "blocked"], "failed"),
        (["passed", "timed out"], "failed"),
        (["failed", "memory changed"], "memory changed"),
    ],
)
def test_one_outcome_for_all_steps(outcomes: list[str], expected: str) -> None:
    assert outcome_of([step(f"selftest {n} GiB", outcome) for n, outcome in enumerate(outcomes)]) == expected


def test_an_interrupted_proof_has_not_passed() -> None:
    assert outcome_of([step("selftest 1 GiB"), step("cycles", "not run", reason="INTERRUPTED")]) == "failed"


def test_the_figures_are_those_of_the_counted_runs() -> None:
    found = make_document(MADE, STEPS, "it is not installed")["figures"]
    assert [(row["size_bytes"], row["runs"], row["freeze_s"]["max"]) for row in found["sizes"]] == [
        (GB, 2, 0.3),
        (3 * GB, 1, 0.7),
    ]
    (freeze, wake) = found["fit"]
    assert (freeze["operation"], freeze["n"], freeze["sizes"]) == ("freeze", 3, 2)
    assert (freeze["intercept_s"], freeze["gb_s"]) == (pytest.approx(0.1), pytest.approx(5.0))
    assert wake["intercept_s"] == pytest.approx(0.05)
    share = found["pinned"][0]["checkpoint_share"]  # within each run: 4 of 16 and 4 of 8 GB/s
    assert (share["n"], share["min"], share["max"]) == (2, 0.25, 0.5)
    assert found["pinned"][0]["restore_share"]["max"] == 0.5


def test_the_page_comes_from_the_json_alone() -> None:
    document = json.loads(json.dumps(make_document(MADE, STEPS, "it is not installed")))
    page = make_page(document)
    assert "| selftest 32 GiB | not run | 1.0 | NO_TIME_LEFT: because of selftest 32 GiB |" in page
    assert "| driver | freeze | 100.0 ms | 200.0 ms | 5.00 | 2, 3 |" in page
    assert "none; not compared: it is not installed" in page
    assert page.count("\n| ---") == 5  # steps, host, sizes, fit, pinned


@pytest.mark.parametrize(("model", "emulated"), [("Emulated H100", True), ("NVIDIA H100 80GB HBM3", False)])
def test_the_first_line_tells_an_emulated_driver_from_hardware(model: str, emulated: bool) -> None:
    document = make_document(MADE, [step("facts", data=facts(model)), *STEPS[1:]], "")
    first = make_page(document).splitlines()[0]
    assert document["emulated"] is emulated
    assert model in first
    assert ("EMULATED, no proof of hardware" in first) is emulated


def test_a_page_without_any_fact_says_so() -> None:
    page = make_page(make_document(MADE, [step("facts", "timed out", reason="SELFTEST_TIMEOUT")], ""))
    assert page.startswith("# Proof: no GPU")
    assert "Not passed" in page


def test_what_is_missing_is_said() -> None:
    found = " ".join(missing(facts()))
    for word in ("not root", "SIGSTOP", "Yama", "cuda-checkpoint", "PyTorch"):
        assert word in found
    assert "loopback" not in found
    assert "No GPU" not in found


def test_kernel_module_and_rights_are_read() -> None:
    opened = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06"
    assert module_kind(opened) == "open"
    assert module_kind("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.163.01") == "proprietary"
    assert module_kind("") is None
    assert capabilities_of("0000000000080000") == ["SYS_PTRACE"]
    assert capabilities_of(None) == []
