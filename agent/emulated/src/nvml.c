/* libnvidia-ml.so.1, with the symbols that nvidia-ml-py needs. This file: initialisation and device lookup.
 *
 * Every call about a device asks the driver process, even for constants: a lost GPU gives no other answer, and a
 * silent one blocks only calls about itself.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include "nvml.h"
#include "pool.h"

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static int users;
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

EMU_API nvml_result nvmlInitWithFlags(unsigned flags)
{
    struct emu_device found[EMU_MAX_DEVICES];
    struct emu_msg msg = {.op = EMU_DEVICES};
    nvml_result result = OK;
    (void)flags;
    pthread_mutex_lock(&mutex);
    if (!users) {
        long got = emu_pool_call(&msg, NULL, 0, found, sizeof found);
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

EMU_API nvml_result nvmlInit_v2(void)
{
    return nvmlInitWithFlags(0);
}

EMU_API nvml_result nvmlShutdown(void)
{
    pthread_mutex_lock(&mutex);
    nvml_result result = users ? OK : UNINITIALIZED;
    if (users && --users == 0)
        emu_pool_drain();
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

nvml_result emu_ask(device_t device, struct emu_msg *msg, void *payload, size_t *bytes)
{
    nvml_result result = emu_check(device);
    if (result)
        return result;
    if (!is_device(device))
        return INVALID_ARGUMENT;
    msg->a = device->index;
    long got = emu_pool_call(msg, NULL, 0, payload, *bytes);
    if (got < 0)
        return UNKNOWN;
    *bytes = (size_t)got;
    return msg->status;
}

nvml_result emu_check_device(device_t device, const void *out)
{
    struct emu_msg msg = {.op = EMU_DEVICE_CHECK};
    size_t nothing = 0;
    nvml_result result = emu_check(out);
    return result ? result : emu_ask(device, &msg, NULL, &nothing);
}

EMU_API const char *nvmlErrorString(nvml_result code)
{
    static const struct {
        nvml_result code;
        const char *text;
    } texts[] = {
        {OK, "Success"},
        {UNINITIALIZED, "Uninitialized"},
        {INVALID_ARGUMENT, "Invalid Argument"},
        {NOT_SUPPORTED, "Not Supported"},
        {NOT_FOUND, "Not Found"},
        {INSUFFICIENT_SIZE, "Insufficient Size"},
        {DRIVER_NOT_LOADED, "Driver Not Loaded"},
        {TIMEOUT, "Timeout"},
        {GPU_IS_LOST, "GPU is lost"},
        {MEMORY, "Insufficient Memory"},
        {VERSION_MISMATCH, "Argument Version Mismatch"},
    };
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++)
        if (texts[i].code == code)
            return texts[i].text;
    return "Unknown Error";
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

EMU_API nvml_result nvmlSystemGetCudaDriverVersion_v2(int *) __attribute__((alias("nvmlSystemGetCudaDriverVersion")));

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
        result = emu_check_device(&devices[index], device);
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
            result = emu_check_device(&devices[i], device);
            if (!result)
                *device = &devices[i];
            return result;
        }
    return NOT_FOUND;
}

EMU_API nvml_result nvmlDeviceGetIndex(device_t device, unsigned *index)
{
    nvml_result result = emu_check_device(device, index);
    if (!result)
        *index = device->index;
    return result;
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
