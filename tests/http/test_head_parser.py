"""The strict parser: heads that it refuses, results for the others, and agreement with llhttp on these."""

from __future__ import annotations

import httptools
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.http.errors import HttpError
from agent.http.head_parser import check_partial, parse_request_head, parse_response_head, serialise
from agent.http.message import RequestHead

HOST = b"Host: f.localhost\r\n"

HOSTILE: dict[str, bytes] = {
    "two lengths": b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n",
    "two equal lengths": b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 1\r\nContent-Length: 1\r\n\r\n",
    "a list of lengths": b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 1, 1\r\n\r\n",
    "length +1": b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: +1\r\n\r\n",
    "length -1": b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: -1\r\n\r\n",
    "length 0x1": b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 0x1\r\n\r\n",
    "length 1_0": b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 1_0\r\n\r\n",
    "length empty": b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length:\r\n\r\n",
    "length huge": b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 99999999999999999999\r\n\r\n",
    "length beside chunks": b"POST / HTTP/1.1\r\n"
    + HOST
    + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunks beside length": b"POST / HTTP/1.1\r\n"
    + HOST
    + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
    "two encodings": b"POST / HTTP/1.1\r\n"
    + HOST
    + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
    "gzip, chunked": b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: gzip, chunked\r\n\r\n",
    "chunked, identity": b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked, identity\r\n\r\n",
    "xchunked": b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: xchunked\r\n\r\n",
    "identity": b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: identity\r\n\r\n",
    "encoding with vertical tab": b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: \x0bchunked\r\n\r\n",
    "chunks in HTTP/1.0": b"POST / HTTP/1.0\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n",
    "folded header": b"GET / HTTP/1.1\r\n" + HOST + b"X-A: b\r\n c\r\n\r\n",
    "tab-folded header": b"GET / HTTP/1.1\r\n" + HOST + b"X-A: b\r\n\tc\r\n\r\n",
    "folded first header": b"GET / HTTP/1.1\r\n Host: f.localhost\r\n\r\n",
    "bare LF in the head": b"GET / HTTP/1.1\r\n" + HOST + b"X-A: b\nX-B: c\r\n\r\n",
    "bare LF only": b"GET / HTTP/1.1\nHost: f.localhost\n\n",
    "bare CR in a value": b"GET / HTTP/1.1\r\n" + HOST + b"X-A: b\rX-B: c\r\n\r\n",
    "CR CR LF": b"GET / HTTP/1.1\r\n" + HOST + b"X-A: b\r\r\n\r\n",
    "NUL in a value": b"GET / HTTP/1.1\r\n" + HOST + b"X-A: b\0c\r\n\r\n",
    "DEL in a value": b"GET / HTTP/1.1\r\n" + HOST + b"X-A: b\x7fc\r\n\r\n",
    "escape in a value": b"GET / HTTP/1.1\r\n" + HOST + b"X-A: \x1b[2J\r\n\r\n",
    "space before the colon": b"GET / HTTP/1.1\r\n" + HOST + b"X-A : b\r\n\r\n",
    "tab before the colon": b"GET / HTTP/1.1\r\n" + HOST + b"X-A\t: b\r\n\r\n",
    "length with space before the colon": b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length : 5\r\n\r\nhello",
    "no colon": b"GET / HTTP/1.1\r\n" + HOST + b"X-A\r\n\r\n",
    "a known name without a colon": b"GET / HTTP/1.1\r\n" + HOST + b"Host\r\n\r\n",
    "empty name": b"GET / HTTP/1.1\r\n" + HOST + b": b\r\n\r\n",
    "non-ASCII name": b"GET / HTTP/1.1\r\n" + HOST + b"X-\xc3\xa4: b\r\n\r\n",
    "bracket in a name": b"GET / HTTP/1.1\r\n" + HOST + b"X[A]: b\r\n\r\n",
    "no Host": b"GET / HTTP/1.1\r\nX-A: b\r\n\r\n",
    "two Hosts": b"GET / HTTP/1.1\r\n" + HOST + HOST + b"\r\n",
    "two Hosts in HTTP/1.0": b"GET / HTTP/1.0\r\n" + HOST + HOST + b"\r\n",
    "Host with a space": b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n",
    "Host with a path": b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n",
    "Host with user info": b"GET / HTTP/1.1\r\nHost: u@a\r\n\r\n",
    "HTTP/0.9": b"GET /\r\n\r\n",
    "HTTP/0.9 with Host": b"GET /\r\n" + HOST + b"\r\n",
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/1.2": b"GET / HTTP/1.2\r\n" + HOST + b"\r\n",
    "HTTP/1.10": b"GET / HTTP/1.10\r\n" + HOST + b"\r\n",
    "lower case version": b"GET / http/1.1\r\n" + HOST + b"\r\n",
    "two spaces": b"GET  / HTTP/1.1\r\n" + HOST + b"\r\n",
    "tab for a space": b"GET\t/ HTTP/1.1\r\n" + HOST + b"\r\n",
    "space in the target": b"GET /a b HTTP/1.1\r\n" + HOST + b"\r\n",
    "space at the end": b"GET / HTTP/1.1 \r\n" + HOST + b"\r\n",
    "non-ASCII target": b"GET /\xc3\xa4 HTTP/1.1\r\n" + HOST + b"\r\n",
    "fragment": b"GET /#a HTTP/1.1\r\n" + HOST + b"\r\n",
    "no slash": b"GET a HTTP/1.1\r\n" + HOST + b"\r\n",
    "asterisk for GET": b"GET * HTTP/1.1\r\n" + HOST + b"\r\n",
    "authority form": b"CONNECT f.localhost:443 HTTP/1.1\r\n" + HOST + b"\r\n",
    "CONNECT to a path": b"CONNECT / HTTP/1.1\r\n" + HOST + b"\r\n",
    "another host in the target": b"GET http://evil/ HTTP/1.1\r\n" + HOST + b"\r\n",
    "another scheme in the target": b"GET ftp://f.localhost/ HTTP/1.1\r\n" + HOST + b"\r\n",
    "bad method": b"G(T / HTTP/1.1\r\n" + HOST + b"\r\n",
    "leading empty line": b"\r\nGET / HTTP/1.1\r\n" + HOST + b"\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 64,
    "response": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    "large headers": b"GET / HTTP/1.1\r\n" + HOST + b"X-A: " + b"b" * 8192 + b"\r\n\r\n",
    "many small headers": b"GET / HTTP/1.1\r\n" + HOST + b"a: b\r\n" * 1400 + b"\r\n",
    "large headers without an end": b"GET / HTTP/1.1\r\n" + HOST + b"X-A: " + b"b" * 9000,
    "long target": b"GET /" + b"a" * 4096 + b" HTTP/1.1\r\n" + HOST + b"\r\n",
    "long target without an end": b"GET /" + b"a" * 5000,
    "long query": b"GET /?" + b"a" * 4096 + b" HTTP/1.1\r\n" + HOST + b"\r\n",
}


def parse(raw: bytes) -> RequestHead:
    head, end, _ = raw.partition(b"\r\n\r\n")
    if not end:
        check_partial(raw, 8192, 4096)
        raise AssertionError("waits for more")
    return parse_request_head(head, 8192, 4096)


@pytest.mark.parametrize("raw", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_heads(raw: bytes) -> None:
    with pytest.raises(HttpError) as caught:
        parse(raw)
    assert caught.value.status == 400
    assert caught.value.code == "InvalidArgument"


def test_an_unknown_expectation_is_417() -> None:
    with pytest.raises(HttpError) as caught:
        parse(b"POST / HTTP/1.1\r\n" + HOST + b"Expect: 200-ok\r\n\r\n")
    assert caught.value.status == 417


def test_a_good_head() -> None:
    head = parse(
        b"POST /fn/x%20y/z?q=%7B HTTP/1.1\r\nHOST: f.localhost:8600\r\nX-Utf8:\t gr\xc3\xbcn \t\r\nAccept:\r\n"
        b"Content-Length: 007\r\nExpect: 100-Continue\r\nConnection: Upgrade, close\r\n\r\n"
    )
    assert head == RequestHead(
        method=b"POST",
        target=b"/fn/x%20y/z?q=%7B",
        headers=[
            (b"host", b"f.localhost:8600"),
            (b"x-utf8", b"gr\xc3\xbcn"),
            (b"accept", b""),
            (b"content-length", b"007"),
            (b"expect", b"100-Continue"),
            (b"connection", b"Upgrade, close"),
        ],
        length=7,
        chunked=False,
        expect_continue=True,
        keep_alive=False,
        http10=False,
    )
    assert head.path == b"/fn/x%20y/z"
    assert head.get(b"accept") == b""
    assert head.get(b"cookie") is None


@pytest.mark.parametrize(
    ("target", "method", "seen"),
    [
        (b"http://F.localhost/a?b", b"GET", b"/a?b"),
        (b"HTTP://f.localhost", b"GET", b"/"),
        (b"http://f.localhost?b", b"GET", b"/?b"),
        (b"*", b"OPTIONS", b"*"),
        (b"//a", b"GET", b"//a"),
    ],
)
def test_forms_of_a_target(target: bytes, method: bytes, seen: bytes) -> None:
    assert parse(b"%b %b HTTP/1.1\r\n%b\r\n" % (method, target, HOST)).target == seen


def test_http10() -> None:
    head = parse(b"GET / HTTP/1.0\r\n\r\n")
    assert not head.keep_alive
    assert head.http10


@pytest.mark.parametrize("end", range(1, 60))
def test_partial_valid_head_is_not_refused(end: int) -> None:
    raw = b"GET /a?b HTTP/1.1\r\nHost: f.localhost\r\nAccept: */*\r\n\r\n"
    check_partial(raw[: min(end, len(raw) - 2)], 8192, 4096)


class Llhttp:
    """A request as llhttp, Node's parser, reads it."""

    def __init__(self) -> None:
        self.headers: list[tuple[bytes, bytes]] = []
        self.target = b""
        self.complete = False

    def on_url(self, url: bytes) -> None:
        self.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self.complete = True


TEXT = st.sampled_from(
    [b"a", b"B-c", b"Host", b"content-length", b"Transfer-Encoding", b"chunked", b"5", b" ", b"\t", b"\r", b"\n", b":"]
    + [b"\r\n", b"\0", b"\xe4", b",", b"_", b"x-fc-a", b"close", b"Connection", b"\x0b", b"0", b"f.localhost", b"\r\n "]
)


@given(st.lists(st.lists(TEXT, max_size=6).map(b"".join), max_size=5))
def test_llhttp_agrees_with_every_accepted_head(lines: list[bytes]) -> None:
    raw = b"POST /a HTTP/1.1\r\nHost: f\r\n" + b"".join(line + b"\r\n" for line in lines) + b"\r\n"
    try:
        head = parse(raw)
    except (HttpError, AssertionError):
        return
    witness = Llhttp()
    parser = httptools.HttpRequestParser(witness)
    parser.feed_data(raw[: raw.index(b"\r\n\r\n") + 4])
    assert witness.complete
    assert [(name, value.strip()) for name, value in witness.headers] == head.headers
    assert witness.target == head.target
    assert parser.should_keep_alive() == head.keep_alive


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 1",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked",
        b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked",
        b"HTTP/1.1 200 OK\r\nX-A: b\nSet-Cookie: c",
        b"HTTP/1.1 200 OK\r\nX-A: b\r\n folded",
        b"HTTP/1.1 20 OK",
        b"HTTP/1.1 2000 OK",
        b"HTTP/1.1 000 OK",
        b"HTTP/2 200 OK",
        b"ICY 200 OK",
        b"HTTP/1.1 200 O\0K",
    ],
)
def test_broken_responses(raw: bytes) -> None:
    with pytest.raises(HttpError):
        parse_response_head(raw)


def test_a_response_without_a_reason() -> None:
    for raw in (b"HTTP/1.1 299", b"HTTP/1.1 299 "):
        head = parse_response_head(raw + b"\r\nConnection: close\r\nContent-Length: 3")
        assert (head.status, head.reason, head.length, head.keep_alive) == (299, b"", 3, False)
    assert not parse_response_head(b"HTTP/1.0 200 OK").keep_alive


@pytest.mark.parametrize("header", [(b"x", b"a\r\nb: c"), (b"x", b"a\nb"), (b"x\r", b"a")])
def test_header_with_a_line_break_is_never_sent(header: tuple[bytes, bytes]) -> None:
    with pytest.raises(ValueError, match="CR or LF"):
        serialise(b"HTTP/1.1 200 OK\r\n", [header], b"")
