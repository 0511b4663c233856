"""The variables that an instance gets from us, and which of them a function may set itself.

A function's own value counts wherever neither isolation nor the data path rests on ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from agent.core.function_rules import HOST_IMAGE
from agent.core.types import FunctionSpec, Gpu, VisibleDevices

CUDA_DEVICES = "CUDA_VISIBLE_DEVICES"
CUDA_ORDER = "CUDA_DEVICE_ORDER"
NVIDIA_DEVICES = "NVIDIA_VISIBLE_DEVICES"
LISTEN_PORT = "FC_CUSTOM_LISTEN_PORT"
PORT = "PORT"
INSTANCE_VARIABLE = "HIBERNODE_INSTANCE"

_GPUS = "a process of the host sees every GPU, so it is told which ones are its own"
_GPUS_OF_SOME = "with gpu.migrate or gpu.attach: mounts a container sees every GPU; elsewhere your value counts"


def replaced_variables(function: FunctionSpec, *, sees_all_gpus: bool | None = None) -> Mapping[str, str]:
    """The variables of `function` that are replaced by ours, each with the reason for its author.

    `sees_all_gpus`: whether the instance sees every GPU of its host, which a process of the host always does. None: not
    known yet; the result then names what some nodes replace."""
    host = function.image == HOST_IMAGE
    why = {INSTANCE_VARIABLE: "the agent finds the instance's processes by it"}
    if host:
        why[PORT] = "the agent chooses a free port for each process of the host"
    else:
        why[NVIDIA_DEVICES] = "the agent decides which GPUs get into the container"
    if host or sees_all_gpus is not False:
        why[CUDA_DEVICES] = _GPUS if host else _GPUS_OF_SOME
        if function.gpu.count and function.gpu.visible_devices is VisibleDevices.INDEX:
            why[CUDA_ORDER] = why[CUDA_DEVICES]
    if not host and not function.gpu.count:
        why.pop(CUDA_DEVICES, None)  # no GPU gets in
    return {name: why[name] for name, _value in function.environment if name in why}


def gpu_variables(
    function: FunctionSpec, gpu_uuids: Sequence[str], gpu_numbers: Sequence[int], *, sees_all_gpus: bool
) -> Mapping[str, str]:
    """CUDA_VISIBLE_DEVICES for an instance on `gpu_uuids`, and the order in which its numbers count.

    Numbers count the GPUs that the instance sees. Where it sees all of the host they are `gpu_numbers`; without these,
    or if the function wants them, it gets UUIDs. Most programs read numbers only."""
    if not gpu_uuids:
        return {CUDA_DEVICES: ""}
    if function.gpu.visible_devices is VisibleDevices.INDEX:
        if not sees_all_gpus:
            return {CUDA_DEVICES: ",".join(map(str, range(len(gpu_uuids))))}
        if gpu_numbers:
            return {CUDA_DEVICES: ",".join(map(str, gpu_numbers)), CUDA_ORDER: "PCI_BUS_ID"}
    return {CUDA_DEVICES: ",".join(gpu_uuids)}


def cuda_numbers(inventory: Iterable[Gpu], gpu_uuids: Iterable[str]) -> tuple[int, ...]:
    """The numbers of `gpu_uuids` in CUDA with CUDA_DEVICE_ORDER=PCI_BUS_ID, for a process that sees every GPU.

    Empty where they are not certain: a GPU is missing from `inventory` (CUDA may count it or not), has no known PCI
    address, or is cut up by MIG (its parts count too). NVML's own index promises no order (nvmlDeviceGetIndex)."""
    gpus = list(inventory)
    complete = sorted(gpu.index for gpu in gpus) == list(range(len(gpus)))
    if not complete or any(gpu.mig or gpu.pci_address is None for gpu in gpus):
        return ()
    in_order = sorted(gpus, key=lambda gpu: gpu.pci_address or ())
    number_of = {gpu.uuid: number for number, gpu in enumerate(in_order)}
    wanted = tuple(gpu_uuids)
    return tuple(number_of[uuid] for uuid in wanted) if number_of.keys() >= set(wanted) else ()
