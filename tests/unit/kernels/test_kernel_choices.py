"""The table of choice: which kernel runs a layer on which hardware, and what each other lacks.

Every cell was looked over against what the makers say: `torch._scaled_mm` takes e4m3 from SM89 on, in
multiples of 16, and scales per 128 columns and 128 x 128 block on SM90 alone; flashinfer's `trtllm`
is SM100 and SM103, its `cutlass` and `cudnn` SM120, too; the SVDQuant engine is built for SM8x (int4)
and SM12x (nvfp4), in tiles of 128; torch_npu wants int8 in multiples of 8. A change of the code that
moves a cell must move it here, on purpose.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from importlib import import_module
from itertools import chain

import pytest

from quantmatrix import families, kernels
from quantmatrix.hardware.machine import Machine
from quantmatrix.kernels import Kernel, Needs, choosing
from quantmatrix.scheme import Scheme
from quantmatrix.tables import identify, read

TABLE = """
linear.fp8: FP8 tensor-static, tensor-static, tensor-dynamic, channel-dynamic, channel-static
  3072 x 3072            cpu   a100   3090   4090   h100   h200  200x2   b200   5090 5090x4   910b mi300x
    reference              2      2      2      o      o      o      o      o      o      o      2      2
    decode                 1      1      1      2      2      2      2      2      2      2      1      1
    torch                  V      A      A      1      1      1      1      1      1      1      V      V
    torch-block            V      A      A      A      S      S      S      A      A      A      V      V
  16 x 16                cpu   a100   3090   4090   h100   h200  200x2   b200   5090 5090x4   910b mi300x
    reference              2      2      2      o      o      o      o      o      o      o      2      2
    decode                 1      1      1      2      2      2      2      2      2      2      1      1
    torch                  V      A      A      1      1      1      1      1      1      1      V      V
    torch-block            V      A      A      A      S      S      S      A      A      A      V      V
  8 x 3072               cpu   a100   3090   4090   h100   h200  200x2   b200   5090 5090x4   910b mi300x
    reference              2      2      2      o      o      o      o      o      o      o      2      2
    decode                 1      1      1      1      1      1      1      1      1      1      1      1
    torch                  V      A      A      N      N      N      N      N      N      N      V      V
    torch-block            V      A      A      A      S      S      S      A      A      A      V      V
  3072 x 8               cpu   a100   3090   4090   h100   h200  200x2   b200   5090 5090x4   910b mi300x
    reference              2      2      2      o      o      o      o      o      o      o      2      2
    decode                 1      1      1      1      1      1      1      1      1      1      1      1
    torch                  V      A      A      N      N      N      N      N      N      N      V      V
    torch-block            V      A      A      A      S      S      S      A      A      A      V      V

linear.fp8: block
  3072 x 3072            cpu   a100   3090   4090   h100   h200  200x2   b200   5090 5090x4   910b mi300x
    reference              2      2      2      o      o      o      o      o      o      o      2      2
    decode                 1      1      1      1      2      2      2      1      1      1      1      1
    torch                  V      A      A      S      S      S      S      S      S      S      V      V
    torch-block            V      A      A      A      1      1      1      A      A      A      V      V
  64 x 3072              cpu   a100   3090   4090   h100   h200  200x2   b200   5090 5090x4   910b mi300x
    reference              2      2      2      o      o      o      o      o      o      o      2      2
    decode                 1      1      1      1      1      1      1      1      1      1      1      1
    torch                  V      A      A      S      S      S      S      S      S      S      V      V
    torch-block            V      A      A      A      N      N      N      A      A      A      V      V
  3072 x 256             cpu   a100   3090   4090   h100   h200  200x2   b200   5090 5090x4   910b mi300x
    reference              2      2      2      o      o      o      o      o      o      o      2      2
    decode                 1      1      1      1      1      1      1      1      1      1      1      1
    torch                  V      A      A      S      S      S      S      S      S      S      V      V
    torch-block            V      A      A      A      N      N      N      A      A      A      V      V

linear.fp8: mxfp8
  3072 x 3072            cpu   a100   3090   4090   h100   h200  200x2   b200   5090 5090x4   910b mi300x
    reference              2      2      2      o      o      o      o      o      o      o      2      2
    decode                 1      1      1      1      1      1      1      1      1      1      1      1
    torch                  V      A      A      S      S      S      S      S      S      S      V      V
    torch-block            V      A      A      A      I      I      I      A      A      A      V      V

linear.fp8: cast
  3072 x 3072            cpu   a100   3090   4090   h100   h200  200x2   b200   5090 5090x4   910b mi300x
    reference              2      2      2      o      o      o      o      o      o      o      2      2
    decode                 1      1      1      1      1      1      1      1      1      1      1      1
    torch                  V      A      A      I      I      I      I      I      I      I      V      V
    torch-block            V      A      A      A      S      S      S      A      A      A      V      V

linear.nvfp4: NVFP4
  3072 x 3072            cpu   a100   3090   4090   h100   h200  200x2   b200   5090 5090x4   910b mi300x
    reference              2      2      2      o      o      o      o      o      o      o      2      2
    decode                 1      1      1      2      2      2      2      5      4      4      1      1
    fp8-recode             V      A      A      1      1      1      1      4      3      3      V      V
    packed                 V      o      o      o      o      o      o      o      o      o      V      o
    packed-fp8             V      A      A      o      o      o      o      o      o      o      V      V
    flashinfer-trtllm      V      A      A      A      A      A      A      1      A      A      V      V
    flashinfer-cutlass     V      A      A      A      A      A      A      2      1      1      V      V
    flashinfer-cudnn       V      A      A      A      A      A      A      3      2      2      V      V
  3072 x 3072 x 65536    cpu   a100   3090   4090   h100   h200  200x2   b200   5090 5090x4   910b mi300x
    reference              2      2      2      o      o      o      o      o      o      o      2      2
    decode                 1      1      1      2      2      2      2      5      4      4      1      1
    fp8-recode             V      A      A      1      1      1      1      4      3      3      V      V
    packed                 V      o      o      o      o      o      o      o      o      o      V      o
    packed-fp8             V      A      A      o      o      o      o      o      o      o      V      V
    flashinfer-trtllm      V      A      A      A      A      A      A      1      A      A      V      V
    flashinfer-cutlass     V      A      A      A      A      A      A      2      1      1      V      V
    flashinfer-cudnn       V      A      A      A      A      A      A      3      2      2      V      V
  3072 x 3072 x 65537    cpu   a100   3090   4090   h100   h200  200x2   b200   5090 5090x4   910b mi300x
    reference              2      2      2      o      o      o      o      o      o      o      2      2
    decode                 1      1      1      2      2      2      2      4      3      3      1      1
    fp8-recode             V      A      A      1      1      1      1      3      2      2      V      V
    packed                 V      o      o      o      o      o      o      o      o      o      V      o
    packed-fp8             V      A      A      o      o      o      o      o      o      o      V      V
    flashinfer-trtllm      V      A      A      A      A      A      A      1      A      A      V      V
    flashinfer-cutlass     V      A      A      A      A      A      A      R      R      R      V      V
    flashinfer-cudnn       V      A      A      A      A      A      A      2      1      1      V      V
  64 x 3072              cpu   a100   3090   4090   h100   h200  200x2   b200   5090 5090x4   910b mi300x
    reference              2      2      2      o      o      o      o      o      o      o      2      2
    decode                 1      1      1      2      2      2      2      4      4      4      1      1
    fp8-recode             V      A      A      1      1      1      1      3      3      3      V      V
    packed                 V      o      o      o      o      o      o      o      o      o      V      o
    packed-fp8             V      A      A      o      o      o      o      o      o      o      V      V
    flashinfer-trtllm      V      A      A      A      A      A      A      N      A      A      V      V
    flashinfer-cutlass     V      A      A      A      A      A      A      1      1      1      V      V
    flashinfer-cudnn       V      A      A      A      A      A      A      2      2      2      V      V
  3072 x 32              cpu   a100   3090   4090   h100   h200  200x2   b200   5090 5090x4   910b mi300x
    reference              2      2      2      o      o      o      o      o      o      o      2      2
    decode                 1      1      1      2      2      2      2      4      4      4      1      1
    fp8-recode             V      A      A      1      1      1      1      3      3      3      V      V
    packed                 V      o      o      o      o      o      o      o      o      o      V      o
    packed-fp8             V      A      A      o      o      o      o      o      o      o      V      V
    flashinfer-trtllm      V      A      A      A      A      A      A      N      A      A      V      V
    flashinfer-cutlass     V      A      A      A      A      A      A      1      1      1      V      V
    flashinfer-cudnn       V      A      A      A      A      A      A      2      2      2      V      V
  48 x 3072              cpu   a100   3090   4090   h100   h200  200x2   b200   5090 5090x4   910b mi300x
    reference              2      2      2      o      o      o      o      o      o      o      2      2
    decode                 1      1      1      2      2      2      2      2      2      2      1      1
    fp8-recode             V      A      A      1      1      1      1      1      1      1      V      V
    packed                 V      o      o      o      o      o      o      o      o      o      V      o
    packed-fp8             V      A      A      o      o      o      o      o      o      o      V      V
    flashinfer-trtllm      V      A      A      A      A      A      A      N      A      A      V      V
    flashinfer-cutlass     V      A      A      A      A      A      A      N      N      N      V      V
    flashinfer-cudnn       V      A      A      A      A      A      A      N      N      N      V      V
  8 x 3072               cpu   a100   3090   4090   h100   h200  200x2   b200   5090 5090x4   910b mi300x
    reference              2      2      2      o      o      o      o      o      o      o      2      2
    decode                 1      1      1      1      1      1      1      1      1      1      1      1
    fp8-recode             V      A      A      N      N      N      N      N      N      N      V      V
    packed                 V      o      o      o      o      o      o      o      o      o      V      o
    packed-fp8             V      A      A      N      N      N      N      N      N      N      V      V
    flashinfer-trtllm      V      A      A      A      A      A      A      N      A      A      V      V
    flashinfer-cutlass     V      A      A      A      A      A      A      N      N      N      V      V
    flashinfer-cudnn       V      A      A      A      A      A      A      N      N      N      V      V

linear.nvfp4: NVFP4_SVD
  3072 x 3072            cpu   a100   3090   4090   h100   h200  200x2   b200   5090 5090x4   910b mi300x
    reference              2      2      2      o      o      o      o      o      o      o      2      2
    decode                 1      1      1      2      2      2      2      5      4      4      1      1
    fp8-recode             V      A      A      1      1      1      1      4      3      3      V      V
    packed                 V      o      o      o      o      o      o      o      o      o      V      o
    packed-fp8             V      A      A      L      L      L      L      L      L      L      V      V
    flashinfer-trtllm      V      A      A      A      A      A      A      1      A      A      V      V
    flashinfer-cutlass     V      A      A      A      A      A      A      2      1      1      V      V
    flashinfer-cudnn       V      A      A      A      A      A      A      3      2      2      V      V

linear.nvfp4: W4A16_NVFP4
  3072 x 3072            cpu   a100   3090   4090   h100   h200  200x2   b200   5090 5090x4   910b mi300x
    reference              2      2      2      o      o      o      o      o      o      o      2      2
    decode                 1      1      1      1      1      1      1      1      1      1      1      1
    fp8-recode             V      A      A      I      I      I      I      I      I      I      V      V
    packed                 V      o      o      o      o      o      o      o      o      o      V      o
    packed-fp8             V      A      A      I      I      I      I      I      I      I      V      V
    flashinfer-trtllm      V      A      A      A      A      A      A      I      A      A      V      V
    flashinfer-cutlass     V      A      A      A      A      A      A      I      I      I      V      V
    flashinfer-cudnn       V      A      A      A      A      A      A      I      I      I      V      V

linear.svdq: int4, unsigned
  3072 x 3072            cpu   a100   3090   4090   h100   h200  200x2   b200   5090 5090x4   910b mi300x
    merged                 1      2      2      2      1      1      1      1      1      1      1      1
    decode                 2      3      3      3      2      2      2      2      2      2      2      2
    packed                 V      o      o      o      o      o      o      o      o      o      V      o
    reference              3      4      4      4      3      3      3      3      3      3      3      3
    nunchaku               V      1      1      1      A      A      A      A      W      W      V      V
    comfy-kitchen          P      P      P      P      P      P      P      P      P      P      V      V
  64 x 3072              cpu   a100   3090   4090   h100   h200  200x2   b200   5090 5090x4   910b mi300x
    merged                 1      1      1      1      1      1      1      1      1      1      1      1
    decode                 2      2      2      2      2      2      2      2      2      2      2      2
    packed                 V      o      o      o      o      o      o      o      o      o      V      o
    reference              3      3      3      3      3      3      3      3      3      3      3      3
    nunchaku               V      N      N      N      A      A      A      A      W      W      V      V
    comfy-kitchen          P      P      P      P      P      P      P      P      P      P      V      V

linear.svdq: nvfp4
  3072 x 3072            cpu   a100   3090   4090   h100   h200  200x2   b200   5090 5090x4   910b mi300x
    merged                 1      1      1      1      1      1      1      1      2      1      1      1
    decode                 2      2      2      2      2      2      2      2      3      2      2      2
    packed                 V      o      o      o      o      o      o      o      o      o      V      o
    reference              3      3      3      3      3      3      3      3      4      3      3      3
    nunchaku               V      W      W      W      A      A      A      A      1      P      V      V
    comfy-kitchen          P      P      P      P      P      P      P      P      P      P      V      V
  64 x 3072              cpu   a100   3090   4090   h100   h200  200x2   b200   5090 5090x4   910b mi300x
    merged                 1      1      1      1      1      1      1      1      1      1      1      1
    decode                 2      2      2      2      2      2      2      2      2      2      2      2
    packed                 V      o      o      o      o      o      o      o      o      o      V      o
    reference              3      3      3      3      3      3      3      3      3      3      3      3
    nunchaku               V      W      W      W      A      A      A      A      N      P      V      V
    comfy-kitchen          P      P      P      P      P      P      P      P      P      P      V      V

linear.w4a16: awq
  18432 x 3072           cpu   a100   3090   4090   h100   h200  200x2   b200   5090 5090x4   910b mi300x
    decode                 1      2      2      2      1      1      1      1      2      1      1      1
    merged                 o      o      o      o      o      o      o      o      o      o      o      o
    packed                 V      o      o      o      o      o      o      o      o      o      V      o
    reference              2      3      3      3      2      2      2      2      3      2      2      2
    nunchaku               V      1      1      1      A      A      A      A      1      P      V      V
    comfy-kitchen          P      P      P      P      P      P      P      P      P      P      V      V
  64 x 3072              cpu   a100   3090   4090   h100   h200  200x2   b200   5090 5090x4   910b mi300x
    decode                 1      1      1      1      1      1      1      1      1      1      1      1
    merged                 o      o      o      o      o      o      o      o      o      o      o      o
    packed                 V      o      o      o      o      o      o      o      o      o      V      o
    reference              2      2      2      2      2      2      2      2      2      2      2      2
    nunchaku               V      N      N      N      A      A      A      A      N      P      V      V
    comfy-kitchen          P      P      P      P      P      P      P      P      P      P      V      V

linear.int8: W8A8, W8A8_DYNAMIC, W4A4_DYNAMIC
  3072 x 3072            cpu   a100   3090   4090   h100   h200  200x2   b200   5090 5090x4   910b mi300x
    reference              3      o      o      o      o      o      o      o      o      o      o      o
    decode                 2      2      2      2      2      2      2      2      2      2      2      1
    int8                   1      1      1      1      1      1      1      1      1      1      V      o
    npu                    V      V      V      V      V      V      V      V      V      V      1      V
  12 x 3072              cpu   a100   3090   4090   h100   h200  200x2   b200   5090 5090x4   910b mi300x
    reference              3      o      o      o      o      o      o      o      o      o      o      o
    decode                 2      2      2      2      2      2      2      2      2      2      1      1
    int8                   1      1      1      1      1      1      1      1      1      1      V      o
    npu                    V      V      V      V      V      V      V      V      V      V      N      V
  3072 x 7               cpu   a100   3090   4090   h100   h200  200x2   b200   5090 5090x4   910b mi300x
    reference              2      o      o      o      o      o      o      o      o      o      o      o
    decode                 1      1      1      1      1      1      1      1      1      1      1      1
    int8                   N      N      N      N      N      N      N      N      N      N      V      N
    npu                    V      V      V      V      V      V      V      V      V      V      N      V

linear.convrot: ComfyUI int8, ConvRot
  3072 x 3072            cpu   a100   3090   4090   h100   h200  200x2   b200   5090 5090x4   910b mi300x
    reference              3      o      o      o      o      o      o      o      o      o      o      o
    decode                 2      2      2      2      2      2      2      2      2      2      1      1
    int8                   1      1      1      1      1      1      1      1      1      1      V      o

linear.convrot: ConvRot weights
  3072 x 3072            cpu   a100   3090   4090   h100   h200  200x2   b200   5090 5090x4   910b mi300x
    reference              2      o      o      o      o      o      o      o      o      o      o      o
    decode                 1      1      1      1      1      1      1      1      1      1      1      1
    int8                   I      I      I      I      I      I      I      I      I      I      V      I

linear.convrot: ComfyUI int8
  3072 x 7               cpu   a100   3090   4090   h100   h200  200x2   b200   5090 5090x4   910b mi300x
    reference              2      o      o      o      o      o      o      o      o      o      o      o
    decode                 1      1      1      1      1      1      1      1      1      1      1      1
    int8                   N      N      N      N      N      N      N      N      N      N      V      N

linear.mxfp4: W4A4_MXFP4, W4A4_MXFP4_DUALSCALE
  3072 x 3072            cpu   a100   3090   4090   h100   h200  200x2   b200   5090 5090x4   910b mi300x
    reference              2      2      2      2      2      2      2      2      2      2      2      2
    decode                 1      1      1      1      1      1      1      1      1      1      1      1

linear.gguf: Q8_0, Q5_0, Q4_K
  3072 x 3072            cpu   a100   3090   4090   h100   h200  200x2   b200   5090 5090x4   910b mi300x
    decode                 1      2      2      2      2      2      2      2      2      2      1      2
    packed                 2      1      1      1      1      1      1      1      1      1      V      1
    reference              3      3      3      3      3      3      3      3      3      3      2      3
"""
"""Blocks of an op and schemes that are treated alike; in them one part per shape (out x in x rows).

`1` is the kernel that runs, `2` ... those that would if it were not there, `o` one that fits but runs
only when it is asked for, and a letter what is missing (`MISSING`).
"""

MISSING = {
    "V": "hardware, this is",
    "A": ", this is",
    "P": "needs the package",
    "W": "takes weights",
    "S": "takes weight scales per",
    "I": "takes activations",
    "B": "takes blocks of",
    "L": "takes no layers with smoothing or a low-rank branch",
    "N": "needs out_features a multiple of",
    "R": "takes inputs of at most",
}
"""Vendor, architecture, package, weights, scales, inputs, blocks, low-rank branch, numbers, rows."""

SHORT = {
    "200x2": "h200-x2",
    "3090": "rtx-3090",
    "4090": "rtx-4090",
    "5090": "rtx-5090",
    "5090x4": "rtx-5090-x4",
    "910b": "ascend-910b",
}
"""Heads of columns that are not ids of hardware.csv."""


def scheme_of(family: str, name: str) -> Scheme:
    found: Scheme = families.load(family).SCHEMES[name]
    return found


INT4 = scheme_of("nunchaku-svdq", "int4_r32")
CONVROT = scheme_of("comfyui-int8", "convrot")
SCHEMES = {
    "FP8 tensor-static": scheme_of("modelopt-fp8", "FP8"),
    "tensor-static": scheme_of("fp8", "tensor-static"),
    "tensor-dynamic": scheme_of("fp8", "tensor-dynamic"),
    "channel-dynamic": scheme_of("fp8", "channel-dynamic"),
    "channel-static": scheme_of("fp8", "channel-static"),
    "block": scheme_of("fp8", "block-dynamic"),
    "cast": scheme_of("fp8", "cast"),
    "mxfp8": scheme_of("msmodelslim", "W8A8_MXFP8"),
    "NVFP4": scheme_of("modelopt-nvfp4", "NVFP4"),
    "NVFP4_SVD": scheme_of("modelopt-nvfp4", "NVFP4_SVD"),
    "W4A16_NVFP4": scheme_of("modelopt-nvfp4", "W4A16_NVFP4"),
    "int4": INT4,
    "unsigned": replace(INT4, unsigned=True),
    "nvfp4": scheme_of("nunchaku-svdq", "nvfp4_r32"),
    "awq": scheme_of("nunchaku-svdq", "awq"),
    "W8A8": scheme_of("msmodelslim", "W8A8"),
    "W8A8_DYNAMIC": scheme_of("msmodelslim", "W8A8_DYNAMIC"),
    "W4A4_DYNAMIC": scheme_of("msmodelslim", "W4A4_DYNAMIC"),
    "ComfyUI int8": scheme_of("comfyui-int8", "int8"),
    "ConvRot": CONVROT,
    "ConvRot weights": replace(CONVROT, activation="none"),
    "W4A4_MXFP4": scheme_of("msmodelslim", "W4A4_MXFP4"),
    "W4A4_MXFP4_DUALSCALE": scheme_of("msmodelslim", "W4A4_MXFP4_DUALSCALE"),
    "Q8_0": scheme_of("gguf", "Q8_0"),
    "Q5_0": scheme_of("gguf", "Q5_0"),
    "Q4_K": scheme_of("gguf", "Q4_K"),
}
MACHINES = {row.id: identify.from_row(row) for row in read.read().hardware.values()}


def read_table() -> Iterator[tuple[str, str, tuple[int, ...], str, dict[str, str]]]:
    """(op, scheme, shape, backend, cell by hardware) of every line."""
    for block in TABLE.strip().split("\n\n"):
        title, *lines = block.splitlines()
        op, _, names = title.partition(": ")
        for line in lines:
            if not line.startswith("    "):
                place, _, heads = line.strip().partition("  ")
                shape = tuple(int(number) for number in place.split(" x "))
                columns = [SHORT.get(head, head) for head in heads.split()]
                continue
            backend, *cells = line.split()
            for name in names.split(", "):
                yield op, name, shape, backend, dict(zip(columns, cells, strict=True))


LINES = {
    f"{scheme} {' x '.join(map(str, shape))} {backend}": (op, scheme, shape, backend, cells)
    for op, scheme, shape, backend, cells in read_table()
}


def find_kernel(op: str, backend: str) -> Kernel:
    return next(kernel for kernel in kernels.kernels_of(op) if kernel.backend == backend)


def find_cell(machine: Machine, scheme: Scheme, shape: tuple[int, ...], backend: str) -> str:
    """What a cell of the table should say, by the code."""
    place, rows = (shape[0], shape[1]), sum(shape[2:])
    why = find_kernel(scheme.op, backend).needs.why_not(machine, scheme, place, rows)
    if why is not None:
        return next(letter for letter, words in MISSING.items() if words in why)
    fitting = [
        name
        for name in kernels.order_of(scheme.op, machine)
        if find_kernel(scheme.op, name).needs.why_not(machine, scheme, place, rows) is None
    ]
    return str(fitting.index(backend) + 1) if backend in fitting else "o"


@pytest.mark.parametrize("name", LINES)
def test_cells_of_the_table(name: str) -> None:
    op, scheme, shape, backend, cells = LINES[name]
    found = {
        name: find_cell(machine, SCHEMES[scheme], shape, backend)
        for name, machine in MACHINES.items()
    }
    assert SCHEMES[scheme].op == op
    assert found == cells


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_chosen_and_what_is_left(scheme: str) -> None:
    """`choose`, with and without a backend asked for, says what the table says."""
    for op, name, shape, backend, cells in LINES.values():
        if name != scheme:
            continue
        place, rows = (shape[0], shape[1]), sum(shape[2:])
        for hardware_id, cell in cells.items():
            machine = MACHINES[hardware_id]
            chosen = kernels.choose(op, machine, SCHEMES[scheme], place, rows=rows)
            assert (chosen.backend == backend) == (cell == "1")
            assert choosing.choose(op, machine, SCHEMES[scheme], place, rows=rows) == chosen
            if cell in MISSING:
                with pytest.raises(kernels.NoKernel, match=MISSING[cell]):
                    kernels.choose(op, machine, SCHEMES[scheme], place, backend, rows)
            else:
                asked = kernels.choose(op, machine, SCHEMES[scheme], place, backend, rows)
                assert asked.backend == backend


def test_every_hardware_backend_and_scheme_has_its_place() -> None:
    for op, scheme, _, _, cells in LINES.values():
        assert list(cells) == list(MACHINES), (op, scheme)
    for op in kernels.OPS:
        for scheme in {line[1] for line in LINES.values() if line[0] == op}:
            shapes = {line[2] for line in LINES.values() if line[1] == scheme}
            for shape in shapes:
                listed = [line[3] for line in LINES.values() if line[1:3] == (scheme, shape)]
                assert listed == list(kernels.backends_of(op))
    in_table = {replace(SCHEMES[line[1]], name="", rank=0) for line in LINES.values()}
    for family in families.IDS:
        for scheme in families.load(family).SCHEMES.values():
            assert replace(scheme, name="", rank=0) in in_table, f"{family} {scheme}"


# --- the limits at their edges: (hardware, scheme, need, last that is taken, first that is not) ----

WHOLE = (3072, 3072, 0)
EDGES = [
    ("h100", "FP8 tensor-static", "torch", "out_multiple", (16, 3072, 0), (24, 3072, 0)),
    ("h100", "FP8 tensor-static", "torch", "in_multiple", (3072, 16, 0), (3072, 24, 0)),
    ("h100", "FP8 tensor-static", "torch", "out_multiple", (48, 3072, 0), (47, 3072, 0)),
    ("h100", "block", "torch-block", "out_multiple", (128, 512, 0), (64, 512, 0)),
    ("h100", "block", "torch-block", "out_multiple", (384, 512, 0), (320, 512, 0)),
    ("h100", "block", "torch-block", "in_multiple", (128, 512, 0), (128, 256, 0)),
    ("h100", "block", "torch-block", "in_multiple", (128, 1536, 0), (128, 1280, 0)),
    ("h100", "NVFP4", "fp8-recode", "out_multiple", (16, 3072, 0), (8, 3072, 0)),
    ("h100", "NVFP4", "fp8-recode", "in_multiple", (3072, 16, 0), (3072, 8, 0)),
    ("h100", "NVFP4", "packed-fp8", "out_multiple", (16, 3072, 0), (8, 3072, 0)),
    ("h100", "NVFP4", "packed-fp8", "in_multiple", (3072, 16, 0), (3072, 8, 0)),
    ("b200", "NVFP4", "flashinfer-trtllm", "out_multiple", (128, 64, 0), (64, 64, 0)),
    ("b200", "NVFP4", "flashinfer-trtllm", "in_multiple", (128, 192, 0), (128, 160, 0)),
    ("b200", "NVFP4", "flashinfer-cutlass", "out_multiple", (32, 32, 0), (16, 32, 0)),
    ("b200", "NVFP4", "flashinfer-cutlass", "in_multiple", (32, 96, 0), (32, 80, 0)),
    ("b200", "NVFP4", "flashinfer-cutlass", "max_rows", (32, 32, 65536), (32, 32, 65537)),
    ("b200", "NVFP4", "flashinfer-cudnn", "out_multiple", (32, 32, 0), (16, 32, 0)),
    ("b200", "NVFP4", "flashinfer-cudnn", "in_multiple", (32, 96, 0), (32, 80, 0)),
    ("a100", "int4", "nunchaku", "out_multiple", (128, 128, 0), (64, 128, 0)),
    ("a100", "int4", "nunchaku", "in_multiple", (128, 384, 0), (128, 320, 0)),
    ("a100", "awq", "nunchaku", "out_multiple", (128, 128, 0), (64, 128, 0)),
    ("a100", "awq", "nunchaku", "in_multiple", (128, 384, 0), (128, 320, 0)),
    ("cpu", "int4", "comfy-kitchen", "out_multiple", (128, 128, 0), (64, 128, 0)),
    ("cpu", "int4", "comfy-kitchen", "in_multiple", (128, 384, 0), (128, 320, 0)),
    ("cpu", "awq", "comfy-kitchen", "out_multiple", (128, 128, 0), (64, 128, 0)),
    ("cpu", "awq", "comfy-kitchen", "in_multiple", (128, 384, 0), (128, 320, 0)),
    ("cpu", "W8A8", "int8", "in_multiple", (1, 2, 0), (1, 1, 0)),
    ("cpu", "W8A8", "int8", "in_multiple", (1, 4, 0), (1, 3, 0)),
    ("cpu", "ComfyUI int8", "int8", "in_multiple", (1, 2, 0), (1, 1, 0)),
    ("h100", "ComfyUI int8", "int8", "in_multiple", (1, 4, 0), (1, 3, 0)),
    ("ascend-910b", "W8A8", "npu", "out_multiple", (8, 8, 0), (4, 8, 0)),
    ("ascend-910b", "W8A8", "npu", "in_multiple", (8, 24, 0), (8, 20, 0)),
]  # fmt: skip


def machine_of(hardware_id: str, backend: str) -> Machine:
    """The hardware, with the package that comfy-kitchen needs where that is meant."""
    machine = MACHINES[hardware_id]
    wanted = {"comfy_kitchen"} if backend == "comfy-kitchen" else set()
    return replace(machine, packages=machine.packages | wanted)


@pytest.mark.parametrize(("place", "scheme", "backend", "limit", "taken", "refused"), EDGES)
def test_shapes_at_the_edge(
    place: str,
    scheme: str,
    backend: str,
    limit: str,
    taken: tuple[int, int, int],
    refused: tuple[int, int, int],
) -> None:
    machine, wanted = machine_of(place, backend), SCHEMES[scheme]
    needs = find_kernel(wanted.op, backend).needs
    assert needs.why_not(machine, wanted, taken[:2], taken[2]) is None
    need, why = needs.find_unmet(machine, wanted, refused[:2], refused[2])
    if limit == "max_rows":
        assert why == "takes inputs of at most 65536 rows, this run has 65537"
        return
    assert why == (
        f"needs out_features a multiple of {need.out_multiple} and in_features of "
        f"{need.in_multiple}, the layer is {refused[0]} x {refused[1]}"
    )


def list_needs(needs: Needs) -> Iterator[Needs]:
    yield needs
    for further in needs.further:
        yield from list_needs(further)


def test_every_limit_on_shapes_has_an_edge() -> None:
    """A limit declared from now on wants its line above."""
    known = {(SCHEMES[line[1]].op, line[2], line[3]) for line in EDGES}
    defaults = {field.name: field.default for field in fields(Needs)}
    for op in kernels.OPS:
        for kernel in kernels.kernels_of(op):
            for need in list_needs(kernel.needs):
                for limit in ("out_multiple", "in_multiple", "max_rows"):
                    if getattr(need, limit) != defaults[limit]:
                        assert (op, kernel.backend, limit) in known


@pytest.mark.parametrize(
    ("place", "scheme", "backend", "change", "why"),
    [
        ("h100", "block", "torch-block", {"block": (64, 128)},
         "takes blocks of 128x128, the layer has 64x128"),
        ("h100", "block", "torch-block", {"block": (128, 64)},
         "takes blocks of 128x128, the layer has 128x64"),
        ("h100", "block", "torch-block", {"activation": "group-power"},
         "takes activations group-dynamic, the layer has group-power"),
        ("h100", "block", "torch", {},
         "takes weight scales per tensor or channel, the layer has block"),
        ("h100", "FP8 tensor-static", "torch", {"activation": "none"},
         "takes activations tensor-static or tensor-dynamic or token-dynamic, the layer has none"),
        ("h100", "NVFP4", "packed-fp8", {"smoothed": True},
         "takes no layers with smoothing or a low-rank branch"),
        ("h100", "NVFP4", "packed-fp8", {"rank": 1},
         "takes no layers with smoothing or a low-rank branch"),
        ("h100", "W4A16_NVFP4", "fp8-recode", {},
         "takes activations group-dynamic, the layer has none"),
        ("cpu", "W8A8", "int8", {"weight": "e4m3"},
         "takes weights int8 or int4, the layer has e4m3"),
        ("cpu", "W8A8", "int8", {"scale": "tensor"},
         "takes weight scales per channel, the layer has tensor"),
        ("cpu", "W8A8", "int8", {"activation": "group-dynamic"},
         "takes activations tensor-static or token-dynamic, the layer has group-dynamic"),
        ("cpu", "ConvRot weights", "int8", {},
         "takes activations token-dynamic, the layer has none"),
        ("cpu", "ConvRot", "int8", {"activation": "tensor-static"},
         "takes activations token-dynamic, the layer has tensor-static"),
        ("a100", "nvfp4", "nunchaku", {}, "takes weights int4 or uint4, the layer has e2m1"),
        ("rtx-5090", "int4", "nunchaku", {}, "takes weights e2m1 or uint4, the layer has int4"),
        ("rtx-5090-x4", "nvfp4", "nunchaku", {},
         "needs the package nunchaku: it is not installed"),
        ("h100", "int4", "nunchaku", {},
         "needs sm80, sm86, sm89, sm120, sm121, this is NVIDIA H100 (sm90)"),
        ("mi300x", "FP8 tensor-static", "torch", {},
         "needs nvidia hardware, this is AMD Instinct MI300X"),
        ("cpu", "NVFP4", "packed", {}, "needs nvidia or amd hardware, this is CPU"),
    ],
)  # fmt: skip
def test_what_is_missing_in_words(
    place: str, scheme: str, backend: str, change: dict[str, object], why: str
) -> None:
    asked = replace(SCHEMES[scheme], **change)  # type: ignore[arg-type]
    needs = find_kernel(asked.op, backend).needs
    assert needs.why_not(MACHINES[place], asked, WHOLE[:2]) == why


@pytest.mark.parametrize(
    ("arch", "vendor", "first"),
    [
        ("sm90", "nvidia", "torch"),
        ("sm89", "nvidia", "torch"),
        ("sm86", "nvidia", "decode"),
        ("gfx942", "amd", "decode"),
        ("mps", "apple", "decode"),
    ],
)
def test_the_architecture_counts_before_the_vendor(arch: str, vendor: str, first: str) -> None:
    machine = Machine(arch, vendor, arch, 0)
    assert kernels.order_of("linear.fp8", machine)[0] == first


def test_a_refusal_lists_every_candidate_and_what_works() -> None:
    with pytest.raises(kernels.NoKernel) as caught:
        kernels.choose("linear.fp8", MACHINES["b200"], SCHEMES["block"], (128, 512), "torch-block")
    assert caught.value.rule == "fp8-torch-block-sm90"
    assert caught.value.message == (
        "linear.fp8 on NVIDIA B200: torch-block: needs sm90, this is NVIDIA B200 (sm100)"
        "; works here: --backend reference | decode; --backend decode runs anywhere"
    )


# --- architectures that no row of the tables has ---------------------------------------------------


@pytest.mark.parametrize("op", kernels.OPS)
def test_a_kernel_of_an_order_is_offered_on_every_architecture_that_it_takes(op: str) -> None:
    """A B300 (sm103) or a GB10 (sm121) is not left with `decode` where a kernel takes it."""
    nvidia = MACHINES["b200"]
    ordered = set(chain(*import_module(kernels.OPS[op]).ORDER.values()))
    for kernel in kernels.kernels_of(op):
        if kernel.backend in ordered:
            for arch in kernel.needs.arches:
                assert kernel.backend in kernels.order_of(op, replace(nvidia, arch=arch)), arch


@pytest.mark.parametrize(("arch", "like"), [("sm103", "b200"), ("sm121", "rtx-5090")])
def test_a_second_architecture_of_blackwell_chooses_as_the_first(arch: str, like: str) -> None:
    for first in (MACHINES[like], replace(MACHINES[like], packages=frozenset())):
        for scheme in ("NVFP4", "FP8 tensor-static", "W8A8"):
            wanted = SCHEMES[scheme]
            second = replace(first, arch=arch)
            chosen = [kernels.choose(wanted.op, on, wanted, WHOLE[:2]) for on in (first, second)]
            assert chosen[0] == chosen[1], scheme
            assert chosen[1].backend != "decode" or scheme == "W8A8", scheme
