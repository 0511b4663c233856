/* This process as a CUDA process: its connection, the gate every CUDA call passes, and its restore thread. */
#ifndef EMU_PROCESS_H
#define EMU_PROCESS_H

#include <pthread.h>

#include "channel.h"
#include "cuda_abi.h"

struct emu_process {
    int device_count;
    struct emu_device devices[EMU_MAX_DEVICES];
    int vram_fd[EMU_MAX_DEVICES];
    const volatile uint64_t *offsets; /* by slot: where the driver process put that allocation in its device's VRAM */
    int visible_count;
    int visible[EMU_MAX_DEVICES]; /* device ordinal -> index in devices; changed only by a restore onto other GPUs */
};

extern struct emu_process emu_process;

/* Has cuInit succeeded here (and no fork happened since)? */
int emu_initialized(void);

/* Every CUDA call runs between these two. enter blocks while the process is locked; 0 or a CUresult. */
emu_result emu_enter(void);
void emu_leave(void);

/* For the restore thread: close the gate and wait until no call is inside; NOT_READY after the timeout (0 = none). */
emu_result emu_gate_close(unsigned timeout_ms);
void emu_gate_open(void);
/* The driver process is gone: whoever waits at the gate, and every later call, gets UNKNOWN. */
void emu_gate_lost(void);
void emu_gate_after_fork(void);

/* A request to the driver process on behalf of a CUDA call; its CUresult, UNKNOWN if the connection is lost. */
emu_result emu_request(struct emu_msg *msg);

/* The body of the restore thread. */
void emu_restore_loop(int fd);

/* Bytes of VRAM of this process are copied to host memory / mapped and copied back; addresses stay reserved.
 * dying: the process dies after half of the first allocation.
 */
emu_result emu_memory_checkpoint(uint64_t *image_bytes, int dying);
emu_result emu_memory_restore(int dying);
/* The devices that hold allocations of this process count as busy since start_ns. Only while the gate is closed. */
void emu_memory_busy(int64_t start_ns);

/* A planned fault: SIGSEGV with its default action, whatever handler the application has; no core is written. */
_Noreturn void emu_die(void);

#define EMU_CALL_BEGIN                       \
    do {                                     \
        emu_result entered_ = emu_enter();   \
        if (entered_)                        \
            return entered_;                 \
    } while (0)

#endif
