/* Contexts: which device a thread's calls go to, and what dies with a context. */
#ifndef EMU_CONTEXT_H
#define EMU_CONTEXT_H

#include "cuda_abi.h"

struct emu_context {
    uint32_t magic;
    int device; /* ordinal as the application sees it */
    int primary;
    int references;
};

/* The calling thread's context; INVALID_CONTEXT where it has none, CONTEXT_IS_DESTROYED where it was destroyed. */
emu_result emu_current_context(struct emu_context **context);

/* Free all VRAM of a context (memory.c). */
void emu_free_context_memory(const struct emu_context *context);

#endif
