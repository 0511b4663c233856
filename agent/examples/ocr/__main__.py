"""`python -m agent.examples.ocr`: reads the text in a picture. Dockerfile and s.yaml are in this folder.

POST / or /invoke  a PNG's or JPEG's bytes -> {"text": [line, ...], "scores": [...], "model"}; 400 if it is no picture
POST /initialize   loads rapidocr's models into device memory

Before every answer, all bytes of the models are read back from device memory and digested (`model`), and the
recognition (rapidocr on onnxruntime) runs on sessions built from them. Only the inference itself runs on the CPU, so
that the example needs no CUDA libraries and no GPU that computes: any driver will do, even the emulated one.
"""

from __future__ import annotations

from agent.examples.http_app import Answer, Request, as_json, serve
from agent.examples.ocr.model import NotAnImageError, Reader


class Ocr:
    """The request handler. /initialize loads the models once per instance; they survive every freeze."""

    def __init__(self) -> None:
        self._reader: Reader | None = None

    def __call__(self, request: Request) -> Answer:
        match request.path:
            case "/initialize":
                if self._reader is None:
                    self._reader = Reader()
                return as_json({"vram_bytes": self._reader.vram_bytes})
            case "/healthz" | "/pre-freeze" | "/pre-stop":
                return as_json({"status": "ok"})
            case _:
                pass
        if self._reader is None:
            return as_json({"error": "not initialized: configure the initializer, which loads the models"}, 503)
        if request.method != "POST":
            return as_json({"error": "POST a picture's bytes (PNG or JPEG)"}, 405)
        try:
            return as_json(self._reader.read(request.body))
        except NotAnImageError as error:
            return as_json({"error": str(error)}, 400)


if __name__ == "__main__":
    serve(Ocr())
