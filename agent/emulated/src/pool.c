#define _GNU_SOURCE
#include "pool.h"

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include "channel.h"

#define IDLE_CONNECTIONS 16

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pid_t owner;
static int idle[IDLE_CONNECTIONS], idle_count;

/* Called with the mutex held. */
static void close_idle(void)
{
    while (idle_count)
        close(idle[--idle_count]);
}

/* A forked child must not share its parent's connections. */
static int pop_idle(void)
{
    int fd = -1;
    pthread_mutex_lock(&mutex);
    if (owner != getpid()) {
        close_idle();
        owner = getpid();
    }
    if (idle_count)
        fd = idle[--idle_count];
    pthread_mutex_unlock(&mutex);
    return fd;
}

static void give(int fd)
{
    pthread_mutex_lock(&mutex);
    if (owner == getpid() && idle_count < IDLE_CONNECTIONS) {
        idle[idle_count++] = fd;
        fd = -1;
    }
    pthread_mutex_unlock(&mutex);
    if (fd >= 0)
        close(fd);
}

void emu_pool_drain(void)
{
    pthread_mutex_lock(&mutex);
    close_idle();
    pthread_mutex_unlock(&mutex);
}

long emu_await(int fd, struct emu_msg *msg, void *in, size_t in_capacity)
{
    sigset_t all, before;
    int held = 0;
    long got;
    while ((got = emu_receive(fd, msg, in, in_capacity, NULL, NULL)) >= 0 && msg->op == EMU_HOLD) {
        sigfillset(&all);
        if (!held++)
            pthread_sigmask(SIG_SETMASK, &all, &before);
    }
    if (held)
        pthread_sigmask(SIG_SETMASK, &before, NULL);
    return got;
}

long emu_pool_call(struct emu_msg *msg, const void *out, size_t out_bytes, void *in, size_t in_capacity)
{
    int fd = pop_idle();
    /* An idle connection may belong to an earlier driver process. Retry only requests that were never received. */
    while (fd >= 0 && emu_send(fd, msg, out, out_bytes)) {
        close(fd);
        fd = pop_idle();
    }
    if (fd < 0) {
        fd = emu_connect();
        if (fd < 0)
            return -1;
        if (emu_send(fd, msg, out, out_bytes)) {
            close(fd);
            return -1;
        }
    }
    long got = emu_await(fd, msg, in, in_capacity);
    if (got < 0)
        close(fd);
    else
        give(fd);
    return got;
}
