"""Runs magika on a model kept in device memory.

Reads the model's bytes back from the GPU before every inference, and builds the session from exactly these bytes. A
byte lost in a freeze and wake shows as a different digest, and usually as an error of onnxruntime or a different score.
"""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from typing import Any

import magika as magika_package
import onnxruntime
from magika import Magika

from agent.examples.device_memory import DeviceMemory
from agent.examples.pattern import PIECE_BYTES, pattern

DIGEST_CHARS = 16


def model_path() -> Path:
    """The ONNX file in the installed magika package."""
    model = Magika._get_default_model_name()
    return Path(magika_package.__file__).parent / "models" / model / "model.onnx"


def session_of(model: bytes) -> onnxruntime.InferenceSession:
    """A session on the CPU with one thread that does not spin: an instance must be idle between requests."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    onnxruntime.disable_telemetry_events()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


class _MagikaOf(Magika):
    """Magika's feature extraction, thresholds and labels around an existing session."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self._given = session
        super().__init__()

    def _init_onnx_session(self) -> Any:
        return self._given


def digest_of(model: bytes) -> str:
    return hashlib.sha256(model).hexdigest()[:DIGEST_CHARS]


def describe(result: Any, digest: str) -> dict[str, object]:
    """A magika result as JSON; `model` is the digest of the model's bytes."""
    output = result.output
    return {
        "label": str(output.label),
        "group": output.group,
        "mime": output.mime_type,
        "score": round(float(result.score), 6),
        "model": digest,
    }


class Identifier:
    """Detects file types. `extra_bytes` of pattern beside the model make freezes heavier."""

    def __init__(self, extra_bytes: int = 0) -> None:
        """Raises DeviceError if there is no GPU."""
        self._memory = DeviceMemory()
        self._model = self._memory.put(model_path().read_bytes())
        self._extra = [
            self._memory.put(pattern(min(PIECE_BYTES, extra_bytes - offset), offset))
            for offset in range(0, extra_bytes, PIECE_BYTES)
        ]
        self._lock = threading.Lock()
        self._digest = ""
        self._magika: Magika | None = None
        self._current()

    @property
    def vram_bytes(self) -> int:
        return self._model.size_bytes + sum(block.size_bytes for block in self._extra)

    def identify(self, content: bytes) -> dict[str, object]:
        """Raises onnxruntime's exceptions for a damaged model."""
        magika, digest = self._current()
        return describe(magika.identify_bytes(content), digest)

    def extra_is_intact(self) -> bool:
        """Compare the whole pattern."""
        return all(
            self._memory.get(block) == pattern(block.size_bytes, index * PIECE_BYTES)
            for index, block in enumerate(self._extra)
        )

    def _current(self) -> tuple[Magika, str]:
        """The detector for the model now in device memory; builds a session only when its bytes have changed."""
        model = self._memory.get(self._model)
        digest = digest_of(model)
        with self._lock:
            if self._magika is None or digest != self._digest:
                self._magika = None
                self._magika = _MagikaOf(session_of(model))
                self._digest = digest
            return self._magika, digest
