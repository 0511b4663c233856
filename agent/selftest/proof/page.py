"""Makes the page for people from a proof's JSON document, and from nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from agent.core.types import GIB, MIB

_HEADLINES = {
    "passed": "**Passed:** everything that ran ended as promised, and every byte came back.",
    "failed": "**Not passed:** see the steps below.",
    "memory changed": "**MEMORY CHANGED. This host must not freeze instances.** See the steps below.",
}


def make_page(document: Mapping[str, Any]) -> str:
    """Markdown. The first line tells an emulated driver from hardware."""
    return "\n\n".join(_parts(document)) + "\n"


def _parts(document: Mapping[str, Any]) -> Iterator[str]:
    facts, figures, made = document["facts"], document["figures"], document["made"]
    name = _gpu_names(facts)
    if document["emulated"]:
        yield f"# EMULATED, no proof of hardware: {name}"
        yield "The driver was Hibernode's emulated one. The times below are those of a machine's memory, not of a GPU."
    else:
        yield f"# Proof: {name}"
    yield _HEADLINES[document["outcome"]]
    yield (
        f"Made {made['date']} in {made['took_s']:.0f} s of at most {made['budget_s']:.0f} s, from commit "
        f"{made['commit'] or 'unknown'} ({made['commit_note']}). Times are median (min to max, n); "
        "GB are 10^9 bytes. The file proof.json beside this page has every single run."
    )
    yield "## Steps\n\n" + _table(
        ("step", "outcome", "seconds", "remark"),
        ([step["name"], step["outcome"], f"{step['took_s']:.1f}", _remark(step)] for step in document["steps"]),
    )
    yield "## Host\n\n" + _table(("fact", "value"), _facts(document))
    if facts.get("missing"):
        yield "Missing for a complete proof:\n\n" + "\n".join(f"- {_clean(text)}" for text in facts["missing"])
    if figures["sizes"]:
        yield from _sizes(document)
    if figures["fit"]:
        yield "## Fixed cost and speed\n\n" + _table(
            ("checkpointer", "operation", "fixed cost", "each GB", "GB/s", "sizes, runs", "largest residual"),
            (_fit_row(row) for row in figures["fit"]),
        )
    if figures["pinned"]:
        yield (
            "## Beside a pinned copy\n\nThe copy shows what the bus can do; a share is the driver's GB/s of that.\n\n"
            + _table(
                (
                    "GiB",
                    "checkpointer",
                    "copy to host GB/s",
                    "checkpoint's share",
                    "copy to GPU GB/s",
                    "restore's share",
                ),
                (_pinned_row(row) for row in figures["pinned"]),
            )
        )
    if figures["cycles"]:
        yield from _cycles(figures["cycles"])
    if figures["end_to_end"] and "program" in figures["end_to_end"]:
        yield from _end_to_end(figures["end_to_end"])


def _gpu_names(facts: Mapping[str, Any]) -> str:
    gpus = facts.get("gpus") or []
    if not gpus:
        return "no GPU"
    models = list(dict.fromkeys(gpu["model"] for gpu in gpus))
    return f"{len(gpus)} x {', '.join(models)}, driver {facts['driver']['version']}"


def _remark(step: Mapping[str, Any]) -> str:
    return ": ".join(filter(None, [step["reason"], step["message"]]))


def _facts(document: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    facts = document["facts"]
    if not facts:
        yield "facts", "not known"
        return
    host, driver, torch, utility = facts["host"], facts["driver"], facts["torch"], facts["utility"]
    cuda = f"{driver['cuda'] // 1000}.{driver['cuda'] % 1000 // 10}" if driver["cuda"] else "unknown"
    yield "driver", f"{_known(driver['version'])}, CUDA {cuda}, kernel module {_known(driver['module'])}"
    for gpu in facts["gpus"]:
        mode = f"persistence {'on' if gpu['persistence'] else 'off'}, MIG {'on' if gpu['mig'] else 'off'}"
        yield (
            f"GPU {gpu['index']}",
            f"{gpu['model']}, {gpu['memory_bytes'] / GIB:.1f} GiB, {mode}, {_pcie(gpu['pcie'])}",
        )
    yield (
        "machine",
        f"{_known(host['cpu'])}, {host['cpus']} CPUs, {host['memory_bytes'] / GIB:.0f} GiB, {host['machine']}",
    )
    yield "system", f"{_known(host['system'])}, kernel {host['kernel']}, NUMA nodes {_known(host['numa_nodes'])}"
    rights = ", ".join(host["capabilities"]) or "none of those that freezing uses"
    yield "rights", f"user {host['user_id']}; {rights}; Yama ptrace_scope {_known(host['yama_ptrace_scope'])}"
    yield "cgroup", _known(host["cgroup"])
    yield "checkpointer", _known(facts["checkpointer"])
    known = f"{utility['path']}, SHA-256 {utility['sha256']}" if utility["path"] else "none"
    without = document["without_utility"]
    yield "cuda-checkpoint", f"{known}; not compared: {without}" if without else known
    yield "PyTorch", f"{torch['version']}, CUDA {torch['cuda']}" if torch["python"] else "none"
    yield "versions", ", ".join(f"{name} {_known(version)}" for name, version in facts["versions"].items())


def _pcie(link: Mapping[str, Any] | None) -> str:
    if link is None or link["max_generation"] is None:
        return "PCIe link unknown"
    now = f"generation {_known(link['generation'])} x{_known(link['width'])}"
    return f"PCIe {now} (at most {link['max_generation']} x{link['max_width']}), NUMA node {_known(link['numa_node'])}"


def _sizes(document: Mapping[str, Any]) -> Iterator[str]:
    rows = (
        [
            f"{row['size_bytes'] / GIB:g}",
            row["checkpointer"],
            _seconds(row["freeze_s"]),
            _number(row["checkpoint_gb_s"]),
            _seconds(row["wake_s"]),
            _number(row["restore_gb_s"]),
        ]
        for row in document["figures"]["sizes"]
    )
    head = ("GiB", "checkpointer", "freeze", "checkpoint GB/s", "wake", "restore GB/s")
    yield "## Freeze and wake\n\nEvery byte was compared after each wake, at its old address.\n\n" + _table(head, rows)


def _fit_row(row: Mapping[str, Any]) -> list[str]:
    return [
        row["checkpointer"],
        row["operation"],
        _short_s(row["intercept_s"]),
        _short_s(row["s_per_gb"]),
        f"{row['gb_s']:.2f}" if row["gb_s"] else "no growth",
        f"{row['sizes']}, {row['n']}",
        _short_s(row["worst_residual_s"]),
    ]


def _pinned_row(row: Mapping[str, Any]) -> list[str]:
    shares = [_number(row[key], 100, " %") for key in ("checkpoint_share", "restore_share")]
    copies = [_number(row[key]) for key in ("to_host_gb_s", "to_device_gb_s")]
    return [f"{row['size_bytes'] / GIB:g}", row["checkpointer"], copies[0], shares[0], copies[1], shares[1]]


def _cycles(cycles: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"## {cycles['done']} cycles of one process\n\n{cycles['equal']} of {cycles['done']} times every byte of "
        f"{cycles['size_bytes'] / GIB:g} GiB was equal."
    )
    rows = [
        [
            what,
            _seconds(cycles[key]),
            _seconds(cycles["first"][key]),
            _seconds(cycles["last"][key]),
            f"{cycles['drift'][key]:.2f}" if cycles["drift"][key] is not None else "unknown",
        ]
        for what, key in (("freeze", "freeze_s"), ("wake", "wake_s"))
    ]
    yield _table(("", "all", "first", "last", "last / first"), rows)
    grown = cycles["growth_bytes"]
    if grown:
        words = ", ".join(f"{name} {grown[name] / MIB + 0.0:+.1f} MiB" for name in ("gpu", "program", "agent"))
        yield f"Memory from the first to the last cycles (medians): {words}."


def _end_to_end(found: Mapping[str, Any]) -> Iterator[str]:
    usage = found["usage"]
    intact = "unchanged" if found["memory_intact"] else "CHANGED"
    yield (
        "## A function, from its caller's side\n\n"
        f"Program: {found['program']}, {found['vram_bytes'] / MIB:.0f} MiB of GPU memory. "
        f"{found['requests']} requests, {found['failed']} without an answer, {found['different']} answers different; "
        f"{usage['freezes']} freezes, {usage['wakes']} wakes; GPU memory {intact} at the end."
    )
    names = (
        ("request that wakes the instance, by its caller", "caller_wake_ms"),
        ("8 requests at once that wake it, by their callers", "caller_burst_ms"),
        ("request to an awake instance, by its caller", "caller_warm_ms"),
        ("delay by a wake, as the gateway reports it", "gateway_wake_ms"),
        ("wake, from the GPU's grant to RUNNING", "agent_wake_ms"),
        ("freeze, from the decision to FROZEN", "agent_freeze_ms"),
    )
    yield _table(("", "ms"), ([text, _number(found[key])] for text, key in names))
    equal = "equal" if usage["scheduler_ns"] == usage["node_ns"] else "NOT equal"
    yield (
        f"Usage: {usage['active_ns'] / 1e9:.3f} s active, {usage['idle_ns'] / 1e9:.3f} s idle, "
        f"{usage['unbilled_ns'] / 1e9:.3f} s unbilled; the scheduler's sum and the node's are {equal}, in nanoseconds. "
        f"The program itself worked {usage['program_active_ns'] / 1e9:.3f} s."
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_clean(cell) for cell in line) + " |" for line in lines)


def _clean(text: str) -> str:
    """One line, and no end of a cell."""
    return "".join(char if char.isprintable() else " " for char in text).replace("|", "\\|")


def _known(value: object) -> str:
    return "unknown" if value is None else str(value)


def _seconds(figure: Mapping[str, Any] | None) -> str:
    if figure is None:
        return "none"
    spread = f"{_short_s(figure['min'])} to {_short_s(figure['max'])}"
    return f"{_short_s(figure['median'])} ({spread}, n {figure['n']})"


def _short_s(seconds: float) -> str:
    return f"{seconds:.2f} s" if abs(seconds) >= 1 else f"{seconds * 1000:.1f} ms"


def _number(figure: Mapping[str, Any] | None, factor: float = 1, unit: str = "") -> str:
    if figure is None:
        return "none"
    median, least, most = (f"{figure[key] * factor:.2f}" for key in ("median", "min", "max"))
    return f"{median}{unit} ({least} to {most}, n {figure['n']})"
