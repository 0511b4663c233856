"""Device memory: limits, isolation between processes, use of host memory."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from agent.emulated.vram import CHUNK, GRANULE, FreeRanges, rounded
from tests.adapters.emulated.conftest import StartDriver
from tests.adapters.emulated.harness import MIB, RunningDriver

INVALID_VALUE, OUT_OF_MEMORY = 1, 2


def test_copies_and_fills_stay_inside_their_allocation(driver: RunningDriver) -> None:
    app = driver.application()
    address = app.must("alloc", size=1000)["address"]
    app.must("fill", address=address, size=1000, value=0xAB)
    assert app.must("read", address=address + 996, size=4, raw=True)["hex"] == "abababab"
    for start, size in ((address, 1001), (address + 999, 2), (address - 1, 1), (address + 4096, 1), (4096, 8)):
        assert app.ask("read", address=start, size=size)["rc"] == INVALID_VALUE
        assert app.ask("fill", address=start, size=size, value=1)["rc"] == INVALID_VALUE
    assert app.ask("free", address=address + 1)["rc"] == INVALID_VALUE


def test_device_to_device_and_wide_fills(driver: RunningDriver) -> None:
    app = driver.application()
    first, second = (app.must("alloc", size=4096)["address"] for _ in range(2))
    app.must("fill", address=first, size=4096, value=0x01020304, width=4)
    app.must("copy", to=second, source=first, size=4096)
    assert app.must("read", address=second + 4, size=4, raw=True)["hex"] == "04030201"


def test_new_memory_never_shows_another_processes_data(driver: RunningDriver) -> None:
    first = driver.application()
    for size in (5000, 3 * MIB):
        address = first.must("alloc", size=size)["address"]
        first.must("fill", address=address, size=size, value=0x5A)
    first.close()
    second = driver.application()
    for size in (1, 5000, 200_000, 3 * MIB, 8 * MIB):
        address = second.must("alloc", size=size)["address"]
        assert second.must("read", address=address, size=size)["zero"], size


def test_memory_is_counted_and_runs_out(start_driver: StartDriver) -> None:
    driver = start_driver("--gib", "0.03125")
    app = driver.application()
    assert app.must("memory") == {"rc": 0, "free": 32 * MIB, "total": 32 * MIB}
    address = app.must("alloc", size=20 * MIB)["address"]
    assert app.must("memory")["free"] == 12 * MIB
    assert app.ask("alloc", size=14 * MIB)["rc"] == OUT_OF_MEMORY
    app.must("free", address=address)
    app.must("alloc", size=32 * MIB)


def test_large_gpu_uses_host_memory_only_as_allocated(start_driver: StartDriver) -> None:
    driver = start_driver("--gib", "64", "--gpus", "2")

    def resident() -> int:
        with open(f"/proc/{driver.process.pid}/statm") as statm:
            return int(statm.read().split()[1]) * 4096

    before = resident()
    app = driver.application()
    app.must("alloc", size=8 * MIB)
    assert 8 * MIB <= resident() - before <= 16 * MIB  # charged to the driver process


def test_allocations_are_whole_granules() -> None:
    assert rounded(1) == GRANULE
    assert rounded(GRANULE + 1) == 2 * GRANULE
    assert rounded(CHUNK) == CHUNK
    assert rounded(CHUNK + 1) == 2 * CHUNK


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 40), st.sampled_from([1, 4, 8])), max_size=60))
def test_ranges_never_overlap_and_are_all_freed(steps: list[tuple[bool, int, int]]) -> None:
    ranges = FreeRanges(128)
    held: list[tuple[int, int]] = []
    for give, length, align in steps:
        if give and held:
            ranges.free(*held.pop(length % len(held)))
        else:
            offset = ranges.allocate(length, align)
            if offset is not None:
                assert offset % align == 0
                assert offset + length <= 128
                held.append((offset, length))
        for (a, m), (b, n) in itertools.pairwise(sorted(held)):
            assert a + m <= b, (a, m, b, n)
        assert ranges.free_bytes == 128 - sum(length for _, length in held)
    for offset, length in held:
        ranges.free(offset, length)
    assert ranges.allocate(128, 8) == 0
