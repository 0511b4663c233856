"""More functions than GPUs: each is served in bounded time, and minAwake keeps the GPUs from thrashing."""

from __future__ import annotations

import pytest

from scripts.benchmarks.sharing import measure


@pytest.mark.slow
async def test_six_functions_share_two_gpus() -> None:
    """A shorter run of the benchmark, which also counts calls on frozen processes and wrong answers."""
    result = await measure(requests=300, rate=40.0, seed=3)
    for phase in (result["without_min_awake"], result["with_min_awake"]):
        assert phase["failed"] == 0, phase["failures"]
        assert phase["within_bound"], phase
        assert phase["swaps"] > 12, "every function was asked while others held its GPU"
        assert phase["calls_on_frozen_processes"] == 0
    assert result["with_min_awake"]["swaps"] < result["without_min_awake"]["swaps"]
