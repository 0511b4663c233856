"""Which GPUs an instance is told to use, and which variables a function may set itself."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agent.core.instance_variables import cuda_numbers, gpu_variables, replaced_variables
from agent.core.types import GIB, FunctionSpec, Gpu, GpuNeed, VisibleDevices

A = Gpu("A", 0, "L20", 48 * GIB, pci_address=(0, 9, 0))
B = Gpu("B", 1, "L20", 48 * GIB, pci_address=(0, 1, 0))
C = Gpu("C", 2, "L20", 48 * GIB, pci_address=(0, 5, 0))
UUIDS = FunctionSpec("ocr", gpu=GpuNeed(2, visible_devices=VisibleDevices.UUID))
NUMBERS = FunctionSpec("ocr", gpu=GpuNeed(2))


def test_numbers_follow_the_pci_addresses_and_not_nvml() -> None:
    assert cuda_numbers([A, B, C], "ABC") == (2, 0, 1)
    assert cuda_numbers([A, B, C], "CA") == (1, 2), "in the order of the grant"
    assert cuda_numbers([A, replace(B, pci_address=(1, 0, 0)), C], "ABC") == (1, 2, 0), "the domain comes first"


@pytest.mark.parametrize(
    "inventory",
    [[A, replace(B, mig=True), C], [A, replace(B, pci_address=None), C], [A, C], [B, C], []],
    ids=["MIG", "address unknown", "one missing", "first missing", "empty"],
)
def test_uncertain_numbers_are_none(inventory: list[Gpu]) -> None:
    assert cuda_numbers(inventory, "C") == ()


def test_gpu_that_is_not_listed_has_no_number() -> None:
    assert cuda_numbers([A, B, C], "AD") == ()


@pytest.mark.parametrize(
    ("function", "gpus", "numbers", "sees_all", "expected"),
    [
        (NUMBERS, "AB", (2, 0), True, {"CUDA_VISIBLE_DEVICES": "2,0", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}),
        (NUMBERS, "AB", (2, 0), False, {"CUDA_VISIBLE_DEVICES": "0,1"}),
        (NUMBERS, "AB", (), True, {"CUDA_VISIBLE_DEVICES": "A,B"}),
        (NUMBERS, "", (), True, {"CUDA_VISIBLE_DEVICES": ""}),
        (UUIDS, "AB", (2, 0), True, {"CUDA_VISIBLE_DEVICES": "A,B"}),
        (UUIDS, "AB", (2, 0), False, {"CUDA_VISIBLE_DEVICES": "A,B"}),
    ],
)
def test_gpu_variables(
    function: FunctionSpec, gpus: str, numbers: tuple[int, ...], sees_all: bool, expected: dict[str, str]
) -> None:
    assert gpu_variables(function, tuple(gpus), numbers, sees_all_gpus=sees_all) == expected


ALL = ("CUDA_DEVICE_ORDER", "CUDA_VISIBLE_DEVICES", "HIBERNODE_INSTANCE", "NVIDIA_VISIBLE_DEVICES", "PORT", "MODEL")


@pytest.mark.parametrize(
    ("image", "gpu", "sees_all", "expected"),
    [
        ("host", GpuNeed(1), None, {"CUDA_DEVICE_ORDER", "CUDA_VISIBLE_DEVICES", "HIBERNODE_INSTANCE", "PORT"}),
        ("host", UUIDS.gpu, None, {"CUDA_VISIBLE_DEVICES", "HIBERNODE_INSTANCE", "PORT"}),
        ("host", GpuNeed(0), None, {"CUDA_VISIBLE_DEVICES", "HIBERNODE_INSTANCE", "PORT"}),
        ("ocr:3", GpuNeed(1), False, {"HIBERNODE_INSTANCE", "NVIDIA_VISIBLE_DEVICES"}),
        ("ocr:3", GpuNeed(1), True, {*ALL[:4]}),
        ("ocr:3", GpuNeed(1), None, {*ALL[:4]}),
        ("ocr:3", GpuNeed(0), None, {"HIBERNODE_INSTANCE", "NVIDIA_VISIBLE_DEVICES"}),
    ],
)
def test_replaced_variables(image: str, gpu: GpuNeed, sees_all: bool | None, expected: set[str]) -> None:
    function = FunctionSpec("ocr", image=image, gpu=gpu, environment=tuple((name, "x") for name in ALL))
    assert set(replaced_variables(function, sees_all_gpus=sees_all)) == expected
    assert replaced_variables(replace(function, environment=()), sees_all_gpus=sees_all) == {}
