"""Strict parsing of heads (RFC 9112). A head that two parsers could read differently is refused.

Request smuggling needs one of these, all of which are refused: bare CR or LF, obs-fold, space before the colon, two
lengths, a length beside chunks. A head is checked as one piece (`bytes.translate` finds all control characters at
once), which costs less than a parser with callbacks. Accepted heads are serialised anew. The tests compare this parser
with llhttp, which must agree on every head that is accepted here.
"""

from __future__ import annotations

import re

from agent.http.errors import HttpError, malformed, too_large
from agent.http.message import Header, RequestHead, ResponseHead

HEAD_END = b"\r\n\r\n"
_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_is_token = re.compile(_TOKEN).fullmatch
# A target is visible ASCII without a fragment; `_origin_form` checks its form.
_request_line = re.compile(rb"(" + _TOKEN + rb") ([\x21\x22\x24-\x7e]+) HTTP/1\.([01])").fullmatch
_status_line = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9][0-9])(?: ([\t\x20-\x7e\x80-\xff]*))?").fullmatch
_is_host = re.compile(rb"[A-Za-z0-9\-._~%!$&'()*+,;=:\[\]]*").fullmatch
_is_length = re.compile(rb"[0-9]{1,15}").fullmatch
_absolute = re.compile(rb"https?://([^/?]+)(.*)", re.IGNORECASE).fullmatch
_VERSION = re.compile(rb"HTTP/[0-9.]+$")

# Control characters: CR and LF may stand only in a line's end, the others nowhere.
_CONTROLS = bytes(byte for byte in range(32) if byte != 9) + b"\x7f"
_FRAMING = frozenset((b"host", b"content-length", b"transfer-encoding", b"connection", b"expect"))
_NAMES: dict[bytes, bytes] = {}  # as written -> lower case, for names found valid
_NAMES_SIZE = 1024
_STATUS_LINES: dict[bytes, tuple[bool, int, bytes]] = {}  # as received -> whether HTTP/1.1, status, reason


def _fields(raw: bytes, lines: list[bytes]) -> tuple[list[Header], list[Header]]:
    """All header fields, and those that decide the framing. `lines` is `raw` split at CRLF."""
    if len(raw) - len(raw.translate(None, _CONTROLS)) != 2 * (len(lines) - 1):
        raise malformed("control character, or bare CR or LF, in the head")
    headers: list[Header] = []
    framing: list[Header] = []
    names = _NAMES
    for line in lines[1:]:
        written, colon, value = line.partition(b":")
        name = names.get(written)
        if name is None:
            name = _new_name(written, colon)
        elif not colon:
            raise malformed("header line without a colon")
        header = (name, value.strip(b" \t"))
        headers.append(header)
        if name in _FRAMING:
            framing.append(header)
    return headers, framing


def _new_name(written: bytes, colon: bytes) -> bytes:
    if not colon:
        raise malformed("header line without a colon")
    if _is_token(written) is None:
        if written[:1] in (b" ", b"\t"):
            raise malformed("folded header line")
        raise malformed("invalid character in a header name")
    name = written.lower()
    if len(_NAMES) < _NAMES_SIZE:
        _NAMES[written] = name
    return name


def parse_request_head(raw: bytes, header_bytes: int, target_bytes: int) -> RequestHead:
    """The head of a request. `raw` excludes the final CRLF CRLF. Raises HttpError 400 or 417."""
    lines = raw.split(b"\r\n")
    match = _request_line(lines[0])
    if match is None:
        raise _bad_request_line(lines[0])
    method, target, minor = match.groups()
    http10 = minor == b"0"
    if len(target) > target_bytes:
        raise too_large("Path and query are", target_bytes)
    if len(raw) - len(lines[0]) > header_bytes:
        raise too_large("The headers are", header_bytes)
    headers, framing = _fields(raw, lines)
    head = RequestHead(method, target, headers, None, False, False, not http10, http10)
    host = _read_framing(head, framing)
    if target[0] != 0x2F:
        head.target = _origin_form(method, target, host)
    elif method == b"CONNECT":
        raise malformed("CONNECT is not served")
    return head


def _read_framing(head: RequestHead, framing: list[Header]) -> bytes | None:
    """Sets the fields of `head` that framing headers decide; returns the Host."""
    host: bytes | None = None
    for name, value in framing:
        if name == b"host":
            if host is not None or _is_host(value) is None:
                raise malformed("more than one Host, or an invalid one")
            host = value
        elif name == b"content-length":
            if head.length is not None:
                raise malformed("more than one Content-Length")
            head.length = _length(value)
        elif name == b"transfer-encoding":
            if head.http10 or head.chunked or value.lower() != b"chunked":
                raise malformed("Transfer-Encoding other than a single 'chunked' in HTTP/1.1")
            head.chunked = True
        elif name == b"connection":
            if _has_close(value):
                head.keep_alive = False
        elif value.lower() != b"100-continue":
            raise HttpError(417, "InvalidArgument", "EXPECTATION_UNKNOWN", "Only 'Expect: 100-continue' is known.")
        else:
            head.expect_continue = not head.http10
    if head.chunked and head.length is not None:
        raise malformed("Content-Length beside Transfer-Encoding")
    if host is None and not head.http10:
        raise malformed("no Host")
    return host


def _origin_form(method: bytes, target: bytes, host: bytes | None) -> bytes:
    """The target as a path: `*` of OPTIONS unchanged, `http://host/path` as `/path` if its host equals the Host header.
    Raises HttpError 400 for anything else."""
    if target == b"*" and method == b"OPTIONS":
        return target
    match = _absolute(target)
    if match is None or method == b"CONNECT":
        raise malformed("the target is not a path")
    authority, rest = match.groups()
    if host is None or authority.lower() != host.lower():
        raise malformed("the target's host is not the Host header's")
    return bytes(rest) if rest.startswith(b"/") else b"/" + rest


def _bad_request_line(line: bytes) -> HttpError:
    version = _VERSION.search(line)
    if version is not None and version.group() not in (b"HTTP/1.0", b"HTTP/1.1"):
        return malformed("only HTTP/1.1 and HTTP/1.0 are served")
    return malformed("the request line is not 'METHOD target HTTP/1.1'")


def _length(value: bytes) -> int:
    if _is_length(value) is None:
        raise malformed("Content-Length is not a number of at most 15 digits")
    return int(value)


def _has_close(value: bytes) -> bool:
    if value == b"keep-alive":
        return False  # the usual value, without splitting it
    value = value.lower()
    return value == b"close" or b"close" in [token.strip(b" \t") for token in value.split(b",")]


def check_partial(raw: bytes, header_bytes: int, target_bytes: int) -> None:
    """Checks the beginning of a request's head, so that a client that will never send CRLF CRLF (HTTP/0.9, bare LF,
    TLS) is refused at once. Raises HttpError 400."""
    bare = raw[:-1] if raw.endswith(b"\r") else raw
    if len(bare) - len(bare.translate(None, _CONTROLS)) != 2 * bare.count(b"\r\n"):
        raise malformed("control character, or bare CR or LF, in the head")
    line, end, rest = raw.partition(b"\r\n")
    if end and _request_line(line) is None:
        raise _bad_request_line(line)
    if len(line) > target_bytes + 64:
        raise too_large("Path and query are", target_bytes)
    if len(rest) > header_bytes:
        raise too_large("The headers are", header_bytes)


def parse_response_head(raw: bytes) -> ResponseHead:
    """The head of a response. `raw` excludes the final CRLF CRLF. Raises HttpError; callers use its message and ignore
    its status, which is meant for requests."""
    lines = raw.split(b"\r\n")
    http11, status, reason = _STATUS_LINES.get(lines[0]) or _new_status_line(lines[0])
    headers, framing = _fields(raw, lines)
    head = ResponseHead(status, reason, headers, None, False, http11)
    for name, value in framing:
        if name == b"content-length":
            if head.length is not None:
                raise malformed("more than one Content-Length")
            head.length = _length(value)
        elif name == b"transfer-encoding":
            if head.chunked or not http11 or value.lower() != b"chunked":
                raise malformed("Transfer-Encoding other than a single 'chunked' in HTTP/1.1")
            head.chunked = True
        elif name == b"connection" and _has_close(value):
            head.keep_alive = False
    if head.chunked and head.length is not None:
        raise malformed("Content-Length beside Transfer-Encoding")
    return head


def _new_status_line(line: bytes) -> tuple[bool, int, bytes]:
    match = _status_line(line)
    if match is None:
        raise malformed("the status line is not 'HTTP/1.1 STATUS reason'")
    minor, status, reason = match.groups()
    parsed = (minor == b"1", int(status), reason or b"")
    if len(_STATUS_LINES) < 128:
        _STATUS_LINES[line] = parsed
    return parsed


def serialise(start_line: bytes, headers: list[Header], extra: bytes) -> bytes:
    """A head as bytes. `extra`: complete header lines, each with CRLF, for framing.

    Names and values must come from a parsed head or from constants. Raises ValueError for a CR or LF in one of them.
    """
    lines = b"".join([b"%b: %b\r\n" % header for header in headers])
    if lines.count(b"\r") != len(headers) or lines.count(b"\n") != len(headers):
        raise ValueError("CR or LF in a header to be sent")
    return b"%b%b%b\r\n" % (start_line, lines, extra)
