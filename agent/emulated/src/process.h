/* This process as a CUDA process: its connection, the gate of every CUDA call, and its restore thread. */
#ifndef EMU_PROCESS_H
#define EMU_PROCESS_H

#include <pthread.h>

#include "channel.h"
#include "cuda_abi.h"

struct emu_process {
    int device_count;
    struct emu_device devices[EMU_MAX_DEVICES];
    int vram_fd[EMU_MAX_DEVICES];
    const volatile uint64_t *offsets; /* by slot: the allocation's offset in its device's VRAM */
    int visible_count;
    int visible[EMU_MAX_DEVICES]; /* device ordinal -> index in devices; only a restore onto other GPUs changes it */
};

extern struct emu_process emu_process;

/* Whether cuInit has succeeded here, with no fork since. */
int emu_initialized(void);

/* Every CUDA call runs between these two. emu_enter blocks while the process is locked; 0 or a CUresult. */
emu_result emu_enter(void);
void emu_leave(void);

/* For the restore thread: close the gate and wait for running calls; NOT_READY after the timeout (0 = none). */
emu_result emu_gate_close(unsigned timeout_ms);
void emu_gate_open(void);
/* The driver process is gone: calls waiting at the gate, and every later call, get UNKNOWN. */
void emu_gate_lost(void);
void emu_gate_after_fork(void);

/* Send a CUDA call's request to the driver process; its CUresult, UNKNOWN if the connection is lost. */
emu_result emu_request(struct emu_msg *msg);

/* The body of the restore thread. */
void emu_restore_loop(int fd);

/* Copy this process's VRAM to host memory, or map VRAM and copy it back; addresses stay reserved.
 * dying: the process dies after half of the first allocation.
 */
emu_result emu_memory_checkpoint(uint64_t *image_bytes, int dying);
emu_result emu_memory_restore(int dying);
/* Count the devices with allocations of this process as busy since start_ns. Only while the gate is closed. */
void emu_memory_busy(int64_t start_ns);

/* A planned fault: SIGSEGV with its default action, ignoring the application's handler, without a core dump. */
_Noreturn void emu_die(void);

#define EMU_CALL_BEGIN                       \
    do {                                     \
        emu_result entered_ = emu_enter();   \
        if (entered_)                        \
            return entered_;                 \
    } while (0)

#endif
