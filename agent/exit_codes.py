"""Maps errors and HTTP statuses to the exit codes of the commands."""

from __future__ import annotations

from enum import IntEnum

from agent.core import errors as core


class ExitCode(IntEnum):
    """The exit codes."""

    OK = 0
    UNEXPECTED = 1
    USAGE = 2
    NOT_FOUND = 3
    PRECONDITION = 4
    UNAVAILABLE = 5
    MEMORY_CHANGED = 6  # `doctor --selftest` only: a byte came back different
    INTERRUPTED = 130


_EXIT_OF_KIND: tuple[tuple[type[core.HibernodeError], ExitCode], ...] = (
    (core.InvalidArgumentError, ExitCode.USAGE),
    (core.NotFoundError, ExitCode.NOT_FOUND),
    (core.UnauthenticatedError, ExitCode.PRECONDITION),
    (core.PermissionDeniedError, ExitCode.PRECONDITION),
    (core.ConflictError, ExitCode.PRECONDITION),
    (core.PreconditionError, ExitCode.PRECONDITION),
    (core.UnsupportedError, ExitCode.PRECONDITION),
    (core.ExhaustedError, ExitCode.UNAVAILABLE),
    (core.UnavailableError, ExitCode.UNAVAILABLE),
    (core.DeadlineError, ExitCode.UNAVAILABLE),
    (core.InstanceError, ExitCode.UNEXPECTED),
)

_EXIT_OF_REASON: dict[str, ExitCode] = {
    "IMAGE_NOT_FOUND": ExitCode.NOT_FOUND,
    "COMMAND_NOT_FOUND": ExitCode.NOT_FOUND,
    "IMAGE_PULL_DENIED": ExitCode.PRECONDITION,
    "VOLUME_REFUSED": ExitCode.PRECONDITION,
    "GPU_ATTACH_UNAVAILABLE": ExitCode.PRECONDITION,
    "IMAGE_PULL_FAILED": ExitCode.UNAVAILABLE,
    "DISK_FULL": ExitCode.UNAVAILABLE,
    "ENGINE_UNAVAILABLE": ExitCode.UNAVAILABLE,
}
"""Reasons of an instance's end: they decide before the kind of the error that carries them."""


def exit_of(error: core.HibernodeError) -> ExitCode:
    """The exit code of an error's reason, else of its kind (agent/core/errors.py)."""
    if error.reason in _EXIT_OF_REASON:
        return _EXIT_OF_REASON[error.reason]
    return next((code for kind, code in _EXIT_OF_KIND if isinstance(error, kind)), ExitCode.UNEXPECTED)


def exit_of_http(status: int) -> ExitCode:
    """The exit code of a function's answer: 2xx and 3xx are success, others as the error kinds map to HTTP."""
    match status:
        case _ if 200 <= status < 400:
            return ExitCode.OK
        case 404:
            return ExitCode.NOT_FOUND
        case 401 | 403 | 409 | 501:
            return ExitCode.PRECONDITION
        case 408 | 429 | 503 | 504:
            return ExitCode.UNAVAILABLE
        case _ if 400 <= status < 500:
            return ExitCode.USAGE
        case _:
            return ExitCode.UNEXPECTED
