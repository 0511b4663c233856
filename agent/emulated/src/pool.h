/* Idle connections for calls that may wait long. Each call uses its own, so none waits for another. */
#ifndef EMU_POOL_H
#define EMU_POOL_H

#include <stddef.h>

#include "protocol.h"

/* Send the request *msg, receive its answer into *msg. Payload bytes of the answer, or -1 if the driver is gone. */
long emu_pool_call(struct emu_msg *msg, const void *out, size_t out_bytes, void *in, size_t in_capacity);

/* Receive an answer. While the call hangs (EMU_HOLD) it is like one stuck in the kernel: only SIGKILL ends it. */
long emu_await(int fd, struct emu_msg *msg, void *in, size_t in_capacity);

/* Close all idle connections. */
void emu_pool_drain(void);

#endif
