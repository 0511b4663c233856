"""`python -m agent.examples.torch_mlp`: a multi-layer perceptron in PyTorch, in half precision, with fixed weights.

GET  /answer?n=7   a digest of the bytes that the model computes for input n: the same each time, unless a byte of its
                   memory was lost
GET  /verify       200 if every byte of the weights is unchanged, else 500
POST /initialize   makes $VRAM_MIB MiB of weights (at least 32) on $TORCH_DEVICE (default: cuda)
"""

from __future__ import annotations

import hashlib
import os
from typing import Any

from agent.examples.http_app import Answer, Request, as_json, serve

WIDTH = 4096
MIB = 1 << 20
LAYER_MIB = WIDTH * WIDTH * 2 // MIB
BATCH = 16


class Model:
    """The weights on the device, and the digest of each layer before any freeze. `width`: for tests."""

    def __init__(self, device: str, layers: int, width: int = WIDTH) -> None:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with it
        import torch

        self._torch = torch
        torch.use_deterministic_algorithms(True)
        torch.set_grad_enabled(False)
        self._device, self._width = device, width
        generator = torch.Generator().manual_seed(0)
        one = torch.randn(width, width, generator=generator).div(width**0.5)
        # Each layer is the first one, rolled: as random, and made in milliseconds.
        self._layers = [one.roll(number * 997 + 1).to(device, torch.float16) for number in range(layers)]
        self._digests = [self._digest(layer) for layer in self._layers]

    def answer(self, number: int) -> str:
        """The digest of the output for input `number`."""
        torch = self._torch
        generator = torch.Generator().manual_seed(number + 1)
        state = torch.randn(BATCH, self._width, generator=generator).to(self._device, torch.float16)
        for layer in self._layers:
            state = torch.tanh(state @ layer)
        return self._digest(state)

    def changed_layers(self) -> list[int]:
        """Layers with a byte that differs from the first time."""
        return [
            number
            for number, (layer, digest) in enumerate(zip(self._layers, self._digests, strict=True))
            if self._digest(layer) != digest
        ]

    @property
    def vram_bytes(self) -> int:
        return sum(int(layer.nbytes) for layer in self._layers)

    def _digest(self, tensor: Any) -> str:
        raw = tensor.contiguous().view(self._torch.uint8).cpu().flatten()
        return hashlib.sha256(memoryview(raw.numpy())).hexdigest()


class Service:
    """The request handler."""

    def __init__(self) -> None:
        self._model: Model | None = None

    def __call__(self, request: Request) -> Answer:
        if request.path == "/initialize":
            if self._model is None:
                layers = max(1, int(os.environ.get("VRAM_MIB", "0")) // LAYER_MIB)
                self._model = Model(os.environ.get("TORCH_DEVICE", "cuda"), layers)
            return as_json({"vram_bytes": self._model.vram_bytes})
        if request.path in ("/healthz", "/pre-freeze", "/pre-stop"):
            return as_json({"status": "ok"})
        if self._model is None:
            return as_json({"error": "not initialized: configure the initializer, which makes the model"}, 503)
        if request.path == "/verify":
            changed = self._model.changed_layers()
            return as_json({"intact": not changed, "changed_layers": changed[:16]}, 500 if changed else 200)
        return Answer(body=self._model.answer(int(request.query.get("n", "0"))).encode(), content_type="text/plain")


if __name__ == "__main__":
    serve(Service())
