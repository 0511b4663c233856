/* The gate: a lock waits until running calls have returned, and blocks new ones until the unlock. */
#define _GNU_SOURCE
#include <time.h>

#include "process.h"

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t opened = PTHREAD_COND_INITIALIZER;
static pthread_cond_t drained; /* on CLOCK_MONOTONIC */
static pthread_once_t once = PTHREAD_ONCE_INIT;
static int closed, lost;
static unsigned inside;

static void prepare(void)
{
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&drained, &attributes);
    pthread_condattr_destroy(&attributes);
}

emu_result emu_enter(void)
{
    if (!emu_initialized())
        return EMU_NOT_INITIALIZED;
    pthread_mutex_lock(&mutex);
    while (closed && !lost)
        pthread_cond_wait(&opened, &mutex);
    emu_result result = lost ? EMU_UNKNOWN : EMU_SUCCESS;
    if (!result)
        inside++;
    pthread_mutex_unlock(&mutex);
    return result;
}

void emu_leave(void)
{
    pthread_mutex_lock(&mutex);
    if (--inside == 0 && closed)
        pthread_cond_signal(&drained);
    pthread_mutex_unlock(&mutex);
}

emu_result emu_gate_close(unsigned timeout_ms)
{
    struct timespec deadline;
    pthread_once(&once, prepare);
    clock_gettime(CLOCK_MONOTONIC, &deadline);
    deadline.tv_sec += timeout_ms / 1000;
    deadline.tv_nsec += (long)(timeout_ms % 1000) * 1000000;
    if (deadline.tv_nsec >= 1000000000) {
        deadline.tv_sec++;
        deadline.tv_nsec -= 1000000000;
    }
    int rc = 0;
    pthread_mutex_lock(&mutex);
    closed = 1;
    while (inside && !rc)
        rc = timeout_ms ? pthread_cond_timedwait(&drained, &mutex, &deadline) : pthread_cond_wait(&drained, &mutex);
    int busy = inside != 0;
    if (busy) {
        closed = 0;
        pthread_cond_broadcast(&opened);
    }
    pthread_mutex_unlock(&mutex);
    return busy ? EMU_NOT_READY : EMU_SUCCESS;
}

void emu_gate_open(void)
{
    pthread_mutex_lock(&mutex);
    closed = 0;
    pthread_cond_broadcast(&opened);
    pthread_mutex_unlock(&mutex);
}

void emu_gate_lost(void)
{
    pthread_mutex_lock(&mutex);
    lost = 1;
    pthread_cond_broadcast(&opened);
    pthread_mutex_unlock(&mutex);
}

void emu_gate_after_fork(void)
{
    mutex = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
    opened = (pthread_cond_t)PTHREAD_COND_INITIALIZER;
    closed = 0;
    inside = 0;
}
