"""Measures an absence: for how long a node was given up, in the clock of its host, which dates its usage windows."""

from __future__ import annotations

from agent.core.billing.absence import NO_END_NS, Absence
from agent.core.types import SECOND_NS

SETTLE_NS = SECOND_NS
"""The clocks are compared for so long after a return: the first messages may have been under way for seconds."""


class Away:
    """One absence. Times are CLOCK_MONOTONIC ns of the scheduler; it began at `since_ns`."""

    def __init__(self, since_ns: int) -> None:
        self._since_ns = since_ns
        self._back_ns: int | None = None
        self._ahead_ns: int | None = None

    def heard_nothing_since(self, boot_id: str, ahead_ns: int | None) -> Absence | None:
        """The absence in the boot in which the node was last heard, by how far its clock was ahead then; None if that
        is not known. It has this one too if the host is rebooted before it is back."""
        if not boot_id or ahead_ns is None:
            return None
        return Absence(boot_id, self._since_ns + ahead_ns, NO_END_NS)

    def silent_again(self) -> None:
        """The node was given up again before the end was measured: the absence goes on."""
        self._back_ns = self._ahead_ns = None

    def heard(self, now_ns: int, host_ns: int) -> bool:
        """Note a message, written at `host_ns` of the node's clock (0: its agent does not say). True if it has been
        heard for long enough."""
        if self._back_ns is None:
            self._back_ns = now_ns
        if host_ns:
            # A message that took long makes the node's clock look behind: the quickest one is right.
            ahead_ns = host_ns - now_ns
            self._ahead_ns = ahead_ns if self._ahead_ns is None else max(ahead_ns, self._ahead_ns)
        return now_ns - self._back_ns >= SETTLE_NS

    def absence(self, boot_id: str) -> Absence | None:
        """The absence, once `heard` has said True; None if the agent does not say its time."""
        if self._back_ns is None or self._ahead_ns is None:
            return None
        return Absence(boot_id, self._since_ns + self._ahead_ns, self._back_ns + self._ahead_ns)
