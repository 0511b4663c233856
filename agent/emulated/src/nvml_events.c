/* NVML events: XID errors of a GPU, waited for without holding any lock. */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "nvml.h"

#define EVENT_XID 8ull

struct event_set {
    int fd;
};

struct event_data {
    device_t device;
    unsigned long long type, data;
    unsigned gpu_instance, compute_instance;
};

EMU_API nvml_result nvmlDeviceGetSupportedEventTypes(device_t device, unsigned long long *types)
{
    nvml_result result = emu_check_device(device, types);
    if (!result)
        *types = EVENT_XID;
    return result;
}

EMU_API nvml_result nvmlEventSetCreate(struct event_set **out)
{
    nvml_result result = emu_check(out);
    if (result)
        return result;
    struct event_set *set = malloc(sizeof *set);
    if (!set)
        return MEMORY;
    set->fd = emu_connect();
    if (set->fd < 0) {
        free(set);
        return UNKNOWN;
    }
    *out = set;
    return OK;
}

/* A set has a connection of its own, so that waiting holds no lock. */
EMU_API nvml_result nvmlDeviceRegisterEvents(device_t device, unsigned long long types, struct event_set *set)
{
    nvml_result result = emu_check_device(device, set);
    if (result)
        return result;
    if (types & ~EVENT_XID)
        return NOT_SUPPORTED;
    struct emu_msg msg = {.op = EMU_WATCH, .a = device->index, .b = types};
    return emu_send(set->fd, &msg, NULL, 0) ? UNKNOWN : OK;
}

static int64_t now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

EMU_API nvml_result nvmlEventSetWait_v2(struct event_set *set, struct event_data *data, unsigned timeout_ms)
{
    if (!set || !data)
        return INVALID_ARGUMENT;
    struct pollfd wait = {.fd = set->fd, .events = POLLIN};
    int64_t end = now_ms() + timeout_ms;
    for (;;) {
        int64_t left = end - now_ms();
        int ready = poll(&wait, 1, left > 0 ? left > 1000000 ? 1000000 : (int)left : 0);
        if (ready < 0 && errno != EINTR)
            return UNKNOWN;
        if (ready > 0)
            break;
        if (now_ms() >= end)
            return TIMEOUT;
    }
    struct emu_msg msg;
    if (emu_receive(set->fd, &msg, NULL, 0, NULL, NULL) < 0 || msg.op != EMU_EVENT || !emu_device_at(msg.a))
        return UNKNOWN;
    *data = (struct event_data){emu_device_at(msg.a), msg.b, msg.c, ~0u, ~0u};
    return OK;
}

EMU_API nvml_result nvmlEventSetFree(struct event_set *set)
{
    if (!set)
        return INVALID_ARGUMENT;
    close(set->fd);
    free(set);
    return OK;
}
