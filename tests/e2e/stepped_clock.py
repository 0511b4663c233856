"""Steps the wall clock of one process and those it starts: a preloaded library adds a number to CLOCK_REALTIME.

A time namespace cannot do it (it has no CLOCK_REALTIME), and the machine's own clock is not ours to set.
"""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

from agent.emulated.build import find_compiler

_SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

static int (*real)(clockid_t, struct timespec *);
static volatile int64_t *step_s;

__attribute__((constructor)) static void start(void) {
    real = dlsym(RTLD_NEXT, "clock_gettime");
    const char *path = getenv("STEPPED_CLOCK");
    int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (fd < 0) return;
    void *page = mmap(NULL, sizeof *step_s, PROT_READ, MAP_SHARED, fd, 0);
    if (page != MAP_FAILED) step_s = page;
    close(fd);
}

int clock_gettime(clockid_t clock, struct timespec *at) {
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(clock, at);
    if (!result && step_s && clock == CLOCK_REALTIME) at->tv_sec += *step_s;
    return result;
}
"""


class SteppedClock:
    """`environment` makes a process see the stepped clock; `step` moves it while the process runs."""

    def __init__(self, folder: Path) -> None:
        source, library = folder / "stepped_clock.c", folder / "stepped_clock.so"
        source.write_text(_SOURCE)
        command = [find_compiler(), "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        self._file = folder / "stepped_clock"
        self._file.write_bytes(struct.pack("=q", 0))
        self.environment = {"LD_PRELOAD": str(library), "STEPPED_CLOCK": str(self._file)}

    def step(self, seconds: int) -> None:
        """Set the wall clock to the true time plus `seconds`."""
        with self._file.open("r+b") as file:  # in place: the process has mapped it
            file.write(struct.pack("=q", seconds))
