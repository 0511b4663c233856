"""Completes a usage ledger after a crash or restart of the agent, without ever overcharging.

- The same process still lives: the gap is idle and `estimated` (a request inside the agent at the crash has failed, so
  no time in the gap was active), for `most_idle_ns` at most: without an agent no request reaches the instance. The rest
  is unbilled, and so is the gap after an unbilled state.
- The same with a state of another version: the gap is unbilled.
- The process is gone, at an unknown time: the gap is unbilled.
- Another boot: the ledger ends at its last window.

The last window of an open ledger is unsealed, which tells a ledger that was cut off from one that ended properly.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from agent.core.billing.meter import BilledAs, BillingPolicy
from agent.core.billing.window import UsageWindow
from agent.core.types import InstanceState


@dataclass(frozen=True, slots=True)
class Recovered:
    """`windows` are sealed and contiguous and complete the old ledger; a meter continues at `next_seq`."""

    windows: tuple[UsageWindow, ...]
    next_seq: int


def resume(
    last: UsageWindow,
    *,
    boot_id: str,
    now_mono_ns: int,
    same_process: bool,
    policy: BillingPolicy,
    most_idle_ns: int,
    goes_on: bool = False,
) -> Recovered:
    """Complete the ledger whose newest stored window is `last`, up to `now_mono_ns`.

    - `same_process`: the same pid and start time in the same boot
    - `most_idle_ns`: how much of a gap is billed at most; the rest is a second window
    - `goes_on`: a new process of the instance (a repeated start) continues the ledger, which must have no gap

    Nothing is added to a ledger that ended properly.
    """
    closed = () if last.sealed else (replace(last, sealed=True),)
    gap_ns = now_mono_ns - last.end_mono_ns
    other_boot = last.boot_id != boot_id
    ended = last.sealed and not (same_process or goes_on)
    if other_boot or ended or gap_ns <= 0:
        return Recovered(closed, last.seq + 1)
    billed_ns = 0
    if _gap_kind(last, same_process=same_process, policy=policy) is BilledAs.IDLE:
        billed_ns = min(gap_ns, most_idle_ns)
    windows = [*closed]
    for length_ns, idle_ns in ((billed_ns, billed_ns), (gap_ns - billed_ns, 0)):
        if length_ns:
            last = _following(last, length_ns, idle_ns, estimated=same_process)
            windows.append(last)
    return Recovered(tuple(windows), last.seq + 1)


def _following(before: UsageWindow, length_ns: int, idle_ns: int, *, estimated: bool) -> UsageWindow:
    """A window of the gap, which follows `before`."""
    return replace(
        before,
        seq=before.seq + 1,
        start_mono_ns=before.end_mono_ns,
        end_mono_ns=before.end_mono_ns + length_ns,
        start_wall_ns=before.start_wall_ns + (before.end_mono_ns - before.start_mono_ns),
        active_ns=0,
        idle_ns=idle_ns,
        unbilled_ns=length_ns - idle_ns,
        invocations=0,
        estimated=estimated,
        sealed=True,
    )


def _gap_kind(last: UsageWindow, *, same_process: bool, policy: BillingPolicy) -> BilledAs:
    if not same_process or last.unbilled_ns:
        return BilledAs.UNBILLED
    if last.state not in InstanceState.__members__:  # of another version
        return BilledAs.UNBILLED
    quiet = policy.quiet_kind(InstanceState(last.state))
    return BilledAs.UNBILLED if quiet is BilledAs.UNBILLED else BilledAs.IDLE
