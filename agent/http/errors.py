"""Translates errors into HTTP answers. No other module maps a `HibernodeError` to a status.

Body `{"RequestId", "Code", "Message"}` and header `x-fc-request-id` are Function Compute's. `Code` is the error's
reason in PascalCase (QUEUE_TIMEOUT -> QueueTimeout), but InvalidArgument for every 400 and ResourceExhausted for every
429, the codes that its clients look for.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from agent.core import errors as core
from agent.core.sizes import size_text
from agent.http.message import Header

_STATUS: tuple[tuple[type[core.HibernodeError], int], ...] = (
    (core.InvalidArgumentError, 400),
    (core.UnauthenticatedError, 401),
    (core.PermissionDeniedError, 403),
    (core.NotFoundError, 404),
    (core.ConflictError, 409),
    (core.PreconditionError, 409),
    (core.ExhaustedError, 429),
    (core.UnsupportedError, 501),
    (core.InstanceError, 502),
    (core.UnavailableError, 503),
    (core.DeadlineError, 504),
)
_FIXED_CODE = {400: "InvalidArgument", 429: "ResourceExhausted"}


class HttpError(core.HibernodeError):
    """A refusal specific to HTTP (malformed, too large, too slow), with its own status and code."""

    def __init__(self, status: int, code: str, reason: str, message: str) -> None:
        super().__init__(reason, message)
        self.status = status
        self.code = code


class ClientGoneError(core.UnavailableError):
    """The client closed its connection before its request was read; there is no one to answer."""

    def __init__(self) -> None:
        super().__init__("CLIENT_GONE", "the client closed the connection before its request ended")


class ConnectFailedError(core.UnavailableError):
    """No connection to the upstream: nothing was sent, so the request may go elsewhere."""


class UpstreamTimeoutError(core.DeadlineError):
    """The upstream did not answer in time; its connection was closed."""


class UpstreamBrokenError(core.InstanceError):
    """The upstream closed the connection or broke HTTP before its answer was complete."""


def malformed(what: str) -> HttpError:
    """400: the request is invalid or ambiguous. The connection is closed afterwards."""
    return HttpError(400, "InvalidArgument", "MALFORMED_REQUEST", f"The request is not valid HTTP/1.1: {what}.")


def too_large(what: str, limit_bytes: int) -> HttpError:
    """400: headers or target over their limit."""
    message = f"{what} larger than the limit of {size_text(limit_bytes)}."
    return HttpError(400, "InvalidArgument", "REQUEST_HEAD_TOO_LARGE", message)


def too_many_connections() -> core.UnavailableError:
    """503: the server is at its limit of connections."""
    return core.UnavailableError("TOO_MANY_CONNECTIONS", "Too many connections; try again later.")


def body_too_large(limit_bytes: int) -> HttpError:
    """413: the body is over its limit."""
    message = f"The body is larger than the limit of {size_text(limit_bytes)}."
    return HttpError(413, "RequestEntityTooLarge", "REQUEST_BODY_TOO_LARGE", message)


def too_slow(what: str, seconds: float) -> HttpError:
    """408: `what` did not arrive within `seconds`."""
    return HttpError(408, "RequestTimeout", "REQUEST_TIMEOUT", f"{what} did not arrive within {seconds:g} seconds.")


@dataclass(frozen=True, slots=True)
class ErrorAnswer:
    """The arguments of `Exchange.answer` for an error."""

    status: int
    headers: list[Header]
    body: bytes


def status_and_code(error: BaseException) -> tuple[int, str]:
    """HTTP status and `Code` of an error; 500 InternalServerError for all but a HibernodeError."""
    if isinstance(error, HttpError):
        return error.status, error.code
    if isinstance(error, core.HibernodeError):
        for kind, status in _STATUS:
            if isinstance(error, kind):
                return status, _FIXED_CODE.get(status) or "".join(p.capitalize() for p in error.reason.split("_"))
    return 500, "InternalServerError"


def error_answer(error: BaseException, request_id: str, *, retry_after_s: int | None = None) -> ErrorAnswer:
    """The JSON answer for `error`.

    A 429 carries `Retry-After` (1 s by default), another status only if `retry_after_s` is given. An InstanceError, the
    function's own fault, carries `x-fc-error-type`, by which clients recognise it. No text of an unknown error is sent.
    """
    status, code = status_and_code(error)
    if isinstance(error, core.HibernodeError):
        message = error.message
    else:
        message = "An internal error occurred; the server's log has the details."
    body = json.dumps({"RequestId": request_id, "Code": code, "Message": message}).encode()
    headers = [(b"content-type", b"application/json"), (b"x-fc-request-id", request_id.encode("ascii"))]
    if isinstance(error, core.InstanceError):
        headers.append((b"x-fc-error-type", code.encode()))
    if status == 429 or retry_after_s is not None:
        headers.append((b"retry-after", str(retry_after_s or 1).encode()))
    return ErrorAnswer(status, headers, body)
