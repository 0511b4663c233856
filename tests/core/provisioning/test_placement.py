"""Which node gets a new instance, which instances are stopped for it, and the reason if none can take it."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from agent.core.provisioning.placement import GpuView, NodeView, Occupant, Placed, Unplaceable, instances_to_stop, place
from agent.core.types import GIB, MIB, FunctionSpec, GpuNeed

OCR = FunctionSpec("ocr", memory_bytes=GIB)
HOST = frozenset({"process"})


def gpus(*sharers: int, model: str = "A10") -> tuple[GpuView, ...]:
    """One GPU for each number of instances that are assigned to it."""
    return tuple(GpuView(f"{model}-{index}", model, count) for index, count in enumerate(sharers))


NODE = NodeView("n1", gpus(0, 0), runtimes=HOST, memory_free_bytes=8 * GIB)
SMALL = replace(NODE, gpus=tuple(GpuView(f"T4-{n}", "Tesla T4", memory_bytes=15360 * MIB) for n in range(2)))
A10 = GpuView("A10", "A10", memory_bytes=23028 * MIB)


def test_the_node_with_the_most_free_slots_gets_it() -> None:
    shared = replace(NODE, name="n2", instances_per_gpu=2)
    assert place(OCR, [NODE, replace(shared, gpus=gpus(1, 0))]) == Placed("n2")
    assert place(OCR, [NODE, replace(shared, gpus=gpus(2, 1))]) == Placed("n1")


def test_ties_go_to_the_most_memory_then_the_name() -> None:
    assert place(OCR, [NODE, replace(NODE, name="n0", memory_free_bytes=9 * GIB)]) == Placed("n0")
    assert place(OCR, [replace(NODE, name="n9"), NODE]) == Placed("n1")


def test_only_slots_of_the_wanted_model_count() -> None:
    """Three free GPUs of another model are no reason to go there."""
    mixed = replace(NODE, name="n2", gpus=(*gpus(1, 0), *gpus(0, 0, 0, model="T4")))
    assert place(replace(OCR, gpu=GpuNeed(model="A10")), [mixed, NODE]) == Placed("n1")
    full = replace(mixed, gpus=(*gpus(1, 1), *gpus(0, model="T4")))
    outcome = place(replace(OCR, gpu=GpuNeed(model="A10")), [full])
    assert isinstance(outcome, Unplaceable)
    assert outcome.reason == "NO_FREE_GPU"


def test_an_instance_of_two_gpus_needs_a_slot_on_each_of_two() -> None:
    two = replace(OCR, gpu=GpuNeed(count=2))
    shared = replace(NODE, instances_per_gpu=2)
    assert isinstance(place(two, [replace(shared, gpus=gpus(2, 0))]), Unplaceable)
    assert place(two, [replace(shared, gpus=gpus(1, 1))]) == Placed("n1")


def test_with_migration_instances_per_gpu_bounds_the_average() -> None:
    """Two woke on the first GPU: the second looks free, but its place is theirs."""
    wandered = replace(NODE, gpus=gpus(2, 0))
    assert place(OCR, [wandered]) == Placed("n1")
    assert isinstance(place(OCR, [replace(wandered, migrates=True)]), Unplaceable)


def test_only_gpus_with_enough_memory_and_of_the_type_count() -> None:
    """The small GPUs are free, the large one is in use; and the type means another model on each node."""
    large = replace(OCR, gpu=GpuNeed(memory_bytes=24 * GIB))
    mixed = replace(SMALL, gpus=(*SMALL.gpus, replace(A10, sharers=1)))
    outcome = place(large, [mixed])
    assert isinstance(outcome, Unplaceable)
    assert outcome.reason == "NO_FREE_GPU"
    assert mixed.with_instance(large).gpus[-1].sharers == 2, "counted where it can go"
    assert place(large, [mixed, replace(NODE, name="n2", gpus=(A10,))]) == Placed("n2")
    ada = replace(OCR, gpu=GpuNeed(gpu_type="fc.gpu.ada.1"))
    elsewhere = replace(NODE, name="n2", gpu_types={"fc.gpu.ada.1": "A10"})
    assert place(ada, [replace(SMALL, gpu_types={"fc.gpu.ada.1": "L20"}), elsewhere]) == Placed("n2")


def test_the_message_says_what_gpu_is_wanted_and_no_figure_that_changes() -> None:
    outcome = place(replace(OCR, gpu=GpuNeed(gpu_type="T4", memory_bytes=17 * GIB)), [SMALL])
    assert isinstance(outcome, Unplaceable)
    assert "node n1 has 0 of 1 usable GPU(s) of type 'T4' with 17 GiB" in outcome.message
    short = place(OCR, [replace(NODE, memory_free_bytes=GIB - 1)])
    assert isinstance(short, Unplaceable)
    assert "has 1 GiB of memory left" in short.message


def test_labels_of_the_function_must_match() -> None:
    rack = replace(NODE, name="n2", labels={"rack": "b"}, gpus=gpus(1, 0))
    asks = replace(OCR, node_labels=(("rack", "b"),))
    assert place(asks, [NODE, rack]) == Placed("n2")
    assert isinstance(place(asks, [NODE]), Unplaceable)


def test_what_is_asked_for_in_one_round_is_spread_and_counted() -> None:
    nodes = {name: replace(NODE, name=name) for name in ("n1", "n2")}
    places = []
    for _ in range(4):
        outcome = place(OCR, nodes.values())
        assert isinstance(outcome, Placed)
        places.append(outcome.node)
        nodes[outcome.node] = nodes[outcome.node].with_instance(OCR)
    assert places == ["n1", "n2", "n1", "n2"]
    assert isinstance(place(OCR, nodes.values()), Unplaceable)


@pytest.mark.parametrize(
    ("spec", "nodes", "reason"),
    [
        (OCR, [], "NO_NODE"),
        (OCR, [replace(NODE, unavailable="is cordoned")], "NO_NODE"),
        (OCR, [NodeView("n1", unavailable="is silent")], "NO_NODE"),
        (replace(OCR, image="registry/ocr:1"), [NODE], "IMAGE_RUNTIME_UNAVAILABLE"),
        (OCR, [replace(NODE, runtimes=frozenset({"engine"}))], "IMAGE_RUNTIME_UNAVAILABLE"),
        (replace(OCR, gpu=GpuNeed(model="H100")), [NODE], "NO_MATCHING_NODE"),
        (replace(OCR, gpu=GpuNeed(model="H100")), [replace(NODE, unavailable="is silent")], "NO_MATCHING_NODE"),
        (replace(OCR, gpu=GpuNeed(count=3)), [NODE], "NO_MATCHING_NODE"),
        (replace(OCR, node_labels=(("rack", "b"),)), [NODE], "NO_MATCHING_NODE"),
        (replace(OCR, gpu=GpuNeed(gpu_type="H100")), [NODE], "NO_MATCHING_NODE"),
        (replace(OCR, gpu=GpuNeed(memory_bytes=17 * GIB)), [SMALL], "NO_MATCHING_NODE"),
        (OCR, [replace(NODE, gpus=gpus(1, 1))], "NO_FREE_GPU"),
        (OCR, [replace(NODE, gpus=gpus(1, 1)), replace(NODE, unavailable="is lost")], "NO_FREE_GPU"),
        (OCR, [replace(NODE, memory_free_bytes=GIB - 1)], "HOST_MEMORY_SHORT"),
    ],
)
def test_the_reason_is_what_the_closest_node_lacks(spec: FunctionSpec, nodes: list[NodeView], reason: str) -> None:
    outcome = place(spec, nodes)
    assert isinstance(outcome, Unplaceable)
    assert outcome.reason == reason


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        ([replace(NODE, labels={}, gpus=gpus(0))], "node n1 lacks label zone=a"),
        (
            [
                replace(NODE, name="n1", labels={"zone": "a"}, gpus=gpus(1)),
                replace(NODE, name="n2", labels={"zone": "b"}),
                replace(NODE, name="n3", labels={"zone": "a"}, gpus=gpus(1, 1)),
            ],
            "3 nodes: 2 have no free GPU, 1 lacks label zone=a",
        ),
        (
            [
                replace(NODE, name="n1", labels={"zone": "a"}, unavailable="is cordoned"),
                replace(NODE, name="n2", labels={"zone": "a"}, unavailable="is cordoned"),
                NodeView("n3", unavailable="is silent"),
                replace(NODE, name="n4", labels={"zone": "a"}, gpus=()),
            ],
            "4 nodes: 2 are cordoned, 1 is silent, 1 has 0 of 1 usable GPU(s)",
        ),
        (
            [replace(NODE, name=f"n{n}", labels={"zone": "a"}, memory_free_bytes=0) for n in range(2)],
            "2 nodes: 2 have too little host memory left",
        ),
    ],
)
def test_the_message_counts_the_nodes_by_what_they_lack(nodes: list[NodeView], said: str) -> None:
    outcome = place(replace(OCR, node_labels=(("zone", "a"),)), nodes)
    assert isinstance(outcome, Unplaceable)
    assert said in outcome.message


# ---- instances to stop -----------------------------------------------------------------------------------------


def test_the_first_instances_that_make_enough_room_are_stopped() -> None:
    full = replace(NODE, gpus=gpus(1, 1))
    old = [Occupant("a", "n1", ("A10-1",)), Occupant("b", "n1", ("A10-0",))]
    assert instances_to_stop(OCR, [full], old) == ("a",)
    assert instances_to_stop(OCR, [full], [Occupant("c", "n1", ("cordoned-gpu",)), *old]) == ("a",)


def test_no_instance_is_stopped_if_it_does_not_help() -> None:
    full = replace(NODE, gpus=gpus(1, 1))
    old = [Occupant("a", "n1", ("A10-0",))]
    assert instances_to_stop(replace(OCR, gpu=GpuNeed(count=2)), [full], old) == ()
    assert instances_to_stop(replace(OCR, gpu=GpuNeed(model="H100")), [full], old) == ()
    assert instances_to_stop(OCR, [replace(full, unavailable="is cordoned")], old) == ()
    assert instances_to_stop(replace(OCR, node_labels=(("rack", "b"),)), [full], old) == ()
    assert instances_to_stop(OCR, [full], [Occupant("a", "n1", ("cordoned-gpu",))]) == ()


def test_the_node_where_the_fewest_go_is_chosen() -> None:
    nodes = [replace(NODE, name="n1", gpus=gpus(1, 1)), replace(NODE, name="n2", gpus=gpus(1, 0))]
    old = [Occupant("a", "n1", ("A10-0",)), Occupant("b", "n1", ("A10-1",)), Occupant("c", "n2", ("A10-0",))]
    assert instances_to_stop(replace(OCR, gpu=GpuNeed(count=2)), nodes, old) == ("c",)


def test_stopped_instances_make_room_for_one() -> None:
    """Random fleets: the chosen instances make enough room, and no subset does."""
    helped = 0
    for seed in range(600):
        rng = random.Random(seed)
        nodes, old = [], []
        for name in ("n1", "n2", "n3"):
            counts = [rng.randint(0, 2) for _ in range(rng.randint(1, 3))]
            node = replace(NODE, name=name, gpus=gpus(*counts), instances_per_gpu=2, migrates=rng.random() < 0.5)
            nodes.append(node)
            for index, count in enumerate(counts):
                old += [Occupant(f"{name}-{index}-{n}", name, (f"A10-{index}",)) for n in range(rng.randint(0, count))]
        rng.shuffle(old)
        spec = replace(OCR, gpu=GpuNeed(count=rng.randint(1, 3)))
        if isinstance(place(spec, nodes), Placed):
            continue
        uids = instances_to_stop(spec, nodes, old)
        if not uids:
            continue
        helped += 1
        gone = [one for one in old if one.uid in uids]
        assert len({one.node for one in gone}) == 1
        assert isinstance(place(spec, _without(nodes, gone)), Placed)
        for one in gone:
            assert isinstance(place(spec, _without(nodes, [other for other in gone if other is not one])), Unplaceable)
    assert helped > 50


def _without(nodes: list[NodeView], gone: list[Occupant]) -> list[NodeView]:
    left = {node.name: node for node in nodes}
    for one in gone:
        left[one.node] = left[one.node].without(one.gpus, 0)
    return list(left.values())
