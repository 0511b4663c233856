/* The part of the CUDA driver API's binary interface that the emulated libcuda offers.
 *
 * The names differ from NVIDIA's, so that a test can include cuda.h too and compare sizes, offsets and values.
 */
#ifndef EMU_CUDA_ABI_H
#define EMU_CUDA_ABI_H

#include <stddef.h>
#include <stdint.h>

#define EMU_API __attribute__((visibility("default")))

typedef int emu_result;
typedef int emu_devno;
typedef uintptr_t emu_devptr;

enum {
    EMU_SUCCESS = 0,
    EMU_INVALID_VALUE = 1,
    EMU_OUT_OF_MEMORY = 2,
    EMU_NOT_INITIALIZED = 3,
    EMU_DEVICE_UNAVAILABLE = 46,
    EMU_NO_DEVICE = 100,
    EMU_INVALID_DEVICE = 101,
    EMU_INVALID_CONTEXT = 201,
    EMU_OPERATING_SYSTEM = 304,
    EMU_INVALID_HANDLE = 400,
    EMU_ILLEGAL_STATE = 401,
    EMU_NOT_FOUND = 500,
    EMU_NOT_READY = 600,
    EMU_CONTEXT_IS_DESTROYED = 709,
    EMU_NOT_PERMITTED = 800,
    EMU_NOT_SUPPORTED = 801,
    EMU_UNKNOWN = 999
};

enum { EMU_RUNNING = 0, EMU_LOCKED = 1, EMU_CHECKPOINTED = 2, EMU_FAILED = 3 };

struct emu_uuid {
    unsigned char bytes[16];
};

struct emu_lock_args {
    unsigned timeout_ms;
    unsigned reserved0;
    uint64_t reserved1[7];
};

struct emu_checkpoint_args {
    uint64_t reserved[8];
};

struct emu_gpu_pair {
    struct emu_uuid old_uuid;
    struct emu_uuid new_uuid;
};

struct emu_restore_args {
    struct emu_gpu_pair *pairs;
    unsigned count;
    char reserved[52 - sizeof(struct emu_gpu_pair *)];
    uint64_t reserved1;
};

struct emu_unlock_args {
    uint64_t reserved[8];
};

/* The table that cuGetExportTable gives cuda-checkpoint: the only access to checkpoints before CUDA 12.8. The real
 * driver does the same with another name and shape. */
#define EMU_TABLE_ID {{0x68, 0x62, 0x6e, 0x2d, 0x63, 0x68, 0x65, 0x63, 0x6b, 0x70, 0x6f, 0x69, 0x6e, 0x74, 0x2d, 0x31}}

struct emu_export_table {
    size_t size;
    emu_result (*get_state)(int, int *);
    emu_result (*get_tid)(int, int *);
    emu_result (*lock)(int, const struct emu_lock_args *);
    emu_result (*checkpoint)(int, const struct emu_checkpoint_args *);
    emu_result (*restore)(int, const struct emu_restore_args *);
    emu_result (*unlock)(int, const struct emu_unlock_args *);
};

extern const struct emu_export_table emu_export_table;

#endif
