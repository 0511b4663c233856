"""What clients of one function see, in plain integers: counted on the request path, read when somebody scrapes.

Every invocation ends as exactly one of: a response (of the instance, or of ours in its place), a client that left, an
answer that was cut in its middle. Of our own answers each is one of: a throttle (of concurrency: the queue is full; of
resources: no instance), a client error (4xx), a server error (5xx).
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
"""Upper bounds of the buckets, inclusive: what fits the light requests of an OCR and the wakes of an LLM alike."""
CLASSES = (1, 2, 3, 4, 5)
"""Hundreds of the statuses: the places of `Traffic.responses`. What is none of them counts with the last."""
QUEUE_FULL = "QUEUE_FULL"
NO_CAPACITY = "NO_CAPACITY"


class Durations:
    """A histogram. `counts[i]` are durations up to `BOUNDS_NS[i]`, the last of them longer than all bounds."""

    __slots__ = ("counts", "sum_ns")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_NS) + 1)
        self.sum_ns = 0

    def add(self, ns: int) -> None:
        """One more."""
        self.counts[bisect_left(BOUNDS_NS, ns)] += 1
        self.sum_ns += ns

    def cumulative(self) -> list[tuple[str, int]]:
        """(upper bound in seconds as Prometheus writes it, how many are not longer), the last for +Inf."""
        total, pairs = 0, []
        for bound, count in zip([*BOUNDS_NS, 0], self.counts, strict=True):
            total += count
            pairs.append((f"{bound / SECOND_NS:g}" if bound else "+Inf", total))
        return pairs


class Traffic:
    """One function's. Add to `invocations`, `left` and `cut` directly; `began`, `at` are monotonic ns."""

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
        """An instance's answer is whole at `at`. Durations from the request's arrival to the last byte; `queue_ns` of
        it waiting, of which `wake_ns` for an instance to be woken."""
        self.responses[min(status // 100, CLASSES[-1])] += 1
        took = at - began
        self.duration.add(took)
        self.longest.note(took, at)
        if queue_ns > MICROSECOND_NS:
            self.queue.add(queue_ns)
        else:  # the usual request: no search
            self.queue.counts[0] += 1
        if wake_ns:
            self.wake.add(wake_ns)

    def refused(self, status: int, reason: str) -> None:
        """We answered in the instance's place."""
        self.responses[min(status // 100, CLASSES[-1])] += 1
        if reason == QUEUE_FULL:
            self.queue_full += 1
        elif reason == NO_CAPACITY:
            self.no_capacity += 1
        elif status >= 500:
            self.server_errors += 1
        else:
            self.client_errors += 1
