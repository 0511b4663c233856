"""`python -m agent.examples.filetype` (extra `demo`): detects the type of a file.

POST / or /invoke  a file's bytes -> {"label", "group", "mime", "score", "model"}
GET  /verify       checks the extra pattern in device memory
POST /initialize   loads the model, and $VRAM_MIB of pattern, into device memory
"""

from __future__ import annotations

import os

from agent.examples.http_app import Answer, Request, as_json, serve


class FileType:
    """The request handler. /initialize loads the model once per instance; it survives every freeze."""

    def __init__(self) -> None:
        from agent.examples.filetype.model import Identifier

        self._make = Identifier
        self._identifier: Identifier | None = None

    def __call__(self, request: Request) -> Answer:
        match request.path:
            case "/initialize":
                if self._identifier is None:
                    self._identifier = self._make(int(os.environ.get("VRAM_MIB", "0")) << 20)
                return as_json({"vram_bytes": self._identifier.vram_bytes})
            case "/healthz" | "/pre-freeze" | "/pre-stop":
                return as_json({"status": "ok"})
            case _:
                pass
        if self._identifier is None:
            return as_json({"error": "not initialized: configure the initializer, which loads the model"}, 503)
        if request.path == "/verify":
            intact = self._identifier.extra_is_intact()
            return as_json({"intact": intact}, 200 if intact else 500)
        if request.method != "POST":
            return as_json({"error": "POST a file's bytes"}, 405)
        return as_json(self._identifier.identify(request.body))


if __name__ == "__main__":
    serve(FileType())
