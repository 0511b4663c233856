"""What a ledger says about the time nobody watched: after a crash or restart of the agent.

The rule (DESIGN section 5): in doubt never overcharge. If the same process still lives, the gap is idle and
`estimated` (a request inside the agent at the crash has failed, so nothing there was active); where the state before
was unbilled it stays unbilled. If the process is gone, nobody knows when it ended: unbilled. Of an earlier boot the
ledger ends at its last mark.

The last window of an instance is unsealed for as long as its ledger is open; that is how a ledger that ended
properly is told from one that was cut off.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from agent.core.billing.meter import BilledAs, BillingPolicy
from agent.core.billing.window import UsageWindow
from agent.core.types import InstanceState


@dataclass(frozen=True, slots=True)
class Recovered:
    """`windows` are sealed, contiguous and complete the old ledger; a meter goes on at `next_seq`."""

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
    """Complete the ledger whose newest stored window is `last`, up to now.

    `same_process` is true only for the same pid and start time in the same boot. `goes_on`: the ledger is continued
    by a new process of the instance (a start that is done anew), so it must have no hole. Nothing is added to a ledger
    that was properly ended.
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
    quiet = policy.quiet_kind(InstanceState(last.state))
    return BilledAs.UNBILLED if quiet is BilledAs.UNBILLED else BilledAs.IDLE
