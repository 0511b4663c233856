"""Routes: which function a request is for, and what the instance sees of it (agent/docs/design.md).

| the client asks | the instance sees | x-fc-control-path |
|---|---|---|
| any method and path with `Host: <function>.<domain>` | the same | /http-invoke |
| any method, `/fn/<function>/<path>` | `/<path>` | /http-invoke |
| GET or HEAD, `/fn/<function>` | nothing; 308 to `/fn/<function>/`, for the relative links of a page | |
| `POST /2023-03-30/functions/<function>/invocations` | `POST /invoke` | /invoke |
"""

from __future__ import annotations

from dataclasses import dataclass

from agent.core.errors import NotFoundError
from agent.http.errors import HttpError
from agent.http.message import RequestHead

HTTP_INVOKE = b"/http-invoke"
INVOKE = b"/invoke"
_PREFIX = b"/fn/"
_API = b"/2023-03-30/functions/"
_INVOCATIONS = b"/invocations"


@dataclass(frozen=True, slots=True)
class Route:
    """`target`: path and query for the instance. `control_path`: value of x-fc-control-path. `by_host`: the name
    comes from a host name, in which its case may have been lost. `location`: what to redirect to instead, or empty."""

    function: str
    target: bytes
    control_path: bytes
    by_host: bool = False
    location: bytes = b""


class Router:
    """Routes for one domain; with `localhost`, a function's host name is `<function>.localhost`."""

    def __init__(self, domain: str) -> None:
        self._suffix = b"." + domain.lower().encode()

    def route(self, head: RequestHead) -> Route:
        """Find the route. Raises NotFoundError FUNCTION_NOT_FOUND, or HttpError 405 for an invocation not by POST."""
        host = head.get(b"host") or b""
        name = self._by_host(host)
        if name:
            return Route(name, head.target, HTTP_INVOKE, by_host=True)
        target = head.target
        if target.startswith(_PREFIX):
            return _by_prefix(head.method, target)
        if target.startswith(_API):
            return _invocation(head)
        raise NotFoundError(
            "FUNCTION_NOT_FOUND",
            "no function at this address; use /fn/<function>/, or the host name <function>" + self._suffix.decode(),
        )

    def _by_host(self, host: bytes) -> str:
        """The function of `<function>.<domain>`, with or without port and final dot, ignoring the domain's case; ""
        for any other host."""
        name, colon, port = host.rpartition(b":")
        if not colon or (port and not port.isdigit()):
            name = host
        name = name.removesuffix(b".")
        return name[: -len(self._suffix)].decode("latin-1") if name.lower().endswith(self._suffix) else ""


def _by_prefix(method: bytes, target: bytes) -> Route:
    end = len(target)
    for mark in (b"/", b"?"):
        at = target.find(mark, len(_PREFIX))
        end = at if 0 <= at < end else end
    name, rest, location = target[len(_PREFIX) : end].decode("latin-1"), target[end:], b""
    if not rest.startswith(b"/"):
        rest = b"/" + rest
        location = target[:end] + rest if method in (b"GET", b"HEAD") else b""
    return Route(name, rest, HTTP_INVOKE, location=location)


def _invocation(head: RequestHead) -> Route:
    name, _, tail = head.path[len(_API) :].partition(b"/")
    if b"/" + tail != _INVOCATIONS:
        raise NotFoundError(
            "FUNCTION_NOT_FOUND", "functions are invoked at /2023-03-30/functions/<function>/invocations"
        )
    if head.method != b"POST":
        raise method_not_allowed(head.method)
    return Route(name.decode("latin-1"), INVOKE, INVOKE)


def method_not_allowed(method: bytes) -> HttpError:
    """HTTP 405: an invocation that is not a POST, or a method that the function's triggers do not allow."""
    text = f"{method.decode('latin-1')} is not allowed by the function's HTTP trigger, or for an invocation (send POST)"
    return HttpError(405, "MethodNotAllowed", "METHOD_NOT_ALLOWED", text)
