/* NVML queries about one device. Variable state is queried anew each time. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>

#include "nvml.h"

/* Query the driver process. `processes` may be NULL; otherwise the caller frees it. */
static nvml_result status_of(device_t device, struct emu_device_status *status, struct emu_gpu_process **processes)
{
    struct emu_msg msg = {.op = EMU_DEVICE_STATUS};
    size_t got = EMU_MAX_PAYLOAD;
    char *payload = malloc(got);
    nvml_result result = payload ? emu_ask(device, &msg, payload, &got) : MEMORY;
    if (!result && got < sizeof *status)
        result = UNKNOWN;
    if (!result)
        memcpy(status, payload, sizeof *status);
    if (!result && got < sizeof *status + status->processes * sizeof **processes)
        result = UNKNOWN;
    if (!result && processes) {
        memmove(payload, payload + sizeof *status, got - sizeof *status);
        *processes = (struct emu_gpu_process *)payload;
    } else
        free(payload);
    return result;
}

struct memory {
    unsigned long long total, free, used;
};

struct memory_v2 {
    unsigned version;
    unsigned long long total, reserved, free, used;
};

EMU_API nvml_result nvmlDeviceGetMemoryInfo(device_t device, struct memory *out)
{
    struct emu_device_status status;
    nvml_result result = out ? status_of(device, &status, NULL) : INVALID_ARGUMENT;
    if (!result)
        *out = (struct memory){device->info.total_bytes, device->info.total_bytes - status.used_bytes, status.used_bytes};
    return result;
}

EMU_API nvml_result nvmlDeviceGetMemoryInfo_v2(device_t device, struct memory_v2 *out)
{
    struct emu_device_status status;
    if (!out)
        return INVALID_ARGUMENT;
    if (out->version != (sizeof *out | 2u << 24))
        return VERSION_MISMATCH;
    nvml_result result = status_of(device, &status, NULL);
    if (!result)
        *out = (struct memory_v2){out->version, device->info.total_bytes, 0, device->info.total_bytes - status.used_bytes,
                                  status.used_bytes};
    return result;
}

struct utilization {
    unsigned gpu, memory;
};

EMU_API nvml_result nvmlDeviceGetUtilizationRates(device_t device, struct utilization *out)
{
    struct emu_device_status status;
    nvml_result result = out ? status_of(device, &status, NULL) : INVALID_ARGUMENT;
    if (!result)
        *out = (struct utilization){status.utilization, status.memory_utilization};
    return result;
}

static nvml_result codec(device_t device, unsigned *percent, unsigned *period_us, int decoder)
{
    struct emu_device_status status;
    nvml_result result = percent && period_us ? status_of(device, &status, NULL) : INVALID_ARGUMENT;
    if (!result) {
        *percent = decoder ? status.decoder : status.encoder;
        *period_us = 167000;
    }
    return result;
}

EMU_API nvml_result nvmlDeviceGetEncoderUtilization(device_t device, unsigned *percent, unsigned *period_us)
{
    return codec(device, percent, period_us, 0);
}

EMU_API nvml_result nvmlDeviceGetDecoderUtilization(device_t device, unsigned *percent, unsigned *period_us)
{
    return codec(device, percent, period_us, 1);
}

EMU_API nvml_result nvmlDeviceGetPersistenceMode(device_t device, unsigned *mode)
{
    struct emu_device_status status;
    nvml_result result = mode ? status_of(device, &status, NULL) : INVALID_ARGUMENT;
    if (!result)
        *mode = status.persistence;
    return result;
}

EMU_API nvml_result nvmlDeviceGetComputeMode(device_t device, unsigned *mode)
{
    struct emu_device_status status;
    nvml_result result = mode ? status_of(device, &status, NULL) : INVALID_ARGUMENT;
    if (!result)
        *mode = status.compute_mode;
    return result;
}

/* None: an emulated GPU is not virtualised. */
EMU_API nvml_result nvmlDeviceGetVirtualizationMode(device_t device, unsigned *mode)
{
    nvml_result result = emu_check_device(device, mode);
    if (!result)
        *mode = 0;
    return result;
}

EMU_API nvml_result nvmlDeviceGetMigMode(device_t device, unsigned *current, unsigned *pending)
{
    struct emu_device_status status;
    nvml_result result = current && pending ? status_of(device, &status, NULL) : INVALID_ARGUMENT;
    if (!result && status.mig < 0)
        result = NOT_SUPPORTED;
    if (!result)
        *current = *pending = (unsigned)status.mig;
    return result;
}

EMU_API nvml_result nvmlDeviceGetTemperature(device_t device, int sensor, unsigned *celsius)
{
    struct emu_device_status status;
    nvml_result result = celsius && !sensor ? status_of(device, &status, NULL) : INVALID_ARGUMENT;
    if (!result)
        *celsius = status.temperature_c;
    return result;
}

#if EMU_CUDA_VERSION >= 12080 /* older drivers have only the other one (inferred: it came with 570) */
struct temperature {
    unsigned version, sensor;
    int celsius;
};

EMU_API nvml_result nvmlDeviceGetTemperatureV(device_t device, struct temperature *out)
{
    struct emu_device_status status;
    if (!out || out->sensor)
        return INVALID_ARGUMENT;
    if (out->version != (sizeof *out | 1u << 24))
        return VERSION_MISMATCH;
    nvml_result result = status_of(device, &status, NULL);
    if (!result)
        out->celsius = (int)status.temperature_c;
    return result;
}
#endif

EMU_API nvml_result nvmlDeviceGetPowerUsage(device_t device, unsigned *milliwatts)
{
    struct emu_device_status status;
    nvml_result result = milliwatts ? status_of(device, &status, NULL) : INVALID_ARGUMENT;
    if (!result)
        *milliwatts = status.power_mw;
    return result;
}

struct process_info {
    unsigned pid;
    unsigned long long used;
    unsigned gpu_instance, compute_instance;
};

EMU_API nvml_result nvmlDeviceGetComputeRunningProcesses_v3(device_t device, unsigned *count, struct process_info *out)
{
    struct emu_device_status status;
    struct emu_gpu_process *processes = NULL;
    nvml_result result = count ? status_of(device, &status, &processes) : INVALID_ARGUMENT;
    if (result)
        return result;
    if (status.processes > *count || (status.processes && !out))
        result = INSUFFICIENT_SIZE;
    for (unsigned i = 0; !result && i < status.processes; i++)
        out[i] = (struct process_info){processes[i].pid, processes[i].used_bytes, ~0u, ~0u};
    *count = status.processes;
    free(processes);
    return result;
}
