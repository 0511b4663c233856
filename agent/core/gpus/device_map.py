"""On which GPU each GPU's memory wakes: the map that a restore on other GPUs needs (driver 580 on).

Rule (facts gpu-checkpoint 2): the pairs must name every GPU that the driver sees, whatever CUDA_VISIBLE_DEVICES says,
each once as old and once as new, and only GPUs of one model stand in for each other. So a move is a permutation of the
host's GPUs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def device_map(old: Sequence[str], new: Sequence[str], models: Mapping[str, str]) -> dict[str, str]:
    """old uuid -> new uuid for every GPU in `models` (uuid -> model), with `old` landing on `new`; {} if nothing moves.

    A GPU that is in both stays; those that the instance does not use stay too, or take a place that it left. Raises
    ValueError where `old` can't land on `new`: another number, another model, or a GPU that is not on this host.
    """
    if set(old) == set(new):
        return {}
    leaves, enters = [u for u in old if u not in new], [u for u in new if u not in old]
    known = set(old) | set(new) <= set(models)
    if not known or sorted(models[u] for u in leaves) != sorted(models[u] for u in enters):
        raise ValueError(f"what was on GPUs {', '.join(old)} can't wake on {', '.join(new)}")
    pairs = {uuid: uuid for uuid in models}
    for uuid in leaves:
        goes_to = next(each for each in enters if models[each] == models[uuid])
        enters.remove(goes_to)
        pairs[uuid], pairs[goes_to] = goes_to, uuid
    return pairs
