/* One connection to the driver process. */
#ifndef EMU_CHANNEL_H
#define EMU_CHANNEL_H

#include <stddef.h>

#include "protocol.h"

/* Largest number of descriptors in a message: table, activity, VRAM of each device. */
#define EMU_MAX_FDS (EMU_MAX_DEVICES + 2)

/* A connected, close-on-exec socket, or -1 (no driver process listens). */
int emu_connect(void);

/* 0, or -1 if the connection is lost. Waits without a deadline, like the real driver. */
int emu_send(int fd, const struct emu_msg *msg, const void *payload, size_t bytes);

/* Payload bytes, or -1 if the connection is lost. Descriptors are close-on-exec; *fd_count is their number. */
long emu_receive(int fd, struct emu_msg *msg, void *payload, size_t capacity, int *fds, int *fd_count);

/* Send the request *msg and receive the answer into it; payload bytes of the answer or -1. */
long emu_call(int fd, struct emu_msg *msg, const void *out, size_t out_bytes, void *in, size_t in_capacity);

#endif
