"""Time zones by their names in the IANA database: the host's files, else those of the Python package tzdata.

Names are written as there, `Europe/Berlin`: with another case a name would be known on some hosts only.
"""

from __future__ import annotations

from datetime import UTC, tzinfo
from difflib import get_close_matches
from functools import cache
from zoneinfo import ZoneInfo, available_timezones

MAX_NAME = 64
_ADVICE = "or omit it for UTC"
_MOST_SUGGESTED = 3


class UnknownZone(ValueError):
    """There is no such zone here. The text says what to do."""


def zone_of(name: str) -> tzinfo:
    """The zone; UTC for "". Raises UnknownZone."""
    try:
        return UTC if not name else ZoneInfo(name[: MAX_NAME + 1])
    except (OSError, ValueError, KeyError):  # a directory, a path outside of the zone files, a broken file, or none
        raise UnknownZone(_problem(name[:MAX_NAME])) from None


def _problem(name: str) -> str:
    known = _names()
    if not known:
        return (
            f"{name!r} can't be looked up, since this host has no time zone files; install the package tzdata, "
            f"{_ADVICE}"
        )
    close = _close(name, known)
    others = f"use {' or '.join(close)}" if close else "names are written like Europe/Berlin"
    # Debian keeps older names, such as US/Pacific, in a package of their own.
    install = "if the name is right, install the package tzdata or tzdata-legacy"
    return f"there is no time zone {name!r} on this host; {others}; {install}, {_ADVICE}"


@cache
def _names() -> list[str]:
    """All names, sorted. Read once: that takes tens of milliseconds."""
    return sorted(available_timezones())


def _close(name: str, known: list[str]) -> list[str]:
    """The names most like this one: in another case, of the same city, or written alike."""
    folded = {one.lower(): one for one in known}
    wanted = name.lower().replace(" ", "_")
    if wanted in folded:
        return [folded[wanted]]
    city = [one for one in known if one.lower().rpartition("/")[2] == wanted.rpartition("/")[2]]
    found = city or [folded[one] for one in get_close_matches(wanted, folded, _MOST_SUGGESTED, 0.75)]
    return found[:_MOST_SUGGESTED]
