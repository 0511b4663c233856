"""Options, reserved memory and the activity ring, each alone."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from agent.core.errors import InvalidArgumentError, PreconditionError
from agent.emulated.activity import ACTIVITY_BYTES, Activity
from agent.emulated.devices import make_devices
from agent.emulated.options import Options, parse_compute_mode
from agent.emulated.profiles import find_profile
from agent.emulated.protocol import ACTIVITY_BUCKETS, ACTIVITY_NS, ComputeMode
from agent.emulated.vram import Vram
from tests.adapters.emulated.harness import MIB

NOW_TICK = (1 << 41) + 5  # beyond the 40 bits in a bucket
NOW_NS = NOW_TICK * ACTIVITY_NS


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as threads:
        yield threads


@pytest.fixture
def activity() -> Iterator[Activity]:
    one = Activity()
    yield one
    one.close()


def count(activity: Activity, device: int, tick: int, busy_us: int) -> None:
    with mmap.mmap(activity.fd, ACTIVITY_BYTES) as ring:
        place = 8 * (device * ACTIVITY_BUCKETS + tick % ACTIVITY_BUCKETS)
        struct.pack_into("<Q", ring, place, (tick & 0xFF_FFFF_FFFF) << 24 | busy_us)


def test_last_second_counts_whole_buckets(activity: Activity) -> None:
    assert activity.percent(1, NOW_NS) == 0
    for ago in (1, 2):
        count(activity, 1, NOW_TICK - ago, 62_500)
    assert activity.percent(1, NOW_NS) == activity.percent(1, NOW_NS + ACTIVITY_NS // 2) == 12
    assert activity.percent(0, NOW_NS) == 0
    assert activity.percent(1, NOW_NS + 7 * ACTIVITY_NS) == 6  # the earlier bucket is more than a second old
    assert activity.percent(1, NOW_NS + 8 * ACTIVITY_NS) == 0
    assert activity.percent(1, NOW_NS + ACTIVITY_BUCKETS * ACTIVITY_NS) == 0  # and does not count again


def test_overlapping_work_counts_once(activity: Activity) -> None:
    for ago in range(1, 9):
        count(activity, 0, NOW_TICK - ago, 400_000)
    assert activity.percent(0, NOW_NS) == 100


def test_reserved_memory_is_not_allocated(executor: ThreadPoolExecutor) -> None:
    vram = Vram("test", 8 * MIB, executor)
    try:
        mine = vram.allocate(2 * MIB)
        assert mine is not None
        vram.reserve(5 * MIB)
        assert vram.used_bytes == 7 * MIB
        assert vram.allocate(2 * MIB) is None
        with pytest.raises(PreconditionError) as refused:
            vram.reserve(7 * MIB)
        assert refused.value.reason == "EMULATED_VRAM_SHORT"
        assert vram.used_bytes == 7 * MIB
        vram.reserve(6 * MIB)  # in all, not in addition
        assert vram.used_bytes == 8 * MIB
        vram.reserve(0)
        vram.free(mine)
        assert vram.used_bytes == 0
    finally:
        vram.close()


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        ("DEFAULT", ComputeMode.DEFAULT),
        ("exclusive-process", ComputeMode.EXCLUSIVE_PROCESS),
        ("Exclusive", ComputeMode.EXCLUSIVE_PROCESS),
        ("prohibited", ComputeMode.PROHIBITED),
    ],
)
def test_compute_modes_by_name(text: str, mode: ComputeMode) -> None:
    assert parse_compute_mode(text) is mode


def test_invalid_compute_mode() -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        parse_compute_mode("EXCLUSIVE_THREAD")
    assert refused.value.reason == "EMULATED_OPTION_INVALID"


def test_mig_needs_a_model_that_supports_it(executor: ThreadPoolExecutor, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        make_devices(Options(tmp_path, model="L20", mig=True, memory_bytes=2 * MIB), executor)
    assert refused.value.reason == "EMULATED_MIG_UNSUPPORTED"
    devices = make_devices(Options(tmp_path, model="H20", mig=True, memory_bytes=2 * MIB), executor)
    assert [device.mig for device in devices] == [True, True]
    for device in devices:
        device.vram.close()


@pytest.mark.parametrize(("name", "why"), [("590", "described, but not emulated"), ("600", "does not exist")])
def test_profiles_that_cannot_start(name: str, why: str) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        find_profile(name)
    assert refused.value.reason == "EMULATED_PROFILE_UNKNOWN"
    assert why in refused.value.message
    assert "535, 550, 555, 570, 580" in refused.value.message
