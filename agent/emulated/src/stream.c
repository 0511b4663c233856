/* Streams and pinned memory, as far as they matter to a checkpoint: work in a stream counts as a call inside. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/mman.h>

#include "context.h"
#include "process.h"

struct stream {
    const struct emu_context *context;
};

EMU_API emu_result cuStreamCreate(struct stream **out, unsigned flags)
{
    struct emu_context *context = NULL;
    (void)flags;
    if (!out)
        return EMU_INVALID_VALUE;
    EMU_CALL_BEGIN;
    emu_result result = emu_current_context(&context);
    if (!result && !(*out = malloc(sizeof **out)))
        result = EMU_OUT_OF_MEMORY;
    if (!result)
        (*out)->context = context;
    emu_leave();
    return result;
}

EMU_API emu_result cuStreamDestroy_v2(struct stream *stream)
{
    if (!stream)
        return EMU_INVALID_HANDLE;
    EMU_CALL_BEGIN;
    free(stream);
    emu_leave();
    return EMU_SUCCESS;
}

EMU_API emu_result cuStreamDestroy(struct stream *) __attribute__((alias("cuStreamDestroy_v2")));

EMU_API emu_result cuStreamSynchronize(struct stream *stream)
{
    struct emu_context *context = NULL;
    EMU_CALL_BEGIN;
    emu_result result = stream ? EMU_SUCCESS : emu_current_context(&context);
    emu_leave();
    return result;
}

/* The function runs before the call returns (on a GPU: later, in order). A lock waits for it in both cases. */
EMU_API emu_result cuLaunchHostFunc(struct stream *stream, void (*function)(void *), void *data)
{
    struct emu_context *context = NULL;
    if (!function)
        return EMU_INVALID_VALUE;
    EMU_CALL_BEGIN;
    emu_result result = stream ? EMU_SUCCESS : emu_current_context(&context);
    if (!result)
        function(data);
    emu_leave();
    return result;
}

#define HEADER 4096 /* remembers the length in front of the block, and keeps the block page-aligned */

EMU_API emu_result cuMemHostAlloc(void **out, size_t bytes, unsigned flags)
{
    struct emu_context *context = NULL;
    (void)flags;
    if (!out || !bytes || bytes > SIZE_MAX - HEADER)
        return EMU_INVALID_VALUE;
    EMU_CALL_BEGIN;
    emu_result result = emu_current_context(&context);
    if (!result) {
        size_t *block = mmap(NULL, bytes + HEADER, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
        if (block == MAP_FAILED)
            result = EMU_OUT_OF_MEMORY;
        else {
            *block = bytes + HEADER;
            *out = (char *)block + HEADER;
        }
    }
    emu_leave();
    return result;
}

EMU_API emu_result cuMemAllocHost_v2(void **out, size_t bytes)
{
    return cuMemHostAlloc(out, bytes, 0);
}

EMU_API emu_result cuMemAllocHost(void **, size_t) __attribute__((alias("cuMemAllocHost_v2")));

EMU_API emu_result cuMemFreeHost(void *block)
{
    if (!block)
        return EMU_INVALID_VALUE;
    EMU_CALL_BEGIN;
    size_t *start = (size_t *)((char *)block - HEADER);
    munmap(start, *start);
    emu_leave();
    return EMU_SUCCESS;
}
