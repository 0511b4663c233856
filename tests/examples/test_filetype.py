"""The example with a real model: its answers equal magika's and depend on the bytes in device memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.examples.conftest import Start
from tests.fakes.emulated_driver import EmulatedNvidia, nvidia

__all__ = ["nvidia"]

pytest.importorskip("magika", reason="the extra `demo` is not installed")

FILES = {
    "script.py": b"import os\n\n\ndef main() -> None:\n    print(os.environ['HOME'])\n\n\nmain()\n" * 3,
    "page.html": b"<!doctype html><html><head><title>x</title></head><body><p>hello</p></body></html>" * 3,
    "prose.txt": b"It was a bright cold day in April, and the clocks were striking thirteen.\n" * 5,
    "empty": b"",
    "few": b"\x00\x01",
}


def test_answers_match_magika(start: Start, nvidia: EmulatedNvidia) -> None:
    from magika import Magika

    from agent.examples.filetype.model import describe, digest_of, model_path

    app = start("filetype", nvidia, VRAM_MIB="2")
    app.wait_until_listening()
    assert app.request("POST", "/", b"too early")[0] == 503
    model = model_path().read_bytes()
    assert app.json("POST", "/initialize") == (200, {"vram_bytes": len(model) + (2 << 20)})
    assert app.json("POST", "/initialize")[0] == 200, "asking again changes nothing"
    plain = Magika()
    for name, content in FILES.items():
        expected = describe(plain.identify_bytes(content), digest_of(model))
        assert app.json("POST", "/invoke", content) == (200, expected), name
    assert app.json("POST", "/", FILES["page.html"])[1]["label"] == "html"
    assert app.json("GET", "/verify") == (200, {"intact": True})
    assert app.request("GET", "/")[0] == 405
    assert len(app.logged(len(FILES) + 4)) == len(FILES) + 4


@pytest.mark.parametrize("offset", [0, 1_500_000], ids=["in the header", "among the weights"])
def test_flipped_byte_changes_the_answer(start: Start, nvidia: EmulatedNvidia, offset: int) -> None:
    app = start("filetype", nvidia)
    app.wait_until_listening()
    app.request("POST", "/initialize")
    before = app.json("POST", "/", FILES["page.html"])
    nvidia.control.flip_byte(app.process.pid, offset=offset)
    flipped = app.json("POST", "/", FILES["page.html"])
    assert flipped != before
    assert flipped[0] == 500 or flipped[1]["model"] != before[1]["model"]
    nvidia.control.flip_byte(app.process.pid, offset=offset)
    assert app.json("POST", "/", FILES["page.html"]) == before, "the byte is as it was, and so is the answer"


def test_initializer_fails_without_a_driver(start: Start, tmp_path: Path) -> None:
    app = start("filetype", LD_LIBRARY_PATH=str(tmp_path))
    app.wait_until_listening()
    status, answer = app.json("POST", "/initialize")
    assert status == 500
    assert "install the NVIDIA driver" in answer["error"]
