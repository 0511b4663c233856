"""`python -m agent.examples.ocr`: reads the text in a picture. Dockerfile and s.yaml are beside this file.

POST / or /invoke  a PNG's or JPEG's bytes -> {"text": [line, ...], "scores": [...], "model"}; 400 if it is no picture
POST /initialize   puts rapidocr's models into device memory

What is real: the text is recognised (rapidocr on onnxruntime), by sessions made from the bytes that were read back from
device memory; before every answer all of these bytes are read back again and digested (`model`).
What is not: the inference itself runs on the CPU, so that the example needs neither CUDA libraries nor a GPU that
computes: the driver alone, the emulated one too.
"""

from __future__ import annotations

from agent.examples.http_app import Answer, Request, as_json, serve
from agent.examples.ocr.model import NotAnImageError, Reader


class Ocr:
    """The handler. The models are loaded by /initialize, once an instance: they outlive every freeze."""

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
            return as_json({"error": "not initialized: configure the initializer, it loads the models"}, 503)
        if request.method != "POST":
            return as_json({"error": "POST a picture's bytes (PNG or JPEG)"}, 405)
        try:
            return as_json(self._reader.read(request.body))
        except NotAnImageError as error:
            return as_json({"error": str(error)}, 400)


if __name__ == "__main__":
    serve(Ocr())
