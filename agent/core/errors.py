"""The error hierarchy of Hibernode.

Every failure that a user or a program can meet is a `HibernodeError` with a stable `reason` (UPPER_SNAKE, part of the
interface), a sentence that names the fix, and metadata. Its class decides how it leaves the process, in one place each:
`wire/status.py` maps it to a gRPC status, `http/errors.py` to an HTTP answer, `cli` to an exit code.
"""

from __future__ import annotations


class HibernodeError(Exception):
    """A failure with a stable reason. Raise one of the subclasses, never this class."""

    def __init__(self, reason: str, message: str, **metadata: str | int) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.metadata: dict[str, str] = {key: str(value) for key, value in metadata.items()}

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"


class InvalidArgumentError(HibernodeError):
    """The caller's input is wrong; a retry does not help. HTTP 400, gRPC INVALID_ARGUMENT, exit 2."""


class ConfigError(InvalidArgumentError):
    """A configuration file or s.yaml is wrong; the message names the file and the key path."""


class UnauthenticatedError(HibernodeError):
    """The credential is missing or wrong. HTTP 401, gRPC UNAUTHENTICATED, exit 4."""


class PermissionDeniedError(HibernodeError):
    """The caller is known but not allowed to. HTTP 403, gRPC PERMISSION_DENIED, exit 4."""


class NotFoundError(HibernodeError):
    """The named thing does not exist. HTTP 404, gRPC NOT_FOUND, exit 3."""


class ConflictError(HibernodeError):
    """The thing exists already, with other contents. HTTP 409, gRPC ALREADY_EXISTS, exit 4."""


class PreconditionError(HibernodeError):
    """The system's state forbids it (state, host memory, capabilities). HTTP 409, gRPC FAILED_PRECONDITION, exit 4."""


class ExhaustedError(HibernodeError):
    """A bounded queue or budget is full; a later retry helps. HTTP 429, gRPC RESOURCE_EXHAUSTED, exit 5."""


class UnavailableError(HibernodeError):
    """Something the request needs is not available now. HTTP 503, gRPC UNAVAILABLE, exit 5."""


class DeadlineError(HibernodeError):
    """A deadline passed. HTTP 504, gRPC DEADLINE_EXCEEDED, exit 5."""


class InstanceError(HibernodeError):
    """The instance failed (crashed, never listened, refused its hook). HTTP 502, gRPC ABORTED, exit 1."""


class UnsupportedError(HibernodeError):
    """Valid, but not supported by this host or version. HTTP 501, gRPC UNIMPLEMENTED, exit 4."""
