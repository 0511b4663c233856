/* Shared by the two halves of the emulated libnvidia-ml.so.1. */
#ifndef EMU_NVML_H
#define EMU_NVML_H

#include "channel.h"

#define EMU_API __attribute__((visibility("default")))

enum {
    OK = 0,
    UNINITIALIZED = 1,
    INVALID_ARGUMENT = 2,
    NOT_SUPPORTED = 3,
    NOT_FOUND = 6,
    INSUFFICIENT_SIZE = 7,
    DRIVER_NOT_LOADED = 9,
    TIMEOUT = 10,
    GPU_IS_LOST = 15,
    MEMORY = 20,
    VERSION_MISMATCH = 25,
    UNKNOWN = 999
};

typedef int nvml_result;
typedef struct device {
    struct emu_device info;
    unsigned index;
    char uuid[48];
} *device_t;

/* Check that NVML is initialised and `out` is not NULL. */
nvml_result emu_check(const void *out);

/* Send one query about a device; returns NVML's result. `*bytes`: capacity of the payload, then its size. */
nvml_result emu_ask(device_t device, struct emu_msg *msg, void *payload, size_t *bytes);

/* Check that the handle is valid and the device answers. */
nvml_result emu_check_device(device_t device, const void *out);

device_t emu_device_at(uint64_t index);

#endif
