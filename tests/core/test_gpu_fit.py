"""Which GPUs suit a function, with the totals that NVML reports, and what is said if none does."""

from __future__ import annotations

import pytest

from agent.core.gpu_fit import NodeGpus, misfit, nominal_bytes, suits, unmapped_type
from agent.core.provisioning.placement import GpuView
from agent.core.types import GIB, MIB, GpuNeed

# model, the total in MiB that NVML reports, and the size in GiB that it is sold with
CARDS = [
    ("Tesla T4", 15360, 16),
    ("NVIDIA A10", 23028, 24),
    ("NVIDIA L4", 23034, 24),
    ("NVIDIA L20", 46068, 48),
    ("NVIDIA RTX 6000 Ada Generation", 49140, 48),
    ("NVIDIA A100-SXM4-80GB", 81920, 80),
    ("NVIDIA H100 80GB HBM3", 81559, 80),
    ("NVIDIA H200", 143771, 141),
    ("Tesla V100-SXM2-32GB", 32510, 32),
    ("NVIDIA GeForce RTX 3060", 12288, 12),
    ("NVIDIA RTX A4500", 20470, 20),
    ("Emulated L20", 16 * 1024, 16),
]


def card(model: str, mib: int) -> GpuView:
    return GpuView(model, model, memory_bytes=mib * MIB)


T4, A10, L20 = card("Tesla T4", 15360), card("NVIDIA A10", 23028), card("NVIDIA L20", 46068)
A100, H100, H200 = (card(*CARDS[n][:2]) for n in (5, 6, 7))


@pytest.mark.parametrize(("model", "mib", "sold_gib"), CARDS)
def test_a_function_may_ask_for_the_size_a_gpu_is_sold_with_and_for_no_more(
    model: str, mib: int, sold_gib: int
) -> None:
    assert nominal_bytes(mib * MIB) == sold_gib * GIB
    assert suits(GpuNeed(memory_bytes=sold_gib * GIB), card(model, mib), {})
    assert not suits(GpuNeed(memory_bytes=(sold_gib + 1) * GIB), card(model, mib), {})


def test_unknown_memory_is_enough() -> None:
    assert suits(GpuNeed(memory_bytes=100 * GIB), card("NVIDIA A10", 0), {})


@pytest.mark.parametrize(
    ("gpu_type", "gpu", "fits"),
    [
        ("H100", H100, True),
        ("h100", H100, True),
        ("NVIDIA H100 80GB HBM3", H100, True),
        ("H100 80GB", H100, True),
        ("A100", A100, True),
        ("H100", L20, False),
        ("A10", A100, False),
        ("L2", L20, False),
        ("80GB H100", H100, False),
        ("-", H100, False),
    ],
)
def test_a_type_that_nothing_maps_is_words_of_the_model(gpu_type: str, gpu: GpuView, fits: bool) -> None:
    assert suits(GpuNeed(gpu_type=gpu_type), gpu, {}) is fits
    assert suits(GpuNeed(gpu_type=gpu_type), gpu, {"fc.gpu.tesla.1": "Tesla T4"}) is fits


def test_a_mapped_type_is_that_model_and_an_unmapped_one_of_function_compute_any_where_nothing_is_mapped() -> None:
    ada, types = GpuNeed(gpu_type="fc.gpu.ada.1"), {"fc.gpu.ada.1": "NVIDIA L20"}
    assert suits(ada, L20, types)
    assert not suits(ada, T4, types)
    assert suits(ada, T4, {})
    assert not suits(GpuNeed(gpu_type="fc.gpu.tesla.1"), L20, types), "this node says what its types mean"
    assert suits(GpuNeed(gpu_type="fast"), L20, {"fast": "NVIDIA L20"})


def test_a_model_is_exact() -> None:
    assert suits(GpuNeed(model="NVIDIA L20"), L20, {})
    assert not suits(GpuNeed(model="L20"), L20, {})


FLEET = [NodeGpus([T4, T4]), NodeGpus([L20], {"fc.gpu.ada.1": "NVIDIA L20"})]


@pytest.mark.parametrize(
    ("need", "said"),
    [
        (GpuNeed(), ""),
        (GpuNeed(0, "", "H100", 100 * GIB), ""),
        (GpuNeed(2), ""),
        (GpuNeed(memory_bytes=48 * GIB), ""),
        (GpuNeed(gpu_type="fc.gpu.ada.1", memory_bytes=48 * GIB), ""),
        (
            GpuNeed(memory_bytes=100 * GIB),
            (
                "the fleet has no GPU with 100 GiB; the largest is NVIDIA L20 with 48 GiB; "
                "lower gpuMemorySize, or add such a GPU"
            ),
        ),
        (
            GpuNeed(gpu_type="T4", memory_bytes=17 * GIB),
            (
                "the fleet has no GPU of type 'T4' with 17 GiB; the largest is Tesla T4 with 16 GiB; "
                "lower gpuMemorySize, or add such a GPU"
            ),
        ),
        (
            GpuNeed(gpu_type="H100"),
            (
                "the fleet has no GPU of type 'H100'; it has NVIDIA L20, Tesla T4; "
                "change gpuType, add such a GPU, or set gpu.types at an agent"
            ),
        ),
        (
            GpuNeed(3),
            (
                "the function needs 3 GPUs on one node; the fleet has at most 2 that fit; "
                "lower hibernode.gpus, or add such GPUs"
            ),
        ),
        (
            GpuNeed(2, gpu_type="L20"),
            (
                "the function needs 2 GPUs of type 'L20' on one node; the fleet has at most 1 that fit; "
                "lower hibernode.gpus, or add such GPUs"
            ),
        ),
    ],
)
def test_what_no_node_can_run_is_said_with_what_there_is(need: GpuNeed, said: str) -> None:
    assert misfit(need, FLEET, "the fleet") == said


def test_a_node_without_gpus_says_so() -> None:
    why = misfit(GpuNeed(), [NodeGpus([])], "this node")
    assert why == "this node has no GPU, and the function needs 1; add one, or leave gpuConfig out"


def test_a_type_of_function_compute_that_nothing_maps_is_used_with_a_warning() -> None:
    need = GpuNeed(gpu_type="fc.gpu.ada.1")
    assert "means any GPU here" in unmapped_type(need, [NodeGpus([T4])])
    assert unmapped_type(need, FLEET) == ""
    assert unmapped_type(GpuNeed(gpu_type="H100"), [NodeGpus([H100])]) == ""
