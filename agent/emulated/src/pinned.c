/* Pinned host memory: its pages exist from the start, and only its own address frees it. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/mman.h>

#include "context.h"
#include "process.h"

struct block {
    void *address;
    size_t bytes;
    struct block *next;
};

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static struct block *blocks;

/* Called inside the gate. */
static emu_result allocate(void **out, size_t bytes)
{
    struct block *block = malloc(sizeof *block);
    if (!block)
        return EMU_OUT_OF_MEMORY;
    block->address = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (block->address == MAP_FAILED) {
        free(block);
        return EMU_OUT_OF_MEMORY;
    }
    block->bytes = bytes;
    pthread_mutex_lock(&mutex);
    block->next = blocks;
    blocks = block;
    pthread_mutex_unlock(&mutex);
    *out = block->address;
    return EMU_SUCCESS;
}

EMU_API emu_result cuMemHostAlloc(void **out, size_t bytes, unsigned flags)
{
    struct emu_context *context = NULL;
    if (!out || !bytes || flags & ~7u) /* PORTABLE, DEVICEMAP, WRITECOMBINED: no difference here */
        return EMU_INVALID_VALUE;
    EMU_CALL_BEGIN;
    emu_result result = emu_current_context(&context);
    if (!result)
        result = allocate(out, bytes);
    emu_leave();
    return result;
}

EMU_API emu_result cuMemAllocHost_v2(void **out, size_t bytes)
{
    return cuMemHostAlloc(out, bytes, 0);
}

EMU_API emu_result cuMemAllocHost(void **, size_t) __attribute__((alias("cuMemAllocHost_v2")));

EMU_API emu_result cuMemFreeHost(void *address)
{
    EMU_CALL_BEGIN;
    pthread_mutex_lock(&mutex);
    struct block **at = &blocks;
    while (*at && (*at)->address != address)
        at = &(*at)->next;
    struct block *gone = *at;
    if (gone)
        *at = gone->next;
    pthread_mutex_unlock(&mutex);
    if (gone)
        munmap(gone->address, gone->bytes);
    free(gone);
    emu_leave();
    return gone ? EMU_SUCCESS : EMU_INVALID_VALUE;
}
