"""Which node gets a new instance."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agent.core.placement import NodeView, Placed, Unplaceable, place
from agent.core.types import GIB, FunctionSpec, GpuNeed

OCR = FunctionSpec("ocr", memory_bytes=GIB)
HOST = frozenset({"process"})
NODE = NodeView("n1", ("A10", "A10"), runtimes=HOST, memory_free_bytes=8 * GIB)


def test_the_node_with_the_most_free_slots_gets_it() -> None:
    shared = replace(NODE, name="n2", instances_per_gpu=2, assigned=1)
    assert place(OCR, [NODE, shared]) == Placed("n2")
    assert place(OCR, [NODE, replace(shared, assigned=3)]) == Placed("n1")


def test_ties_go_to_the_most_memory_then_the_name() -> None:
    assert place(OCR, [NODE, replace(NODE, name="n0", memory_free_bytes=9 * GIB)]) == Placed("n0")
    assert place(OCR, [replace(NODE, name="n9"), NODE]) == Placed("n1")


@pytest.mark.parametrize(
    ("spec", "nodes", "reason"),
    [
        (OCR, [], "NO_NODE"),
        (replace(OCR, image="registry/ocr:1"), [NODE], "IMAGE_RUNTIME_UNAVAILABLE"),
        (OCR, [replace(NODE, runtimes=frozenset({"engine"}))], "IMAGE_RUNTIME_UNAVAILABLE"),
        (replace(OCR, gpu=GpuNeed(model="H100")), [NODE], "NO_MATCHING_NODE"),
        (replace(OCR, gpu=GpuNeed(count=3)), [NODE], "NO_MATCHING_NODE"),
        (OCR, [replace(NODE, assigned=2)], "NO_FREE_GPU"),
        (OCR, [replace(NODE, memory_free_bytes=GIB - 1)], "HOST_MEMORY_SHORT"),
    ],
)
def test_the_reason_names_what_is_missing(spec: FunctionSpec, nodes: list[NodeView], reason: str) -> None:
    outcome = place(spec, nodes)
    assert isinstance(outcome, Unplaceable)
    assert outcome.reason == reason


def test_labels_must_match() -> None:
    rack = replace(NODE, name="n2", labels={"rack": "b"}, assigned=1)
    assert place(OCR, [NODE, rack], {"rack": "b"}) == Placed("n2")
    assert isinstance(place(OCR, [NODE], {"rack": "b"}), Unplaceable)
