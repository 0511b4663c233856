"""The GPU models: compute capability, NVML architecture, MIG, multiprocessors, PCI id."""

from __future__ import annotations

from dataclasses import dataclass

from agent.core.errors import InvalidArgumentError


@dataclass(frozen=True, slots=True)
class Model:
    """`mig`: whether it can be partitioned. `pci_id` as in NVML: device << 16 | vendor 0x10DE."""

    name: str
    capability: tuple[int, int]
    architecture: int
    mig: bool
    multiprocessors: int
    pci_id: int


MODELS = {
    model.name: model
    for model in (
        Model("T4", (7, 5), 6, False, 40, 0x1EB810DE),
        Model("A10", (8, 6), 7, False, 72, 0x223610DE),
        Model("A100", (8, 0), 7, True, 108, 0x20B010DE),
        Model("L4", (8, 9), 8, False, 58, 0x27B810DE),
        Model("L20", (8, 9), 8, False, 92, 0x26BA10DE),
        Model("L40S", (8, 9), 8, False, 142, 0x26B910DE),
        Model("H100", (9, 0), 9, True, 132, 0x233010DE),
        Model("H20", (9, 0), 9, True, 78, 0x232910DE),
        Model("B200", (10, 0), 10, True, 148, 0x290110DE),
    )
}


def find_model(name: str) -> Model:
    """Raises InvalidArgumentError EMULATED_MODEL_UNKNOWN."""
    model = MODELS.get(name)
    if model is None:
        raise InvalidArgumentError(
            "EMULATED_MODEL_UNKNOWN",
            f"There is no emulated GPU model {name!r}; choose one of {', '.join(MODELS)}.",
            model=name,
        )
    return model
