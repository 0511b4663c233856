"""Translates a `HibernodeError` to a gRPC status and back. No other module does.

On the wire an error has the code of its class, its message, and a `google.rpc.ErrorInfo` with its reason, the domain
`hibernode` and its metadata. A status without an ErrorInfo of this domain comes from gRPC itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]  # no py.typed
from grpc import aio
from grpc_status import rpc_status

from agent.core.errors import (
    ConflictError,
    DeadlineError,
    ExhaustedError,
    HibernodeError,
    InstanceError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
    UnavailableError,
    UnsupportedError,
)

DOMAIN = "hibernode"
DETAILS_KEY = "grpc-status-details-bin"

# gRPC peers refuse more than 8 KiB of metadata; percent-encoding may triple the message, which travels twice.
MAX_MESSAGE_CHARS = 1000
MAX_METADATA_ENTRIES = 16
MAX_METADATA_CHARS = 100

CODE_OF_CLASS: dict[type[HibernodeError], grpc.StatusCode] = {
    InvalidArgumentError: grpc.StatusCode.INVALID_ARGUMENT,
    UnauthenticatedError: grpc.StatusCode.UNAUTHENTICATED,
    PermissionDeniedError: grpc.StatusCode.PERMISSION_DENIED,
    NotFoundError: grpc.StatusCode.NOT_FOUND,
    ConflictError: grpc.StatusCode.ALREADY_EXISTS,
    PreconditionError: grpc.StatusCode.FAILED_PRECONDITION,
    ExhaustedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    UnavailableError: grpc.StatusCode.UNAVAILABLE,
    DeadlineError: grpc.StatusCode.DEADLINE_EXCEEDED,
    InstanceError: grpc.StatusCode.ABORTED,
    UnsupportedError: grpc.StatusCode.UNIMPLEMENTED,
}
CLASS_OF_CODE: dict[grpc.StatusCode, type[HibernodeError]] = {code: kind for kind, code in CODE_OF_CLASS.items()}
_CODE_OF_NUMBER: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


def code_of(error: HibernodeError) -> grpc.StatusCode:
    """The code of the error's class, or of its nearest base class that has one."""
    for kind in type(error).__mro__:
        if kind in CODE_OF_CLASS:
            return CODE_OF_CLASS[kind]
    return grpc.StatusCode.INTERNAL


def to_status(error: HibernodeError) -> status_pb2.Status:
    """The error as `google.rpc.Status`. Long texts are truncated: a status must fit into gRPC's trailers."""
    metadata = dict(list(error.metadata.items())[:MAX_METADATA_ENTRIES])
    info = error_details_pb2.ErrorInfo(
        reason=_truncate(error.reason, MAX_METADATA_CHARS),
        domain=DOMAIN,
        metadata={_truncate(k, MAX_METADATA_CHARS): _truncate(v, MAX_METADATA_CHARS) for k, v in metadata.items()},
    )
    packed = any_pb2.Any()
    packed.Pack(info)
    message = _truncate(error.message, MAX_MESSAGE_CHARS)
    return status_pb2.Status(code=code_of(error).value[0], message=message, details=[packed])


def to_grpc_status(error: HibernodeError) -> grpc.Status:
    """The error as an argument of `context.abort_with_status`."""
    return rpc_status.to_status(to_status(error))


def from_status(status: status_pb2.Status, target: str = "") -> HibernodeError:
    """The error that `status` stands for, with its class, reason, message and metadata.

    The reason of a status from gRPC itself is derived from its code.
    """
    code = _CODE_OF_NUMBER.get(status.code, grpc.StatusCode.UNKNOWN)
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info) and info.domain == DOMAIN:
            return _error(code, info.reason, status.message, dict(info.metadata))
    return _from_grpc(code, status.message, target)


def from_rpc_error(error: grpc.RpcError, target: str = "") -> HibernodeError:
    """The error of a failed call. `target` is the daemon that the message names if it could not be reached."""
    if not isinstance(error, aio.AioRpcError):
        return HibernodeError("INTERNAL", f"the call failed: {type(error).__name__}")
    code, details = error.code(), error.details() or ""
    trailers = cast(Sequence[tuple[str, str | bytes]], error.trailing_metadata() or ())
    for key, value in trailers:
        if key == DETAILS_KEY and isinstance(value, bytes):
            return from_status(_parsed(value, code, details), target)
    return _from_grpc(code, details, target)


@contextmanager
def translated_errors(target: str = "") -> Iterator[None]:
    """A context in which a failed gRPC call raises its `HibernodeError`."""
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc_error(error, target) from error


def _error(code: grpc.StatusCode, reason: str, message: str, metadata: dict[str, str]) -> HibernodeError:
    # A code without a class of its own, such as INTERNAL, becomes a plain HibernodeError.
    error = CLASS_OF_CODE.get(code, HibernodeError)(reason, message)
    error.metadata.update(metadata)  # not as keywords: a key may be called `reason`
    return error


def _from_grpc(code: grpc.StatusCode, details: str, target: str) -> HibernodeError:
    where = target or "the daemon"
    match code:
        case grpc.StatusCode.UNAVAILABLE:
            return UnavailableError("UNREACHABLE", f"cannot reach {where}; is it running? ({details})", target=target)
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineError("DEADLINE_EXCEEDED", f"{where} did not answer in time; try a longer timeout")
        case grpc.StatusCode.UNIMPLEMENTED:
            message = f"{where} does not know this call; is it of another version? ({details})"
            return UnsupportedError("UNIMPLEMENTED", message)
        case _:
            return _error(code, code.name, details or f"{where} answered {code.name}", {})


def _parsed(serialized: bytes, code: grpc.StatusCode, details: str) -> status_pb2.Status:
    """The rich status of a trailer; a plain one if it does not parse or contradicts `code`."""
    plain = status_pb2.Status(code=code.value[0], message=details)
    try:
        status = status_pb2.Status.FromString(serialized)
    except DecodeError:
        return plain
    return status if status.code == plain.code else plain


def _truncate(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
