/* Device functions of the driver API. */
#define _GNU_SOURCE
#include <string.h>

#include "process.h"

EMU_API emu_result cuDriverGetVersion(int *version)
{
    if (!version)
        return EMU_INVALID_VALUE;
    *version = EMU_CUDA_VERSION;
    return EMU_SUCCESS;
}

static emu_result enter_device(emu_devno device, const void *out)
{
    emu_result result = out ? emu_enter() : EMU_INVALID_VALUE;
    if (!result && (device < 0 || device >= emu_process.visible_count)) {
        emu_leave();
        return EMU_INVALID_DEVICE;
    }
    return result;
}

static const struct emu_device *info(emu_devno device)
{
    return &emu_process.devices[emu_process.visible[device]];
}

EMU_API emu_result cuDeviceGetCount(int *count)
{
    if (!count)
        return EMU_INVALID_VALUE;
    EMU_CALL_BEGIN;
    *count = emu_process.visible_count;
    emu_leave();
    return EMU_SUCCESS;
}

EMU_API emu_result cuDeviceGet(emu_devno *device, int ordinal)
{
    emu_result result = enter_device(ordinal, device);
    if (result)
        return result;
    *device = ordinal;
    emu_leave();
    return EMU_SUCCESS;
}

EMU_API emu_result cuDeviceGetName(char *name, int length, emu_devno device)
{
    emu_result result = enter_device(device, name);
    if (result)
        return result;
    if (length > 0) {
        strncpy(name, info(device)->name, (size_t)length);
        name[length - 1] = 0;
    }
    emu_leave();
    return length > 0 ? EMU_SUCCESS : EMU_INVALID_VALUE;
}

EMU_API emu_result cuDeviceGetUuid_v2(struct emu_uuid *uuid, emu_devno device)
{
    emu_result result = enter_device(device, uuid);
    if (result)
        return result;
    memcpy(uuid->bytes, info(device)->uuid, sizeof uuid->bytes);
    emu_leave();
    return EMU_SUCCESS;
}

EMU_API emu_result cuDeviceGetUuid(struct emu_uuid *, emu_devno) __attribute__((alias("cuDeviceGetUuid_v2")));

EMU_API emu_result cuDeviceTotalMem_v2(size_t *bytes, emu_devno device)
{
    emu_result result = enter_device(device, bytes);
    if (result)
        return result;
    *bytes = info(device)->total_bytes;
    emu_leave();
    return EMU_SUCCESS;
}

EMU_API emu_result cuDeviceTotalMem(size_t *, emu_devno) __attribute__((alias("cuDeviceTotalMem_v2")));

EMU_API emu_result cuDeviceGetAttribute(int *value, int attribute, emu_devno device)
{
    emu_result result = enter_device(device, value);
    if (result)
        return result;
    struct emu_msg msg = {.op = EMU_MEMINFO, .a = (uint64_t)emu_process.visible[device]};
    switch (attribute) {
    case 1: /* MAX_THREADS_PER_BLOCK */
        *value = 1024;
        break;
    case 10: /* WARP_SIZE */
        *value = 32;
        break;
    case 16: /* MULTIPROCESSOR_COUNT */
        *value = (int)info(device)->multiprocessors;
        break;
    case 20: /* COMPUTE_MODE */
        result = emu_request(&msg);
        *value = (int)msg.c;
        break;
    case 33: /* PCI_BUS_ID */
        *value = (int)info(device)->pci_bus;
        break;
    case 41: /* UNIFIED_ADDRESSING */
        *value = 1;
        break;
    case 75: /* COMPUTE_CAPABILITY_MAJOR */
        *value = (int)info(device)->cc_major;
        break;
    case 76: /* COMPUTE_CAPABILITY_MINOR */
        *value = (int)info(device)->cc_minor;
        break;
    default: /* the rest are features that an emulated GPU lacks */
        *value = 0;
        result = attribute > 0 ? EMU_SUCCESS : EMU_INVALID_VALUE;
    }
    emu_leave();
    return result;
}
