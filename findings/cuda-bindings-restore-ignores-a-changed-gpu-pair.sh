#!/usr/bin/env bash
# cuda-bindings: a GPU pair that changes after it was put into CUcheckpointRestoreArgs does not reach the driver.
#
# cuda-bindings 13.5.0, CPython 3.11.7, Linux 6.18, 2026-11-30. No driver and no GPU: the script reads the C structure
# that cuCheckpointProcessRestore would get, at args.getPtr().
#
# A process that was checkpointed on one GPU is restored on another one by pairs of UUIDs in args.gpuPairs. Expected of
# Python objects: args hold the pairs. Seen: the assignment copies them, and reading args.gpuPairs makes new copies. So
# neither a later change of the pair nor `args.gpuPairs[0].newUuid = ...` or `args.gpuPairs.append(...)` does anything,
# and none of them complains; the value of a pair read back is the old one. Besides, the assignment leaves gpuPairsCount
# at 0, the number of GPUs to remap by the driver's documentation, while len(args.gpuPairs) is 1.
#
# Why it matters: whoever keeps one args object and changes the target before each restore names the first target to
# the driver every time; whoever forgets the count asks for no move at all, perhaps back to a GPU that is full. Build
# the pairs completely, assign the whole list before each restore, and set gpuPairsCount.
#
# Seen:
#     pair a -> b assigned:               the driver gets a -> b, count 0
#     count set, pair changed to a -> c:  the driver gets a -> b, count 1
#     args.gpuPairs[0] set to a -> c:     the driver gets a -> b, count 1
#     args.gpuPairs.append(another pair): the driver gets a -> b, count 1, list of 1
#     the changed pair assigned again:    the driver gets a -> c, count 1
#     as stated: only an assignment of the list changes what the driver gets
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
timeout 60 "$work/venv/bin/python" -m pip install -q cuda-bindings==13.5.0 >"$work/pip.log" 2>&1 || {
    echo "not installed within 60 s: $(grep -v WARNING "$work/pip.log" | tail -n 1)"
    exit 77
}
export HOME="$work"
timeout 60 "$work/venv/bin/python" - <<'EOF'
import ctypes
import sys

from cuda.bindings import driver


class Pair(ctypes.Structure):
    _fields_ = [("old", ctypes.c_char * 16), ("new", ctypes.c_char * 16)]


class Args(ctypes.Structure):
    """The head of CUcheckpointRestoreArgs."""

    _fields_ = [("pairs", ctypes.POINTER(Pair)), ("count", ctypes.c_uint)]


buffers = []


def uuid(letter):
    buffers.append(ctypes.create_string_buffer(letter.encode() * 16, 16))
    return driver.CUuuid(ctypes.addressof(buffers[-1]))


def seen(what, note=""):
    got = Args.from_address(args.getPtr())
    pair = got.pairs[0]
    mapping = f"{pair.old[:1].decode()} -> {pair.new[:1].decode()}"
    print(f"{what:35} the driver gets {mapping}, count {got.count}{note}")
    return mapping, got.count


pair = driver.CUcheckpointGpuPair()
pair.oldUuid, pair.newUuid = uuid("a"), uuid("b")
args = driver.CUcheckpointRestoreArgs()
args.gpuPairs = [pair]
assigned = seen("pair a -> b assigned:")
args.gpuPairsCount = 1
pair.newUuid = uuid("c")
changed = seen("count set, pair changed to a -> c:")
args.gpuPairs[0].newUuid = uuid("c")
by_index = seen("args.gpuPairs[0] set to a -> c:")
args.gpuPairs.append(pair)
appended = seen("args.gpuPairs.append(another pair):", f", list of {len(args.gpuPairs)}")
args.gpuPairs = [pair]
again = seen("the changed pair assigned again:")
if again != ("a -> c", 1):
    sys.exit("changed: an assignment of the list does not reach the driver either")
if assigned != ("a -> b", 0):
    sys.exit("changed: the assignment sets the count")
if {changed, by_index, appended} != {("a -> b", 1)}:
    sys.exit("changed: a later change of a pair reaches the driver")
print("as stated: only an assignment of the list changes what the driver gets")
EOF
