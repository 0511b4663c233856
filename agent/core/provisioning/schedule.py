"""When a scheduled action fires: `at(yyyy-mm-ddThh:mm:ss)` or `cron(second minute hour day month weekday)` in a zone.

Cron fields take numbers, names (JAN-DEC, MON-SUN), `,` `-` `*` `/`; weekdays are 1-7 = MON-SUN, and `?` in day or
weekday leaves the choice to the other one. If both are restricted, either is enough, as in every cron.

Times are of the zone's wall clock. When clocks change, Debian's cron is followed (cron(8), "daylight saving time"):
- an interval, that is a schedule with `*`, `*/n` or `n/m` as minute or hour, fires in real time, whenever the clock
  shows such a time: in both passes of a repeated hour, and not at all for a skipped one;
- a fixed time fires once: in the first pass of a repeated hour, and when a skipped hour would have begun. So fixed
  times fire in the same order as on other days. `at(...)` is a fixed time.

Pure: the caller provides the zone. Work is bounded, as cronsim searches 50 years at most. cronsim gets the wall clock
without a zone: with one it applies its rule for fixed times only to expressions without seconds, and misses firings
where clocks change by half an hour or at midnight.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo

from cronsim import CronSim, CronSimError

from agent.core.types import SECOND_NS

MAX_EXPRESSION = 256
_EPOCH = datetime(1970, 1, 1)  # noqa: DTZ001 -- wall clocks here have no zone; `_instant` adds it
_MICROSECOND = timedelta(microseconds=1)
_SECOND = timedelta(seconds=1)
_AT = re.compile(r"at\(\s*(\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2})\s*\)", re.ASCII)
_CRON = re.compile(r"cron\(([^()]*)\)", re.ASCII)
_TIME = re.compile(r"(\d{4}-\d{2}-\d{2}T\d{2}:\d{2})(:\d{2})?(?:\.(\d{1,9}))?(Z|[+-]\d{2}:\d{2})?", re.ASCII)
_TERM = re.compile(r"(\*|[0-9A-Z]+(?:-[0-9A-Z]+)?)(?:/([0-9]{1,2}))?", re.ASCII)
_OPEN = re.compile(r"\*(?:/[0-9]+)?|[0-9]+/[0-9]+", re.ASCII)
_NAMES = ("second", "minute", "hour", "day of month", "month", "day of week")
_LOW, _HIGH = (0, 0, 0, 1, 1, 1), (59, 59, 23, 31, 12, 7)
_MONTHS = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")
_WEEKDAYS = ("MON", "TUE", "WED", "THU", "FRI", "SAT", "SUN")
_MINUTE, _HOUR, _DAY, _MONTH, _WEEKDAY = 1, 2, 3, 4, 5
_SPAN_S = 2 * 86_400


class BadSchedule(ValueError):
    """An invalid expression or time. The text, such as `must be ...`, follows the name of its field."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """An expression in its zone: the six `fields` of cron, or the time `at`. `interval`: it fires in real time."""

    zone: tzinfo
    fields: str = ""
    at: datetime | None = None
    interval: bool = False

    def last(self, start_ns: int, until_ns: int) -> int | None:
        """The last firing in [start_ns, until_ns], wall ns."""
        return self._within(self._found(self._before, until_ns), start_ns, until_ns)

    def next(self, after_ns: int, end_ns: int) -> int | None:
        """The first firing in (after_ns, end_ns), wall ns."""
        return self._within(self._found(self._after, after_ns), after_ns + 1, end_ns - 1)

    def _found(self, search: Callable[[int], int | None], at_ns: int) -> int | None:
        if self.at is not None:
            return _instant(self.at, self.zone)
        try:
            return search(at_ns)
        except (StopIteration, OverflowError, ValueError):  # beyond 50 years, or the years of datetime
            return None

    def _after(self, after_ns: int) -> int:
        if self.interval:
            return self._in_real_time(after_ns // SECOND_NS + 1, 1) * SECOND_NS
        found = CronSim(self.fields, _wall(after_ns, self.zone))
        while True:
            fires = _instant(next(found), self.zone)
            if fires > after_ns:  # else a skipped time, which fired together with others
                return fires

    def _before(self, until_ns: int) -> int:
        if self.interval:
            return self._in_real_time(until_ns // SECOND_NS, -1) * SECOND_NS
        return _instant(next(CronSim(self.fields, _wall(until_ns, self.zone) + _SECOND, reverse=True)), self.zone)

    def _in_real_time(self, at_s: int, step: int) -> int:
        """The first second from `at_s` on (included), forwards or backwards, at which the clock shows a firing.

        It goes from one change of the offset to the next. Clocks never change by more than a day, nor twice within
        three days (the tests look at every zone), so two ends of `_SPAN_S` with one offset have no change in between.
        """
        while True:
            offset = _offset_at(at_s, self.zone)
            start = _wall_of(at_s, offset) - step * _SECOND
            wall = next(CronSim(self.fields, start, reverse=step < 0))
            fires = _ns(wall) // SECOND_NS - offset
            far = fires if abs(fires - at_s) <= _SPAN_S else at_s + step * _SPAN_S
            if _offset_at(far, self.zone) != offset:
                at_s = _first_change(at_s, far, offset, self.zone)
            elif far == fires:
                return fires
            elif (fires - far) * step > _SPAN_S:  # no offset brings the clock there earlier
                at_s = fires - step * _SPAN_S
            else:
                at_s = far

    @staticmethod
    def _within(fires_ns: int | None, first_ns: int, last_ns: int) -> int | None:
        return fires_ns if fires_ns is not None and first_ns <= fires_ns <= last_ns else None


def parse_schedule(text: str, zone: tzinfo) -> Schedule:
    """Parse an expression. Raises BadSchedule."""
    text = text.strip()
    if len(text) <= MAX_EXPRESSION:
        if found := _AT.fullmatch(text):
            return Schedule(zone, at=_moment(found[1], "must hold a time that exists, such as at(2026-07-01T08:00:00)"))
        if found := _CRON.fullmatch(text):
            return Schedule(zone, fields=_fields(found[1]), interval=_is_interval(found[1]))
    raise BadSchedule("must be at(yyyy-mm-ddThh:mm:ss) or cron(second minute hour day month weekday)")


def parse_time(text: str, zone: tzinfo) -> int:
    """Wall ns of an ISO 8601 time such as 2026-07-01T16:00:00.000Z; one without `Z` or an offset is in `zone`.

    Raises BadSchedule."""
    wrong = "must be a time such as 2026-07-01T16:00:00.000Z or 2026-07-01T16:00:00"
    found = _TIME.fullmatch(text) if len(text) <= MAX_EXPRESSION else None
    if found is None:
        raise BadSchedule(wrong)
    moment = _moment(found[1] + (found[2] or ":00"), wrong)
    fraction = int((found[3] or "0").ljust(9, "0"))
    if found[4] is None:
        return _instant(moment, zone) + fraction
    offset = 0
    if found[4] != "Z":
        hours, minutes = int(found[4][1:3]), int(found[4][4:6])
        if hours > 23 or minutes > 59:
            raise BadSchedule(wrong)
        offset = (hours * 60 + minutes) * (60 if found[4][0] == "+" else -60)
    return _ns(moment) - offset * SECOND_NS + fraction


def _moment(text: str, wrong: str) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise BadSchedule(wrong) from None


def _fields(text: str) -> str:
    """The fields as cronsim takes them. Raises BadSchedule."""
    parts = text.upper().split()
    if len(parts) != len(_NAMES):
        raise BadSchedule(
            f"must have six fields (second minute hour day month weekday) within cron(), not {len(parts)}"
        )
    if parts[_DAY] == parts[_WEEKDAY] == "?":
        raise BadSchedule("must not have `?` for both day and weekday")
    for index, part in enumerate(parts):
        parts[index] = _field(index, part)
    try:
        fields = " ".join(parts)
        next(CronSim(fields, datetime(2000, 1, 1)))  # noqa: DTZ001 -- as `_EPOCH`
    except (CronSimError, StopIteration, ValueError, OverflowError):
        raise BadSchedule("never fires: there is no such day") from None
    return fields


def _is_interval(text: str) -> bool:
    """Whether minute or hour has `*` or an open step, as Debian's cron decides; `text` is valid."""
    return any(
        _OPEN.fullmatch(term) for part in (text.split()[_MINUTE], text.split()[_HOUR]) for term in part.split(",")
    )


def _field(index: int, part: str) -> str:
    """One field in numbers. Raises BadSchedule."""
    if part == "?":
        if index not in (_DAY, _WEEKDAY):
            raise BadSchedule(f"must not have `?` for {_NAMES[index]} in cron(); only day and weekday take it")
        return "*"
    terms = [_term(index, part, term) for term in part.split(",")]
    return "*" if "*" in terms else ",".join(terms)


def _term(index: int, part: str, term: str) -> str:
    low, high = _LOW[index], _HIGH[index]
    bad = BadSchedule(f"has a wrong {_NAMES[index]} in cron(): {part[:40]!r} is not within {low} to {high}")
    found = _TERM.fullmatch(term)
    if found is None:
        raise bad
    if term == "*":
        return term
    names = _MONTHS if index == _MONTH else _WEEKDAYS if index == _WEEKDAY else ()
    ends = [low, high]
    if found[1] != "*":
        ends = [names.index(end) + 1 if end in names else _number(end, bad) for end in found[1].split("-")]
    step = 1 if found[2] is None else int(found[2])
    if not (1 <= step <= max(1, high) and all(low <= end <= high for end in ends)):
        raise bad
    first = ends[0]
    last = ends[1] if len(ends) == 2 else high if found[2] is not None else first
    if first > last:
        raise BadSchedule(f"has a range that goes backwards in cron(): {part[:40]!r}")
    return ",".join(str(one) for one in range(first, last + 1, step))


def _number(text: str, bad: BadSchedule) -> int:
    if not text.isdecimal() or len(text) > 2:
        raise bad
    return int(text)


def _wall(at_ns: int, zone: tzinfo) -> datetime:
    """The zone's wall clock at `at_ns`, to the second. In the second pass of a repeated hour: its last second."""
    moment = (_EPOCH + timedelta(seconds=at_ns // SECOND_NS)).replace(tzinfo=UTC).astimezone(zone)
    naive = moment.replace(tzinfo=None, fold=0)
    if not moment.fold:
        return naive
    low, high = naive, naive + timedelta(days=1)
    while high - low > _SECOND:
        middle = low + timedelta(seconds=(high - low) // _SECOND // 2)
        low, high = (middle, high) if _offset(middle, zone, 0) != _offset(middle, zone, 1) else (low, middle)
    return low


def _instant(wall: datetime, zone: tzinfo) -> int:
    """Wall ns at which the zone's clock first shows `wall`, or skips it."""
    before, after = _offset(wall, zone, 0), _offset(wall, zone, 1)
    if before >= after:  # an ordinary time, or a repeated one
        return _ns(wall) - before // _MICROSECOND * 1000
    low, high = _ns(wall - after) // SECOND_NS, _ns(wall - before) // SECOND_NS
    while high - low > 1:  # a skipped time: find where the clock jumps
        middle = (low + high) // 2
        offset = (_EPOCH + timedelta(seconds=middle)).replace(tzinfo=UTC).astimezone(zone).utcoffset()
        low, high = (low, middle) if offset == after else (middle, high)
    return high * SECOND_NS


def _offset_at(at_s: int, zone: tzinfo) -> int:
    """The zone's offset from UTC at a time, in seconds."""
    moment = (_EPOCH + timedelta(seconds=at_s)).replace(tzinfo=UTC).astimezone(zone)
    return (moment.utcoffset() or timedelta()) // _SECOND


def _wall_of(at_s: int, offset: int) -> datetime:
    return _EPOCH + timedelta(seconds=at_s + offset)


def _first_change(near: int, far: int, offset: int, zone: tzinfo) -> int:
    """The second nearest to `near` at which the offset is not `offset` any more; `far` is one, later or earlier."""
    while abs(far - near) > 1:
        middle = (near + far) // 2
        near, far = (middle, far) if _offset_at(middle, zone) == offset else (near, middle)
    return far


def _offset(wall: datetime, zone: tzinfo, fold: int) -> timedelta:
    return wall.replace(tzinfo=zone, fold=fold).utcoffset() or timedelta()


def _ns(wall: datetime) -> int:
    return (wall - _EPOCH) // _MICROSECOND * 1000
