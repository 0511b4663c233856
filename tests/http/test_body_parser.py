"""Body decoders: bodies cut at any byte are decoded, invalid ones refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.http.body_parser import BodyDecoder, ChunkedBody, CloseBody, LengthBody
from agent.http.errors import HttpError

WIRE = b"5\r\nhello\r\n1;note=yes\r\n,\r\n00A\r\n0123456789\r\n0\r\nx-sum: 1\r\n\r\n"
BODY = b"hello,0123456789"


def fed(decoder: BodyDecoder, *reads: bytes) -> tuple[bytes, bytes]:
    """The body, and the bytes after it."""
    out: list[bytes] = []
    for number, read in enumerate(reads):
        used = decoder.feed(read, 0, out)
        if decoder.done:
            return b"".join(out), read[used:] + b"".join(reads[number + 1 :])
        assert used == len(read)
    return b"".join(out), b""


def test_chunks_cut_at_every_byte() -> None:
    for cut in range(len(WIRE) + 1):
        decoder = ChunkedBody(100)
        assert fed(decoder, WIRE[:cut], WIRE[cut:] + b"GET /next") == (BODY, b"GET /next"), cut
        assert decoder.done


def test_chunks_byte_by_byte() -> None:
    decoder = ChunkedBody(100)
    assert fed(decoder, *(WIRE[i : i + 1] for i in range(len(WIRE)))) == (BODY, b"")
    assert decoder.done


@given(pieces=st.lists(st.binary(min_size=1, max_size=300), max_size=8), data=st.data())
def test_round_trip(pieces: list[bytes], data: st.DataObject) -> None:
    wire = b"".join(b"%X\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    cuts = sorted(data.draw(st.lists(st.integers(0, len(wire)), max_size=6)))
    reads = [wire[a:b] for a, b in zip([0, *cuts], [*cuts, len(wire)], strict=True)]
    body = b"".join(pieces)
    assert fed(ChunkedBody(len(body)), *reads, b"behind") == (body, b"behind")
    if body:
        with pytest.raises(HttpError) as caught:
            fed(ChunkedBody(len(body) - 1), *reads)
        assert caught.value.status == 413


@given(body=st.binary(min_size=1, max_size=300), data=st.data())
def test_length_round_trip(body: bytes, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(body)))
    assert fed(LengthBody(len(body)), body[:cut], body[cut:] + b"behind") == (body, b"behind")
    assert fed(CloseBody(), body[:cut], body[cut:]) == (body, b"")


@pytest.mark.parametrize(
    "wire",
    [
        b"+5\r\nhello\r\n",
        b"-5\r\nhello\r\n",
        b"0x5\r\nhello\r\n",
        b" 5\r\nhello\r\n",
        b"5 \r\nhello\r\n",
        b"5_0\r\nhello\r\n",
        b"\r\nhello\r\n",
        b";ext\r\nhello\r\n",
        b"g\r\n",
        b"5\nhello\r\n",
        b"5;a\nb\r\nhello\r\n",
        b"5;a\rb\r\nhello\r\n",
        b"5;" + b"e" * 300 + b"\r\nhello\r\n",
        b"123456789\r\n",  # nine digits
        b"FFFFFFFFFFFFFFFFF\r\n",
        b"5\r\nhelloo\r\n",
        b"5\r\nhello\n0\r\n\r\n",
        b"5\r\nhello0\r\n\r\n",
        b"0\r\nbad trailer\r\n\r\n",
        b"0\r\n folded: x\r\n\r\n",
        b"0\r\na: b\nc: d\r\n\r\n",
        b"0\r\n" + b"a: " + b"b" * 9000 + b"\r\n\r\n",
        b"0\r\n" + (b"a: " + b"b" * 1000 + b"\r\n") * 9 + b"\r\n",
    ],
)
def test_bad_chunks(wire: bytes) -> None:
    with pytest.raises(HttpError) as whole:
        fed(ChunkedBody(1000), wire + b"\r\n")
    with pytest.raises(HttpError) as cut:
        fed(ChunkedBody(1000), *(wire[i : i + 1] for i in range(len(wire))), b"\r\n")
    assert whole.value.status == cut.value.status == 400


def test_a_partial_line_is_refused_before_it_grows() -> None:
    decoder = ChunkedBody(1000)
    with pytest.raises(HttpError):
        fed(decoder, b"5;" + b"x" * 300)


def test_whole_reads_are_passed_on_without_a_copy() -> None:
    out: list[bytes] = []
    read = b"x" * 1000
    LengthBody(5000).feed(read, 0, out)
    CloseBody().feed(read, 0, out)
    assert out[0] is read
    assert out[1] is read
