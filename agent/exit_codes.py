"""The one place where an error becomes an exit code and a line on stderr (STYLE, "CLI")."""

from __future__ import annotations

from enum import IntEnum

from agent.core import errors as core


class Exit(IntEnum):
    """What the shell sees."""

    OK = 0
    UNEXPECTED = 1
    USAGE = 2
    NOT_FOUND = 3
    PRECONDITION = 4
    UNAVAILABLE = 5
    MEMORY_CHANGED = 6  # `doctor --selftest` only: a byte came back different
    INTERRUPTED = 130


_EXIT_OF_KIND: tuple[tuple[type[core.HibernodeError], Exit], ...] = (
    (core.InvalidArgumentError, Exit.USAGE),
    (core.NotFoundError, Exit.NOT_FOUND),
    (core.UnauthenticatedError, Exit.PRECONDITION),
    (core.PermissionDeniedError, Exit.PRECONDITION),
    (core.ConflictError, Exit.PRECONDITION),
    (core.PreconditionError, Exit.PRECONDITION),
    (core.UnsupportedError, Exit.PRECONDITION),
    (core.ExhaustedError, Exit.UNAVAILABLE),
    (core.UnavailableError, Exit.UNAVAILABLE),
    (core.DeadlineError, Exit.UNAVAILABLE),
    (core.InstanceError, Exit.UNEXPECTED),
)

_EXIT_OF_REASON: dict[str, Exit] = {
    "IMAGE_NOT_FOUND": Exit.NOT_FOUND,
    "COMMAND_NOT_FOUND": Exit.NOT_FOUND,
    "IMAGE_PULL_DENIED": Exit.PRECONDITION,
    "VOLUME_REFUSED": Exit.PRECONDITION,
    "GPU_ATTACH_UNAVAILABLE": Exit.PRECONDITION,
    "IMAGE_PULL_FAILED": Exit.UNAVAILABLE,
    "DISK_FULL": Exit.UNAVAILABLE,
    "ENGINE_UNAVAILABLE": Exit.UNAVAILABLE,
}
"""An instance's end is told with its own reason, whatever the kind of the error that brings it here."""


def exit_of(error: core.HibernodeError) -> Exit:
    """The exit code of an error's reason, else of its kind; agent/core/errors.py says which is which."""
    if error.reason in _EXIT_OF_REASON:
        return _EXIT_OF_REASON[error.reason]
    return next((code for kind, code in _EXIT_OF_KIND if isinstance(error, kind)), Exit.UNEXPECTED)


def exit_of_http(status: int) -> Exit:
    """The exit code for a function's answer: 2xx and 3xx are success, the rest as the error kinds map to HTTP."""
    match status:
        case _ if 200 <= status < 400:
            return Exit.OK
        case 404:
            return Exit.NOT_FOUND
        case 401 | 403 | 409 | 501:
            return Exit.PRECONDITION
        case 408 | 429 | 503 | 504:
            return Exit.UNAVAILABLE
        case _ if 400 <= status < 500:
            return Exit.USAGE
        case _:
            return Exit.UNEXPECTED
