/* Messages between the libraries and the driver process, over one SOCK_SEQPACKET socket each.
 *
 * Every datagram is one struct emu_msg, with a payload for some operations. An answer repeats the request's `op` and
 * `id`; its `status` is a CUresult, or an nvmlReturn_t for NVML's operations (0 = success in both). protocol.py
 * mirrors this file; a test compares the two.
 */
#ifndef EMU_PROTOCOL_H
#define EMU_PROTOCOL_H

#include <stdint.h>

#define EMU_PROTOCOL 2
#define EMU_MAX_DEVICES 64
#define EMU_MAX_ALLOCATIONS 65536
#define EMU_MAX_PAYLOAD 32768
/* The ring in which processes record how busy a device was: activity.py. */
#define EMU_ACTIVITY_BUCKETS 16
#define EMU_ACTIVITY_NS 125000000

enum emu_op {
    /* any library -> driver */
    EMU_HELLO_PROCESS = 1, /* a = EMU_PROTOCOL; answer: a = token, b = devices; payload emu_device[]; fds: table, activity, VRAM of each */
    EMU_HELLO_RESTORE = 2, /* a = token, b = tid in its own pid namespace: this socket is the restore thread's */
    EMU_DEVICES = 3,       /* answer: b = devices; payload emu_device[] */
    EMU_DEVICE_STATUS = 4, /* a = device; answer: payload emu_device_status, then emu_gpu_process[] */
    EMU_WATCH = 5,         /* a = device, b = NVML event types: after its answer this socket receives EMU_EVENT */
    EMU_EVENT = 6,         /* driver -> library: a = device, b = event type, c = event data */
    EMU_DEVICE_CHECK = 7,  /* a = device; answers as EMU_DEVICE_STATUS would, without its payload */
    /* CUDA process -> driver */
    EMU_ALLOC = 10,   /* a = device, b = bytes; answer: a = slot, b = offset in the device's VRAM, c = bytes given */
    EMU_FREE = 11,    /* a = slot */
    EMU_MEMINFO = 12, /* a = device; answer: a = free bytes, b = total bytes, c = compute mode */
    EMU_CONTEXT = 13, /* a = device, b = contexts of this process alive on it */
    /* cuCheckpointProcess*: caller -> driver: a = pid as the caller sees it, b = 1 if the caller has called cuInit */
    EMU_GET_STATE = 20,          /* answer: a = CUprocessState */
    EMU_GET_RESTORE_THREAD = 21, /* answer: a = tid */
    EMU_LOCK = 22,               /* c = timeoutMs */
    EMU_CHECKPOINT = 23,
    EMU_RESTORE = 24, /* c = pairs; payload: pairs of 16-byte UUIDs, old then new */
    EMU_UNLOCK = 25,
    EMU_HOLD = 26, /* driver -> caller, before the answer: the call hangs as if in the kernel, signals blocked */
    /* driver -> restore thread; f = least duration in microseconds (the latency model);
     * e = 1: the process dies by SIGSEGV half-way through the copy */
    EMU_DO_PING = 30,
    EMU_DO_LOCK = 31,       /* a = timeoutMs, 0 = none */
    EMU_DO_CHECKPOINT = 32, /* answer: a = bytes of the image */
    EMU_DO_RESTORE = 33,    /* payload: uint32_t new device of each device; offsets are in the table */
    EMU_DO_UNLOCK = 34
};

struct emu_msg {
    uint32_t op;
    int32_t status;
    uint64_t id;
    uint64_t a, b, c, d, e, f;
};

struct emu_device {
    unsigned char uuid[16];
    char name[96];
    uint64_t total_bytes;
    uint32_t cc_major, cc_minor;
    uint32_t architecture; /* NVML_DEVICE_ARCH_* */
    uint32_t pci_bus;
    uint32_t pci_device_id;
    uint32_t multiprocessors;
};

struct emu_device_status {
    uint64_t used_bytes;
    uint32_t persistence;
    int32_t mig; /* 0 off, 1 on, -1 the model has none */
    uint32_t utilization, memory_utilization, encoder, decoder;
    uint32_t temperature_c, power_mw;
    uint32_t processes;
    uint32_t compute_mode; /* nvmlComputeMode_t */
};

struct emu_gpu_process {
    uint32_t pid; /* in the driver's pid namespace: the host's */
    uint32_t reserved;
    uint64_t used_bytes;
};

#endif
