#define _GNU_SOURCE
#include "activity.h"

#include <stdatomic.h>
#include <sys/mman.h>
#include <time.h>

#include "protocol.h"

#define BYTES (EMU_MAX_DEVICES * EMU_ACTIVITY_BUCKETS * sizeof(uint64_t))
#define TIME_BITS 24
#define MOST ((1ull << TIME_BITS) - 1)
#define TICK_MASK ((1ull << (64 - TIME_BITS)) - 1)

static _Atomic(uint64_t) *rings;

int emu_activity_map(int fd)
{
    void *at = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (at == MAP_FAILED)
        return -1;
    madvise(at, BYTES, MADV_DONTFORK);
    rings = at;
    return 0;
}

void emu_activity_unmap(void)
{
    if (rings)
        munmap((void *)rings, BYTES);
    rings = NULL;
}

void emu_activity_forget(void)
{
    rings = NULL;
}

int64_t emu_now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* Restart a bucket of an earlier round. The counter saturates instead of overflowing into the tick. */
static void add(_Atomic(uint64_t) *bucket, uint64_t tick, uint64_t busy_us)
{
    uint64_t old = atomic_load(bucket), new;
    do {
        uint64_t before = old >> TIME_BITS == (tick & TICK_MASK) ? old & MOST : 0;
        uint64_t sum = before + busy_us;
        new = (tick & TICK_MASK) << TIME_BITS | (sum < MOST ? sum : MOST);
    } while (!atomic_compare_exchange_weak(bucket, &old, new));
}

void emu_busy(int device, int64_t start_ns)
{
    int64_t end_ns = emu_now_ns();
    int64_t oldest = (end_ns / EMU_ACTIVITY_NS - EMU_ACTIVITY_BUCKETS + 1) * EMU_ACTIVITY_NS;
    if (!rings || device < 0 || device >= EMU_MAX_DEVICES)
        return;
    if (start_ns < oldest)
        start_ns = oldest; /* older than the ring */
    while (start_ns < end_ns) {
        int64_t tick = start_ns / EMU_ACTIVITY_NS, next = (tick + 1) * EMU_ACTIVITY_NS;
        int64_t until = next < end_ns ? next : end_ns;
        /* Round by absolute time: many short copies must add up to one long one. */
        add(&rings[device * EMU_ACTIVITY_BUCKETS + tick % EMU_ACTIVITY_BUCKETS], (uint64_t)tick,
            (uint64_t)(until / 1000 - start_ns / 1000));
        start_ns = until;
    }
}
