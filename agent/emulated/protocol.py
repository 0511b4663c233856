"""Messages between the C libraries and the driver process: `src/protocol.h` in Python (a test compares the two)."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

PROTOCOL = 2
MAX_DEVICES = 64
MAX_ALLOCATIONS = 65536
MAX_PAYLOAD = 32768
ACTIVITY_BUCKETS = 16
ACTIVITY_NS = 125000000


class MessageOp(IntEnum):
    """`enum emu_op`, which defines a, b and c for each."""

    HELLO_PROCESS = 1
    HELLO_RESTORE = 2
    DEVICES = 3
    DEVICE_STATUS = 4
    WATCH = 5
    EVENT = 6
    DEVICE_CHECK = 7
    ALLOC = 10
    FREE = 11
    MEMINFO = 12
    CONTEXT = 13
    GET_STATE = 20
    GET_RESTORE_THREAD = 21
    LOCK = 22
    CHECKPOINT = 23
    RESTORE = 24
    UNLOCK = 25
    HOLD = 26
    DO_PING = 30
    DO_LOCK = 31
    DO_CHECKPOINT = 32
    DO_RESTORE = 33
    DO_UNLOCK = 34


CHECKPOINT_OPS = frozenset(
    {
        MessageOp.GET_STATE,
        MessageOp.GET_RESTORE_THREAD,
        MessageOp.LOCK,
        MessageOp.CHECKPOINT,
        MessageOp.RESTORE,
        MessageOp.UNLOCK,
    }
)


class CuResult(IntEnum):
    """The CUresult codes of the emulated driver."""

    SUCCESS = 0
    INVALID_VALUE = 1
    OUT_OF_MEMORY = 2
    NOT_INITIALIZED = 3
    DEVICE_UNAVAILABLE = 46
    OPERATING_SYSTEM = 304
    ILLEGAL_STATE = 401
    NOT_READY = 600
    NOT_PERMITTED = 800
    NOT_SUPPORTED = 801
    UNKNOWN = 999


def result_of(status: int) -> CuResult:
    """The CuResult of a status from a socket; UNKNOWN for any other number."""
    return CuResult(status) if status in CuResult.__members__.values() else CuResult.UNKNOWN


class State(IntEnum):
    """CUprocessState. No process is in the last two here: only planned faults answer them."""

    RUNNING = 0
    LOCKED = 1
    CHECKPOINTED = 2
    FAILED = 3
    CHECKPOINTING = 4
    RESTORING = 5


class ComputeMode(IntEnum):
    """nvmlComputeMode_t (1 is obsolete): which processes may create contexts on a device."""

    DEFAULT = 0
    PROHIBITED = 2
    EXCLUSIVE_PROCESS = 3


_HEADER = struct.Struct("<IiQ6Q")
HEADER_BYTES = _HEADER.size


@dataclass(slots=True)
class Message:
    """One datagram. Not frozen, because creation time counts on this path."""

    op: int
    status: int = 0
    id: int = 0
    a: int = 0
    b: int = 0
    c: int = 0
    d: int = 0
    e: int = 0
    f: int = 0
    payload: bytes = b""

    def encode(self) -> bytes:
        return (
            _HEADER.pack(self.op, self.status, self.id, self.a, self.b, self.c, self.d, self.e, self.f) + self.payload
        )

    @classmethod
    def decode(cls, data: bytes) -> Message:
        """Raises `struct.error` for a datagram shorter than a header."""
        op, status, number, a, b, c, d, e, f = _HEADER.unpack_from(data)
        return cls(op, status, number, a, b, c, d, e, f, data[HEADER_BYTES:])


DEVICE = struct.Struct("<16s96sQ6I")
DEVICE_STATUS = struct.Struct("<QIi8I")
GPU_PROCESS = struct.Struct("<IIQ")
MAX_GPU_PROCESSES = (MAX_PAYLOAD - DEVICE_STATUS.size) // GPU_PROCESS.size
