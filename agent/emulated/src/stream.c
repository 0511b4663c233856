/* Streams: work in a stream counts as a running call, which a lock waits for. */
#define _GNU_SOURCE
#include <stdlib.h>

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

/* The function runs before the call returns (on a GPU: later, in order). A lock waits for it either way. */
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
