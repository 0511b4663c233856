"""The one place where a `HibernodeError` becomes a gRPC status, and a gRPC status a `HibernodeError` again.

On the wire an error is: the code of its kind, its message, and a `google.rpc.ErrorInfo` with the stable reason, the
domain `hibernode` and the metadata. A status without ErrorInfo of our domain was made by gRPC itself.
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

CODE_OF_KIND: dict[type[HibernodeError], grpc.StatusCode] = {
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
KIND_OF_CODE: dict[grpc.StatusCode, type[HibernodeError]] = {code: kind for kind, code in CODE_OF_KIND.items()}
_CODE_OF_NUMBER: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


def code_of(error: HibernodeError) -> grpc.StatusCode:
    """The code of the error's kind; a subclass of a kind has the kind's code."""
    for kind in type(error).__mro__:
        if kind in CODE_OF_KIND:
            return CODE_OF_KIND[kind]
    return grpc.StatusCode.INTERNAL


def to_status(error: HibernodeError) -> status_pb2.Status:
    """The error as `google.rpc.Status`. Over-long texts are cut: a status has to fit into gRPC's trailers."""
    metadata = dict(list(error.metadata.items())[:MAX_METADATA_ENTRIES])
    info = error_details_pb2.ErrorInfo(
        reason=_cut(error.reason, MAX_METADATA_CHARS),
        domain=DOMAIN,
        metadata={_cut(k, MAX_METADATA_CHARS): _cut(v, MAX_METADATA_CHARS) for k, v in metadata.items()},
    )
    packed = any_pb2.Any()
    packed.Pack(info)
    message = _cut(error.message, MAX_MESSAGE_CHARS)
    return status_pb2.Status(code=code_of(error).value[0], message=message, details=[packed])


def to_grpc_status(error: HibernodeError) -> grpc.Status:
    """The error as what `context.abort_with_status` takes."""
    return rpc_status.to_status(to_status(error))


def from_status(status: status_pb2.Status, target: str = "") -> HibernodeError:
    """The error that `status` stands for: same kind, reason, message and metadata.

    Without our ErrorInfo the status is gRPC's own; the reason is then made from the code.
    """
    code = _CODE_OF_NUMBER.get(status.code, grpc.StatusCode.UNKNOWN)
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info) and info.domain == DOMAIN:
            return _error(code, info.reason, status.message, dict(info.metadata))
    return _from_grpc_itself(code, status.message, target)


def from_rpc_error(error: grpc.RpcError, target: str = "") -> HibernodeError:
    """The error behind a failed call. `target` names the daemon in the message when it could not be reached."""
    if not isinstance(error, aio.AioRpcError):
        return HibernodeError("INTERNAL", f"the call failed: {type(error).__name__}")
    code, details = error.code(), error.details() or ""
    trailers = cast(Sequence[tuple[str, str | bytes]], error.trailing_metadata() or ())
    for key, value in trailers:
        if key == DETAILS_KEY and isinstance(value, bytes):
            return from_status(_parsed(value, code, details), target)
    return _from_grpc_itself(code, details, target)


@contextmanager
def translated_errors(target: str = "") -> Iterator[None]:
    """Inside this block a failed gRPC call raises the `HibernodeError` it stands for."""
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc_error(error, target) from error


def _error(code: grpc.StatusCode, reason: str, message: str, metadata: dict[str, str]) -> HibernodeError:
    # HibernodeError itself stands for a code that is no kind of ours: a fault of the other side (INTERNAL).
    error = KIND_OF_CODE.get(code, HibernodeError)(reason, message)
    error.metadata.update(metadata)  # not as keywords: a key may be called `reason`
    return error


def _from_grpc_itself(code: grpc.StatusCode, details: str, target: str) -> HibernodeError:
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
    """The rich status of a trailer; one that does not parse, or contradicts the code, counts as none."""
    plain = status_pb2.Status(code=code.value[0], message=details)
    try:
        status = status_pb2.Status.FromString(serialized)
    except DecodeError:
        return plain
    return status if status.code == plain.code else plain


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
