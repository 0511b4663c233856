"""A CUDA program of Python, ctypes and libcuda.so.1. It fills device memory and later verifies it.

Commands on stdin, one answer per line on stdout:
    fill BYTES SEED   -> "filled ADDRESS": cuMemAlloc, and random bytes copied there
    verify            -> "intact" | "corrupt": every byte read back and compared, at the same address
    child             -> "child PID": a forked child that uses CUDA of its own (it forks before CUDA is initialised)
"""

from __future__ import annotations

import ctypes
import os
import random
import signal
import sys


class Cuda:
    """A context on device 0."""

    def __init__(self) -> None:
        self.cuda = ctypes.CDLL("libcuda.so.1")
        self.check(self.cuda.cuInit(0))
        device = ctypes.c_int(0)
        self.check(self.cuda.cuDeviceGet(ctypes.byref(device), 0))
        self.context = ctypes.c_void_p()
        self.check(self.cuda.cuCtxCreate_v2(ctypes.byref(self.context), 0, device))

    @staticmethod
    def check(code: int) -> None:
        if code != 0:
            raise SystemExit(f"CUDA error {code}")

    def fill(self, content: bytes) -> int:
        address = ctypes.c_uint64(0)
        self.check(self.cuda.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(len(content))))
        self.check(self.cuda.cuMemcpyHtoD_v2(address, content, ctypes.c_size_t(len(content))))
        return address.value

    def read(self, address: int, size: int) -> bytes:
        content = ctypes.create_string_buffer(size)
        self.check(self.cuda.cuMemcpyDtoH_v2(content, ctypes.c_uint64(address), ctypes.c_size_t(size)))
        return content.raw


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def fork_child() -> None:
    parent = os.getpid()
    if os.fork() == 0:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
        if os.getppid() == parent:
            Cuda().fill(b"x" * 4096)
            say(f"child {os.getpid()}")
            signal.pause()
        os._exit(0)


def main() -> None:
    cuda: Cuda | None = None
    blocks: dict[int, bytes] = {}
    say("ready")
    for line in sys.stdin:
        match line.split():
            case ["fill", size, seed]:
                cuda = cuda or Cuda()
                content = random.Random(int(seed)).randbytes(int(size)) if int(size) else b""
                address = cuda.fill(content) if content else 0
                blocks[address] = content
                say(f"filled {address}")
            case ["verify"]:
                assert cuda is not None
                intact = all(cuda.read(at, len(content)) == content for at, content in blocks.items() if content)
                say("intact" if intact else "corrupt")
            case ["child"]:
                fork_child()
            case other:
                say(f"what? {other}")


if __name__ == "__main__":
    main()
