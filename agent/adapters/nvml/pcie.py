"""The PCIe link and the NUMA node of each GPU, by NVML and sysfs. For reports only: the calls block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pynvml


@dataclass(frozen=True, slots=True)
class PcieLink:
    """None: NVML or the kernel does not say. An idle GPU may report a slower link than it uses under load."""

    bus_id: str | None
    generation: int | None
    width: int | None
    max_generation: int | None
    max_width: int | None
    numa_node: int | None


def pcie_links(sysfs: Path = Path("/sys/bus/pci/devices")) -> dict[str, PcieLink]:
    """The links by uuid of the GPU; empty without a driver. May hang with the driver."""
    found: dict[str, PcieLink] = {}
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return found
    try:
        for index in range(_ask(pynvml.nvmlDeviceGetCount) or 0):
            device = _ask(pynvml.nvmlDeviceGetHandleByIndex, index)
            uuid = _ask(pynvml.nvmlDeviceGetUUID, device) if device is not None else None
            if uuid is not None:
                found[str(uuid)] = _link_of(device, sysfs)
    finally:
        pynvml.nvmlShutdown()
    return found


def _link_of(device: Any, sysfs: Path) -> PcieLink:
    pci = _ask(pynvml.nvmlDeviceGetPciInfo, device)
    bus_id = str(pci.busId) if pci is not None else None
    return PcieLink(
        bus_id,
        _ask(pynvml.nvmlDeviceGetCurrPcieLinkGeneration, device),
        _ask(pynvml.nvmlDeviceGetCurrPcieLinkWidth, device),
        _ask(pynvml.nvmlDeviceGetMaxPcieLinkGeneration, device),
        _ask(pynvml.nvmlDeviceGetMaxPcieLinkWidth, device),
        _numa_node(bus_id, sysfs) if bus_id else None,
    )


def _numa_node(bus_id: str, sysfs: Path) -> int | None:
    """sysfs writes the domain with four digits, NVML with eight. The kernel's -1 means that it knows no node."""
    domain, _, rest = bus_id.lower().partition(":")
    try:
        node = int((sysfs / f"{domain[-4:]}:{rest}" / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def _ask(call: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return call(*arguments)
    except pynvml.NVMLError:
        return None
