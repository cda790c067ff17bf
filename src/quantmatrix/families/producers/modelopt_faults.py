"""Export faults: what ModelOpt writes and no family takes, named by its cause.

ModelOpt quantizes in more ways than its files have names for, and some of these differ by one
tensor or one number. Judged by dtypes and shapes alone such a file looks damaged, or padded, which
sends its owner the wrong way. Here the declaration is read beside the tensors:

| what is found | what it is |
| ------------- | ---------- |
| a layer that `quantized_layers` gives another algorithm | a format of which no kernel is here |
| `group_size` other than 16 beside NVFP4 codes | blocks of another size than NVFP4 has |
| FP8 codes without an `input_scale` | inputs left alone, scaled per call, or never calibrated |
| `kv_cache_scheme` | outputs that ModelOpt rounds while simulating; no scale of theirs is written |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from quantmatrix.errors import CheckpointError
from quantmatrix.families.producers.comfyui import WHOLE_INPUTS
from quantmatrix.families.producers.modelopt import (
    FP8_ALGORITHMS,
    NVFP4_ALGORITHMS,
    read_block,
    read_method,
)
from quantmatrix.kernels.nvfp4_arithmetic import GROUP

if TYPE_CHECKING:
    from quantmatrix.checkpoints.checkpoint import Checkpoint
    from quantmatrix.checkpoints.header import TensorHeader
    from quantmatrix.scheme import Scheme

CODES = ("U8", "I8", "F8_E4M3")
KNOWN_ALGORITHMS = (*FP8_ALGORITHMS, *NVFP4_ALGORITHMS)
"""Algorithms that one layer may have."""


def check_export(checkpoint: Checkpoint) -> None:
    """Refuse what a ModelOpt declaration says of layers and no family takes; CheckpointError."""
    block = read_block(checkpoint)
    method, whole = read_method(block)
    if not method.startswith("modelopt"):
        return
    source = checkpoint.quantization_from or checkpoint.reference
    for layer, weight in list_coded(checkpoint):
        entry = find_entry(block, layer)
        algorithm = str(entry.get("quant_algo") or "").upper()
        if algorithm and algorithm not in KNOWN_ALGORITHMS:
            raise CheckpointError(
                f"{weight.file}: layer {layer} is {algorithm}, as {source} declares, which no quant "
                f"family takes: expected {', '.join(sorted(KNOWN_ALGORITHMS))}. Quantize it with one of "
                "these, or leave it in full precision"
            )
        size = entry.get("group_size") or find_group_size(block)
        if weight.dtype == "U8" and isinstance(size, int) and size not in (0, GROUP):
            raise CheckpointError(
                f"{weight.file}: layer {layer} has one scale per {size} columns, as {source} "
                f"declares (group_size {size}): expected {GROUP}, which the kernels of NVFP4 "
                f"take. Quantize it with block_sizes {{-1: {GROUP}}}"
            )
        if whole == "FP8" and lacks_input_scale(checkpoint, layer, weight):
            raise CheckpointError(explain_input_scale(layer, weight))


def list_doubts(checkpoint: Checkpoint, schemes: Mapping[str, Scheme]) -> list[str]:
    """Warnings about a ModelOpt checkpoint that is taken: what its files leave open."""
    block = read_block(checkpoint)
    if not read_method(block)[0].startswith("modelopt"):
        return []
    found = []
    source = checkpoint.quantization_from or checkpoint.reference
    per_call = [
        layer
        for layer, scheme in schemes.items()
        if scheme.activation == "tensor-dynamic" and find_entry(block, layer)
    ]
    if per_call:
        found.append(
            f"{source}: {len(per_call)} FP8 layers have no input_scale, {per_call[0]} is the first. "
            "ModelOpt writes none for inputs that it leaves alone, nor for those that it scales "
            "per call; they are taken as scaled per call, save by --backend decode, which leaves "
            "all inputs alone. If they were left alone, add each layer to the block: "
            f'"layers": {{"{per_call[0]}": {{"format": "float8_e4m3fn", "{WHOLE_INPUTS}": true}}}}'
        )
    for key in ("kv_cache_scheme", "kv_cache_quant_algo"):
        if block.get(key):
            found.append(
                f"{source}: {key} is there, but such files hold no scale of keys, values or "
                "outputs: these are left in full precision"
            )
    return found


def list_coded(checkpoint: Checkpoint) -> Iterator[tuple[str, TensorHeader]]:
    """(layer, header of its weight) of every layer that is stored as codes."""
    for name, header in checkpoint.tensors.items():
        layer, _, leaf = name.rpartition(".")
        if leaf == "weight" and header.dtype in CODES:
            yield layer, header


def find_entry(block: Mapping[str, Any], layer: str) -> Mapping[str, Any]:
    """What `quantized_layers` of a MIXED_PRECISION block says of a layer; empty: nothing."""
    listed = block.get("quantized_layers")
    entry = listed.get(layer) if isinstance(listed, Mapping) else None
    return entry if isinstance(entry, Mapping) else {}


def find_group_size(block: Mapping[str, Any]) -> Any:
    """`group_size` of the only entry of `config_groups`; None where there are none, or several."""
    groups = block.get("config_groups")
    if not isinstance(groups, Mapping) or len(groups) != 1:
        return None
    group = next(iter(groups.values()))
    weights = group.get("weights") if isinstance(group, Mapping) else None
    return weights.get("group_size") if isinstance(weights, Mapping) else None


def lacks_input_scale(checkpoint: Checkpoint, layer: str, weight: TensorHeader) -> bool:
    """Whether a layer is FP8 with a scale of its weight, and none of its input."""
    names = checkpoint.tensors
    coded = weight.dtype == "F8_E4M3" and f"{layer}.weight_scale" in names
    return coded and f"{layer}.input_scale" not in names


def explain_input_scale(layer: str, weight: TensorHeader) -> str:
    """The error about an FP8 layer whose file does not say what becomes of its inputs."""
    return (
        f"{weight.file}: tensor {layer}.input_scale is missing beside {weight.name} "
        f"({weight.dtype}): expected F32 []. ModelOpt writes none for a layer whose inputs are "
        "left alone, are scaled per call, or were never seen in the calibration, and the file "
        "does not say which; a missing scale is never assumed. Quantize with FP8_DEFAULT_CFG and "
        "calibrate with inputs that reach every layer"
    )
