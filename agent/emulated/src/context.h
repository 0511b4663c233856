/* Contexts: the device of a thread's calls, and the lifetime of its memory. */
#ifndef EMU_CONTEXT_H
#define EMU_CONTEXT_H

#include "cuda_abi.h"

struct emu_context {
    uint32_t magic;
    int device; /* ordinal as the application sees it */
    int primary;
    int references;
};

/* The calling thread's context, or INVALID_CONTEXT (none), CONTEXT_IS_DESTROYED. */
emu_result emu_current_context(struct emu_context **context);

/* Free all VRAM of a context (memory.c). */
void emu_free_context_memory(const struct emu_context *context);

#endif
