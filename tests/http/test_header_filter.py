"""Headers that pass from hop to hop, in any spelling."""

from __future__ import annotations

import pytest

from agent.http import header_filter
from agent.http.header_filter import hop_answer_headers, instance_answer_headers, request_headers


@pytest.mark.parametrize(
    "name",
    [
        b"x-fc-request-id",
        b"x_fc_request_id",
        b"x-fc_function-name",
        b"x-fc-",
        b"x-fc-status",
        b"x-hibernode-instance",
        b"x_hibernode_deadline_ms",
        b"connection",
        b"keep-alive",
        b"keep_alive",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"transfer_encoding",
        b"content_length",
        b"content-length",
        b"upgrade",
        b"proxy-authorization",
        b"proxy-connection",
        b"expect",
    ],
)
def test_request_headers_that_are_stripped(name: bytes) -> None:
    kept = [(b"host", b"f"), (b"x-a", b"1")]
    assert request_headers([kept[0], (name, b"spoof"), kept[1]]) == kept


@pytest.mark.parametrize(
    "name",
    [b"host", b"x-fcx", b"x-f-c-a", b"y-x-fc-a", b"cookie", b"authorization", b"x_a", b"accept-encoding", b"date"],
)
def test_request_headers_that_pass(name: bytes) -> None:
    assert request_headers([(name, b"1")]) == [(name, b"1")]


def test_headers_listed_by_connection_are_dropped_except_host() -> None:
    brought = [
        (b"host", b"f"),
        (b"connection", b"X-Hop, host , x_under"),
        (b"x-hop", b"1"),
        (b"connection", b"x-fc-request-id,y"),
        (b"y", b"1"),
        (b"x-under", b"1"),
        (b"z", b"1"),
        (b"z", b"2"),
    ]
    assert request_headers(brought) == [(b"host", b"f"), (b"z", b"1"), (b"z", b"2")]


def test_instance_answer_headers() -> None:
    dropped = [b"x-fc-request-id", b"x_fc_status", b"x-hibernode-refused", b"connection", b"keep-alive", b"date"]
    brought = [(name, b"1") for name in [*dropped, b"server", b"transfer-encoding", b"content-length"]]
    kept = [(b"x-fc-status", b"404"), (b"set-cookie", b"a"), (b"set-cookie", b"b"), (b"content-type", b"t")]
    assert instance_answer_headers(brought + kept) == kept


def test_hop_answer_headers() -> None:
    kept = [(b"x-fc-request-id", b"1"), (b"x-hibernode-wake-ms", b"3")]
    dropped = [(b"connection", b"close"), (b"content-length", b"3"), (b"date", b"now"), (b"Date", b"now")]
    assert hop_answer_headers([*kept, *dropped]) == kept


def test_verdict_caches_are_bounded() -> None:
    for number in range(5000):
        assert request_headers([(b"x-%d" % number, b"1")])
        assert not request_headers([(b"x-fc-%d" % number, b"1")])

    assert len(header_filter._REQUEST) <= header_filter._CACHE_SIZE
