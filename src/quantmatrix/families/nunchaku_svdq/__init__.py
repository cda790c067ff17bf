"""nunchaku-svdq: SVDQuant transformers as the nunchaku engine reads them, one safetensors file each.

A W4A4 layer with N outputs, K inputs and rank R (older files write the names in brackets):

| tensor | dtype | shape | meaning |
| ------ | ----- | ----- | ------- |
| `qweight` | I8 | [N, K/2] | int4 or e2m1 codes, in tiles |
| `wscales` | BF16 or F16 (int4), F8_E4M3 (nvfp4) | [K/64, N], [K/16, N] | group scales, in tiles |
| `smooth_factor` (`smooth`) | BF16 | [K] | inputs are divided by it |
| `smooth_factor_orig` (`smooth_orig`) | BF16 | [K] | not used |
| `proj_down`, `proj_up` (`lora_down`, `lora_up`) | BF16 | [K, R], [N, R] | low-rank branch, in tiles |
| `bias` | BF16 | [N] | in tiles, too |
| `wtscale`, `wcscales` | BF16 | [1], [N] | nvfp4: scale of the layer, of each output; default 1 |

and an AWQ W4A16 layer, for modulation:

| tensor | dtype | shape | meaning |
| ------ | ----- | ----- | ------- |
| `qweight` | I32 | [N/4, K/2] | codes 0..15, in tiles |
| `wscales`, `wzeros` | BF16 | [K/64, N] | plain; some files add rows of zeros |
| `bias` | BF16 | [N] | plain |

`svdq_packing` undoes the tiles. What rows mean (fused q, k and v, interleaved chunks, a folded +1)
and which layers follow a GELU is the business of a model's `nunchaku` dialect. What a file is, its
header says (`quantization_config` with `"method": "svdquant"`), else its tensors; precision and
rank are read from the tensors. A header, a flag or a file name that says otherwise is an error.
Sources: the nunchaku engine, 1.3.0dev, and the packer of its quantizer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from quantmatrix.checkpoints.declaration import METHOD_KEYS
from quantmatrix.errors import CheckpointError
from quantmatrix.families.nunchaku_svdq import flags, writer
from quantmatrix.families.nunchaku_svdq.choices import check_output as check_output
from quantmatrix.families.nunchaku_svdq.choices import name_scheme as name_scheme
from quantmatrix.families.nunchaku_svdq.choices import scheme_of as scheme_of
from quantmatrix.families.nunchaku_svdq.faults import check as check
from quantmatrix.families.nunchaku_svdq.faults import find_fault as find_fault
from quantmatrix.families.nunchaku_svdq.flags import check_flags as check_flags
from quantmatrix.families.nunchaku_svdq.layers import INT4, OLDER_NAMES
from quantmatrix.families.nunchaku_svdq.layers import SCHEMES as SCHEMES
from quantmatrix.families.nunchaku_svdq.layers import after_gelu as after_gelu
from quantmatrix.families.nunchaku_svdq.layers import schemes as schemes
from quantmatrix.families.nunchaku_svdq.layers import tensors as tensors
from quantmatrix.families.protocol import Calibration, Declaration
from quantmatrix.kernels import linear_svdq, linear_w4a16
from quantmatrix.kernels import svdq_packing as packing
from quantmatrix.scheme import Scheme

if TYPE_CHECKING:
    from quantmatrix.checkpoints.checkpoint import Checkpoint
    from quantmatrix.request import Request

ID = "nunchaku-svdq"
DIALECT = "nunchaku"
"""A model's dialect of that name says what the layers of its files stand for; others have none."""
CODE_LEAVES = ("qweight",)
UNUSED = ("smooth_factor_orig", "smooth_orig")
METHODS = ("svdquant", "nunchaku")
"""Names that declare the engine's layout; diffusers' `nunchaku_lite` is another one."""


def detect(checkpoint: Checkpoint) -> str | None:
    """What declares SVDQuant, or the first layer whose tensors show it.

    Raises CheckpointError where declaration and tensors contradict each other.
    """
    coded = next((n for n, s in checkpoint.layers().items() if {"qweight", "wscales"} <= s), None)
    block, source = checkpoint.quantization or {}, checkpoint.quantization_from
    source = source or checkpoint.reference
    for key in METHOD_KEYS if coded else ():
        if block.get(key) and str(block[key]).lower() not in METHODS:
            raise CheckpointError(
                f"{source} declares {key} {block[key]}, but {coded} holds qweight and wscales, "
                f"which are SVDQuant's: expected {' or '.join(METHODS)}. Of layouts with these "
                "tensors only the engine's is read; name a file that was made for it"
            )
    if str(block.get("method", "")).lower() in METHODS:
        if coded is None:
            raise CheckpointError(
                f"{source} says svdquant, but no layer of {checkpoint.reference} has qweight and "
                "wscales: the header belongs to another file, or the file is incomplete"
            )
        return f"method svdquant in {source}"
    return None if coded is None else f"{coded} holds qweight and wscales"


def check_fit(request: Request, checkpoint: Checkpoint) -> list[str]:
    """The three SVDQuant flags and the file's name against what the file holds; see `flags`.

    Returns warnings; contradictions raise UsageError or CheckpointError.
    """
    return flags.check_file(request, checkpoint, detect(checkpoint))


def quantize(
    weight: torch.Tensor,
    scheme: Scheme,
    *,
    bias: torch.Tensor | None = None,
    calibration: Calibration | None = None,
    parts: int = 1,
) -> dict[str, torch.Tensor]:
    """On-disk tensors of a layer with weight [N, K], rows in the order of the file.

    The weight has any float dtype; gives tensors as in the module's table. Without a calibration
    nothing is smoothed. `parts` is how many original layers are stacked in it: each gets its own
    nvfp4 scale. Raises UsageError for sizes that the tiles cannot hold.
    """
    if scheme.op == "linear.w4a16":
        return writer.quantize_awq(weight, scheme, bias, calibration)
    return writer.quantize_svdq(weight, scheme, bias, calibration, parts)


def cut_rows(
    tensors: Mapping[str, torch.Tensor], scheme: Scheme, start: int, stop: int
) -> dict[str, torch.Tensor]:
    """On-disk tensors of the rows [start, stop) of a layer; see the protocol.

    Takes and gives tensors as in the module's table. Whole tiles of rows lie together on disk,
    those of `wscales` after all groups of the tile before.
    """
    cut = dict(tensors)
    for suffix, tensor in tensors.items():
        today = OLDER_NAMES.get(suffix, suffix)
        if scheme.op == "linear.w4a16":
            if today == "qweight":
                cut[suffix] = tensor[start // 4 : stop // 4]
            else:
                cut[suffix] = tensor[..., start:stop]
        elif today in ("qweight", "proj_up", "wcscales", "bias"):
            cut[suffix] = tensor[start:stop]
        elif today == "wscales":
            groups = tensor.shape[0]
            cut[suffix] = tensor.flatten()[start * groups : stop * groups].view(groups, -1)
    return cut


def canonical(tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> dict[str, torch.Tensor]:
    """On-disk tensors of one layer as canonical tensors of `scheme.op`, rows in the file's order.

    Takes tensors as in the module's table.
    """
    own = {OLDER_NAMES.get(suffix, suffix): tensor for suffix, tensor in tensors.items()}
    if scheme.op == "linear.w4a16":
        found = {"weight": packing.unpack_awq(own["qweight"])}
        groups = 2 * own["qweight"].shape[1] // scheme.group_size
        for suffix, name in (("wscales", "weight_scale"), ("wzeros", "weight_zero")):
            found[name] = own[suffix][:groups].T.contiguous()
        return found if "bias" not in own else {**found, "bias": own["bias"]}
    channel = torch.ones(own["qweight"].shape[0], device=own["qweight"].device)
    if "wtscale" in own:
        channel = channel * own["wtscale"].float()
    if "wcscales" in own:
        channel = channel * packing.unpack_channels(own["wcscales"].float())
    found = {
        "weight": packing.unpack_codes(own["qweight"]),
        "weight_scale": packing.unpack_scales(own["wscales"]),
        "channel_scale": channel,
        "smooth": packing.unpack_channels(own["smooth_factor"]),
        "proj_down": packing.unpack_down(own["proj_down"]),
        "proj_up": packing.unpack_up(own["proj_up"]),
    }
    return found if "bias" not in own else {**found, "bias": packing.unpack_channels(own["bias"])}


def dequantize(tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
    """The weight that multiplies the layer's raw input, float32 [N, K], low-rank part merged."""
    decode = linear_w4a16.decode if scheme.op == "linear.w4a16" else linear_svdq.decode
    return decode(canonical(tensors, scheme), scheme)


def reference(x: torch.Tensor, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
    """The layer's exact arithmetic on on-disk tensors, activations quantized too.

    x [..., K] gives [..., N] in x's dtype; tensors as in the module's table.
    """
    compute = linear_w4a16.reference if scheme.op == "linear.w4a16" else linear_svdq.reference
    return compute(x, canonical(tensors, scheme), scheme)


def declare(
    schemes: Mapping[str, Scheme], kept: Sequence[str], tensors: Sequence[str] = ()
) -> Declaration:
    """The header that the engine's own files have; no `quant_method` is in it."""
    main = next((s for s in schemes.values() if s.op == "linear.svdq"), INT4)
    int4 = main.weight == "int4"
    number: dict[str, Any] = {
        "dtype": "int4" if int4 else "fp4_e2m1_all",
        "group_size": main.group_size,
    }
    block: dict[str, Any] = {
        "method": "svdquant",
        "rank": main.rank,
        "weight": {**number, "scale_dtype": None if int4 else [None, "fp8_e4m3_nan"]},
        "activation": {**number, "scale_dtype": None if int4 else "fp8_e4m3_nan"},
    }
    if any("_refiner." in layer and layer.endswith(".attention.to_q") for layer in kept):
        block["skip_refiners"] = True
    return Declaration(metadata={"quantization_config": json.dumps(block, sort_keys=True)})
