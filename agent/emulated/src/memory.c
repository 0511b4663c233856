/* Device memory: each allocation is a range of its device's VRAM, mapped here at a fixed address. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "activity.h"
#include "context.h"
#include "process.h"

#define HUGE_PAGE (2ul << 20)
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

struct allocation {
    uintptr_t address;
    size_t size;   /* as requested: the limit of every copy */
    size_t length; /* as allocated: mapped, and copied by a checkpoint */
    uint32_t slot;
    const struct emu_context *context;
};

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER; /* guards the table, not the contents */
static struct allocation *table; /* by address */
static size_t count, capacity;
static unsigned char *image; /* host copy while checkpointed */
static size_t image_length;

/* Index after the only allocation that can contain `address`. */
static size_t first_above(uintptr_t address)
{
    size_t low = 0, high = count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (table[middle].address <= address)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* Whether [address, address + bytes) lies inside one allocation. */
static int is_device_range(uintptr_t address, size_t bytes)
{
    pthread_mutex_lock(&mutex);
    size_t above = first_above(address);
    int inside = above && address - table[above - 1].address <= table[above - 1].size &&
                 bytes <= table[above - 1].size - (address - table[above - 1].address);
    pthread_mutex_unlock(&mutex);
    return inside;
}

/* Reserve inaccessible address space, aligned for huge pages, into which VRAM is mapped later. */
static void *reserve(size_t length)
{
    size_t align = length >= HUGE_PAGE ? HUGE_PAGE : 4096;
    char *raw = mmap(NULL, length + align, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (raw == MAP_FAILED)
        return NULL;
    char *start = (char *)(((uintptr_t)raw + align - 1) & ~(uintptr_t)(align - 1));
    if (start > raw)
        munmap(raw, (size_t)(start - raw));
    munmap(start + length, (size_t)(raw + align - start));
    return start;
}

static int map_vram(uintptr_t address, size_t length, int device, uint64_t offset)
{
    void *at = mmap((void *)address, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, emu_process.vram_fd[device],
                    (off_t)offset);
    if (at == MAP_FAILED)
        return -1;
    madvise(at, length, MADV_DONTFORK);
    madvise(at, length, MADV_HUGEPAGE);
    madvise(at, length, MADV_POPULATE_WRITE); /* only maps the pages: the driver process has allocated them */
    return 0;
}

/* Reserve the address for this allocation while its VRAM is unmapped. */
static void unmap_vram(uintptr_t address, size_t length)
{
    void *at = mmap((void *)address, length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    if (at != MAP_FAILED)
        madvise(at, length, MADV_DONTFORK);
}

static int device_of(const struct allocation *allocation)
{
    return emu_process.visible[allocation->context->device];
}

static emu_result insert(struct allocation allocation)
{
    emu_result result = EMU_SUCCESS;
    pthread_mutex_lock(&mutex);
    if (count == capacity) {
        size_t grown = capacity ? capacity * 2 : 64;
        struct allocation *bigger = realloc(table, grown * sizeof *table);
        if (bigger) {
            table = bigger;
            capacity = grown;
        } else
            result = EMU_OUT_OF_MEMORY;
    }
    if (!result) {
        size_t at = first_above(allocation.address);
        memmove(table + at + 1, table + at, (count - at) * sizeof *table);
        table[at] = allocation;
        count++;
    }
    pthread_mutex_unlock(&mutex);
    return result;
}

static emu_result allocate(emu_devptr *out, size_t bytes)
{
    struct emu_context *context = NULL;
    emu_result result = emu_current_context(&context);
    if (result)
        return result;
    int device = emu_process.visible[context->device];
    struct emu_msg msg = {.op = EMU_ALLOC, .a = (uint64_t)device, .b = bytes};
    result = emu_request(&msg);
    if (result)
        return result;
    struct allocation new = {0, bytes, msg.c, (uint32_t)msg.a, context};
    new.address = (uintptr_t)reserve(new.length);
    result = new.address && !map_vram(new.address, new.length, device, msg.b) ? insert(new) : EMU_OUT_OF_MEMORY;
    if (result) {
        if (new.address)
            munmap((void *)new.address, new.length);
        msg = (struct emu_msg){.op = EMU_FREE, .a = new.slot};
        emu_request(&msg);
        return result;
    }
    *out = new.address;
    return EMU_SUCCESS;
}

EMU_API emu_result cuMemAlloc_v2(emu_devptr *out, size_t bytes)
{
    if (!out || !bytes)
        return EMU_INVALID_VALUE;
    EMU_CALL_BEGIN;
    emu_result result = allocate(out, bytes);
    emu_leave();
    return result;
}

EMU_API emu_result cuMemAlloc(emu_devptr *, size_t) __attribute__((alias("cuMemAlloc_v2")));

/* Called with the mutex held. */
static emu_result release_at(size_t index)
{
    struct allocation gone = table[index];
    struct emu_msg msg = {.op = EMU_FREE, .a = gone.slot};
    munmap((void *)gone.address, gone.length);
    count--;
    memmove(table + index, table + index + 1, (count - index) * sizeof *table);
    return emu_request(&msg);
}

EMU_API emu_result cuMemFree_v2(emu_devptr address)
{
    if (!address)
        return emu_initialized() ? EMU_SUCCESS : EMU_NOT_INITIALIZED;
    EMU_CALL_BEGIN;
    pthread_mutex_lock(&mutex);
    size_t above = first_above(address);
    emu_result result = EMU_INVALID_VALUE;
    if (above && table[above - 1].address == address)
        result = release_at(above - 1);
    pthread_mutex_unlock(&mutex);
    emu_leave();
    return result;
}

EMU_API emu_result cuMemFree(emu_devptr) __attribute__((alias("cuMemFree_v2")));

void emu_free_context_memory(const struct emu_context *context)
{
    pthread_mutex_lock(&mutex);
    for (size_t i = count; i-- > 0;)
        if (table[i].context == context)
            release_at(i);
    pthread_mutex_unlock(&mutex);
}

EMU_API emu_result cuMemGetInfo_v2(size_t *free_bytes, size_t *total_bytes)
{
    struct emu_context *context = NULL;
    if (!free_bytes || !total_bytes)
        return EMU_INVALID_VALUE;
    EMU_CALL_BEGIN;
    emu_result result = emu_current_context(&context);
    if (!result) {
        struct emu_msg msg = {.op = EMU_MEMINFO, .a = (uint64_t)emu_process.visible[context->device]};
        result = emu_request(&msg);
        *free_bytes = msg.a;
        *total_bytes = msg.b;
    }
    emu_leave();
    return result;
}

EMU_API emu_result cuMemGetInfo(size_t *, size_t *) __attribute__((alias("cuMemGetInfo_v2")));

/* All copies go through here. `device`: which ends must lie inside an allocation (1 = to, 2 = from). */
static emu_result copy(void *to, const void *from, size_t bytes, int device)
{
    struct emu_context *context = NULL;
    EMU_CALL_BEGIN;
    emu_result result = emu_current_context(&context);
    if (!result && (((device & 1) && !is_device_range((uintptr_t)to, bytes)) ||
                    ((device & 2) && !is_device_range((uintptr_t)from, bytes))))
        result = EMU_INVALID_VALUE;
    if (!result && bytes && (!to || !from))
        result = EMU_INVALID_VALUE;
    if (!result && bytes) {
        int64_t start = emu_now_ns();
        memmove(to, from, bytes);
        emu_busy(emu_process.visible[context->device], start);
    }
    emu_leave();
    return result;
}

EMU_API emu_result cuMemcpyHtoD_v2(emu_devptr to, const void *from, size_t bytes)
{
    return copy((void *)to, from, bytes, 1);
}

EMU_API emu_result cuMemcpyDtoH_v2(void *to, emu_devptr from, size_t bytes)
{
    return copy(to, (const void *)from, bytes, 2);
}

EMU_API emu_result cuMemcpyDtoD_v2(emu_devptr to, emu_devptr from, size_t bytes)
{
    return copy((void *)to, (const void *)from, bytes, 3);
}

EMU_API emu_result cuMemcpyHtoDAsync_v2(emu_devptr to, const void *from, size_t bytes, void *stream)
{
    (void)stream;
    return copy((void *)to, from, bytes, 1);
}

EMU_API emu_result cuMemcpyDtoHAsync_v2(void *to, emu_devptr from, size_t bytes, void *stream)
{
    (void)stream;
    return copy(to, (const void *)from, bytes, 2);
}

EMU_API emu_result cuMemcpyHtoD(emu_devptr, const void *, size_t) __attribute__((alias("cuMemcpyHtoD_v2")));
EMU_API emu_result cuMemcpyDtoH(void *, emu_devptr, size_t) __attribute__((alias("cuMemcpyDtoH_v2")));
EMU_API emu_result cuMemcpyDtoD(emu_devptr, emu_devptr, size_t) __attribute__((alias("cuMemcpyDtoD_v2")));
EMU_API emu_result cuMemcpyHtoDAsync(emu_devptr, const void *, size_t, void *)
    __attribute__((alias("cuMemcpyHtoDAsync_v2")));
EMU_API emu_result cuMemcpyDtoHAsync(void *, emu_devptr, size_t, void *)
    __attribute__((alias("cuMemcpyDtoHAsync_v2")));

static emu_result fill(emu_devptr to, uint32_t value, size_t width, size_t elements)
{
    struct emu_context *context = NULL;
    EMU_CALL_BEGIN;
    emu_result result = emu_current_context(&context);
    if (!result && (elements > SIZE_MAX / width || to % width || !is_device_range(to, elements * width)))
        result = EMU_INVALID_VALUE;
    if (!result) {
        int64_t start = emu_now_ns();
        if (width == 1)
            memset((void *)to, (int)value, elements);
        for (size_t i = 0; width == 4 && i < elements; i++)
            ((uint32_t *)to)[i] = value;
        emu_busy(emu_process.visible[context->device], start);
    }
    emu_leave();
    return result;
}

EMU_API emu_result cuMemsetD8_v2(emu_devptr to, unsigned char value, size_t elements)
{
    return fill(to, value, 1, elements);
}

EMU_API emu_result cuMemsetD32_v2(emu_devptr to, unsigned value, size_t elements)
{
    return fill(to, value, 4, elements);
}

EMU_API emu_result cuMemsetD8(emu_devptr, unsigned char, size_t) __attribute__((alias("cuMemsetD8_v2")));
EMU_API emu_result cuMemsetD32(emu_devptr, unsigned, size_t) __attribute__((alias("cuMemsetD32_v2")));

/* The following runs in the restore thread with the gate closed, so no other thread uses the table. */

emu_result emu_memory_checkpoint(uint64_t *image_bytes, int dying)
{
    size_t total = 0, at = 0;
    for (size_t i = 0; i < count; i++)
        total += table[i].length;
    *image_bytes = total;
    if (!total)
        return EMU_SUCCESS;
    size_t length = (total + HUGE_PAGE - 1) & ~(HUGE_PAGE - 1);
    image = reserve(length);
    if (!image || mprotect(image, length, PROT_READ | PROT_WRITE)) {
        if (image)
            munmap(image, length);
        image = NULL;
        return EMU_OUT_OF_MEMORY;
    }
    image_length = length;
    madvise(image, length, MADV_HUGEPAGE);
    madvise(image, length, MADV_DONTFORK);
    for (size_t i = 0; i < count; at += table[i++].length) {
        memcpy(image + at, (void *)table[i].address, dying ? table[i].length / 2 : table[i].length);
        if (dying)
            emu_die();
    }
    for (size_t i = 0; i < count; i++)
        unmap_vram(table[i].address, table[i].length);
    return EMU_SUCCESS;
}

emu_result emu_memory_restore(int dying)
{
    size_t at = 0;
    for (size_t i = 0; i < count; i++) {
        if (map_vram(table[i].address, table[i].length, device_of(&table[i]), emu_process.offsets[table[i].slot])) {
            for (size_t j = 0; j <= i; j++)
                unmap_vram(table[j].address, table[j].length);
            return EMU_OUT_OF_MEMORY;
        }
    }
    for (size_t i = 0; i < count; at += table[i++].length) {
        memcpy((void *)table[i].address, image + at, dying ? table[i].length / 2 : table[i].length);
        if (dying)
            emu_die();
    }
    if (image)
        munmap(image, image_length);
    image = NULL;
    return EMU_SUCCESS;
}

void emu_memory_busy(int64_t start_ns)
{
    for (int ordinal = 0; ordinal < emu_process.visible_count; ordinal++)
        for (size_t i = 0; i < count; i++)
            if (table[i].context->device == ordinal) {
                emu_busy(emu_process.visible[ordinal], start_ns);
                break;
            }
}
