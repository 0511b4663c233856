"""Runs rapidocr on models kept in device memory.

Reads the models' bytes back from the GPU before every answer, and builds the sessions from exactly these bytes. A byte
lost in a freeze and wake shows as a different digest, and usually as an error of onnxruntime or a different text.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from agent.examples.device_memory import DeviceMemory

DIGEST_CHARS = 16
PARTS = {"det_model_path": "Det", "cls_model_path": "Cls", "rec_model_path": "Rec"}
"""Argument of rapidocr -> section of its configuration: detection, orientation, recognition."""

QUIET = ("ORT_DISABLE_TELEMETRY", "OPENBLAS_NUM_THREADS")
"""Turns off onnxruntime's telemetry, and the thread per core of numpy and OpenCV: an instance must be idle between
requests, and each thread slows freezing and waking."""


class NotAnImageError(ValueError):
    """The request's body is no readable picture."""


class MissingPackageError(RuntimeError):
    """rapidocr is not installed; the message names the fix."""


def _rapidocr() -> Any:
    """Import the package lazily: that takes half a second, and only instances need it."""
    for variable in QUIET:
        os.environ.setdefault(variable, "1")
    try:
        import rapidocr_onnxruntime
    except ImportError as error:
        raise MissingPackageError(
            f"{error}: build the image of agent/examples/ocr/Dockerfile, or `pip install --no-deps -r` the "
            "requirements.txt in that folder"
        ) from error
    return rapidocr_onnxruntime


def model_paths() -> dict[str, Path]:
    """The ONNX files in the installed package, in the order of `PARTS`. Raises MissingPackageError."""
    folder = Path(_rapidocr().__file__).parent
    from rapidocr_onnxruntime.utils import read_yaml

    config = read_yaml(folder / "config.yaml")
    return {argument: folder / config[section]["model_path"] for argument, section in PARTS.items()}


@contextmanager
def _as_file(name: str, content: bytes) -> Iterator[str]:
    """A memory-backed path of `content`: rapidocr loads models by path only."""
    descriptor = os.memfd_create(name)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def engine_of(models: Mapping[str, bytes]) -> Any:
    """rapidocr with these models, on one thread that does not spin.

    Pictures keep their size; rapidocr's default enlarges small ones, which takes ten times as long. Raises
    onnxruntime's exceptions for bytes that are no model."""
    with ExitStack() as files:
        paths = {argument: files.enter_context(_as_file(argument, content)) for argument, content in models.items()}
        return _rapidocr().RapidOCR(**paths, intra_op_num_threads=1, inter_op_num_threads=1, det_limit_type="max")


def digest_of(models: Mapping[str, bytes]) -> str:
    """Digest of the models' bytes in order."""
    digest = hashlib.sha256()
    for content in models.values():
        digest.update(content)
    return digest.hexdigest()[:DIGEST_CHARS]


class Reader:
    """Reads one picture at a time. Raises DeviceError without a GPU, MissingPackageError."""

    def __init__(self) -> None:
        files = {argument: path.read_bytes() for argument, path in model_paths().items()}
        self._memory = DeviceMemory()
        self._models = {argument: self._memory.put(content) for argument, content in files.items()}
        self._lock = threading.Lock()
        self._digest = ""
        self._engine: Any = None
        self._current()

    @property
    def vram_bytes(self) -> int:
        return sum(block.size_bytes for block in self._models.values())

    def read(self, picture: bytes) -> dict[str, object]:
        """Lines from top to bottom with rapidocr's scores; `model` is the digest of the models' bytes.

        Raises NotAnImageError, and onnxruntime's exceptions for damaged models."""
        with self._lock:
            engine, digest = self._current()
            try:
                pixels = engine.load_img(picture)
            except Exception as error:
                raise NotAnImageError(f"not a readable picture: {type(error).__name__}: {error}") from error
            lines, _seconds = engine(pixels)
        lines = lines or []
        return {
            "text": [text for _box, text, _score in lines],
            "scores": [round(float(score), 4) for _box, _text, score in lines],
            "model": digest,
        }

    def _current(self) -> tuple[Any, str]:
        """The reader for the models now in device memory; builds sessions only when their bytes have changed."""
        models = {argument: self._memory.get(block) for argument, block in self._models.items()}
        digest = digest_of(models)
        if self._engine is None or digest != self._digest:
            self._engine = None
            self._engine = engine_of(models)
            self._digest = digest
        return self._engine, digest
