"""The options of an emulated driver."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from agent.core.errors import InvalidArgumentError
from agent.core.gpus.speeds import CARDS
from agent.emulated.latency import Latency
from agent.emulated.protocol import MAX_DEVICES, ComputeMode

GIB = 1 << 30
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bandwidth(text: str) -> int:
    """Bytes per second of "8GB/s", "500MiB/s" or "0" (no limit). Raises InvalidArgumentError
    EMULATED_OPTION_INVALID."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?(?:/s)?", text.strip().lower())
    unit = _UNITS.get(found[2]) if found else None
    if found is None or unit is None:
        raise InvalidArgumentError(
            "EMULATED_OPTION_INVALID", f"{text!r} is no bandwidth; write it like 8GB/s, 500MiB/s or 0 (no limit)."
        )
    return int(float(found[1]) * unit)


def parse_compute_mode(text: str) -> ComputeMode:
    """A compute mode by nvidia-smi's name in any case: DEFAULT, PROHIBITED, EXCLUSIVE_PROCESS (or exclusive).

    Raises InvalidArgumentError EMULATED_OPTION_INVALID."""
    name = text.strip().upper().replace("-", "_")
    name = "EXCLUSIVE_PROCESS" if name == "EXCLUSIVE" else name
    if name not in ComputeMode.__members__:
        raise InvalidArgumentError(
            "EMULATED_OPTION_INVALID", f"{text!r} is no compute mode; use DEFAULT, EXCLUSIVE_PROCESS or PROHIBITED."
        )
    return ComputeMode[name]


@dataclass(frozen=True, slots=True)
class Options:
    """`directory` holds the sockets, the libraries and the identity of the GPUs; it may be bind-mounted.

    bandwidth_bytes_s: of a restore, 0 = the speed of memory; a checkpoint takes 2.5 times as long. card: a name in
    core.gpus.speeds.CARDS, whose speeds it has instead; "" = none. fixed_us: added to every lock, checkpoint,
    restore and unlock. mig: MIG mode, if the model has it."""

    directory: Path
    gpus: int = 2
    profile: str = "580"
    memory_bytes: int = 16 * GIB
    model: str = "T4"
    persistence: bool = True
    mig: bool = False
    compute_mode: ComputeMode = ComputeMode.DEFAULT
    bandwidth_bytes_s: int = 0
    fixed_us: int = 0
    card: str = ""
    cache_directory: Path | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.gpus <= MAX_DEVICES:
            raise InvalidArgumentError("EMULATED_OPTION_INVALID", f"gpus must be 1 to {MAX_DEVICES}.")
        if not 2 << 20 <= self.memory_bytes <= 1 << 40:
            raise InvalidArgumentError("EMULATED_OPTION_INVALID", "A GPU's memory must be 2 MiB to 1 TiB.")
        if self.bandwidth_bytes_s < 0 or self.fixed_us < 0:
            raise InvalidArgumentError("EMULATED_OPTION_INVALID", "Bandwidth and fixed time can't be negative.")
        if self.card and (self.card not in CARDS or self.bandwidth_bytes_s):
            raise InvalidArgumentError(
                "EMULATED_OPTION_INVALID",
                f"There are speeds of the cards {', '.join(CARDS)}; with a card there is no bandwidth to be set.",
            )

    @property
    def latency(self) -> Latency:
        return Latency(self.fixed_us, self.bandwidth_bytes_s, CARDS.get(self.card))
