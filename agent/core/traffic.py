"""Counters of a function's invocations as its clients see them: updated on the request path, read by a scrape.

Every invocation ends as exactly one of: a response (the instance's, or Hibernode's in its place), a client that left,
an answer cut off in the middle. A response of Hibernode is exactly one of: a concurrency throttle (the queue is full),
a resource throttle (no instance), a client error (4xx), a server error (5xx).
"""

from __future__ import annotations

from bisect import bisect_left

from agent.core.peak import Peak
from agent.core.types import MICROSECOND_NS, MILLISECOND_NS, SECOND_NS

BOUNDS_NS = (
    *(ms * MILLISECOND_NS for ms in (1, 2)),
    *(ms * MILLISECOND_NS for ms in (5, 10, 20, 50, 100, 200, 500)),
    *(s * SECOND_NS for s in (1, 2, 5, 10, 20, 60, 300)),
)
"""Inclusive upper bounds of the buckets, from light OCR requests to the wakes of an LLM."""
CLASSES = (1, 2, 3, 4, 5)
"""Hundreds of the statuses, the indexes of `Traffic.responses`; any other status counts with the last."""
QUEUE_FULL = "QUEUE_FULL"
NO_CAPACITY = "NO_CAPACITY"


class Durations:
    """A histogram: `counts[i]` durations up to `BOUNDS_NS[i]`; the last count is of those above all bounds."""

    __slots__ = ("counts", "sum_ns")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_NS) + 1)
        self.sum_ns = 0

    def add(self, ns: int) -> None:
        """Count one duration."""
        self.counts[bisect_left(BOUNDS_NS, ns)] += 1
        self.sum_ns += ns

    def cumulative(self) -> list[tuple[str, int]]:
        """(upper bound in seconds as Prometheus writes it, durations up to it) per bound, the last for +Inf."""
        total, pairs = 0, []
        for bound, count in zip([*BOUNDS_NS, 0], self.counts, strict=True):
            total += count
            pairs.append((f"{bound / SECOND_NS:g}" if bound else "+Inf", total))
        return pairs


class Traffic:
    """The counters of one function. Callers add to `invocations`, `left` and `cut` directly."""

    __slots__ = (
        "client_errors", "cut", "duration", "invocations", "left", "longest", "no_capacity", "queue", "queue_full",
        "responses", "server_errors", "wake",
    )  # fmt: skip

    def __init__(self) -> None:
        self.invocations = 0
        self.responses = [0] * (1 + max(CLASSES))
        self.client_errors = 0
        self.server_errors = 0
        self.queue_full = 0
        self.no_capacity = 0
        self.left = 0
        self.cut = 0
        self.duration = Durations()
        self.queue = Durations()
        self.wake = Durations()
        self.longest = Peak()

    def served(self, status: int, began: int, at: int, queue_ns: int, wake_ns: int) -> None:
        """Count an instance's complete answer.

        `began` and `at`: arrival of the request and last byte of the answer, monotonic ns. `queue_ns`: time in the
        queue, of which `wake_ns` for a wake.
        """
        self.responses[min(status // 100, CLASSES[-1])] += 1
        duration = at - began
        self.duration.add(duration)
        self.longest.note(duration, at)
        if queue_ns > MICROSECOND_NS:
            self.queue.add(queue_ns)
        else:  # most requests: no search
            self.queue.counts[0] += 1
        if wake_ns:
            self.wake.add(wake_ns)

    def refused(self, status: int, reason: str) -> None:
        """Count an answer of Hibernode in the instance's place."""
        self.responses[min(status // 100, CLASSES[-1])] += 1
        if reason == QUEUE_FULL:
            self.queue_full += 1
        elif reason == NO_CAPACITY:
            self.no_capacity += 1
        elif status >= 500:
            self.server_errors += 1
        else:
            self.client_errors += 1
