"""Completes a usage ledger after a crash or restart of the agent, without ever overcharging.

- The same process still lives: the gap is idle and `estimated` (a request inside the agent at the crash has failed, so
  no time in the gap was active); after an unbilled state it stays unbilled.
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
    goes_on: bool = False,
) -> Recovered:
    """Complete the ledger whose newest stored window is `last`, up to `now_mono_ns`.

    - `same_process`: the same pid and start time in the same boot
    - `goes_on`: a new process of the instance (a repeated start) continues the ledger, which must have no gap

    Nothing is added to a ledger that ended properly.
    """
    closed = () if last.sealed else (replace(last, sealed=True),)
    gap_ns = now_mono_ns - last.end_mono_ns
    other_boot = last.boot_id != boot_id
    ended = last.sealed and not (same_process or goes_on)
    if other_boot or ended or gap_ns <= 0:
        return Recovered(closed, last.seq + 1)
    kind = _gap_kind(last, same_process=same_process, policy=policy)
    gap = replace(
        last,
        seq=last.seq + 1,
        start_mono_ns=last.end_mono_ns,
        end_mono_ns=now_mono_ns,
        start_wall_ns=last.start_wall_ns + (last.end_mono_ns - last.start_mono_ns),
        active_ns=0,
        idle_ns=gap_ns if kind is BilledAs.IDLE else 0,
        unbilled_ns=gap_ns if kind is BilledAs.UNBILLED else 0,
        invocations=0,
        estimated=same_process,
        sealed=True,
    )
    return Recovered((*closed, gap), gap.seq + 1)


def _gap_kind(last: UsageWindow, *, same_process: bool, policy: BillingPolicy) -> BilledAs:
    if not same_process or last.unbilled_ns:
        return BilledAs.UNBILLED
    if last.state not in InstanceState.__members__:  # of another version
        return BilledAs.UNBILLED
    quiet = policy.quiet_kind(InstanceState(last.state))
    return BilledAs.UNBILLED if quiet is BilledAs.UNBILLED else BilledAs.IDLE
