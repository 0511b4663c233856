/* Lookup of functions and error names: cuGetProcAddress, export tables. */
#define _GNU_SOURCE
#include <string.h>

#include "process.h"

static const struct {
    emu_result code;
    const char *name, *text;
} errors[] = {
    {EMU_SUCCESS, "CUDA_SUCCESS", "no error"},
    {EMU_INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {EMU_OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {EMU_NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {EMU_DEVICE_UNAVAILABLE, "CUDA_ERROR_DEVICE_UNAVAILABLE", "CUDA-capable device(s) is/are busy or unavailable"},
    {EMU_NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {EMU_INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {EMU_INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {EMU_OPERATING_SYSTEM, "CUDA_ERROR_OPERATING_SYSTEM", "OS call failed or operation not supported on this OS"},
    {EMU_INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {EMU_ILLEGAL_STATE, "CUDA_ERROR_ILLEGAL_STATE", "the operation cannot be performed in the present state"},
    {EMU_NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {EMU_NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready"},
    {EMU_CONTEXT_IS_DESTROYED, "CUDA_ERROR_CONTEXT_IS_DESTROYED", "context is destroyed"},
    {EMU_NOT_PERMITTED, "CUDA_ERROR_NOT_PERMITTED", "operation not permitted"},
    {EMU_NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {EMU_UNKNOWN, "CUDA_ERROR_UNKNOWN", "unknown error"},
};

#define ERROR_COUNT (sizeof errors / sizeof *errors)

EMU_API emu_result cuGetErrorName(emu_result code, const char **name)
{
    if (!name)
        return EMU_INVALID_VALUE;
    *name = NULL;
    for (size_t i = 0; i < ERROR_COUNT; i++)
        if (errors[i].code == code)
            *name = errors[i].name;
    return *name ? EMU_SUCCESS : EMU_INVALID_VALUE;
}

EMU_API emu_result cuGetErrorString(emu_result code, const char **text)
{
    if (!text)
        return EMU_INVALID_VALUE;
    *text = NULL;
    for (size_t i = 0; i < ERROR_COUNT; i++)
        if (errors[i].code == code)
            *text = errors[i].text;
    return *text ? EMU_SUCCESS : EMU_INVALID_VALUE;
}

EMU_API emu_result cuGetExportTable(const void **table, const struct emu_uuid *id)
{
    static const struct emu_uuid known = EMU_TABLE_ID;
    int found = EMU_CHECKPOINTS && id && !memcmp(id, &known, sizeof known);
    if (table)
        *table = found ? &emu_export_table : NULL;
    return table && found ? EMU_SUCCESS : EMU_NOT_FOUND;
}

EMU_API emu_result cuGetProcAddress_v2(const char *, void **, int, uint64_t, int *);
EMU_API emu_result cuGetProcAddress(const char *, void **, int, uint64_t);

/* Base names only, as in the real driver; returns the newest version up to the caller's. X(name, since, function) */
#define ENTRY_POINTS(X)                                                            \
    X(cuInit, 2000, cuInit)                                                        \
    X(cuDriverGetVersion, 2020, cuDriverGetVersion)                                \
    X(cuGetErrorName, 6000, cuGetErrorName)                                        \
    X(cuGetErrorString, 6000, cuGetErrorString)                                    \
    X(cuGetExportTable, 3000, cuGetExportTable)                                    \
    X(cuGetProcAddress, 11030, cuGetProcAddress)                                   \
    X(cuGetProcAddress, 12000, cuGetProcAddress_v2)                                \
    X(cuDeviceGet, 2000, cuDeviceGet)                                              \
    X(cuDeviceGetCount, 2000, cuDeviceGetCount)                                    \
    X(cuDeviceGetName, 2000, cuDeviceGetName)                                      \
    X(cuDeviceGetUuid, 9020, cuDeviceGetUuid_v2)                                   \
    X(cuDeviceTotalMem, 3020, cuDeviceTotalMem_v2)                                 \
    X(cuDeviceGetAttribute, 2000, cuDeviceGetAttribute)                            \
    X(cuDevicePrimaryCtxRetain, 7000, cuDevicePrimaryCtxRetain)                    \
    X(cuDevicePrimaryCtxRelease, 7000, cuDevicePrimaryCtxRelease_v2)               \
    X(cuDevicePrimaryCtxReset, 7000, cuDevicePrimaryCtxReset_v2)                   \
    X(cuDevicePrimaryCtxGetState, 7000, cuDevicePrimaryCtxGetState)                \
    X(cuCtxCreate, 3020, cuCtxCreate_v2)                                           \
    X(cuCtxCreate, 11040, cuCtxCreate_v3)                                          \
    X(cuCtxCreate, 12050, cuCtxCreate_v4)                                          \
    X(cuCtxDestroy, 4000, cuCtxDestroy_v2)                                         \
    X(cuCtxSetCurrent, 4000, cuCtxSetCurrent)                                      \
    X(cuCtxGetCurrent, 4000, cuCtxGetCurrent)                                      \
    X(cuCtxPushCurrent, 4000, cuCtxPushCurrent_v2)                                 \
    X(cuCtxPopCurrent, 4000, cuCtxPopCurrent_v2)                                   \
    X(cuCtxGetDevice, 2000, cuCtxGetDevice)                                        \
    X(cuCtxGetDevice, 13000, cuCtxGetDevice_v2)                                    \
    X(cuCtxSynchronize, 2000, cuCtxSynchronize)                                    \
    X(cuCtxSynchronize, 13000, cuCtxSynchronize_v2)                                \
    X(cuMemAlloc, 3020, cuMemAlloc_v2)                                             \
    X(cuMemFree, 3020, cuMemFree_v2)                                               \
    X(cuMemGetInfo, 3020, cuMemGetInfo_v2)                                         \
    X(cuMemcpyHtoD, 3020, cuMemcpyHtoD_v2)                                         \
    X(cuMemcpyDtoH, 3020, cuMemcpyDtoH_v2)                                         \
    X(cuMemcpyDtoD, 3020, cuMemcpyDtoD_v2)                                         \
    X(cuMemcpyHtoDAsync, 3020, cuMemcpyHtoDAsync_v2)                               \
    X(cuMemcpyDtoHAsync, 3020, cuMemcpyDtoHAsync_v2)                               \
    X(cuMemsetD8, 3020, cuMemsetD8_v2)                                             \
    X(cuMemsetD32, 3020, cuMemsetD32_v2)                                           \
    X(cuMemHostAlloc, 2020, cuMemHostAlloc)                                        \
    X(cuMemAllocHost, 3020, cuMemAllocHost_v2)                                     \
    X(cuMemFreeHost, 2000, cuMemFreeHost)                                          \
    X(cuStreamCreate, 2000, cuStreamCreate)                                        \
    X(cuStreamDestroy, 4000, cuStreamDestroy_v2)                                   \
    X(cuStreamSynchronize, 2000, cuStreamSynchronize)                              \
    X(cuLaunchHostFunc, 10000, cuLaunchHostFunc)

#define CHECKPOINT_ENTRY_POINTS(X)                                                 \
    X(cuCheckpointProcessGetState, 12080, cuCheckpointProcessGetState)             \
    X(cuCheckpointProcessGetRestoreThreadId, 12080, cuCheckpointProcessGetRestoreThreadId) \
    X(cuCheckpointProcessLock, 12080, cuCheckpointProcessLock)                     \
    X(cuCheckpointProcessCheckpoint, 12080, cuCheckpointProcessCheckpoint)         \
    X(cuCheckpointProcessRestore, 12080, cuCheckpointProcessRestore)               \
    X(cuCheckpointProcessUnlock, 12080, cuCheckpointProcessUnlock)

/* Only addresses are needed here; the signatures are with the functions. */
#define DECLARE(name, since, function) extern char address_of_##function[] __asm__(#function);
ENTRY_POINTS(DECLARE)
#if EMU_PUBLIC_API
CHECKPOINT_ENTRY_POINTS(DECLARE)
#endif

#define ENTRY(name, since, function) {#name, since, address_of_##function},
static const struct {
    const char *name;
    int since;
    void *function;
} entries[] = {
    ENTRY_POINTS(ENTRY)
#if EMU_PUBLIC_API
    CHECKPOINT_ENTRY_POINTS(ENTRY)
#endif
};

enum { FOUND = 0, SYMBOL_NOT_FOUND = 1, VERSION_NOT_SUFFICIENT = 2 };

/* Newer drivers refuse a version of the checkpoint functions that is newer than themselves. Which ones, and which other
 * functions, is inferred. */
static int is_refused(const char *symbol, int version)
{
    return EMU_PUBLIC_API && version > EMU_CUDA_VERSION && !strncmp(symbol, "cuCheckpoint", strlen("cuCheckpoint"));
}

/* An unknown symbol is not an error: success, NULL and a status (seen on 550.163.01 and 555.58.02). */
EMU_API emu_result cuGetProcAddress_v2(const char *symbol, void **function, int version, uint64_t flags, int *status)
{
    (void)flags;
    if (!symbol || !function)
        return EMU_INVALID_VALUE;
    int found = SYMBOL_NOT_FOUND, best = -1;
    *function = NULL;
    if (is_refused(symbol, version))
        return EMU_INVALID_VALUE;
    for (size_t i = 0; i < sizeof entries / sizeof *entries; i++) {
        if (entries[i].since > EMU_CUDA_VERSION || strcmp(entries[i].name, symbol))
            continue;
        if (entries[i].since > version) {
            if (found == SYMBOL_NOT_FOUND)
                found = VERSION_NOT_SUFFICIENT;
        } else if (entries[i].since > best) {
            found = FOUND;
            best = entries[i].since;
            *function = entries[i].function;
        }
    }
    if (status)
        *status = found;
    return EMU_SUCCESS;
}

EMU_API emu_result cuGetProcAddress(const char *symbol, void **function, int version, uint64_t flags)
{
    return cuGetProcAddress_v2(symbol, function, version, flags, NULL);
}
