#define _GNU_SOURCE
#include "process.h"

#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "activity.h"

struct emu_process emu_process;

static atomic_int initialized;
static atomic_int forked; /* a child forked after cuInit can't use CUDA, as with the real driver */
static pthread_mutex_t init_mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_mutex_t request_mutex = PTHREAD_MUTEX_INITIALIZER;
static int request_fd = -1, restore_fd = -1;

int emu_initialized(void)
{
    return atomic_load_explicit(&initialized, memory_order_acquire);
}

emu_result emu_request(struct emu_msg *msg)
{
    pthread_mutex_lock(&request_mutex);
    long got = emu_call(request_fd, msg, NULL, 0, NULL, 0);
    pthread_mutex_unlock(&request_mutex);
    return got < 0 ? EMU_UNKNOWN : msg->status;
}

/* The child must neither use nor keep the parent's sockets: their end tells the driver process of an exec or exit.
 * MADV_DONTFORK has removed its VRAM mappings. */
static void after_fork_in_child(void)
{
    if (!emu_initialized())
        return;
    atomic_store(&initialized, 0);
    atomic_store(&forked, 1);
    emu_activity_forget();
    close(request_fd);
    close(restore_fd);
    request_fd = restore_fd = -1;
    for (int i = 0; i < emu_process.device_count; i++)
        close(emu_process.vram_fd[i]);
    init_mutex = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
    request_mutex = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
    emu_gate_after_fork();
}

static void *restore_main(void *argument)
{
    emu_restore_loop((int)(intptr_t)argument);
    return NULL;
}

static int start_restore_thread(uint64_t token)
{
    restore_fd = emu_connect();
    if (restore_fd < 0)
        return -1;
    /* The thread sends its tid, then receives orders on the same socket. Signals go to the application's threads. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, 256 * 1024);
    struct emu_msg hello = {.op = EMU_HELLO_RESTORE, .a = token};
    pthread_t thread;
    int rc = emu_send(restore_fd, &hello, NULL, 0);
    if (!rc)
        rc = pthread_create(&thread, &attributes, restore_main, (void *)(intptr_t)restore_fd);
    pthread_attr_destroy(&attributes);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return rc ? -1 : 0;
}

static int device_matches(const struct emu_device *device, const char *wanted, size_t length)
{
    char text[48];
    int n = snprintf(text, sizeof text, "GPU-");
    for (int i = 0; i < 16; i++)
        n += snprintf(text + n, sizeof text - (size_t)n, i == 4 || i == 6 || i == 8 || i == 10 ? "-%02x" : "%02x",
                      device->uuid[i]);
    return length > 4 && length <= strlen(text) && !strncmp(text, wanted, length);
}

/* The devices that a container has, by PCI address: those with HIBERNODE_EMULATED_GPU_<UUID in hex>, as others have a
 * device node. Without any such variable all. Returns how many. */
static int choose_attached(int attached[EMU_MAX_DEVICES])
{
    int count = 0;
    for (int i = 0; i < emu_process.device_count; i++) {
        char name[64];
        int n = snprintf(name, sizeof name, "HIBERNODE_EMULATED_GPU_");
        for (int j = 0; j < 16; j++)
            n += snprintf(name + n, sizeof name - (size_t)n, "%02x", emu_process.devices[i].uuid[j]);
        if (getenv(name))
            attached[count++] = i;
    }
    if (count)
        return count;
    for (int i = 0; i < emu_process.device_count; i++)
        attached[i] = i;
    return emu_process.device_count;
}

/* CUDA_VISIBLE_DEVICES: numbers or UUIDs (shortened ones too); the list ends at the first invalid entry. Numbers count
 * what is attached. All devices are alike, so both values of CUDA_DEVICE_ORDER mean the order of PCI addresses. */
static void choose_visible(void)
{
    const char *list = getenv("CUDA_VISIBLE_DEVICES");
    int attached[EMU_MAX_DEVICES];
    int attached_count = choose_attached(attached);
    emu_process.visible_count = 0;
    if (!list) {
        memcpy(emu_process.visible, attached, sizeof attached);
        emu_process.visible_count = attached_count;
        return;
    }
    while (*list) { /* at the latest a duplicate ends it */
        list += strspn(list, " ");
        size_t length = strcspn(list, ", ");
        int found = -1;
        char *end;
        long index = strtol(list, &end, 10);
        if (length && end == list + length && index >= 0 && index < attached_count)
            found = attached[index];
        for (int i = 0, matches = 0; i < attached_count && end != list + length; i++)
            if (device_matches(&emu_process.devices[attached[i]], list, length))
                found = matches++ ? -1 : attached[i]; /* ambiguous = invalid */
        for (int i = 0; i < emu_process.visible_count && found >= 0; i++)
            if (emu_process.visible[i] == found)
                found = -2;
        if (found < 0) {
            if (found == -2)
                emu_process.visible_count = 0; /* a duplicate makes the whole list empty */
            return;
        }
        emu_process.visible[emu_process.visible_count++] = found;
        list += length;
        list += strspn(list, " ");
        if (*list == ',')
            list++;
    }
}

static emu_result hello(void)
{
    int fds[EMU_MAX_FDS], count = 0;
    struct emu_msg msg = {.op = EMU_HELLO_PROCESS, .a = EMU_PROTOCOL};
    request_fd = emu_connect();
    if (request_fd < 0)
        return EMU_NO_DEVICE;
    if (emu_send(request_fd, &msg, NULL, 0) ||
        emu_receive(request_fd, &msg, emu_process.devices, sizeof emu_process.devices, fds, &count) < 0)
        return EMU_UNKNOWN;
    emu_process.device_count = count > 2 ? count - 2 : 0;
    for (int i = 0; i < emu_process.device_count; i++)
        emu_process.vram_fd[i] = fds[i + 2];
    emu_result result = msg.status;
    if (!result && (count < 3 || msg.b != (uint64_t)(count - 2)))
        result = EMU_NO_DEVICE;
    if (count > 2) {
        int mapped = emu_activity_map(fds[1]);
        close(fds[1]);
        if (mapped) {
            close(fds[0]);
            return EMU_OPERATING_SYSTEM;
        }
        size_t bytes = EMU_MAX_ALLOCATIONS * sizeof(uint64_t);
        void *table = mmap(NULL, bytes, PROT_READ, MAP_SHARED, fds[0], 0);
        close(fds[0]);
        if (table == MAP_FAILED)
            return EMU_OPERATING_SYSTEM;
        madvise(table, bytes, MADV_DONTFORK);
        emu_process.offsets = table;
    }
    if (!result) {
        choose_visible();
        if (!emu_process.visible_count)
            result = EMU_NO_DEVICE;
    }
    return result ? result : start_restore_thread(msg.a) ? EMU_OPERATING_SYSTEM : EMU_SUCCESS;
}

static void disconnect(void)
{
    if (request_fd >= 0)
        close(request_fd);
    if (restore_fd >= 0)
        close(restore_fd);
    request_fd = restore_fd = -1;
    for (int i = 0; i < emu_process.device_count; i++)
        close(emu_process.vram_fd[i]);
    emu_process.device_count = 0;
    emu_activity_unmap();
    if (emu_process.offsets)
        munmap((void *)(uintptr_t)emu_process.offsets, EMU_MAX_ALLOCATIONS * sizeof(uint64_t));
    emu_process.offsets = NULL;
}

EMU_API emu_result cuInit(unsigned flags)
{
    static int registered;
    if (flags)
        return EMU_INVALID_VALUE;
    if (atomic_load(&forked))
        return EMU_NOT_INITIALIZED;
    pthread_mutex_lock(&init_mutex);
    emu_result result = EMU_SUCCESS;
    if (!emu_initialized()) {
        result = hello();
        if (result)
            disconnect();
        else {
            if (!registered)
                pthread_atfork(NULL, NULL, after_fork_in_child);
            registered = 1;
            atomic_store_explicit(&initialized, 1, memory_order_release);
        }
    }
    pthread_mutex_unlock(&init_mutex);
    return result;
}
