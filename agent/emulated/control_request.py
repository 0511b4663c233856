"""Reads the arguments of a control command strictly."""

from __future__ import annotations

from agent.core.errors import InvalidArgumentError

Request = dict[str, object]


def refused(message: str) -> InvalidArgumentError:
    return InvalidArgumentError("EMULATED_OPTION_INVALID", message)


def check_keys(request: Request, *known: str) -> None:
    """Raises InvalidArgumentError EMULATED_OPTION_INVALID for an argument that the command does not have."""
    unknown = sorted(set(request) - {"command", *known})
    if unknown:
        raise refused(f"{request['command']} has no argument {unknown[0]!r}; it takes {', '.join(known) or 'none'}.")


def integer(request: Request, key: str, most: int = 1 << 62) -> int:
    """A number from 0 to `most`. Raises InvalidArgumentError EMULATED_OPTION_INVALID."""
    value = request.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise refused(f"{key} must be a number of 0 {'or more' if most == 1 << 62 else f'to {most}'}.")
    return value


def optional_integer(request: Request, key: str) -> int | None:
    return None if request.get(key) is None else integer(request, key)


def boolean(request: Request, key: str) -> bool:
    """Raises InvalidArgumentError EMULATED_OPTION_INVALID."""
    value = request.get(key)
    if not isinstance(value, bool):
        raise refused(f"{key} must be true or false.")
    return value


def text(request: Request, key: str) -> str:
    """Raises InvalidArgumentError EMULATED_OPTION_INVALID."""
    value = request.get(key)
    if not isinstance(value, str):
        raise refused(f"{key} must be a string.")
    return value
