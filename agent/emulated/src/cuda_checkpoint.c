/* The program `cuda-checkpoint`: calls libcuda, with the flags, texts and exit codes of its driver version. */
#define _GNU_SOURCE
#include <ctype.h>
#include <dlfcn.h>
#include <getopt.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda_abi.h"
#include "protocol.h"

#define NEEDED_CUDA 12040
#define UNSUPPORTED "Invalid option(s) or option(s) not supported by this CUDA Driver"
#define SHORT_OPTIONS (EMU_UTILITY_MAP ? "p:t:hd:" : EMU_UTILITY_ACTIONS ? "p:t:h" : "")

enum mode { NONE, BOGUS, GET_STATE, GET_RESTORE_TID, TOGGLE, LOCK, CHECKPOINT, RESTORE, UNLOCK };

static struct {
    emu_result (*init)(unsigned);
    emu_result (*version)(int *);
    emu_result (*error_string)(emu_result, const char **);
    emu_result (*export_table)(const void **, const struct emu_uuid *);
    const struct emu_export_table *table;
} cuda;

static struct emu_gpu_pair pairs[EMU_MAX_DEVICES];
static unsigned pair_count;

#if EMU_UTILITY_ACTIONS
#define HELP_FLAGS "--help|-h"
#else
#define HELP_FLAGS "--help"
#endif

static void usage(FILE *out)
{
    fputs("CUDA checkpoint and restore utility.\n"
          "Toggles the state of CUDA within a process between suspended and running.\n"
          "Version " EMU_DRIVER_VERSION " (emulated).\n\n"
          "Usage:\n",
          out);
#if EMU_UTILITY_ACTIONS
    fputs("    --get-state --pid|-p <value>\n"
          "        Prints the state of the process specified by <value>\n"
          "    --get-restore-tid --pid <value>\n"
          "        Prints the restore thread ID of the process specified by <value>\n"
          "    --action lock|checkpoint|restore|unlock --pid <value>\n"
          "        Performs one operation on the process specified by <value>\n"
          "    --timeout|-t <value>\n"
          "        For --action lock: give up after <value> milliseconds\n",
          out);
#endif
#if EMU_UTILITY_MAP
    fputs("    --device-map|-d <oldUuid=newUuid,...>\n"
          "        For --action restore: the GPUs to restore onto. Must contain all checkpointed devices\n",
          out);
#endif
    fputs("    --toggle --pid <value>\n"
          "        Toggles the state of CUDA in the process specified by <value>\n"
          "    " HELP_FLAGS "\n"
          "        Prints this text\n",
          out);
}

static int bad_usage(const char *text)
{
    fprintf(stderr, "%s\n", text);
    usage(stderr);
    return EMU_ERROR_EXIT;
}

static const char *reason(emu_result code)
{
    const char *text = NULL;
    return cuda.error_string(code, &text) || !text ? "unknown error" : text;
}

static int load(void)
{
    void *library = dlopen("libcuda.so.1", RTLD_NOW);
    if (!library) {
        fprintf(stderr, "%s\n", dlerror());
        return -1;
    }
    *(void **)&cuda.init = dlsym(library, "cuInit");
    *(void **)&cuda.version = dlsym(library, "cuDriverGetVersion");
    *(void **)&cuda.error_string = dlsym(library, "cuGetErrorString");
    *(void **)&cuda.export_table = dlsym(library, "cuGetExportTable");
    return cuda.init && cuda.version && cuda.error_string && cuda.export_table ? 0 : -1;
}

/* The driver's half of this program; old drivers lack it. */
static int find_export_table(void)
{
    static const struct emu_uuid id = EMU_TABLE_ID;
    const void *table = NULL;
    if (cuda.export_table(&table, &id) || !table)
        return -1;
    cuda.table = table;
    return cuda.table->size == sizeof *cuda.table ? 0 : -1;
}

/* As lenient as the real one: a non-number is 0, and only the call on process 0 fails. */
static long number(const char *text)
{
    long value = strtol(text, NULL, 10);
    return value < 0 ? -1 : value > INT_MAX ? INT_MAX : value;
}

/* [GPU-]xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx; the character after it, or NULL */
static const char *parse_uuid(const char *text, struct emu_uuid *uuid)
{
    if (!strncmp(text, "GPU-", 4))
        text += 4;
    for (int i = 0; i < 16; i++) {
        unsigned value;
        if (*text == '-')
            text++;
        if (!isxdigit((unsigned char)text[0]) || !isxdigit((unsigned char)text[1]) || sscanf(text, "%2x", &value) != 1)
            return NULL;
        uuid->bytes[i] = (unsigned char)value;
        text += 2;
    }
    return text;
}

static int parse_map(const char *text)
{
    while (*text) {
        if (pair_count == EMU_MAX_DEVICES || !(text = parse_uuid(text, &pairs[pair_count].old_uuid)) || *text++ != '=' ||
            !(text = parse_uuid(text, &pairs[pair_count].new_uuid)) || (*text && *text != ','))
            return -1;
        pair_count++;
        if (*text)
            text++;
    }
    return pair_count ? 0 : -1;
}

static emu_result perform(enum mode mode, int pid, long timeout)
{
    struct emu_lock_args lock = {.timeout_ms = timeout > 0 ? (unsigned)timeout : 0};
    struct emu_restore_args restore = {.pairs = pair_count ? pairs : NULL, .count = pair_count};
    switch (mode) {
    case LOCK:
        return cuda.table->lock(pid, &lock);
    case CHECKPOINT:
        return cuda.table->checkpoint(pid, NULL);
    case RESTORE:
        return cuda.table->restore(pid, pair_count ? &restore : NULL);
    default:
        return cuda.table->unlock(pid, NULL);
    }
}

static int toggle(int pid)
{
    int state = 0;
    emu_result result = cuda.table->get_state(pid, &state);
    enum mode first = state == EMU_CHECKPOINTED ? RESTORE : LOCK;
    if (!result && state != EMU_CHECKPOINTED && state != EMU_RUNNING)
        result = EMU_ILLEGAL_STATE;
    pair_count = 0; /* --toggle ignores --device-map */
    if (!result)
        result = perform(first, pid, 0);
    if (!result)
        result = perform(first == LOCK ? CHECKPOINT : UNLOCK, pid, 0);
    if (result)
        fprintf(stderr, "Error toggling CUDA in process ID %d: \"%s\"\n", pid, reason(result));
    return result ? EMU_ERROR_EXIT : 0;
}

static int print_state(int pid)
{
    static const char *const names[] = {"running", "locked", "checkpointed", EMU_UTILITY_FAILED ? "failed" : "unknown"};
    int state = 0;
    emu_result result = cuda.table->get_state(pid, &state);
    if (result) {
        fprintf(stderr, "Error getting process state for process ID %d: \"%s\"\n", pid, reason(result));
        return EMU_ERROR_EXIT;
    }
    puts(state >= 0 && state < 4 ? names[state] : "unknown");
    return 0;
}

static int print_tid(int pid)
{
    int tid = 0;
    if (cuda.table->get_tid(pid, &tid)) {
        fprintf(stderr, "Could not find restore thread for process ID %d\n", pid);
        return EMU_ERROR_EXIT;
    }
    printf("%d\n", tid);
    return 0;
}

static int run(enum mode mode, int pid, long timeout, const char *map)
{
    static const char *const verbs[] = {[LOCK] = "lock", [CHECKPOINT] = "checkpoint", [RESTORE] = "restore", [UNLOCK] = "unlock"};
    emu_result result = cuda.init(0);
    if (result) {
        fprintf(stderr, "Error initializing CUDA: \"%s\"\n", reason(result));
        return EMU_ERROR_EXIT;
    }
    if (find_export_table()) {
        fprintf(stderr, "Insufficient driver\n");
        return 255;
    }
    if (mode == BOGUS)
        return bad_usage(UNSUPPORTED);
    if (mode == GET_STATE)
        return print_state(pid);
    if (mode == GET_RESTORE_TID)
        return print_tid(pid);
    if (mode == TOGGLE)
        return toggle(pid);
    result = map && parse_map(map) ? EMU_INVALID_VALUE : perform(mode, pid, timeout);
    if (result)
        fprintf(stderr, "Could not %s on process ID %d: \"%s\"\n", verbs[mode], pid, reason(result));
    return result ? EMU_ERROR_EXIT : 0;
}

static enum mode action(const char *name)
{
    return !strcmp(name, "lock")         ? LOCK
           : !strcmp(name, "checkpoint") ? CHECKPOINT
           : !strcmp(name, "restore")    ? RESTORE
           : !strcmp(name, "unlock")     ? UNLOCK
                                         : BOGUS;
}

int main(int argc, char **argv)
{
    static const struct option options[] = {
        {"toggle", no_argument, NULL, 'T'},     {"pid", required_argument, NULL, 'p'},
        {"help", no_argument, NULL, 'h'},
#if EMU_UTILITY_ACTIONS
        {"get-state", no_argument, NULL, 's'},  {"get-restore-tid", no_argument, NULL, 'g'},
        {"action", required_argument, NULL, 'a'}, {"timeout", required_argument, NULL, 't'},
#endif
#if EMU_UTILITY_MAP
        {"device-map", required_argument, NULL, 'd'},
#endif
        {0}};
    int version = 0, selected = 0, option;
    enum mode mode = NONE;
    long pid = -1, timeout = -1;
    const char *map = NULL;
    if (load() || cuda.version(&version) || version < NEEDED_CUDA) {
        fprintf(stderr, "Insufficient driver\n");
        return 255;
    }
    opterr = 0;
    while ((option = getopt_long(argc, argv, SHORT_OPTIONS, options, NULL)) != -1) {
        switch (option) {
        case 's':
        case 'g':
        case 'T':
            mode = option == 's' ? GET_STATE : option == 'g' ? GET_RESTORE_TID : TOGGLE;
            selected++;
            break;
        case 'a':
            mode = action(optarg); /* an unknown action fails only after cuInit, as in the real program */
            selected++;
            break;
        case 'p':
            if ((pid = number(optarg)) < 0)
                return bad_usage("pid must be a non-negative integer");
            break;
        case 't':
            if ((timeout = number(optarg)) < 0)
                return bad_usage("timeout must be a non-negative integer");
            break;
        case 'd':
            map = optarg;
            break;
        case 'h':
            usage(stdout);
            return EMU_HELP_EXIT;
        default:
            return bad_usage(UNSUPPORTED);
        }
    }
    if (!selected)
        return bad_usage("No operation selected");
    if (selected > 1)
        return bad_usage("Too many operations selected");
    if (pid < 0)
        return bad_usage("Missing pid to perform operation on");
    if (timeout >= 0 && mode != LOCK)
        return bad_usage("Timeout is only valid for --action lock operation");
    return run(mode, (int)pid, timeout, mode == RESTORE ? map : NULL);
}
