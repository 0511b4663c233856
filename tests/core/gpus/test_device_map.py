"""The GPU map of a restore is a permutation of the host's GPUs within their models."""

from __future__ import annotations

import random

import pytest

from agent.core.gpus.device_map import device_map

HOST = {"A": "L20", "B": "L20", "C": "L20", "D": "T4"}


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (("A",), ("A",), {}),
        (("A", "B"), ("B", "A"), {}),
        (("A",), ("B",), {"A": "B", "B": "A", "C": "C", "D": "D"}),
        (("A", "B"), ("B", "C"), {"A": "C", "B": "B", "C": "A", "D": "D"}),
        ((), (), {}),
    ],
)
def test_shared_gpus_stay_and_others_swap(old: tuple[str, ...], new: tuple[str, ...], expected: dict[str, str]) -> None:
    assert device_map(old, new, HOST) == expected


@pytest.mark.parametrize(("old", "new"), [(("A",), ("D",)), (("A",), ("A", "B")), (("A",), ("X",)), (("X",), ("A",))])
def test_impossible_map_raises(old: tuple[str, ...], new: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="can't wake on"):
        device_map(old, new, HOST)


def test_every_map_is_a_permutation_that_keeps_models() -> None:
    dice = random.Random(580)
    for _ in range(500):
        models = {f"GPU-{i}": dice.choice(["L20", "H100"]) for i in range(8)}
        model = models["GPU-0"]
        pool = [uuid for uuid in models if models[uuid] == model]
        count = dice.randint(1, len(pool))
        old, new = dice.sample(pool, count), dice.sample(pool, count)
        pairs = device_map(old, new, models)
        if set(old) == set(new):
            assert pairs == {}
            continue
        assert set(pairs) == set(pairs.values()) == set(models)
        assert all(models[a] == models[b] for a, b in pairs.items())
        assert {pairs[uuid] for uuid in old} == set(new)
