/* Idle connections for callers that wait long: each call has one to itself, so that no call waits for another. */
#ifndef EMU_POOL_H
#define EMU_POOL_H

#include <stddef.h>

#include "protocol.h"

/* Request in *msg, answer in *msg; payload bytes of the answer, or -1 (no driver process, or it went away). */
long emu_pool_call(struct emu_msg *msg, const void *out, size_t out_bytes, void *in, size_t in_capacity);

/* The answer alone. A call that hangs (EMU_HOLD) is like one stuck in the kernel: until it ends, only SIGKILL helps. */
long emu_await(int fd, struct emu_msg *msg, void *in, size_t in_capacity);

/* Close what is idle. */
void emu_pool_drain(void);

#endif
