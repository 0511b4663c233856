"""The OCR example on a stand-in for rapidocr; tests/engines/test_ocr.py has the real one, in containers."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from agent.cli.fc3.load import load_s_yaml
from agent.core.types import SECOND_NS, IdleMode
from tests.examples.conftest import Program, Start
from tests.examples.rapidocr_stand_in import MODELS, write_package
from tests.fakes.emulated_driver import EmulatedNvidia, nvidia

__all__ = ["nvidia"]

EXAMPLE = Path(__file__).parents[2] / "agent" / "examples" / "ocr"
MODEL = hashlib.sha256(b"".join(MODELS.values())).hexdigest()[:16]
READ = {
    "text": ["found the moon", "turned the moon", "read the moon"],
    "scores": [0.9877, 0.9877, 0.9877],
    "model": MODEL,
}


@pytest.fixture
def ocr(start: Start, nvidia: EmulatedNvidia, tmp_path: Path) -> Program:
    """The example with the stand-in, listening."""
    app = start("ocr", nvidia, PYTHONPATH=str(write_package(tmp_path / "packages")))
    app.wait_until_listening()
    return app


def test_uses_the_models_in_device_memory(ocr: Program, nvidia: EmulatedNvidia) -> None:
    assert ocr.request("POST", "/", b"picture too early")[0] == 503
    assert "rapidocr is loaded" not in ocr.stderr.read_text(), "it listens before it loads anything"
    vram_bytes = sum(map(len, MODELS.values()))
    assert ocr.json("POST", "/initialize") == (200, {"vram_bytes": vram_bytes})
    assert ocr.json("POST", "/initialize") == (200, {"vram_bytes": vram_bytes}), "asking again changes nothing"
    held = {process.pid: process.vram_bytes for process in nvidia.control.processes()}
    assert sum(held[ocr.process.pid].values()) >= vram_bytes

    assert ocr.json("POST", "/invoke", b"picture the moon") == (200, READ)
    assert ocr.json("POST", "/", b"picture the moon") == (200, READ)
    assert ocr.json("POST", "/", b"picture ") == (200, {"text": [], "scores": [], "model": MODEL}), "an empty page"
    assert ocr.request("GET", "/")[0] == 405
    assert [ocr.request("GET", path)[0] for path in ("/pre-freeze", "/healthz", "/pre-stop")] == [200, 200, 200]
    assert ocr.stderr.read_text().count("sessions are built") == 1, "they last as long as their bytes do"


def test_invalid_picture_is_answered_400(ocr: Program) -> None:
    ocr.request("POST", "/initialize")
    status, answer = ocr.json("POST", "/", b"%PDF-1.7")
    assert (status, answer["error"]) == (400, "not a readable picture: OSError: cannot identify image file")
    assert ocr.json("POST", "/", b"picture the moon") == (200, READ)


@pytest.mark.parametrize(
    ("model", "offset", "expected"),
    [
        (1, 5, {"text": ["found the moon", "\x8burned the moon", "read the moon"], "error": None}),
        (2, 200, {"text": READ["text"], "error": None}),
        (0, 1, {"text": None, "error": "RuntimeError: INVALID_PROTOBUF"}),
    ],
    ids=["in what is used", "where it changes no text", "in the header"],
)
def test_flipped_byte_of_any_model_changes_the_answer(
    ocr: Program, nvidia: EmulatedNvidia, model: int, offset: int, expected: object
) -> None:
    ocr.request("POST", "/initialize")
    assert ocr.json("POST", "/", b"picture the moon") == (200, READ)
    place = sum(map(len, list(MODELS.values())[:model])) + offset
    nvidia.control.flip_byte(ocr.process.pid, offset=place)
    status, answer = ocr.json("POST", "/", b"picture the moon")
    assert {"text": answer.get("text"), "error": answer.get("error")} == expected
    assert status == (500 if "error" in answer else 200)
    assert answer.get("model") != MODEL
    nvidia.control.flip_byte(ocr.process.pid, offset=place)
    assert ocr.json("POST", "/", b"picture the moon") == (200, READ), "the byte is as it was, and so is the answer"


def test_initializer_without_rapidocr_names_the_fix(start: Start, nvidia: EmulatedNvidia, tmp_path: Path) -> None:
    """A package whose import fails, whether or not the real one is installed."""
    package = tmp_path / "packages" / "rapidocr_onnxruntime"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('libGL.so.1: cannot open shared object file')\n")
    app = start("ocr", nvidia, PYTHONPATH=str(package.parent))
    app.wait_until_listening()
    status, answer = app.json("POST", "/initialize")
    assert status == 500
    assert "libGL.so.1" in answer["error"]
    assert "build the image of agent/examples/ocr/Dockerfile" in answer["error"]
    assert app.request("POST", "/", b"picture the moon")[0] == 503


def test_initializer_fails_without_a_driver(start: Start, tmp_path: Path) -> None:
    app = start("ocr", PYTHONPATH=str(write_package(tmp_path / "packages")), LD_LIBRARY_PATH=str(tmp_path))
    app.wait_until_listening()
    status, answer = app.json("POST", "/initialize")
    assert status == 500
    assert "install the NVIDIA driver" in answer["error"]


def test_s_yaml_matches_the_dockerfile() -> None:
    (found,) = load_s_yaml(EXAMPLE / "s.yaml", environment={})
    assert not found.warnings
    assert found.function.image in (EXAMPLE / "Dockerfile").read_text(), "the name to build it by"
    assert found.function.hooks.initializer is not None
    assert found.function.idle.mode is IdleMode.REQUIRE
    assert found.function.idle.freeze_after_ns == 10 * SECOND_NS


def test_dockerfile_copies_existing_files() -> None:
    context = EXAMPLE.parents[1]
    copied = [line.split()[1] for line in (EXAMPLE / "Dockerfile").read_text().splitlines() if line.startswith("COPY ")]
    assert len(copied) == 3
    assert all((context / path).exists() for path in copied)
