/* libnvidia-ml.so.1: the symbols nvidia-ml-py asks for, answered by the driver process. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "nvml.h"

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static int users, fd = -1;
static pid_t owner;
static unsigned device_count;
static struct device devices[EMU_MAX_DEVICES];

static void write_uuid(const unsigned char *bytes, char *out)
{
    static const char digits[] = "0123456789abcdef";
    strcpy(out, "GPU-");
    out += 4;
    for (int i = 0; i < 16; i++) {
        if (i == 4 || i == 6 || i == 8 || i == 10)
            *out++ = '-';
        *out++ = digits[bytes[i] >> 4];
        *out++ = digits[bytes[i] & 15];
    }
    *out = 0;
}

/* With the mutex held. A lost connection is made anew once; a forked child makes its own. */
static long call(struct emu_msg *msg, void *payload, size_t capacity)
{
    for (int attempt = 0; attempt < 2; attempt++) {
        if (fd >= 0 && owner != getpid()) {
            close(fd);
            fd = -1;
        }
        if (fd < 0) {
            fd = emu_connect();
            owner = getpid();
        }
        if (fd < 0)
            return -1;
        struct emu_msg request = *msg;
        long got = emu_call(fd, &request, NULL, 0, payload, capacity);
        if (got >= 0) {
            *msg = request;
            return got;
        }
        close(fd);
        fd = -1;
    }
    return -1;
}

EMU_API nvml_result nvmlInitWithFlags(unsigned flags)
{
    struct emu_device found[EMU_MAX_DEVICES];
    struct emu_msg msg = {.op = EMU_DEVICES};
    nvml_result result = OK;
    (void)flags;
    pthread_mutex_lock(&mutex);
    if (!users) {
        long got = call(&msg, found, sizeof found);
        if (got < 0 || msg.status)
            result = DRIVER_NOT_LOADED;
        else {
            device_count = (unsigned)((size_t)got / sizeof *found);
            for (unsigned i = 0; i < device_count; i++) {
                devices[i].info = found[i];
                devices[i].index = i;
                write_uuid(found[i].uuid, devices[i].uuid);
            }
        }
    }
    if (!result)
        users++;
    pthread_mutex_unlock(&mutex);
    return result;
}

EMU_API nvml_result nvmlShutdown(void)
{
    pthread_mutex_lock(&mutex);
    nvml_result result = users ? OK : UNINITIALIZED;
    if (users && --users == 0 && fd >= 0) {
        close(fd);
        fd = -1;
    }
    pthread_mutex_unlock(&mutex);
    return result;
}

static nvml_result text(char *out, unsigned length, const char *value)
{
    if (!out)
        return INVALID_ARGUMENT;
    if (strlen(value) >= length)
        return INSUFFICIENT_SIZE;
    strcpy(out, value);
    return OK;
}

nvml_result emu_check(const void *out)
{
    pthread_mutex_lock(&mutex);
    nvml_result result = !users ? UNINITIALIZED : out ? OK : INVALID_ARGUMENT;
    pthread_mutex_unlock(&mutex);
    return result;
}

static int is_device(device_t device)
{
    return device >= devices && device < devices + device_count;
}

nvml_result emu_check_device(device_t device, const void *out)
{
    nvml_result result = emu_check(out);
    return result ? result : is_device(device) ? OK : INVALID_ARGUMENT;
}

EMU_API nvml_result nvmlSystemGetDriverVersion(char *out, unsigned length)
{
    nvml_result result = emu_check(out);
    return result ? result : text(out, length, EMU_DRIVER_VERSION);
}

EMU_API nvml_result nvmlSystemGetNVMLVersion(char *out, unsigned length)
{
    char version[64];
    snprintf(version, sizeof version, "%d.%s", EMU_CUDA_VERSION / 1000, EMU_DRIVER_VERSION);
    return text(out, length, version);
}

EMU_API nvml_result nvmlSystemGetCudaDriverVersion(int *version)
{
    if (!version)
        return INVALID_ARGUMENT;
    *version = EMU_CUDA_VERSION;
    return OK;
}

EMU_API nvml_result nvmlDeviceGetCount_v2(unsigned *count)
{
    nvml_result result = emu_check(count);
    if (!result)
        *count = device_count;
    return result;
}

EMU_API nvml_result nvmlDeviceGetHandleByIndex_v2(unsigned index, device_t *device)
{
    nvml_result result = emu_check(device);
    if (!result && index >= device_count)
        result = INVALID_ARGUMENT;
    if (!result)
        *device = &devices[index];
    return result;
}

EMU_API nvml_result nvmlDeviceGetHandleByUUID(const char *uuid, device_t *device)
{
    nvml_result result = emu_check(uuid && device ? device : NULL);
    if (result)
        return result;
    for (unsigned i = 0; i < device_count; i++)
        if (!strcmp(devices[i].uuid, uuid)) {
            *device = &devices[i];
            return OK;
        }
    return NOT_FOUND;
}

EMU_API nvml_result nvmlDeviceGetUUID(device_t device, char *out, unsigned length)
{
    nvml_result result = emu_check_device(device, out);
    return result ? result : text(out, length, device->uuid);
}

EMU_API nvml_result nvmlDeviceGetName(device_t device, char *out, unsigned length)
{
    nvml_result result = emu_check_device(device, out);
    return result ? result : text(out, length, device->info.name);
}

EMU_API nvml_result nvmlDeviceGetCudaComputeCapability(device_t device, int *major, int *minor)
{
    nvml_result result = emu_check_device(device, major && minor ? major : NULL);
    if (!result) {
        *major = (int)device->info.cc_major;
        *minor = (int)device->info.cc_minor;
    }
    return result;
}

EMU_API nvml_result nvmlDeviceGetArchitecture(device_t device, unsigned *architecture)
{
    nvml_result result = emu_check_device(device, architecture);
    if (!result)
        *architecture = device->info.architecture;
    return result;
}

struct pci_info {
    char bus_id_legacy[16];
    unsigned domain, bus, device, pci_device_id, pci_subsystem_id;
    char bus_id[32];
};

EMU_API nvml_result nvmlDeviceGetPciInfo_v3(device_t device, struct pci_info *out)
{
    nvml_result result = emu_check_device(device, out);
    if (result)
        return result;
    memset(out, 0, sizeof *out);
    out->bus = device->info.pci_bus & 0xff;
    out->pci_device_id = device->info.pci_device_id;
    snprintf(out->bus_id_legacy, sizeof out->bus_id_legacy, "0000:%02X:00.0", out->bus);
    snprintf(out->bus_id, sizeof out->bus_id, "00000000:%02X:00.0", out->bus);
    return OK;
}

device_t emu_device_at(uint64_t index)
{
    return index < device_count ? &devices[index] : NULL;
}

/* What changes: one question to the driver process; `processes` may be NULL. */
static nvml_result status_of(device_t device, struct emu_device_status *status, struct emu_gpu_process **processes)
{
    nvml_result result = emu_check_device(device, status);
    if (result)
        return result;
    char *payload = malloc(EMU_MAX_PAYLOAD);
    struct emu_msg msg = {.op = EMU_DEVICE_STATUS, .a = device->index};
    if (!payload)
        return MEMORY;
    pthread_mutex_lock(&mutex);
    long got = call(&msg, payload, EMU_MAX_PAYLOAD);
    pthread_mutex_unlock(&mutex);
    if (got < (long)sizeof *status || msg.status)
        result = UNKNOWN;
    else
        memcpy(status, payload, sizeof *status);
    if (!result && (size_t)got < sizeof *status + status->processes * sizeof **processes)
        result = UNKNOWN;
    if (!result && processes) {
        memmove(payload, payload + sizeof *status, (size_t)got - sizeof *status);
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
