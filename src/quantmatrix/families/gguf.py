"""gguf: transformers in a GGUF file, whose linear layers are blocks of codes and scales.

Files come from ComfyUI-GGUF, stable-diffusion.cpp and diffusers' users; one holds a transformer and
nothing else. Most layers of a `Q4_K_M` file are Q4_K, some Q6_K, and what llama.cpp cannot cut into
blocks of 256 columns has blocks of 32: every tensor says its own type. Of a linear layer (N outputs,
K inputs):

| tensor | type | shape | meaning |
| ------ | ---- | ----- | ------- |
| `weight` | Q8_0, Q4_K ... | [N, K] | blocks, K / columns of them a row; read as uint8 [N, bytes of a row] |
| `bias` | F32 | [N] | never quantized |

Inputs are left alone: y = x W^T + bias with W as `kernels.gguf_arithmetic` decodes it, all 23 types
of the `gguf` package. A tensor of blocks that is no linear layer's weight is decoded while loading;
tensors of F32, F16 and BF16 are numbers, and a file of these alone is not quantized. Which model it
is of `general.architecture` says, where it is one of the known names; layers are in the model's
original names, or in diffusers'. Source: the GGUF specification, ComfyUI-GGUF's `convert.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from quantmatrix.checkpoints.gguf import ARCHITECTURES
from quantmatrix.checkpoints.gguf import ENDING as ENDING
from quantmatrix.errors import CheckpointError, UsageError
from quantmatrix.families.protocol import Calibration, Declaration
from quantmatrix.kernels import gguf_arithmetic, linear_gguf
from quantmatrix.quoting import quote
from quantmatrix.scheme import BLOCKS, Scheme, TensorSpec

if TYPE_CHECKING:
    from quantmatrix.checkpoints.checkpoint import Checkpoint
    from quantmatrix.checkpoints.header import TensorHeader

ID = "gguf"
SCHEMES: Mapping[str, Scheme] = {
    "Q8_0": Scheme("linear.gguf", "Q8_0", "q8_0", "group", "none", group_size=32),
    "Q5_0": Scheme("linear.gguf", "Q5_0", "q5_0", "group", "none", group_size=32),
    "Q4_K": Scheme("linear.gguf", "Q4_K", "q4_k", "group", "none", group_size=32),
}
OWN = ("weight", "bias")
"""All that a layer of blocks has."""
ENCODERS = {
    "Q8_0": gguf_arithmetic.encode_q8_0,
    "Q5_0": gguf_arithmetic.encode_q5_0,
    "Q4_K": gguf_arithmetic.encode_q4_k,
}
GROUPS = dict.fromkeys(BLOCKS, 32) | {
    **dict.fromkeys(("Q2_K", "Q3_K", "Q6_K", "NVFP4", "IQ2_XS", "IQ2_S", "IQ1_M"), 16),
    **dict.fromkeys(("TQ1_0", "TQ2_0"), 256),
}
"""Columns that share a scale, by type."""
FOREIGN = {
    **dict.fromkeys(("sd1", "sdxl", "sd3"), "Stable Diffusion"),
    **dict.fromkeys(("t5", "t5encoder", "clip", "gemma3", "mistral3"), "a text encoder"),
    **dict.fromkeys(("llama", "qwen2", "qwen2vl", "qwen3", "qwen3vl"), "a language model"),
    "aura": "AuraFlow", "chroma": "Chroma", "cosmos": "Cosmos", "hidream": "HiDream",
    "hyvid": "HunyuanVideo", "hunyuan_video": "HunyuanVideo", "ltxv": "LTX-Video",
}  # fmt: skip
"""What else is written in such files, by `general.architecture`."""
FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K",
    11: "Q3_K_S", 12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S",
    17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS", 21: "Q2_K_S", 22: "IQ3_XS",
    23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S",
    29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0",
}  # fmt: skip
"""Names of `general.file_type` (llama.cpp's `llama_ftype`)."""


def detect(checkpoint: Checkpoint) -> str | None:
    """The reason why a checkpoint is a quantized GGUF file, or None."""
    types = Counter(h.dtype for h in checkpoint.tensors.values() if h.dtype in BLOCKS)
    if not types:
        return None
    stated = checkpoint.metadata.get("general.file_type", "")
    named = FILE_TYPES.get(int(stated)) if stated.isdecimal() and len(stated) < 4 else None
    parts = (
        quote(checkpoint.metadata.get("general.architecture", ""), 40),
        f"file type {named}" if named else "",
        ", ".join(f"{count} {kind}" for kind, count in types.most_common()),
    )
    return f"a GGUF file ({'; '.join(filter(None, parts))})"


def check(checkpoint: Checkpoint) -> None:
    """Refuse a GGUF file of a model that is none of ours, by its name; CheckpointError."""
    if all(header.start is None for header in checkpoint.tensors.values()):
        return
    name = checkpoint.metadata.get("general.architecture", "")
    if name in FOREIGN:
        raise CheckpointError(
            f"{checkpoint.files[0]}: general.architecture is {name}, {FOREIGN[name]}: expected the "
            f"transformer of a base model here ({', '.join(sorted(set(ARCHITECTURES.values())))}). "
            "Name the file of the transformer; text encoders come with the base model"
        )


def schemes(checkpoint: Checkpoint) -> dict[str, Scheme]:
    """Scheme of each linear layer whose weight is blocks, by its type.

    Raises CheckpointError for a tensor of such a layer that nothing would use.
    """
    found = {
        name.removesuffix(".weight"): find_scheme(header.dtype)
        for name, header in checkpoint.tensors.items()
        if name.endswith(".weight") and is_linear(header)
    }
    for name, header in checkpoint.tensors.items():
        layer, _, suffix = name.rpartition(".")
        if layer in found and suffix not in OWN:
            raise CheckpointError(
                f"{header.file}: tensor {name} ({header.dtype} {list(header.shape)}) stands beside "
                f"the blocks of {layer}, expected no more than {', '.join(OWN)}: leaving it out would "
                "give other numbers without an error. Convert the model again without it"
            )
    return found


def is_linear(header: TensorHeader) -> bool:
    """Whether a tensor is a matrix whose rows are whole blocks."""
    shape = header.shape
    return header.dtype in BLOCKS and len(shape) == 2 and shape[1] % BLOCKS[header.dtype][0] == 0


def find_scheme(kind: str) -> Scheme:
    """The scheme of a type of blocks."""
    return Scheme(linear_gguf.OP, kind, kind.lower(), "group", "none", group_size=GROUPS[kind])


def tensors(scheme: Scheme, out_features: int, in_features: int) -> dict[str, TensorSpec]:
    """The tensors of a layer as they are read, by suffix, `bias` left out."""
    columns, size = BLOCKS[scheme.name]
    return {"weight": TensorSpec(("U8",), ((out_features, in_features // columns * size),))}


def name_scheme(scheme: str | None, precision: str | None, rank: int | None) -> str:
    """The name in `SCHEMES` that `quantmatrix quantize` asks for; UsageError where none fits."""
    if precision is not None or rank is not None:
        raise UsageError(f"--precision and --rank are not for {ID}: give --scheme")
    name = (scheme or "Q8_0").upper()
    if name in SCHEMES:
        return name
    read = f", which is read and not written: {ID} writes" if name in BLOCKS else f": {ID} has"
    raise UsageError(f"--scheme {scheme}{read} {', '.join(SCHEMES)}")


def scheme_of(
    layer: str, scheme: Scheme, *, raw: bool, gelu: bool, interleaved: bool, columns: int
) -> Scheme | None:
    """The scheme of one layer; as llama.cpp, Q5_0 where rows are no whole blocks of Q4_K."""
    if columns % BLOCKS[scheme.name][0] == 0:
        return scheme
    return SCHEMES["Q5_0"] if columns % BLOCKS["Q5_0"][0] == 0 else None


def quantize(
    weight: torch.Tensor,
    scheme: Scheme,
    *,
    bias: torch.Tensor | None = None,
    calibration: Calibration | None = None,
    parts: int = 1,
) -> dict[str, torch.Tensor]:
    """Blocks of a weight [N, K] of any float dtype: `weight` uint8 [N, bytes of a row], `bias` F32."""
    stored = {"weight": ENCODERS[scheme.name](weight.float())}
    return stored if bias is None else {**stored, "bias": bias.float()}


def cut_rows(
    stored: Mapping[str, torch.Tensor], scheme: Scheme, start: int, stop: int
) -> dict[str, torch.Tensor]:
    """On-disk tensors of the rows [start, stop) of a layer; see the protocol.

    Takes and gives tensors as in the module's table.
    """
    return {name: tensor[start:stop] for name, tensor in stored.items()}


def canonical(stored: Mapping[str, torch.Tensor], scheme: Scheme) -> dict[str, torch.Tensor]:
    """Canonical tensors of linear.gguf, which are those on disk: `weight` uint8, `bias` [N]."""
    return dict(stored)


def find_fault(tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> tuple[str, str] | None:
    """(suffix, what it holds and what was expected) of scales that cannot be meant, or None.

    Tensors as in the module's table.
    """
    if gguf_arithmetic.holds_bad_scale(tensors["weight"], scheme.name):
        return (
            "weight",
            f"holds {scheme.name} blocks whose scale is NaN or infinite: expected numbers",
        )
    return None


def dequantize(stored: Mapping[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
    """The weight in plain numbers, float32 [N, K]."""
    return linear_gguf.decode(stored, scheme)


def reference(x: torch.Tensor, stored: Mapping[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
    """The layer's exact arithmetic on x [..., K]: [..., N] in x's dtype.

    `stored` are tensors as in the module's table.
    """
    return linear_gguf.reference(x, stored, scheme)


def declare(
    schemes: Mapping[str, Scheme], kept: Sequence[str], tensors: Sequence[str] = ()
) -> Declaration:
    """The type of every tensor of blocks: what makes the writer write a GGUF file."""
    return Declaration(blocks={f"{layer}.weight": scheme.name for layer, scheme in schemes.items()})
