"""The meter against a brute-force oracle: union of requests, sums, contiguity, and losses by a crash."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.core.billing.meter import BilledAs, BillingPolicy, Meter, Placement, Subject
from agent.core.billing.recovery import resume
from agent.core.billing.window import UsageWindow
from agent.core.types import GIB, FunctionSpec, GpuNeed, InstanceState

WALL = 1_700_000_000_000_000_000
MOST_IDLE = 200
ON_GPU_0 = Placement("NVIDIA L20", ("GPU-0",))


def subject(uid: str = "i-ocr-1") -> Subject:
    function = FunctionSpec("ocr", gpu=GpuNeed(count=1, memory_bytes=48 * GIB))
    return Subject.of(uid, function, node="gpu-7", boot_id="boot-a")


def meter(state: InstanceState = InstanceState.RUNNING, at: int = 0, **policy: BilledAs) -> Meter:
    return Meter(subject(), BillingPolicy(**policy), state=state, at=at, wall=WALL + at, placement=ON_GPU_0)


def sums(windows: list[UsageWindow]) -> tuple[int, int, int]:
    return (
        sum(w.active_ns for w in windows),
        sum(w.idle_ns for w in windows),
        sum(w.unbilled_ns for w in windows),
    )


def check_ledger(windows: list[UsageWindow]) -> None:
    """Assert the invariants of one instance's ledger within a boot."""
    for window in windows:
        assert window.active_ns >= 0
        assert window.idle_ns >= 0
        assert window.unbilled_ns >= 0
        assert window.active_ns + window.idle_ns + window.unbilled_ns == window.end_mono_ns - window.start_mono_ns
    for before, after in pairwise(windows):
        assert before.end_mono_ns == after.start_mono_ns
        assert before.seq + 1 == after.seq
        assert before.sealed


def test_three_overlapping_requests_are_billed_once() -> None:
    """FC's example: three 10 s requests at concurrency 10 are 10 s of active time."""
    account = meter()
    for _ in range(3):
        account.request_began(100)
    for _ in range(3):
        account.request_ended(110)
    window = account.seal(200, WALL + 200)
    assert window is not None
    assert (window.active_ns, window.idle_ns, window.invocations) == (10, 190, 3)
    assert (window.function, window.gpu_model, window.gpu_memory_bytes) == ("ocr", "NVIDIA L20", 48 * GIB)


def test_request_over_two_windows_is_active_in_both_counted_in_first() -> None:
    account = meter()
    account.request_began(10)
    first = account.seal(60, WALL + 60)
    account.request_ended(75)
    second = account.seal(100, WALL + 100)
    assert first is not None
    assert second is not None
    assert (first.active_ns, first.idle_ns, first.invocations) == (50, 10, 1)
    assert (second.active_ns, second.idle_ns, second.invocations) == (15, 25, 0)
    assert (second.start_mono_ns, second.start_wall_ns) == (60, WALL + 60)


@pytest.mark.parametrize(
    ("state", "kind"),
    [
        (InstanceState.STARTING, BilledAs.IDLE),
        (InstanceState.RUNNING, BilledAs.IDLE),
        (InstanceState.FREEZING, BilledAs.IDLE),
        (InstanceState.FROZEN, BilledAs.IDLE),
        (InstanceState.WAITING_GPU, BilledAs.UNBILLED),
        (InstanceState.RESTORING, BilledAs.IDLE),
        (InstanceState.STOPPING, BilledAs.IDLE),
    ],
)
def test_quiet_time_has_the_kind_of_its_state(state: InstanceState, kind: BilledAs) -> None:
    window = meter(state).seal(70, WALL + 70)
    assert window is not None
    assert sums([window]) == (0, 70 if kind is BilledAs.IDLE else 0, 70 if kind is BilledAs.UNBILLED else 0)
    assert window.state == state.value


def test_the_policy_decides_about_starting_and_restoring() -> None:
    starting = meter(InstanceState.STARTING, starting=BilledAs.ACTIVE).open_window(5)
    restoring = meter(InstanceState.RESTORING, restoring=BilledAs.UNBILLED).open_window(5)
    assert sums([starting]) == (5, 0, 0)
    assert sums([restoring]) == (0, 0, 5)


def test_the_image_pull_is_unbilled_though_the_state_is_starting() -> None:
    account = Meter(
        subject(), BillingPolicy(), state=InstanceState.STARTING, at=0, wall=WALL, placement=ON_GPU_0, unbilled=True
    )
    pulled = account.state_changed(InstanceState.STARTING, 40, WALL + 40)
    started = account.state_changed(InstanceState.RUNNING, 50, WALL + 50)
    assert pulled is not None
    assert started is not None
    assert (pulled.state, sums([pulled])) == ("STARTING", (0, 0, 40))
    assert (started.state, sums([started])) == ("STARTING", (0, 10, 0))


def test_stopping_is_active_while_the_last_request_drains() -> None:
    account = meter()
    account.request_began(10)
    account.state_changed(InstanceState.STOPPING, 20, WALL + 20)
    account.request_ended(50)
    window = account.state_changed(InstanceState.STOPPED, 60, WALL + 60)
    assert window is not None
    assert sums([window]) == (30, 10, 0)


def test_a_state_that_lasts_no_time_leaves_no_row_and_no_hole() -> None:
    account = meter()
    first = account.state_changed(InstanceState.FREEZING, 10, WALL + 10)
    nothing = account.state_changed(InstanceState.RUNNING, 10, WALL + 10)
    last = account.seal(30, WALL + 30)
    assert nothing is None
    assert first is not None
    assert last is not None
    check_ledger([first, last])
    assert last.state == "RUNNING"


def test_another_gpu_after_a_wake_begins_another_window() -> None:
    account = meter()
    assert account.placed(ON_GPU_0, 10, WALL + 10) is None
    before = account.placed(Placement("NVIDIA L20", ("GPU-1",)), 20, WALL + 20)
    assert before is not None
    assert before.gpu_uuids == ("GPU-0",)
    assert account.open_window(30).gpu_uuids == ("GPU-1",)


def test_late_events_shorten_a_bill_never_lengthen_it() -> None:
    account = meter()
    account.request_began(100)
    account.request_ended(200)
    account.request_began(150)
    account.request_ended(210)
    sealed = account.seal(190, WALL + 190)
    assert sealed is not None
    assert sealed.end_mono_ns == 210
    assert sealed.active_ns == 110
    assert account.open_window(0).start_wall_ns == WALL + 210


def test_unmatched_end_is_counted_and_changes_nothing_else() -> None:
    account = meter()
    account.request_ended(10)
    assert account.unmatched_ends == 1
    assert account.in_flight == 0
    assert sums([account.open_window(20)]) == (0, 20, 0)


def test_a_snapshot_changes_nothing() -> None:
    account = meter()
    account.request_began(10)
    assert account.open_window(30) == account.open_window(30)
    assert not account.open_window(30).sealed
    account.request_ended(40)
    window = account.seal(40, WALL + 40)
    assert window is not None
    assert window.active_ns == 30


def test_function_without_gpu_memory_is_billed_by_the_card() -> None:
    small = Subject.of("i", FunctionSpec("f"), node="n", boot_id="b")
    on_card = Placement("NVIDIA A10", ("GPU-0",), 24 * GIB)
    account = Meter(small, BillingPolicy(), state=InstanceState.FROZEN, at=0, wall=WALL, placement=on_card)
    assert account.open_window(1).gpu_memory_bytes == 24 * GIB


# ---- random walks --------------------------------------------------------------------------------------------


@dataclass
class Life:
    """A random life of an instance, whose oracle paints every nanosecond with one kind."""

    account: Meter
    painted: list[BilledAs] = field(default_factory=list)
    windows: list[UsageWindow] = field(default_factory=list)
    invocations: int = 0
    in_flight: int = 0
    state: InstanceState = InstanceState.RUNNING

    @property
    def now(self) -> int:
        return len(self.painted)

    def pass_time(self, duration: int) -> None:
        working = self.state in (InstanceState.RUNNING, InstanceState.STOPPING) and self.in_flight > 0
        kind = BilledAs.ACTIVE if working else BillingPolicy().quiet_kind(self.state)
        self.painted.extend([kind] * duration)

    def do(self, what: str) -> None:
        now, wall = self.now, WALL + self.now
        if what == "begin":
            self.account.request_began(now)
            self.in_flight += 1
            self.invocations += 1
        elif what == "end" and self.in_flight:
            self.account.request_ended(now)
            self.in_flight -= 1
        elif what == "seal":
            self.keep(self.account.seal(now, wall))
        elif what in InstanceState.__members__:
            self.state = InstanceState(what)
            self.keep(self.account.state_changed(self.state, now, wall))

    def keep(self, window: UsageWindow | None) -> None:
        if window is not None:
            self.windows.append(window)


QUIET = ["FREEZING", "FROZEN", "WAITING_GPU", "RESTORING", "STOPPING"]
STEPS = st.lists(
    st.tuples(
        st.integers(0, 40),
        st.sampled_from(["begin", "begin", "end", "end", "seal", "RUNNING", "RUNNING", *QUIET]),
    ),
    max_size=40,
)


@given(STEPS)
@settings(max_examples=300, deadline=None)
def test_every_nanosecond_has_the_kind_the_oracle_gives_it(steps: list[tuple[int, str]]) -> None:
    life = Life(meter())
    for duration, what in steps:
        life.pass_time(duration)
        life.do(what)
    windows = [*life.windows, life.account.open_window(life.now)]
    check_ledger(windows)
    assert windows[0].start_mono_ns == 0
    assert windows[-1].end_mono_ns == life.now
    assert sum(w.invocations for w in windows) == life.invocations
    for window in windows:
        span = life.painted[window.start_mono_ns : window.end_mono_ns]
        assert sums([window]) == tuple(span.count(kind) for kind in (BilledAs.ACTIVE, BilledAs.IDLE, BilledAs.UNBILLED))


@given(STEPS, st.integers(1, 800), st.integers(0, 500), st.booleans(), st.integers(1, 100))
@settings(max_examples=150, deadline=None)
def test_kill_loses_at_most_one_flush_of_active_time_and_adds_none(
    steps: list[tuple[int, str]], killed_at: int, away: int, survived: bool, flush: int
) -> None:
    life = Life(meter())
    stored: dict[int, UsageWindow] = {}

    def live_until(until: int) -> None:
        while life.now < until:
            if life.now % flush == 0:
                stored.update({w.seq: w for w in [*life.windows, life.account.open_window(life.now)]})
            life.pass_time(1)

    for duration, what in steps:
        live_until(min(life.now + duration, killed_at))
        if life.now == killed_at:
            break
        life.do(what)
    live_until(killed_at)
    truth = life.painted.count(BilledAs.ACTIVE)
    last = stored[max(stored)]
    back_at = life.now + away
    recovered = resume(
        last,
        boot_id="boot-a",
        now_mono_ns=back_at,
        same_process=survived,
        policy=BillingPolicy(),
        most_idle_ns=MOST_IDLE,
    )
    ledger = [stored[seq] for seq in sorted(stored) if seq < last.seq] + list(recovered.windows)
    check_ledger(ledger)
    assert all(window.sealed for window in ledger)
    assert ledger[-1].end_mono_ns == max(back_at, last.end_mono_ns)
    assert sum(window.idle_ns for window in recovered.windows if window.estimated) <= MOST_IDLE
    metered = sum(window.active_ns for window in ledger)
    assert truth - flush <= metered <= truth
    assert recovered.next_seq == ledger[-1].seq + 1


# ---- recovery ------------------------------------------------------------------------------------------------


def last_window(state: InstanceState = InstanceState.RUNNING, at: int = 1_000) -> UsageWindow:
    account = meter(state)
    account.request_began(100)
    account.request_ended(300)
    return account.open_window(at)


def gap_after(
    last: UsageWindow,
    *,
    same_process: bool,
    now: int = 5_000,
    boot_id: str = "boot-a",
) -> list[UsageWindow]:
    recovered = resume(
        last,
        boot_id=boot_id,
        now_mono_ns=now,
        same_process=same_process,
        policy=BillingPolicy(),
        most_idle_ns=4_000,
    )
    check_ledger(list(recovered.windows))
    return list(recovered.windows)


def test_a_gap_with_the_process_alive_is_idle_and_estimated() -> None:
    sealed, gap = gap_after(last_window(), same_process=True)
    assert sealed == replace(last_window(), sealed=True)
    assert (gap.idle_ns, gap.active_ns, gap.estimated, gap.invocations) == (4_000, 0, True, 0)
    assert (gap.start_mono_ns, gap.start_wall_ns) == (1_000, WALL + 1_000)


def test_no_more_than_a_window_of_a_gap_is_billed() -> None:
    """A process that outlived its agent by hours could not be reached all that time."""
    _, idle, rest = gap_after(last_window(), same_process=True, now=100_000)
    assert sums([idle]) == (0, 4_000, 0)
    assert sums([rest]) == (0, 0, 95_000)
    assert (rest.seq, rest.estimated, rest.sealed) == (idle.seq + 1, True, True)
    assert rest.start_wall_ns == idle.start_wall_ns + 4_000


def test_a_gap_after_a_state_of_another_version_is_unbilled() -> None:
    _, gap = gap_after(replace(last_window(), state="HIBERNATING"), same_process=True)
    assert (gap.unbilled_ns, gap.idle_ns) == (4_000, 0)


def test_a_gap_after_the_process_died_is_unbilled() -> None:
    _, gap = gap_after(last_window(), same_process=False)
    assert (gap.unbilled_ns, gap.idle_ns, gap.estimated) == (4_000, 0, False)


def test_a_gap_while_waiting_for_a_gpu_stays_unbilled() -> None:
    _, gap = gap_after(last_window(InstanceState.WAITING_GPU), same_process=True)
    assert sums([gap]) == (0, 0, 4_000)


def test_gap_during_an_image_pull_stays_unbilled() -> None:
    pulling = Meter(subject(), BillingPolicy(), state=InstanceState.STARTING, at=0, wall=WALL, unbilled=True)
    _, gap = gap_after(pulling.open_window(1_000), same_process=True)
    assert sums([gap]) == (0, 0, 4_000)


def test_a_ledger_of_another_boot_ends_at_its_last_mark() -> None:
    assert gap_after(last_window(), same_process=False, boot_id="boot-b") == [replace(last_window(), sealed=True)]
    assert gap_after(last_window(), same_process=False, boot_id="boot-b", now=10) == [
        replace(last_window(), sealed=True)
    ]


def test_a_ledger_that_was_properly_ended_is_left_alone() -> None:
    assert gap_after(replace(last_window(), sealed=True), same_process=False) == []
