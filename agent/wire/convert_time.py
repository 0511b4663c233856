"""Wall-clock times: integer nanoseconds since 1970 UTC <-> `google.protobuf.Timestamp`."""

from __future__ import annotations

from google.protobuf.timestamp_pb2 import Timestamp

from agent.core.errors import InvalidArgumentError
from agent.core.types import SECOND_NS

# The range of Timestamp: the years 1 to 9999.
MIN_SECONDS = -62_135_596_800
MAX_SECONDS = 253_402_300_799


def time_to_proto(wall_ns: int) -> Timestamp:
    """Raises InvalidArgumentError outside of the years 1 to 9999."""
    seconds, nanos = divmod(wall_ns, SECOND_NS)
    _check(seconds, nanos)
    return Timestamp(seconds=seconds, nanos=nanos)


def time_from_proto(time: Timestamp) -> int:
    """Nanoseconds since 1970 UTC. Raises InvalidArgumentError for a malformed Timestamp."""
    _check(time.seconds, time.nanos)
    return time.seconds * SECOND_NS + time.nanos


def _check(seconds: int, nanos: int) -> None:
    if not (MIN_SECONDS <= seconds <= MAX_SECONDS and 0 <= nanos < SECOND_NS):
        message = f"{seconds} s and {nanos} ns since 1970 is not a time; send one between the years 1 and 9999"
        raise InvalidArgumentError("INVALID_TIME", message)
