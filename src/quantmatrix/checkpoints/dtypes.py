"""Dtypes: what a header calls them, the bits of an item, and torch's own names.

A GGUF file has types of its own beside numbers: blocks, in which the codes and the scales of some
columns lie together (`quantmatrix.checkpoints.gguf`).

Source of the spellings: the safetensors format (`safetensors/src/tensor.rs`, enum `Dtype`), and
ggml's (`ggml.h`, enum `ggml_type`; sizes as in the `gguf` package's `GGML_QUANT_SIZES`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantmatrix.scheme import BLOCKS

if TYPE_CHECKING:
    import torch

ITEM_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F8_E8M0": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
"""Bits of an item, by the spelling of a header."""
FLOATS = ("BF16", "F16", "F32")
"""Spellings of numbers in full precision, as weights and scales have them."""
TORCH_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I32": "int32", "I64": "int64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
}  # fmt: skip
"""Names in torch of the dtypes that are read and written here, by the spelling of a header."""


def to_torch(spelling: str) -> torch.dtype:
    """The dtype in torch of a header's spelling; KeyError for one that is not read here."""
    import torch

    dtype: torch.dtype = getattr(torch, TORCH_NAMES[spelling])
    return dtype


def from_torch(dtype: torch.dtype) -> str:
    """A header's spelling of a dtype in torch; KeyError for one that is not written here."""
    return SPELLINGS[str(dtype).removeprefix("torch.")]


SPELLINGS = {name: spelling for spelling, name in TORCH_NAMES.items()}


def count_bytes(dtype: str, items: int) -> int:
    """Bytes of so many items of a dtype or, in whole blocks, of a GGUF type; KeyError if unknown."""
    if dtype in BLOCKS:
        columns, size = BLOCKS[dtype]
        return items // columns * size
    return items * ITEM_BITS[dtype] // 8
