"""Proves a GPU host within minutes, offline: `scripts/gpu-proof`, or `python -m agent.selftest.proof`.

Writes `proof.json` and `proof.md` into a folder, also if it is interrupted. Progress goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from agent import __version__
from agent.adapters.kernel.clock import SystemClock
from agent.core.types import GIB, SECOND_NS
from agent.exit_codes import ExitCode
from agent.selftest.proof.budget import allow
from agent.selftest.proof.document import make_document
from agent.selftest.proof.origin import origin_of
from agent.selftest.proof.page import make_page
from agent.selftest.proof.steps import MEMORY_CHANGED, NOT_RUN, PASSED, Options, Result, Steps, shares_of

CHECKOUT = Path(__file__).parents[3]
BUDGET_S = 480.0
WRITE_S = 10.0
"""Kept for the end of the last process and for writing."""
LEAST_BUDGET_S = 60.0

EPILOG = """\
What it does, each step with its own share of the time; what does not fit is reported as "not run":
  facts         driver, kernel module, GPU, PCIe, kernel, cgroup, rights, versions
  doctor        hibernode doctor
  selftest      each size: fill, freeze, wake, compare every byte; by the driver's API and, if it is installed,
                by the cuda-checkpoint program; beside a copy through pinned memory
  end to end    a scheduler, an agent and a function with GPU memory (PyTorch if a python3 has it): its
                requests, freezes and wakes, the answers, the usage
  cycles        many freezes of one process: equal bytes, drift of times, memory that grows

It needs no network. As root it can freeze with cgroups; otherwise it says what is missing. Stop an agent that
drives the GPU first. Nothing is left behind, also after Ctrl-C, which still writes what was measured.

exit status: 0 all that ran passed, 6 memory came back changed, 1 anything else
"""


class ProofRun:
    """One run of all steps. `rows`: name, outcome, reason, message, allowed_s, took_s and data of each so far."""

    def __init__(self, options: Options, clock: SystemClock) -> None:
        self._options = options
        self._clock = clock
        self._began_ns = clock.monotonic_ns()
        self._steps = Steps(options)
        self.rows: list[dict[str, Any]] = []

    def run(self) -> None:
        """All steps that fit into the time. An interrupt ends the current one, and the others are not run."""
        shares = shares_of(self._options)
        try:
            for index, share in enumerate(shares):
                self._step(share.name, share.need_s, allow(shares, index, self._left_s()))
        except KeyboardInterrupt:
            ignore_signals()
            when = "during"
            for share in shares[len(self.rows) :]:
                self._add(share.name, Result(NOT_RUN, "INTERRUPTED", f"the proof was interrupted {when} it"), None, 0.0)
                when = "before"

    def _step(self, name: str, need_s: float, allowed_s: float | None) -> None:
        begin_s = self.elapsed_s()
        if allowed_s is None:
            result = Result(NOT_RUN, "NO_TIME_LEFT", f"needs {need_s:.0f} s; {self._left_s():.0f} s are left")
        else:
            _say(f"[{begin_s:3.0f} s] {name}: at most {allowed_s:.0f} s")
            result = self._steps.run(name, allowed_s)
        self._add(name, result, allowed_s, self.elapsed_s() - begin_s)

    def _add(self, name: str, result: Result, allowed_s: float | None, took_s: float) -> None:
        remark = f", {result.message}" if result.message else ""
        _say(f"[{self.elapsed_s():3.0f} s] {name}: {result.outcome}{remark}")
        self.rows.append({"name": name, **asdict(result), "allowed_s": allowed_s, "took_s": took_s})

    def _left_s(self) -> float:
        return max(0.0, self._options.budget_s - WRITE_S - self.elapsed_s())

    def elapsed_s(self) -> float:
        return (self._clock.monotonic_ns() - self._began_ns) / SECOND_NS

    def document(self) -> dict[str, Any]:
        wall_s = self._clock.wall_ns() / SECOND_NS
        made = {
            "date": datetime.fromtimestamp(wall_s, UTC).isoformat(timespec="seconds"),
            "version": __version__,
            **origin_of(CHECKOUT, os.environ.get("HIBERNODE_CARRIED", "")),
            "budget_s": self._options.budget_s,
            "took_s": self.elapsed_s(),
            "sizes_bytes": list(self._options.sizes),
            "cycles": self._options.cycles,
            "gpu": self._options.gpu,
        }
        return make_document(made, self.rows, self._steps.known.without_utility)


def parse(arguments: Sequence[str] | None = None) -> tuple[Options, Path]:
    parser = argparse.ArgumentParser(
        prog="scripts/gpu-proof",
        description="Prove that this host freezes and wakes GPU instances without losing a byte, and how fast.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for proof.json and proof.md")
    parser.add_argument("--budget", type=float, default=BUDGET_S, metavar="S", help="seconds for everything [480]")
    parser.add_argument("--sizes", type=_sizes, default="0.25,1,8,32", metavar="GIB,...", help="[0.25,1,8,32]")
    parser.add_argument("--cycles", type=int, default=100, metavar="N", help="freezes of one process in a row [100]")
    parser.add_argument("--gpu", default="", metavar="GPU", help="UUID or index [the one with the most free memory]")
    found = parser.parse_args(arguments)
    if found.budget < LEAST_BUDGET_S:
        parser.error(f"--budget must be at least {LEAST_BUDGET_S:.0f} seconds")
    if not 2 <= found.cycles <= 1000:
        parser.error("--cycles must be 2 to 1000")
    return Options(found.sizes, found.cycles, found.gpu, found.budget), found.out


def _sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(sorted({round(float(word) * GIB) for word in text.split(",")}))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of GiB such as 0.25,1,8") from None
    if not 10 << 20 <= sizes[0] <= sizes[-1] <= 2048 * GIB:
        raise argparse.ArgumentTypeError("sizes must be 0.01 to 2048 GiB")
    return sizes


def write(document: dict[str, Any], folder: Path) -> None:
    """Each file appears whole or not at all."""
    texts = {"proof.json": json.dumps(document, indent=1) + "\n", "proof.md": make_page(document)}
    for name, text in texts.items():
        fresh = folder / f".{name}.new"
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(folder / name)


def ignore_signals() -> None:
    """The end is short and must not be cut off."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201 - progress


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    options, folder = parse()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".proof.json.new").touch()
    except OSError as error:
        _say(f"gpu-proof: {error.filename}: {error.strerror}; choose another --out")
        return ExitCode.USAGE
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    proof = ProofRun(options, SystemClock())
    proof.run()
    ignore_signals()
    document = proof.document()
    write(document, folder)
    _say(f"{document['outcome']}: {folder / 'proof.md'}, {folder / 'proof.json'}")
    return {PASSED: ExitCode.OK, MEMORY_CHANGED: ExitCode.MEMORY_CHANGED}.get(document["outcome"], ExitCode.UNEXPECTED)


if __name__ == "__main__":
    sys.exit(main())
