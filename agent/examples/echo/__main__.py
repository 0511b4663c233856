"""`python -m agent.examples.echo`: listens within 100 ms. For tests, benchmarks and experiments.

POST anything                -> the request's body
GET  /                       -> this instance: {"instance", "pid", "initialized", "served"}
GET  /headers                -> the request's headers as JSON
GET  /answer?n=7             -> a digest of device memory at a position chosen by n (of the pattern if VRAM_MIB is 0):
                                always the same on every instance, unless a byte of it was lost
GET  /verify                 -> 200 if every byte of device memory is unchanged, else 500
GET  /sleep?ms=100           -> answers after that time
GET  /sse?events=5&ms=20     -> server-sent events
GET  /bytes?n=1000           -> n bytes, streamed
GET  /status?code=418        -> that status
GET  /crash?code=3           -> exits with that code

$VRAM_MIB                    MiB of device memory filled at /initialize (0: without CUDA)
$INIT_STATUS $INIT_DELAY_MS  status and delay of POST /initialize
$PRE_FREEZE_STATUS $PRE_STOP_STATUS  status of those hooks
$NEVER_LISTEN=1              never opens the port
$EXIT_CODE                   exits at once with that code
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from collections.abc import Iterator

from agent.examples.device_memory import Block, DeviceMemory
from agent.examples.http_app import BINARY, Answer, Request, as_json, serve
from agent.examples.pattern import PIECE_BYTES, pattern

ANSWER_BYTES = 4096
MIB = 1 << 20


def _number(name: str, default: int = 0) -> int:
    return int(os.environ.get(name, str(default)))


class Echo:
    """The request handler; its state is the content of device memory."""

    def __init__(self) -> None:
        self._size = _number("VRAM_MIB") * MIB
        self._memory: DeviceMemory | None = None
        self._block: Block | None = None
        self._initialized = 0
        self._served = 0

    def __call__(self, request: Request) -> Answer:
        match request.path:
            case "/initialize":
                return self._initialize()
            case "/pre-freeze" | "/pre-stop":
                name = request.path[1:].replace("-", "_").upper()
                return Answer(_number(f"{name}_STATUS", 200))
            case "/healthz":
                return as_json({"status": "ok"})
            case _:
                pass
        self._served += 1
        return self._serve(request)

    def _initialize(self) -> Answer:
        time.sleep(_number("INIT_DELAY_MS") / 1000)
        status = _number("INIT_STATUS", 200)
        if status < 300 and self._size and self._block is None:
            self._memory = DeviceMemory()
            self._block = self._memory.put_pieces(
                self._size, (pattern(PIECE_BYTES, at) for at in range(0, self._size, PIECE_BYTES))
            )
        self._initialized += 1
        return as_json({"vram_bytes": self._size}, status)

    def _serve(self, request: Request) -> Answer:
        query = request.query
        match request.path:
            case "/headers":
                return as_json(dict(request.headers))
            case "/answer":
                return Answer(body=self._answer(int(query.get("n", "0"))).encode(), content_type="text/plain")
            case "/verify":
                return self._verify()
            case "/sleep":
                time.sleep(int(query.get("ms", "100")) / 1000)
                return as_json({"slept_ms": int(query.get("ms", "100"))})
            case "/sse":
                events = _events(int(query.get("events", "5")), int(query.get("ms", "20")) / 1000)
                return Answer(content_type="text/event-stream", parts=events)
            case "/bytes":
                return Answer(parts=_pieces(int(query.get("n", "1000"))))
            case "/status":
                return as_json({"status": query.get("code", "200")}, int(query.get("code", "200")))
            case "/crash":
                os._exit(int(query.get("code", "3")))
            case _:
                pass
        if request.method in ("POST", "PUT"):
            return Answer(body=request.body, content_type=request.headers.get("content-type", BINARY))
        return as_json(
            {
                "instance": os.environ.get("FC_INSTANCE_ID", ""),
                "pid": os.getpid(),
                "initialized": self._initialized,
                "served": self._served,
            }
        )

    def _answer(self, number: int) -> str:
        if self._memory is None or self._block is None:
            return expected_answer(number)
        offset = _offset(number, self._block.size_bytes)
        return hashlib.sha256(self._memory.get(self._block, offset, ANSWER_BYTES)).hexdigest()

    def _verify(self) -> Answer:
        """Compare in pieces: a copy of a large block would need as much host memory."""
        if self._memory is None or self._block is None:
            return as_json({"intact": True, "vram_bytes": 0})
        for offset in range(0, self._block.size_bytes, PIECE_BYTES):
            if self._memory.get(self._block, offset, PIECE_BYTES) != pattern(PIECE_BYTES, offset):
                return as_json(
                    {"intact": False, "vram_bytes": self._block.size_bytes, "corrupt_mib": offset // MIB}, 500
                )
        return as_json({"intact": True, "vram_bytes": self._block.size_bytes})


def _offset(number: int, size_bytes: int) -> int:
    return number * 7919 % (min(size_bytes, MIB) - ANSWER_BYTES)


def expected_answer(number: int) -> str:
    """The answer to /answer?n=number, for any size of device memory: it covers the first MiB."""
    return hashlib.sha256(pattern(ANSWER_BYTES, _offset(number, MIB))).hexdigest()


def _events(count: int, pause_s: float) -> Iterator[bytes]:
    for number in range(count):
        yield b"id: %d\ndata: event %d of %d\n\n" % (number, number + 1, count)
        time.sleep(pause_s)


def _pieces(size: int) -> Iterator[bytes]:
    while size > 0:
        yield b"x" * min(size, 65536)
        size -= 65536


def main() -> None:
    if "EXIT_CODE" in os.environ:
        print("echo: exiting with $EXIT_CODE", file=sys.stderr, flush=True)
        sys.exit(_number("EXIT_CODE"))
    if _number("NEVER_LISTEN"):
        print("echo: $NEVER_LISTEN is set, the port stays closed", file=sys.stderr, flush=True)
        signal.pause()
    serve(Echo())


if __name__ == "__main__":
    main()
