"""The GPU map of a restore on other GPUs (driver 580 on): from each GPU to the one its memory wakes on.

The pairs must name every GPU that the driver sees, whatever CUDA_VISIBLE_DEVICES says, each once as old and once as
new, and only GPUs of one model replace each other (`agent/docs/facts/gpu-checkpoint.md`, section 2). So a move is a
permutation of the host's GPUs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def device_map(old: Sequence[str], new: Sequence[str], models: Mapping[str, str]) -> dict[str, str]:
    """old uuid -> new uuid for every GPU in `models` (uuid -> model), which maps `old` to `new`; {} if nothing moves.

    GPUs in both `old` and `new` stay; GPUs in neither stay as well, or take a place that was left. Raises ValueError if
    the numbers or the models of `old` and `new` differ, or if a GPU is not on this host.
    """
    if set(old) == set(new):
        return {}
    leaves, enters = [u for u in old if u not in new], [u for u in new if u not in old]
    known = set(old) | set(new) <= set(models)
    if not known or sorted(models[u] for u in leaves) != sorted(models[u] for u in enters):
        raise ValueError(f"an image of GPUs {', '.join(old)} can't wake on {', '.join(new)}")
    pairs = {uuid: uuid for uuid in models}
    for uuid in leaves:
        target = next(each for each in enters if models[each] == models[uuid])
        enters.remove(target)
        pairs[uuid], pairs[target] = target, uuid
    return pairs
