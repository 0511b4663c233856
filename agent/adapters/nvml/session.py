"""The NVML calls, made from one thread only. A device that fails does not hide the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from pynvml import (
    NVML_COMPUTEMODE_DEFAULT,
    NVML_COMPUTEMODE_PROHIBITED,
    NVML_DEVICE_MIG_ENABLE,
    NVML_ERROR_GPU_IS_LOST,
    NVML_ERROR_RESET_REQUIRED,
    NVML_ERROR_UNINITIALIZED,
    NVML_FEATURE_ENABLED,
    NVML_GPU_VIRTUALIZATION_MODE_VGPU,
    NVML_TEMPERATURE_GPU,
    NVMLError,
    NVMLError_FunctionNotFound,
    NVMLError_NotSupported,
    nvmlDeviceGetComputeMode,
    nvmlDeviceGetComputeRunningProcesses,
    nvmlDeviceGetCount,
    nvmlDeviceGetDecoderUtilization,
    nvmlDeviceGetEncoderUtilization,
    nvmlDeviceGetHandleByIndex,
    nvmlDeviceGetMemoryInfo,
    nvmlDeviceGetMigMode,
    nvmlDeviceGetName,
    nvmlDeviceGetPciInfo,
    nvmlDeviceGetPersistenceMode,
    nvmlDeviceGetPowerUsage,
    nvmlDeviceGetTemperature,
    nvmlDeviceGetUtilizationRates,
    nvmlDeviceGetUUID,
    nvmlDeviceGetVirtualizationMode,
    nvmlInit,
    nvmlShutdown,
    nvmlSystemGetCudaDriverVersion,
    nvmlSystemGetDriverVersion,
)

from agent.core.types import ComputeMode, Gpu, GpuProcess, GpuSample
from agent.log import get_logger
from agent.ports import DriverInfo, GpuProcesses

UNKNOWN_MEMORY_BYTES = 1
"""Stands for memory that NVML does not report, so that nothing counts as released while the process is listed."""
LOST = frozenset({NVML_ERROR_GPU_IS_LOST, NVML_ERROR_RESET_REQUIRED})

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Device:
    """`handle` is None until NVML returns one; `uuid` is "" if it never did."""

    index: int
    uuid: str
    handle: Any


class NvmlSession:
    """Raises NVMLError only for failures of the whole driver; the next call then initialises NVML again."""

    def __init__(self) -> None:
        self._devices: list[_Device] = []
        self._uuids: dict[int, str] = {}
        self._open = False
        self._log = get_logger()

    def list_gpus(self) -> Sequence[Gpu]:
        """The GPUs that can be described now, by index; raises the first error if none can."""

        def describe_all() -> Sequence[Gpu]:
            found: list[Gpu] = []
            errors: list[NVMLError] = []
            for device in self._devices:
                try:
                    found.append(_describe(self._with_handle(device)))
                except NVMLError as error:
                    _reraise_of_driver(error)
                    errors.append(error)
                    self._log.warning("gpu.not_listed", index=device.index, gpu=device.uuid, error=str(error))
            if errors and not found:
                raise errors[0]
            return tuple(found)

        return self._guard(describe_all)

    def processes(self) -> GpuProcesses:
        """The processes by device; the answer names the devices that fail."""

        def read() -> GpuProcesses:
            entries: list[GpuProcess] = []
            unanswered, lost = set(), set()
            for device in self._devices:
                try:
                    entries += _processes_of(self._with_handle(device))
                except NVMLError as error:
                    _reraise_of_driver(error)
                    unanswered.add(device.uuid)
                    if error.value in LOST:
                        lost.add(device.uuid)
            return GpuProcesses(tuple(entries), frozenset(unanswered), frozenset(lost))

        return self._guard(read)

    def memory_free(self) -> Mapping[str, int]:
        """Free bytes of the devices that answer."""

        def read() -> Mapping[str, int]:
            free: dict[str, int] = {}
            for device in self._devices:
                try:
                    free[device.uuid] = nvmlDeviceGetMemoryInfo(self._with_handle(device).handle).free
                except NVMLError as error:
                    _reraise_of_driver(error)
            return free

        return self._guard(read)

    def indices(self) -> Sequence[int]:
        return self._guard(lambda: [device.index for device in self._devices])

    def sample(self, index: int) -> GpuSample | None:
        """One device's figures; None for a device that has never reported its UUID, or is gone."""

        def read() -> GpuSample | None:
            device = next((one for one in self._devices if one.index == index), None)
            if device is None:
                return None
            try:
                return _sample(self._with_handle(device))
            except NVMLError as error:
                _reraise_of_driver(error)
                if not device.uuid:
                    return None
                return GpuSample(device.uuid, error=str(error), lost=error.value in LOST)

        return self._guard(read)

    def driver(self) -> DriverInfo:
        return self._guard(lambda: DriverInfo(nvmlSystemGetDriverVersion(), nvmlSystemGetCudaDriverVersion()))

    def reset(self) -> None:
        """Shut NVML down; the next call initialises it."""
        self._devices = []
        if self._open:
            self._open = False
            with suppress(NVMLError):
                nvmlShutdown()

    def _guard(self, read: Callable[[], T]) -> T:
        try:
            if not self._open:
                nvmlInit()
                self._open = True
                self._devices = [
                    _Device(index, self._uuids.get(index, ""), None) for index in range(nvmlDeviceGetCount())
                ]
                for device in self._devices:
                    with suppress(NVMLError):  # the call that needs it raises
                        self._with_handle(device)
            return read()
        except NVMLError:
            self.reset()
            raise

    def _with_handle(self, device: _Device) -> _Device:
        """The device with its handle. Raises NVMLError while NVML returns none."""
        if device.handle is not None:
            return device
        handle = nvmlDeviceGetHandleByIndex(device.index)
        made = _Device(device.index, nvmlDeviceGetUUID(handle), handle)
        self._uuids[device.index] = made.uuid
        self._devices = [made if one.index == made.index else one for one in self._devices]
        return made


def _reraise_of_driver(error: NVMLError) -> None:
    """Raise an error that means that NVML must be initialised again; ignore one of a single device."""
    if error.value == NVML_ERROR_UNINITIALIZED:
        raise error


def _processes_of(device: _Device) -> list[GpuProcess]:
    return [
        GpuProcess(device.uuid, entry.pid, UNKNOWN_MEMORY_BYTES if entry.usedGpuMemory is None else entry.usedGpuMemory)
        for entry in nvmlDeviceGetComputeRunningProcesses(device.handle)
    ]


def _describe(device: _Device) -> Gpu:
    handle = device.handle
    return Gpu(
        uuid=device.uuid,
        index=device.index,
        model=nvmlDeviceGetName(handle),
        memory_bytes=nvmlDeviceGetMemoryInfo(handle).total,
        persistence=_optional(lambda: nvmlDeviceGetPersistenceMode(handle)) == NVML_FEATURE_ENABLED,
        mig=_optional(lambda: nvmlDeviceGetMigMode(handle)[0]) == NVML_DEVICE_MIG_ENABLE,
        compute_mode=_compute_mode(_optional(lambda: nvmlDeviceGetComputeMode(handle))),
        virtual=_optional(lambda: nvmlDeviceGetVirtualizationMode(handle)) == NVML_GPU_VIRTUALIZATION_MODE_VGPU,
        pci_address=_optional(lambda: _pci_address(handle)),
    )


def _pci_address(handle: Any) -> tuple[int, int, int]:
    found = nvmlDeviceGetPciInfo(handle)
    return found.domain, found.bus, found.device


def _compute_mode(mode: int | None) -> ComputeMode:
    if mode in (None, NVML_COMPUTEMODE_DEFAULT):
        return ComputeMode.DEFAULT
    return ComputeMode.PROHIBITED if mode == NVML_COMPUTEMODE_PROHIBITED else ComputeMode.EXCLUSIVE


def _sample(device: _Device) -> GpuSample:
    """Memory is required; a model may lack every other figure."""
    handle = device.handle
    memory = nvmlDeviceGetMemoryInfo(handle)
    rates = _optional(lambda: nvmlDeviceGetUtilizationRates(handle))
    encoder = _optional(lambda: nvmlDeviceGetEncoderUtilization(handle))
    decoder = _optional(lambda: nvmlDeviceGetDecoderUtilization(handle))
    return GpuSample(
        device.uuid,
        memory_used_bytes=memory.used,
        sm_percent=None if rates is None else rates.gpu,
        memory_percent=None if rates is None else rates.memory,
        encoder_percent=None if encoder is None else encoder[0],
        decoder_percent=None if decoder is None else decoder[0],
        temperature_celsius=_optional(lambda: nvmlDeviceGetTemperature(handle, NVML_TEMPERATURE_GPU)),
        power_milliwatts=_optional(lambda: nvmlDeviceGetPowerUsage(handle)),
        persistence=_optional(lambda: bool(nvmlDeviceGetPersistenceMode(handle) == NVML_FEATURE_ENABLED)),
    )


def _optional(read: Callable[[], T]) -> T | None:
    """None if the device or the driver does not support the query."""
    try:
        return read()
    except (NVMLError_NotSupported, NVMLError_FunctionNotFound):
        return None
