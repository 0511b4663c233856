"""GPU memory through the CUDA driver API and ctypes, with only `libcuda.so.1`.

Uses the primary context of the first GPU in CUDA_VISIBLE_DEVICES. Thread-safe. A call made while the instance is frozen
returns after the wake.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from dataclasses import dataclass

LIBRARY = "libcuda.so.1"


class DeviceError(RuntimeError):
    """The GPU is unusable, or a call failed; the message names the fix."""


@dataclass(frozen=True, slots=True)
class Block:
    """An allocation in device memory."""

    address: int
    size_bytes: int


class DeviceMemory:
    """A context on the first visible GPU. Raises DeviceError if there is no driver or no GPU."""

    def __init__(self) -> None:
        try:
            self._cuda = ctypes.CDLL(LIBRARY)
        except OSError as error:
            raise DeviceError(
                f"{LIBRARY} can't be loaded ({error}): install the NVIDIA driver, or see `hibernode emulated env`"
            ) from error
        self._call("cuInit", ctypes.c_uint(0))
        device = ctypes.c_int(0)
        self._call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(0))
        self._context = ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)

    def put(self, content: bytes) -> Block:
        """Allocate device memory for `content` (at least one byte) and copy it there."""
        return self.put_pieces(len(content), [content])

    def put_pieces(self, size_bytes: int, pieces: Iterable[bytes]) -> Block:
        """Like `put`, but copies piece by piece, so that the whole content need not be in host memory. The pieces must
        add up to `size_bytes`."""
        self._enter()
        address = ctypes.c_uint64(0)
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size_bytes))
        at = address.value
        for piece in pieces:
            if at + len(piece) > address.value + size_bytes:
                raise ValueError(f"the pieces are longer than the announced {size_bytes} bytes")
            self._call("cuMemcpyHtoD_v2", ctypes.c_uint64(at), piece, ctypes.c_size_t(len(piece)))
            at += len(piece)
        return Block(address.value, size_bytes)

    def get(self, block: Block, offset: int = 0, size_bytes: int = -1) -> bytes:
        """A copy of a block, or of `size_bytes` of it from `offset` on."""
        size = block.size_bytes - offset if size_bytes < 0 else size_bytes
        if offset < 0 or size < 0 or offset + size > block.size_bytes:
            raise ValueError(f"{size} bytes at {offset} are not within a block of {block.size_bytes}")
        if not size:
            return b""
        self._enter()
        content = ctypes.create_string_buffer(size)
        self._call("cuMemcpyDtoH_v2", content, ctypes.c_uint64(block.address + offset), ctypes.c_size_t(size))
        return content.raw

    def _enter(self) -> None:
        """Make the context current: that is a setting of the thread, and each connection has its own thread."""
        self._call("cuCtxSetCurrent", self._context)

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._cuda, name)(*arguments)
        if code == 0:
            return
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        hint = f" (CUDA_VISIBLE_DEVICES={visible})" if visible is not None else ""
        raise DeviceError(f"{name} answered CUDA error {code}{hint}; see cuda.h, CUresult")
