/* The restore thread: the driver's part inside the CUDA process, so a frozen process does not answer.
 *
 * It only executes: the driver process holds the state and sends one order at a time.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "activity.h"
#include "process.h"

/* Waits here, not in the driver process, so that a freeze during an operation also stops the wait. */
static void take_at_least(int64_t start_ns, uint64_t model_us)
{
    int64_t end = start_ns + (int64_t)model_us * 1000;
    struct timespec until = {end / 1000000000, end % 1000000000};
    while (emu_now_ns() < end)
        clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL);
}

_Noreturn void emu_die(void)
{
    struct sigaction action = {.sa_handler = SIG_DFL};
    sigset_t segv;
    prctl(PR_SET_DUMPABLE, 0);
    sigaction(SIGSEGV, &action, NULL);
    sigemptyset(&segv);
    sigaddset(&segv, SIGSEGV);
    pthread_sigmask(SIG_UNBLOCK, &segv, NULL);
    raise(SIGSEGV);
    _exit(128 + SIGSEGV);
}

static void move_devices(const uint32_t *new_device, long bytes)
{
    for (int i = 0; i < emu_process.visible_count; i++) {
        long old = emu_process.visible[i];
        if ((old + 1) * (long)sizeof *new_device <= bytes && new_device[old] < (uint32_t)emu_process.device_count)
            emu_process.visible[i] = (int)new_device[old];
    }
}

static void execute(struct emu_msg *msg, const uint32_t *new_device, long bytes)
{
    int before[EMU_MAX_DEVICES];
    switch (msg->op) {
    case EMU_DO_PING:
        msg->status = EMU_SUCCESS;
        break;
    case EMU_DO_LOCK:
        msg->status = emu_gate_close((unsigned)msg->a);
        break;
    case EMU_DO_CHECKPOINT:
        msg->status = emu_memory_checkpoint(&msg->a, msg->e != 0);
        break;
    case EMU_DO_RESTORE:
        memcpy(before, emu_process.visible, sizeof before);
        move_devices(new_device, bytes);
        msg->status = emu_memory_restore(msg->e != 0);
        if (msg->status)
            memcpy(emu_process.visible, before, sizeof before);
        break;
    case EMU_DO_UNLOCK:
        emu_gate_open();
        msg->status = EMU_SUCCESS;
        break;
    default:
        msg->status = EMU_NOT_SUPPORTED;
    }
}

void emu_restore_loop(int fd)
{
    uint32_t payload[EMU_MAX_DEVICES];
    struct emu_msg msg;
    pthread_setname_np(pthread_self(), "cuda-restore");
    msg = (struct emu_msg){.op = EMU_HELLO_RESTORE, .b = (uint64_t)syscall(SYS_gettid)};
    if (emu_send(fd, &msg, NULL, 0) == 0) {
        for (;;) {
            long bytes = emu_receive(fd, &msg, payload, sizeof payload, NULL, NULL);
            if (bytes < 0)
                break;
            int64_t start = emu_now_ns();
            if (msg.e)
                take_at_least(start, msg.f);
            execute(&msg, payload, bytes);
            if (msg.e)
                emu_die();
            take_at_least(start, msg.f);
            if (msg.op == EMU_DO_CHECKPOINT || msg.op == EMU_DO_RESTORE)
                emu_memory_busy(start);
            if (emu_send(fd, &msg, NULL, 0))
                break;
        }
    }
    emu_gate_lost();
}
