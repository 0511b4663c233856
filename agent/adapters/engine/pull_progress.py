"""Sums up an engine's pull messages in one progress sentence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from agent.core.types import GIB, MIB

MAX_LAYERS = 512


@dataclass(slots=True)
class _Layer:
    """One layer: bytes received, bytes in total (0 = unknown), and whether all of them are here."""

    current: int = 0
    total: int = 0
    complete: bool = False


class PullProgress:
    """Consumes each message of `POST /images/create`, in Docker's and in Podman's form."""

    def __init__(self, image: str) -> None:
        self._image = image
        self._layers: dict[str, _Layer] = {}
        self._last: object = None

    def update(self, message: Mapping[str, Any]) -> bool:
        """Add a message. Returns whether it is new: a repeated message is no progress."""
        layer_id, status = str(message.get("id") or ""), str(message.get("status") or "")
        detail = message.get("progressDetail")
        numbers = detail if isinstance(detail, dict) else {}
        current, total = _count(numbers.get("current")), _count(numbers.get("total"))
        news = (layer_id, status, current) != self._last
        self._last = (layer_id, status, current)
        if layer_id and (layer_id in self._layers or len(self._layers) < MAX_LAYERS):
            self._note(layer_id, status, current, total)
        return news

    def _note(self, layer_id: str, status: str, current: int, total: int) -> None:
        match status:
            case "Pulling fs layer" | "Waiting":
                self._layers.setdefault(layer_id, _Layer())
            case "Downloading":
                layer = self._layers.setdefault(layer_id, _Layer())
                layer.current, layer.total = max(layer.current, current), max(layer.total, total)
            case "Download complete" | "Verifying Checksum" | "Extracting" | "Pull complete" | "Already exists":
                layer = self._layers.setdefault(layer_id, _Layer())
                layer.current, layer.complete = layer.total, True
            case _:  # `Pulling from ...`, `Retrying in 5 seconds`, texts of later versions
                pass

    @property
    def downloading(self) -> bool:
        """Whether any layer is still being downloaded. True while no layer is known."""
        return not self._layers or not all(layer.complete for layer in self._layers.values())

    @property
    def sentence(self) -> str:
        """For example `pulling ocr:3: 45 % of 1.2 GiB`."""
        total = sum(layer.total for layer in self._layers.values())
        if not self.downloading:
            return f"unpacking {self._image}"
        if not total:
            return f"pulling {self._image}"
        received = sum(layer.current for layer in self._layers.values())
        return f"pulling {self._image}: {100 * received // total} % of {_size(total)}"


def _count(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 0


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{max(1, count // MIB)} MiB"
