/* cuCheckpointProcess*: the caller's side. The work is done in the target; the driver process carries the request.
 *
 * Needs no cuInit here. Has no deadline, as the real one: the target may be frozen.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <unistd.h>

#include "process.h"

#define IDLE_CONNECTIONS 16

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pid_t owner;
static int idle[IDLE_CONNECTIONS], idle_count;

static int is_zero(const void *bytes, size_t length)
{
    const unsigned char *p = bytes;
    while (length--)
        if (*p++)
            return 0;
    return 1;
}

/* Connections carry one call at a time; a forked child must not share its parent's. */
static int take_connection(void)
{
    int fd = -1;
    pthread_mutex_lock(&mutex);
    if (owner != getpid()) {
        while (idle_count)
            close(idle[--idle_count]);
        owner = getpid();
    }
    if (idle_count)
        fd = idle[--idle_count];
    pthread_mutex_unlock(&mutex);
    return fd;
}

static void give_connection(int fd)
{
    pthread_mutex_lock(&mutex);
    if (idle_count < IDLE_CONNECTIONS) {
        idle[idle_count++] = fd;
        fd = -1;
    }
    pthread_mutex_unlock(&mutex);
    if (fd >= 0)
        close(fd);
}

/* The answer. A call that hangs (EMU_HOLD) is like one stuck in the kernel: until it ends, only SIGKILL helps. */
static long await_answer(int fd, struct emu_msg *msg)
{
    sigset_t all, before;
    int held = 0;
    long got;
    while ((got = emu_receive(fd, msg, NULL, 0, NULL, NULL)) >= 0 && msg->op == EMU_HOLD) {
        sigfillset(&all);
        if (!held++)
            pthread_sigmask(SIG_SETMASK, &all, &before);
    }
    if (held)
        pthread_sigmask(SIG_SETMASK, &before, NULL);
    return got;
}

static emu_result ask(struct emu_msg *msg, const void *payload, size_t bytes)
{
    struct emu_msg request = *msg;
    request.b = (uint64_t)emu_initialized();
    if ((int)request.a <= 0)
        return EMU_INVALID_VALUE;
    int fd = take_connection();
    /* An idle connection may have outlived its driver process; the request is repeated only if it was never taken. */
    if (fd >= 0 && emu_send(fd, &request, payload, bytes)) {
        close(fd);
        fd = -1;
    }
    if (fd < 0) {
        fd = emu_connect();
        if (fd < 0)
            return EMU_OPERATING_SYSTEM;
        if (emu_send(fd, &request, payload, bytes)) {
            close(fd);
            return EMU_OPERATING_SYSTEM;
        }
    }
    if (await_answer(fd, msg) < 0) {
        close(fd);
        return EMU_OPERATING_SYSTEM;
    }
    give_connection(fd);
    return msg->status;
}

EMU_API emu_result cuCheckpointProcessGetState(int pid, int *state)
{
    struct emu_msg msg = {.op = EMU_GET_STATE, .a = (uint64_t)pid};
    emu_result result = state ? ask(&msg, NULL, 0) : EMU_INVALID_VALUE;
    if (!result)
        *state = (int)msg.a;
    return result;
}

EMU_API emu_result cuCheckpointProcessGetRestoreThreadId(int pid, int *tid)
{
    struct emu_msg msg = {.op = EMU_GET_RESTORE_THREAD, .a = (uint64_t)pid};
    emu_result result = tid ? ask(&msg, NULL, 0) : EMU_INVALID_VALUE;
    if (!result)
        *tid = (int)msg.a;
    return result;
}

EMU_API emu_result cuCheckpointProcessLock(int pid, const struct emu_lock_args *args)
{
    struct emu_msg msg = {.op = EMU_LOCK, .a = (uint64_t)pid, .c = args ? args->timeout_ms : 0};
    if (args && (args->reserved0 || !is_zero(args->reserved1, sizeof args->reserved1)))
        return EMU_INVALID_VALUE;
    return ask(&msg, NULL, 0);
}

EMU_API emu_result cuCheckpointProcessCheckpoint(int pid, const struct emu_checkpoint_args *args)
{
    struct emu_msg msg = {.op = EMU_CHECKPOINT, .a = (uint64_t)pid};
    if (args && !is_zero(args, sizeof *args))
        return EMU_INVALID_VALUE;
    return ask(&msg, NULL, 0);
}

EMU_API emu_result cuCheckpointProcessRestore(int pid, const struct emu_restore_args *args)
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

EMU_API emu_result cuCheckpointProcessUnlock(int pid, const struct emu_unlock_args *args)
{
    struct emu_msg msg = {.op = EMU_UNLOCK, .a = (uint64_t)pid};
    if (args && !is_zero(args, sizeof *args))
        return EMU_INVALID_VALUE;
    return ask(&msg, NULL, 0);
}
