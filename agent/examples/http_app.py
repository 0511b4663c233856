"""The HTTP side of an instance, by the Function Compute custom-container contract, in the standard library alone.

Listens on $FC_CUSTOM_LISTEN_PORT (default 9000) with keep-alive and no idle timeout. The contract defines
`POST /initialize`, `GET /pre-freeze`, `GET /pre-stop` and `GET /healthz`; the program defines the rest.

$LISTEN_HOST  address, default 127.0.0.1; in a container 0.0.0.0
$REQUEST_LOG  file for one JSON line per request: {"instance", "request_id", "start_ns", "end_ns"} on CLOCK_MONOTONIC,
              from reading the request line to sending the last bytes of the answer, without hooks and /healthz.
              Metering is checked against it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

MAX_BODY_BYTES = 64 << 20
MAX_CHUNK_LINE = 1024
BINARY = "application/octet-stream"
NOT_REQUESTS = frozenset({"/initialize", "/pre-freeze", "/pre-stop", "/healthz"})


@dataclass(frozen=True, slots=True)
class Request:
    """A handler's input. Header names are lower-case; `query` has the last value of each name."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Answer:
    """A handler's result. With `parts` the body is streamed (chunked), each part as soon as it exists."""

    status: int = 200
    body: bytes = b""
    content_type: str = BINARY
    parts: Iterable[bytes] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


def as_json(content: object, status: int = 200) -> Answer:
    return Answer(status, json.dumps(content).encode() + b"\n", "application/json")


class BadRequestError(Exception):
    """The request's body is malformed; the connection is closed after the answer."""


class RequestLog:
    """Appends to $REQUEST_LOG with one write() per line, so that several instances can share the file."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644) if path else -1
        self._instance = os.environ.get("FC_INSTANCE_ID", "")

    def add(self, request_id: str, start_ns: int, end_ns: int) -> None:
        if self._file >= 0:
            line = {"instance": self._instance, "request_id": request_id, "start_ns": start_ns, "end_ns": end_ns}
            os.write(self._file, json.dumps(line).encode() + b"\n")


def serve(handle: Callable[[Request], Answer]) -> None:
    """Serve until SIGTERM or SIGINT. An exception in `handle` is answered 500 with its text."""
    log = RequestLog(os.environ.get("REQUEST_LOG", ""))

    class Handler(_Handler):
        answer_to = staticmethod(handle)
        request_log = log

    host = os.environ.get("LISTEN_HOST", "127.0.0.1")
    port = int(os.environ.get("FC_CUSTOM_LISTEN_PORT") or os.environ.get("PORT") or "9000")
    signal.signal(signal.SIGTERM, lambda _number, _frame: os._exit(0))
    try:
        _Server((host, port), Handler).serve_forever()
    except KeyboardInterrupt:
        sys.exit(130)


class _Server(ThreadingHTTPServer):
    request_queue_size = 512

    def server_bind(self) -> None:
        """Bind without HTTPServer's DNS lookup of the host name."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log no traceback for a client that disconnects."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    answer_to: Callable[[Request], Answer]
    request_log: RequestLog
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 65536
    started_ns = 0

    def parse_request(self) -> bool:
        """Record the start: the request line has just been read."""
        self.started_ns = time.monotonic_ns()
        return super().parse_request()

    def handle_expect_100(self) -> bool:
        going_on = super().handle_expect_100()
        self.wfile.flush()
        return going_on

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Log nothing: requests are in $REQUEST_LOG."""

    def _exchange(self) -> None:
        url = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        try:
            body = self._read_body(headers)
            request = Request(self.command, url.path, dict(parse_qsl(url.query)), headers, body)
            answer = type(self).answer_to(request)
        except BadRequestError as error:
            self.close_connection = True
            answer = as_json({"error": str(error)}, 400)
        except ConnectionError:
            raise
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            print(f"{self.command} {url.path}: {message}", file=sys.stderr, flush=True)
            answer = as_json({"error": message}, 500)
        self._respond(answer)
        end_ns = time.monotonic_ns()  # before the answer: its reader must not see an end after it
        self.wfile.flush()
        if url.path not in NOT_REQUESTS:
            self.request_log.add(headers.get("x-fc-request-id", ""), self.started_ns, end_ns)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_HEAD = _exchange  # noqa: N815 - http.server's

    def _respond(self, answer: Answer) -> None:
        self.send_response_only(answer.status)
        self.send_header("Content-Type", answer.content_type)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if answer.parts is None:
            self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body)
            return
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for part in answer.parts:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(part), part))
            self.wfile.flush()
        self.wfile.write(b"0\r\n\r\n")

    # ---- request body -----------------------------------------------------------------------------------------

    def _read_body(self, headers: Mapping[str, str]) -> bytes:
        if "transfer-encoding" in headers:
            return self._read_chunks()
        try:
            length = int(headers.get("content-length", "0"))
        except ValueError:
            raise BadRequestError("Content-Length is not a number") from None
        if not 0 <= length <= MAX_BODY_BYTES:
            raise BadRequestError(f"Content-Length must be 0 to {MAX_BODY_BYTES}")
        return self._read_exactly(length)

    def _read_chunks(self) -> bytes:
        body = b""
        while size := self._chunk_size():
            if len(body) + size > MAX_BODY_BYTES:
                raise BadRequestError(f"the body is larger than {MAX_BODY_BYTES} bytes")
            body += self._read_exactly(size)
            self._read_exactly(2)
        while self.rfile.readline(MAX_CHUNK_LINE) not in (b"\r\n", b""):  # trailers
            pass
        return body

    def _chunk_size(self) -> int:
        line = self.rfile.readline(MAX_CHUNK_LINE).split(b";")[0].strip()
        try:
            return int(line, 16)
        except ValueError:
            raise BadRequestError("a chunk does not start with its size") from None

    def _read_exactly(self, size: int) -> bytes:
        content = self.rfile.read(size)
        if len(content) != size:
            raise ConnectionResetError("the client left in the middle of the body")
        return content
