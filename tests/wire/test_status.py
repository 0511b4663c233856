"""The error table: a caller catches the error that the daemon raised."""

from __future__ import annotations

import grpc
import pytest
from google.rpc import status_pb2  # type: ignore[import-untyped]  # no py.typed
from grpc import aio

from agent.core import errors
from agent.core.errors import (
    ConfigError,
    DeadlineError,
    ExhaustedError,
    HibernodeError,
    InvalidArgumentError,
    PreconditionError,
    UnavailableError,
    UnsupportedError,
)
from agent.wire.status import (
    CODE_OF_CLASS,
    DETAILS_KEY,
    DOMAIN,
    code_of,
    from_rpc_error,
    from_status,
    to_grpc_status,
    to_status,
    translated_errors,
)

TABLE = {
    "InvalidArgumentError": "INVALID_ARGUMENT",
    "ConfigError": "INVALID_ARGUMENT",
    "UnauthenticatedError": "UNAUTHENTICATED",
    "PermissionDeniedError": "PERMISSION_DENIED",
    "NotFoundError": "NOT_FOUND",
    "ConflictError": "ALREADY_EXISTS",
    "PreconditionError": "FAILED_PRECONDITION",
    "ExhaustedError": "RESOURCE_EXHAUSTED",
    "UnavailableError": "UNAVAILABLE",
    "DeadlineError": "DEADLINE_EXCEEDED",
    "InstanceError": "ABORTED",
    "UnsupportedError": "UNIMPLEMENTED",
    "HibernodeError": "INTERNAL",
}


def failed_call(code: grpc.StatusCode, details: str, trailer: bytes | None = None) -> aio.AioRpcError:
    trailers = aio.Metadata() if trailer is None else aio.Metadata((DETAILS_KEY, trailer))
    return aio.AioRpcError(code, aio.Metadata(), trailers, details, "debug")


def trailer_of(status: grpc.Status) -> bytes:
    trailer = dict(status.trailing_metadata or ())[DETAILS_KEY]
    assert isinstance(trailer, bytes)
    return trailer


def as_caught(error: HibernodeError) -> HibernodeError:
    """The error after a trip over the wire."""
    status = to_grpc_status(error)
    return from_rpc_error(failed_call(status.code, status.details, trailer_of(status)))


def test_every_error_class_has_a_code() -> None:
    kinds = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert kinds == set(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_each_error_class_round_trips(name: str) -> None:
    kind: type[HibernodeError] = getattr(errors, name)
    raised = kind("HOST_MEMORY_SHORT", "3 GiB are missing; stop an instance", node="node-7", missing_bytes=3 << 30)
    assert code_of(raised) is grpc.StatusCode[TABLE[name]]
    caught = as_caught(raised)
    assert type(caught) is (InvalidArgumentError if kind is ConfigError else kind)
    assert (caught.reason, caught.message, caught.metadata) == (raised.reason, raised.message, raised.metadata)


def test_each_code_has_one_error_class() -> None:
    assert len(set(CODE_OF_CLASS.values())) == len(CODE_OF_CLASS)


def test_the_reason_is_in_error_info() -> None:
    (detail,) = to_status(PreconditionError("INSTANCE_BUSY", "busy", uid="i-1")).details
    assert detail.type_url == "type.googleapis.com/google.rpc.ErrorInfo"
    assert (DOMAIN.encode() in detail.value, b"INSTANCE_BUSY" in detail.value) == (True, True)


def test_metadata_may_be_called_reason() -> None:
    raised = PreconditionError("INSTANCE_BUSY", "busy")
    raised.metadata["reason"] = "two requests"
    assert as_caught(raised).metadata == {"reason": "two requests"}


def test_a_long_error_still_fits_into_the_trailers() -> None:
    raised = InvalidArgumentError("SPEC_INVALID", "ü" * 50_000)
    raised.metadata.update({f"key-{n}": "ü" * 5_000 for n in range(500)})
    status = to_grpc_status(raised)
    percent_encoded = len(status.details.encode()) * 3
    assert percent_encoded + len(trailer_of(status)) * 4 / 3 < 16 * 1024
    assert as_caught(raised).message.startswith("üüü")


@pytest.mark.parametrize(
    ("code", "kind", "reason"),
    [
        (grpc.StatusCode.UNAVAILABLE, UnavailableError, "UNREACHABLE"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, DeadlineError, "DEADLINE_EXCEEDED"),
        (grpc.StatusCode.UNIMPLEMENTED, UnsupportedError, "UNIMPLEMENTED"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, ExhaustedError, "RESOURCE_EXHAUSTED"),
        (grpc.StatusCode.CANCELLED, HibernodeError, "CANCELLED"),
        (grpc.StatusCode.UNKNOWN, HibernodeError, "UNKNOWN"),
    ],
)
def test_grpcs_own_failures_are_translated(code: grpc.StatusCode, kind: type[HibernodeError], reason: str) -> None:
    with pytest.raises(HibernodeError) as caught, translated_errors("127.0.0.1:8611"):
        raise failed_call(code, "")
    assert (type(caught.value), caught.value.reason) == (kind, reason)
    assert "127.0.0.1:8611" in caught.value.message


@pytest.mark.parametrize("trailer", [b"\xff\xff not a status", status_pb2.Status(code=5).SerializeToString()])
def test_bad_rich_status_is_ignored(trailer: bytes) -> None:
    caught = from_rpc_error(failed_call(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many", trailer))
    assert (type(caught), caught.message) == (ExhaustedError, "too many")


def test_error_info_of_another_domain_is_ignored() -> None:
    status = to_status(PreconditionError("INSTANCE_BUSY", "busy"))
    status.details[0].value = status.details[0].value.replace(b"hibernode", b"elsewhere")
    assert from_status(status).reason == "FAILED_PRECONDITION"


def test_other_exceptions_pass_unchanged() -> None:
    with pytest.raises(KeyError), translated_errors():
        raise KeyError("uid")
