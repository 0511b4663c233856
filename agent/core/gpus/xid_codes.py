"""NVIDIA's XID codes: which are fatal for a GPU, so that it must not be used any more.

After NVIDIA's Xid catalogue (docs.nvidia.com/deploy/xid-errors, "Analyzing Xid Errors with the Xid Catalog"), column
"Immediate Action": RESET_GPU, RESTART_BM, RESTART_VM and CHECK_MECHANICALS are fatal here, and so are two that have a
workflow, 48 and 74; RESTART_APP and IGNORE are notes. It differs in two rows with RESET_GPU. 109 is an application's
fault for NVIDIA's own Kubernetes device plugin, whose list of ignored codes this follows: a GPU taken away for a
program's fault would let one function stop the others. 155 is also logged for a link that was taken down on purpose.
The action of 144 to 150 depends on a subcode that NVML does not pass on: notes (fatal cases of 144 to 146 log 48, too).
61 is only in catalogues of older GPUs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class XidMeaning:
    """`text`: what happened, without a full stop; `fatal`: the GPU must not be used before a repair or a reset."""

    text: str
    fatal: bool


_NOTES: Mapping[int, str] = {
    8: "the GPU stopped processing a program's work",
    11: "a program sent an invalid command buffer",
    13: "a program made an illegal access or instruction (graphics engine exception)",
    31: "a program accessed an illegal address (GPU memory page fault)",
    32: "a program's command buffer was invalid or corrupted",
    43: "a program's channel was reset after a fault of its own",
    44: "the graphics engine reported a fault during a context switch",
    45: "a program's work was cleaned up after an earlier error or because it was killed",
    63: "a memory row or page was marked to be remapped; it is at the next reset of the GPU",
    68: "a program caused a video decoder exception",
    69: "a program caused a graphics engine class error",
    92: "single-bit memory errors are frequent; all were corrected",
    94: "an uncorrectable memory error was contained to the programs that it hit",
    109: "a program did not give way in time (context switch timeout)",
    121: "an error on the chip-to-chip link was corrected",
    137: "a program made an illegal access to another GPU's memory over NVLink",
    141: "an error on CUDA's fast path",
    144: "an NVLink error (SAW)",
    145: "an NVLink error (RLW)",
    146: "an NVLink error (TLW)",
    147: "an NVLink error (TREX)",
    148: "an NVLink error (NVLPW)",
    149: "an NVLink error (NETIR)",
    150: "an NVLink error (MSE)",
    154: "the driver changed what it recommends for recovering this GPU",
    155: "an NVLink went down, on purpose or not",
    157: "nothing is left to repair the GPU's memory with",
    160: "a faulty memory channel was retired",
    161: "a faulty memory channel could not be retired",
}
_FATAL: Mapping[int, str] = {
    46: "the GPU stopped processing and needs a reset",
    48: "an uncorrectable double-bit memory error",
    54: "auxiliary power is not connected",
    61: "the GPU's power management unit stopped at a breakpoint",
    62: "the GPU's power management unit halted",
    64: "a memory row or page that fails could not be remapped",
    74: "an NVLink error",
    79: "the GPU has fallen off the bus",
    95: "an uncontained memory error: any program's data may be wrong",
    110: "a security fault inside the GPU",
    119: "the GPU's system processor did not answer the driver (GSP RPC timeout)",
    120: "the GPU's system processor failed (GSP error)",
    136: "the training of a link of the GPU failed",
    140: "an uncorrected memory error could not be recovered from",
    143: "the GPU could not be initialised",
    151: "the rotation of the GPU's encryption keys failed",
    156: "a part of the GPU is to be retired, which takes a reset",
    158: "the GPU hit a fatal timeout",
}
_TABLE: Mapping[int, XidMeaning] = {
    **{code: XidMeaning(text, False) for code, text in _NOTES.items()},
    **{code: XidMeaning(text, True) for code, text in _FATAL.items()},
}
_UNKNOWN = XidMeaning("not in this agent's table: see NVIDIA's Xid catalogue", False)


def meaning_of(code: int) -> XidMeaning:
    """The code's meaning. An unknown code is a note: most new codes of the catalogue concern one program."""
    return _TABLE.get(code, _UNKNOWN)
