/* NVML events: XID errors of a GPU. Waiting holds no lock. */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "nvml.h"
#include "pool.h"

#define EVENT_XID 8ull


struct event_set {
    pthread_mutex_t mutex;
    int count;
    unsigned device[EMU_MAX_DEVICES];
    struct pollfd watched[EMU_MAX_DEVICES];
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
    struct event_set *set = calloc(1, sizeof *set);
    if (!set)
        return MEMORY;
    pthread_mutex_init(&set->mutex, NULL);
    *out = set;
    return OK;
}

static int is_watched(struct event_set *set, device_t device)
{
    int found = 0;
    pthread_mutex_lock(&set->mutex);
    for (int i = 0; i < set->count; i++)
        found |= set->device[i] == device->index;
    pthread_mutex_unlock(&set->mutex);
    return found;
}

/* One connection per device of a set, so that a wait or a silent device blocks no other call. */
EMU_API nvml_result nvmlDeviceRegisterEvents(device_t device, unsigned long long types, struct event_set *set)
{
    nvml_result result = emu_check_device(device, set);
    if (result)
        return result;
    if (types & ~EVENT_XID)
        return NOT_SUPPORTED;
    if (is_watched(set, device))
        return OK;
    struct emu_msg msg = {.op = EMU_WATCH, .a = device->index, .b = types};
    int fd = emu_connect();
    if (fd < 0 || emu_send(fd, &msg, NULL, 0) || emu_await(fd, &msg, NULL, 0) < 0)
        result = UNKNOWN;
    else
        result = msg.status;
    if (result) {
        if (fd >= 0)
            close(fd);
        return result;
    }
    pthread_mutex_lock(&set->mutex);
    if (set->count < EMU_MAX_DEVICES) {
        set->device[set->count] = device->index;
        set->watched[set->count++] = (struct pollfd){.fd = fd, .events = POLLIN};
    } else
        result = MEMORY;
    pthread_mutex_unlock(&set->mutex);
    if (result)
        close(fd);
    return result;
}

static int64_t now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

EMU_API nvml_result nvmlEventSetWait_v2(struct event_set *set, struct event_data *data, unsigned timeout_ms)
{
    struct pollfd watched[EMU_MAX_DEVICES];
    if (!set || !data)
        return INVALID_ARGUMENT;
    pthread_mutex_lock(&set->mutex);
    int count = set->count, at = 0;
    memcpy(watched, set->watched, sizeof watched);
    pthread_mutex_unlock(&set->mutex);
    int64_t end = now_ms() + timeout_ms;
    for (;;) {
        int64_t left = end - now_ms();
        int ready = poll(watched, (nfds_t)count, left > 0 ? left > 1000000 ? 1000000 : (int)left : 0);
        if (ready < 0 && errno != EINTR)
            return UNKNOWN;
        if (ready > 0)
            break;
        if (now_ms() >= end)
            return TIMEOUT;
    }
    while (at < count && !watched[at].revents)
        at++;
    struct emu_msg msg;
    if (at == count || emu_receive(watched[at].fd, &msg, NULL, 0, NULL, NULL) < 0 || msg.op != EMU_EVENT ||
        !emu_device_at(msg.a))
        return UNKNOWN;
    *data = (struct event_data){emu_device_at(msg.a), msg.b, msg.c, ~0u, ~0u};
    return OK;
}

EMU_API nvml_result nvmlEventSetFree(struct event_set *set)
{
    if (!set)
        return INVALID_ARGUMENT;
    while (set->count)
        close(set->watched[--set->count].fd);
    pthread_mutex_destroy(&set->mutex);
    free(set);
    return OK;
}
