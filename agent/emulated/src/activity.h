/* Records how long a GPU was busy, in memory shared with the driver process (activity.py reads it). */
#ifndef EMU_ACTIVITY_H
#define EMU_ACTIVITY_H

#include <stdint.h>

/* Map the descriptor. Returns 0 or -1. */
int emu_activity_map(int fd);
void emu_activity_unmap(void);

/* In a forked child: the mapping is not inherited, and its address may be in use by something else. */
void emu_activity_forget(void);

/* CLOCK_MONOTONIC. */
int64_t emu_now_ns(void);

/* Record that this device was busy from start_ns until now. Callable from any thread. */
void emu_busy(int device, int64_t start_ns);

#endif
