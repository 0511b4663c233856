/* cuCheckpointProcess* on the caller's side. The target does the work; the driver process forwards the request.
 *
 * Needs no cuInit and has no deadline, like the real one: the target may be frozen.
 */
#define _GNU_SOURCE
#include <string.h>

#include "pool.h"
#include "process.h"

#if EMU_PUBLIC_API
#define CHECKPOINT_API EMU_API
#else
#define CHECKPOINT_API /* not exported: only cuda-checkpoint finds them, through the export table */
#endif

static int is_zero(const void *bytes, size_t length)
{
    const unsigned char *p = bytes;
    while (length--)
        if (*p++)
            return 0;
    return 1;
}

static emu_result ask(struct emu_msg *msg, const void *payload, size_t bytes)
{
    msg->b = (uint64_t)emu_initialized();
    if ((int)msg->a <= 0)
        return EMU_INVALID_VALUE;
    return emu_pool_call(msg, payload, bytes, NULL, 0) < 0 ? EMU_OPERATING_SYSTEM : msg->status;
}

CHECKPOINT_API emu_result cuCheckpointProcessGetState(int pid, int *state)
{
    struct emu_msg msg = {.op = EMU_GET_STATE, .a = (uint64_t)pid};
    emu_result result = state ? ask(&msg, NULL, 0) : EMU_INVALID_VALUE;
    if (!result)
        *state = (int)msg.a;
    return result;
}

CHECKPOINT_API emu_result cuCheckpointProcessGetRestoreThreadId(int pid, int *tid)
{
    struct emu_msg msg = {.op = EMU_GET_RESTORE_THREAD, .a = (uint64_t)pid};
    emu_result result = tid ? ask(&msg, NULL, 0) : EMU_INVALID_VALUE;
    if (!result)
        *tid = (int)msg.a;
    return result;
}

CHECKPOINT_API emu_result cuCheckpointProcessLock(int pid, const struct emu_lock_args *args)
{
    struct emu_msg msg = {.op = EMU_LOCK, .a = (uint64_t)pid, .c = args ? args->timeout_ms : 0};
    if (args && (args->reserved0 || !is_zero(args->reserved1, sizeof args->reserved1)))
        return EMU_INVALID_VALUE;
    return ask(&msg, NULL, 0);
}

CHECKPOINT_API emu_result cuCheckpointProcessCheckpoint(int pid, const struct emu_checkpoint_args *args)
{
    struct emu_msg msg = {.op = EMU_CHECKPOINT, .a = (uint64_t)pid};
    if (args && !is_zero(args, sizeof *args))
        return EMU_INVALID_VALUE;
    return ask(&msg, NULL, 0);
}

CHECKPOINT_API emu_result cuCheckpointProcessRestore(int pid, const struct emu_restore_args *args)
{
    struct emu_msg msg = {.op = EMU_RESTORE, .a = (uint64_t)pid};
    if (!args)
        return ask(&msg, NULL, 0);
#if EMU_MIGRATION
    if (!is_zero(args->reserved, sizeof args->reserved) || args->reserved1 || args->count > EMU_MAX_DEVICES ||
        (args->count && !args->pairs))
        return EMU_INVALID_VALUE;
    msg.c = args->count;
    return ask(&msg, args->pairs, args->count * sizeof *args->pairs);
#else
    return is_zero(args, sizeof *args) ? ask(&msg, NULL, 0) : EMU_INVALID_VALUE;
#endif
}

CHECKPOINT_API emu_result cuCheckpointProcessUnlock(int pid, const struct emu_unlock_args *args)
{
    struct emu_msg msg = {.op = EMU_UNLOCK, .a = (uint64_t)pid};
    if (args && !is_zero(args, sizeof *args))
        return EMU_INVALID_VALUE;
    return ask(&msg, NULL, 0);
}

const struct emu_export_table emu_export_table = {
    sizeof emu_export_table,
    cuCheckpointProcessGetState,
    cuCheckpointProcessGetRestoreThreadId,
    cuCheckpointProcessLock,
    cuCheckpointProcessCheckpoint,
    cuCheckpointProcessRestore,
    cuCheckpointProcessUnlock,
};
