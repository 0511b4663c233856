#define _GNU_SOURCE
#include "context.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "process.h"

#define MAGIC 0x43545845u
#define STACK_DEPTH 64

typedef struct emu_context *context_t;

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static struct emu_context primaries[EMU_MAX_DEVICES];
static unsigned alive[EMU_MAX_DEVICES]; /* contexts by device ordinal */
/* Structs of destroyed contexts are kept, so that stale handles are recognised, and reused. */
static struct spare {
    struct emu_context context;
    struct spare *next;
} *spares;

static __thread context_t stack[STACK_DEPTH];
static __thread int depth;

static int is_alive(context_t context)
{
    return context && context->magic == MAGIC;
}

emu_result emu_current_context(context_t *context)
{
    if (!depth || !stack[depth - 1])
        return EMU_INVALID_CONTEXT;
    *context = stack[depth - 1];
    return is_alive(*context) ? EMU_SUCCESS : EMU_CONTEXT_IS_DESTROYED;
}

/* The driver process lists a process on a GPU once it has a context there. Called with the mutex held. */
static emu_result report_contexts(int device, int change)
{
    struct emu_msg msg = {.op = EMU_CONTEXT, .a = (uint64_t)emu_process.visible[device], .b = alive[device] + (unsigned)change};
    emu_result result = emu_request(&msg);
    if (!result)
        alive[device] += (unsigned)change;
    return result;
}

static int valid_device(emu_devno device)
{
    return device >= 0 && device < emu_process.visible_count;
}

static emu_result create(context_t *out, emu_devno device)
{
    if (!out)
        return EMU_INVALID_VALUE;
    EMU_CALL_BEGIN;
    emu_result result = valid_device(device) ? EMU_SUCCESS : EMU_INVALID_DEVICE;
    pthread_mutex_lock(&mutex);
    if (!result && depth == STACK_DEPTH)
        result = EMU_OUT_OF_MEMORY;
    if (!result)
        result = report_contexts(device, 1);
    if (!result) {
        struct spare *node = spares;
        if (node)
            spares = node->next;
        else if (!(node = malloc(sizeof *node))) {
            report_contexts(device, -1);
            result = EMU_OUT_OF_MEMORY;
        }
        if (node) {
            node->context = (struct emu_context){MAGIC, device, 0, 1};
            *out = stack[depth++] = &node->context;
        }
    }
    pthread_mutex_unlock(&mutex);
    emu_leave();
    return result;
}

EMU_API emu_result cuCtxCreate_v2(context_t *out, unsigned flags, emu_devno device)
{
    (void)flags;
    return create(out, device);
}

EMU_API emu_result cuCtxCreate(context_t *, unsigned, emu_devno) __attribute__((alias("cuCtxCreate_v2")));

EMU_API emu_result cuCtxCreate_v3(context_t *out, void *affinity, int count, unsigned flags, emu_devno device)
{
    (void)flags;
    return affinity || count ? EMU_NOT_SUPPORTED : create(out, device);
}

EMU_API emu_result cuCtxCreate_v4(context_t *out, void *parameters, unsigned flags, emu_devno device)
{
    (void)flags;
    return parameters ? EMU_NOT_SUPPORTED : create(out, device);
}

/* Called with the mutex held. */
static void destroy(context_t context)
{
    emu_free_context_memory(context);
    context->magic = 0;
    report_contexts(context->device, -1);
}

EMU_API emu_result cuCtxDestroy_v2(context_t context)
{
    EMU_CALL_BEGIN;
    pthread_mutex_lock(&mutex);
    emu_result result = is_alive(context) && !context->primary ? EMU_SUCCESS : EMU_INVALID_CONTEXT;
    if (!result) {
        destroy(context);
        struct spare *node = (struct spare *)context;
        node->next = spares;
        spares = node;
        if (depth && stack[depth - 1] == context)
            depth--;
    }
    pthread_mutex_unlock(&mutex);
    emu_leave();
    return result;
}

EMU_API emu_result cuCtxDestroy(context_t) __attribute__((alias("cuCtxDestroy_v2")));

EMU_API emu_result cuDevicePrimaryCtxRetain(context_t *out, emu_devno device)
{
    if (!out)
        return EMU_INVALID_VALUE;
    EMU_CALL_BEGIN;
    pthread_mutex_lock(&mutex);
    emu_result result = valid_device(device) ? EMU_SUCCESS : EMU_INVALID_DEVICE;
    if (!result && !is_alive(&primaries[device])) {
        result = report_contexts(device, 1);
        if (!result)
            primaries[device] = (struct emu_context){MAGIC, device, 1, 0};
    }
    if (!result) {
        primaries[device].references++;
        *out = &primaries[device];
    }
    pthread_mutex_unlock(&mutex);
    emu_leave();
    return result;
}

static emu_result release_primary(emu_devno device, int all)
{
    EMU_CALL_BEGIN;
    pthread_mutex_lock(&mutex);
    emu_result result = valid_device(device) ? EMU_SUCCESS : EMU_INVALID_DEVICE;
    if (!result && !is_alive(&primaries[device]))
        result = all ? EMU_SUCCESS : EMU_INVALID_CONTEXT;
    else if (!result && (all || --primaries[device].references == 0))
        destroy(&primaries[device]);
    pthread_mutex_unlock(&mutex);
    emu_leave();
    return result;
}

EMU_API emu_result cuDevicePrimaryCtxRelease_v2(emu_devno device)
{
    return release_primary(device, 0);
}

EMU_API emu_result cuDevicePrimaryCtxRelease(emu_devno) __attribute__((alias("cuDevicePrimaryCtxRelease_v2")));

EMU_API emu_result cuDevicePrimaryCtxReset_v2(emu_devno device)
{
    return release_primary(device, 1);
}

EMU_API emu_result cuDevicePrimaryCtxReset(emu_devno) __attribute__((alias("cuDevicePrimaryCtxReset_v2")));

EMU_API emu_result cuDevicePrimaryCtxGetState(emu_devno device, unsigned *flags, int *active)
{
    if (!flags || !active)
        return EMU_INVALID_VALUE;
    EMU_CALL_BEGIN;
    emu_result result = valid_device(device) ? EMU_SUCCESS : EMU_INVALID_DEVICE;
    *flags = 0;
    *active = !result && is_alive(&primaries[device]);
    emu_leave();
    return result;
}

EMU_API emu_result cuCtxSetCurrent(context_t context)
{
    EMU_CALL_BEGIN;
    emu_result result = !context || is_alive(context) ? EMU_SUCCESS : EMU_INVALID_CONTEXT;
    if (!result && !context && depth)
        depth--;
    else if (!result && context) {
        if (!depth)
            depth = 1;
        stack[depth - 1] = context;
    }
    emu_leave();
    return result;
}

EMU_API emu_result cuCtxGetCurrent(context_t *out)
{
    if (!out)
        return EMU_INVALID_VALUE;
    EMU_CALL_BEGIN;
    *out = depth ? stack[depth - 1] : NULL;
    emu_leave();
    return EMU_SUCCESS;
}

EMU_API emu_result cuCtxPushCurrent_v2(context_t context)
{
    EMU_CALL_BEGIN;
    emu_result result = is_alive(context) ? EMU_SUCCESS : EMU_INVALID_CONTEXT;
    if (!result && depth == STACK_DEPTH)
        result = EMU_OUT_OF_MEMORY;
    if (!result)
        stack[depth++] = context;
    emu_leave();
    return result;
}

EMU_API emu_result cuCtxPushCurrent(context_t) __attribute__((alias("cuCtxPushCurrent_v2")));

EMU_API emu_result cuCtxPopCurrent_v2(context_t *out)
{
    EMU_CALL_BEGIN;
    emu_result result = depth ? EMU_SUCCESS : EMU_INVALID_CONTEXT;
    if (!result) {
        depth--;
        if (out)
            *out = stack[depth];
    }
    emu_leave();
    return result;
}

EMU_API emu_result cuCtxPopCurrent(context_t *) __attribute__((alias("cuCtxPopCurrent_v2")));

EMU_API emu_result cuCtxGetDevice(emu_devno *device)
{
    context_t context = NULL;
    if (!device)
        return EMU_INVALID_VALUE;
    EMU_CALL_BEGIN;
    emu_result result = emu_current_context(&context);
    if (!result)
        *device = context->device;
    emu_leave();
    return result;
}

EMU_API emu_result cuCtxGetDevice_v2(emu_devno *device, context_t context)
{
    if (!context)
        return cuCtxGetDevice(device);
    if (!device || !is_alive(context))
        return device ? EMU_INVALID_CONTEXT : EMU_INVALID_VALUE;
    *device = context->device;
    return EMU_SUCCESS;
}

/* Work is complete when a call returns, so only the gate can block. */
EMU_API emu_result cuCtxSynchronize(void)
{
    context_t context = NULL;
    EMU_CALL_BEGIN;
    emu_result result = emu_current_context(&context);
    emu_leave();
    return result;
}

EMU_API emu_result cuCtxSynchronize_v2(context_t context)
{
    if (!context)
        return cuCtxSynchronize();
    EMU_CALL_BEGIN;
    emu_result result = is_alive(context) ? EMU_SUCCESS : EMU_INVALID_CONTEXT;
    emu_leave();
    return result;
}
