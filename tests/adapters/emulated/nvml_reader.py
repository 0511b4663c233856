"""A program that reads all of Hibernode's NVML values with unmodified nvidia-ml-py, and prints them as JSON."""

import json
import sys

import pynvml as nvml


def main() -> None:
    nvml.nvmlInit()
    devices = []
    for index in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        uuid = nvml.nvmlDeviceGetUUID(handle)
        utilization = nvml.nvmlDeviceGetUtilizationRates(handle)
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        memory_v2 = nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
        try:
            mig = nvml.nvmlDeviceGetMigMode(handle)
        except nvml.NVMLError_NotSupported:
            mig = None
        devices.append(
            {
                "uuid": uuid,
                "same_by_uuid": nvml.nvmlDeviceGetUUID(nvml.nvmlDeviceGetHandleByUUID(uuid)) == uuid,
                "name": nvml.nvmlDeviceGetName(handle),
                "memory": [memory.total, memory.free, memory.used],
                "memory_v2": [memory_v2.total, memory_v2.free, memory_v2.used],
                "utilization": [utilization.gpu, utilization.memory],
                "encoder": nvml.nvmlDeviceGetEncoderUtilization(handle)[0],
                "decoder": nvml.nvmlDeviceGetDecoderUtilization(handle)[0],
                "persistence": nvml.nvmlDeviceGetPersistenceMode(handle),
                "mig": mig,
                "temperatures": [
                    nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
                    nvml.nvmlDeviceGetTemperatureV(handle, nvml.NVML_TEMPERATURE_GPU),
                ],
                "power": nvml.nvmlDeviceGetPowerUsage(handle),
                "capability": nvml.nvmlDeviceGetCudaComputeCapability(handle),
                "architecture": nvml.nvmlDeviceGetArchitecture(handle),
                "pci": nvml.nvmlDeviceGetPciInfo(handle).busId,
                "processes": [
                    [process.pid, process.usedGpuMemory]
                    for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle)
                ],
                "events": nvml.nvmlDeviceGetSupportedEventTypes(handle),
            }
        )
    sys.stdout.write(json.dumps({**system(), "devices": devices, "wait": wait_for_xid()}) + "\n")
    nvml.nvmlShutdown()


def system() -> dict[str, object]:
    return {
        "driver": nvml.nvmlSystemGetDriverVersion(),
        "cuda": nvml.nvmlSystemGetCudaDriverVersion(),
        "nvml": nvml.nvmlSystemGetNVMLVersion(),
    }


def wait_for_xid() -> str:
    events = nvml.nvmlEventSetCreate()
    handle = nvml.nvmlDeviceGetHandleByIndex(0)
    nvml.nvmlDeviceRegisterEvents(handle, nvml.nvmlEventTypeXidCriticalError, events)
    try:
        nvml.nvmlEventSetWait(events, 20)
    except nvml.NVMLError_Timeout:
        return "timeout"
    finally:
        nvml.nvmlEventSetFree(events)
    return "event"


if __name__ == "__main__":
    main()
