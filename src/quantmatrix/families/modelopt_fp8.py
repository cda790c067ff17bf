"""modelopt-fp8: transformers whose linear layers NVIDIA ModelOpt stored as FP8.

On disk: config.json carries `quantization_config` with `quant_method: modelopt` and
`quant_algo: FP8`; layers that were left alone are in its `ignore` list. `modelopt-fp8` is a label of
tables, never a serialized key. Tensors of a quantized linear layer (N outputs, K inputs):

| tensor | dtype | shape | meaning |
| ------ | ----- | ----- | ------- |
| `weight` | F8_E4M3 | [N, K] | round(real / weight_scale) |
| `weight_scale` | F32 | [] or [1] | amax of the weight / 448; a multiplier |
| `input_scale` | F32 | [] or [1] | calibrated amax of the input / 448 (static) |
| `bias` | as the base | [N] | never quantized |

Arithmetic: x is divided by `input_scale`, held within 448 and rounded to e4m3; then
y = codes(x) codes(W)^T x input_scale x weight_scale + bias. The sure sign of a quantized layer is its
`weight_scale`; the config gives the family, the file the layer. Names with `_quantizer.` in them are
leftovers of a calibration and are never loaded. Source: ModelOpt 0.47 exports.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from quantmatrix.errors import CheckpointError, UsageError
from quantmatrix.families.producers.modelopt import (
    FP8_ALGORITHMS,
    StoredLayer,
    read_block,
    read_method,
    refuse_others,
)
from quantmatrix.families.producers.modelopt_faults import check_export, list_doubts
from quantmatrix.families.protocol import Calibration, Declaration
from quantmatrix.kernels import linear_fp8
from quantmatrix.kernels.number_formats import E4M3_MAX
from quantmatrix.scheme import Scheme, TensorSpec

if TYPE_CHECKING:
    from quantmatrix.checkpoints.checkpoint import Checkpoint

ID = "modelopt-fp8"
FP8 = Scheme("linear.fp8", "FP8", "e4m3", "tensor", "tensor-static")
SCHEMES: Mapping[str, Scheme] = {"FP8": FP8}
ALGORITHMS = FP8_ALGORITHMS
CPU_OFFLOAD = False
"""As the guide has it."""
NUMBER: Mapping[str, Any] = {"dynamic": False, "num_bits": 8, "type": "float"}
"""What `config_groups` says of weights and of inputs."""


def detect(checkpoint: Checkpoint) -> str | None:
    """The reason why a checkpoint is ModelOpt FP8, or None.

    Raises CheckpointError where method and algorithm contradict each other.
    """
    method, algorithm = read_method(read_block(checkpoint))
    if method == "modelopt_fp8" and algorithm not in ("", "FP8"):
        raise CheckpointError(
            f"{checkpoint.quantization_from}: quant_method {method} and quant_algo {algorithm} "
            "contradict each other: expected FP8"
        )
    if method == "modelopt_fp8" or (method == "modelopt" and algorithm == "FP8"):
        return f"quant_method {method}, quant_algo FP8 in {checkpoint.quantization_from}"
    return None


def check(checkpoint: Checkpoint) -> None:
    """Refuse what an export declares of layers and no family takes; CheckpointError."""
    if detect(checkpoint):
        check_export(checkpoint)


def doubts(checkpoint: Checkpoint, schemes: Mapping[str, Scheme]) -> list[str]:
    """Warnings about what an export leaves open: inputs, keys and values."""
    return list_doubts(checkpoint, schemes)


def ignored(name: str) -> str | None:
    """Why a tensor is never loaded, or None."""
    return "a leftover of ModelOpt's calibration" if "_quantizer." in name else None


def schemes(checkpoint: Checkpoint) -> dict[str, Scheme]:
    """FP8 for each layer with a `weight_scale`.

    Raises CheckpointError for what does not fit together: the declaration, and tensors as they are.
    """
    block, source = read_block(checkpoint), checkpoint.quantization_from or checkpoint.reference
    excluded = read_ignore(block, source)
    check_groups(block, source)
    found: dict[str, Scheme] = {}
    for layer, suffixes in checkpoint.layers().items():
        if "_quantizer" in layer:
            continue
        header = checkpoint.tensors.get(f"{layer}.weight")
        codes = header is not None and header.dtype == "F8_E4M3"
        if not codes and not suffixes & {"weight_scale", "input_scale"}:
            continue
        check_layer(checkpoint, layer, suffixes)
        if any(pattern.match(layer) for pattern in excluded):
            raise CheckpointError(
                f"{checkpoint.quantization_from}: `ignore` lists {layer}, but "
                f"{checkpoint.tensors[f'{layer}.weight'].file} stores it as FP8"
            )
        found[layer] = FP8
    return found


def check_groups(block: Mapping[str, Any], source: str) -> None:
    """`config_groups`, where there are any, must describe static FP8 of weights and inputs.

    Raises CheckpointError where they do not.
    """
    groups = block.get("config_groups") or {}
    if not isinstance(groups, Mapping) or not all(isinstance(g, Mapping) for g in groups.values()):
        raise CheckpointError(
            f"{source}: config_groups is {json.dumps(groups)[:120]}: expected an object of objects"
        )
    for name, group in groups.items():
        for part in ("weights", "input_activations"):
            stated = group.get(part) or {}
            known = isinstance(stated, Mapping)
            if not known or any(stated.get(key, value) != value for key, value in NUMBER.items()):
                raise CheckpointError(
                    f"{source}: config_groups.{name}.{part} is {json.dumps(stated)[:120]}, while "
                    f"quant_algo is FP8: expected {json.dumps(NUMBER)}. Correct the declaration, "
                    "or export again"
                )


def read_ignore(block: Mapping[str, Any], source: str = "config.json") -> list[re.Pattern[str]]:
    """Patterns of the layers that were left alone; `*` stands for any characters.

    Raises CheckpointError where `ignore` is no list of names.
    """
    entries = block.get("ignore") or []
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise CheckpointError(
            f"{source}: `ignore` is {json.dumps(entries)[:120]}: expected a list of layer names"
        )
    return [re.compile(re.escape(entry).replace(r"\*", ".*") + r"\Z") for entry in entries]


def check_layer(checkpoint: Checkpoint, layer: str, suffixes: frozenset[str]) -> None:
    """A quantized layer must have every tensor, in the right dtype and shape, and no other.

    Raises CheckpointError where it does not.
    """
    header = checkpoint.tensors.get(f"{layer}.weight")
    if header is None or len(header.shape) != 2:
        scale = checkpoint.tensors[f"{layer}.{min(suffixes)}"]
        raise CheckpointError(
            f"{scale.file}: layer {layer} has {', '.join(sorted(suffixes))}, and its weight is "
            f"{list(header.shape) if header else 'missing'}: expected F8_E4M3 [N, K]; export the "
            "checkpoint again"
        )
    specs = tensors(FP8, *header.shape)
    for suffix, spec in specs.items():
        name = f"{layer}.{suffix}"
        found = checkpoint.tensors.get(name)
        if found is None:
            raise CheckpointError(
                f"{header.file}: tensor {name} is missing beside {layer}.weight ({header.dtype}): "
                f"expected {' or '.join(spec.dtypes)} {list(spec.shapes[0])}; a missing scale is "
                "never assumed to be 1: export the checkpoint again"
            )
        if found.dtype not in spec.dtypes or found.shape not in spec.shapes:
            expected = " or ".join(str(list(shape)) for shape in spec.shapes)
            raise CheckpointError(
                f"{found.file}: tensor {name} is {found.dtype} {list(found.shape)}, "
                f"expected {' or '.join(spec.dtypes)} {expected}; export the checkpoint again"
            )
    refuse_others(StoredLayer(checkpoint, layer, suffixes), specs)


def tensors(scheme: Scheme, out_features: int, in_features: int) -> dict[str, TensorSpec]:
    """The tensors of a layer on disk, by suffix, `bias` left out."""
    scalar = TensorSpec(("F32",), ((), (1,)))
    weight = TensorSpec(("F8_E4M3",), ((out_features, in_features),))
    return {"weight": weight, "weight_scale": scalar, "input_scale": scalar}


def quantize(
    weight: torch.Tensor,
    scheme: Scheme,
    *,
    bias: torch.Tensor | None = None,
    calibration: Calibration | None = None,
    parts: int = 1,
) -> dict[str, torch.Tensor]:
    """On-disk tensors of a layer with this weight [N, K], of any float dtype.

    Gives tensors as in the module's table. As ModelOpt does, the division by the scale is made in
    the weight's own dtype, so BF16 weights are rounded twice. Raises UsageError without a
    calibration.
    """
    if calibration is None:
        raise UsageError("modelopt-fp8 has static activation scales: a calibration is needed")
    amax = weight.abs().amax().float()
    scale = torch.where(amax > 0, amax, 1.0) / E4M3_MAX
    scaled = weight / scale  # a scale without a dimension leaves the dtype alone
    stored_form = {
        "weight": scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn),
        "weight_scale": scale,
        "input_scale": calibration.amax.float().amax().clamp_min(1e-12) / E4M3_MAX,
    }
    return stored_form if bias is None else {**stored_form, "bias": bias}


def cut_rows(
    stored: Mapping[str, torch.Tensor], scheme: Scheme, start: int, stop: int
) -> dict[str, torch.Tensor]:
    """On-disk tensors of the rows [start, stop) of a layer; see the protocol.

    Takes and gives tensors as in the module's table.
    """
    return {n: t[start:stop] if n in ("weight", "bias") else t for n, t in stored.items()}


def canonical(stored: Mapping[str, torch.Tensor], scheme: Scheme) -> dict[str, torch.Tensor]:
    """Canonical tensors of linear.fp8: scales as float32 numbers without a dimension.

    Takes tensors as in the module's table.
    """
    stored_form = {"weight": stored["weight"]}
    for suffix in ("weight_scale", "input_scale"):
        stored_form[suffix] = stored[suffix].float().reshape(())
    if "bias" in stored:
        stored_form["bias"] = stored["bias"]
    return stored_form


def dequantize(stored: Mapping[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
    """The weight in plain numbers, float32 [N, K]."""
    return linear_fp8.decode(canonical(stored, scheme), scheme)


def reference(x: torch.Tensor, stored: Mapping[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
    """The layer's exact arithmetic on x [..., K]: [..., N] in x's dtype.

    `stored` are tensors as in the module's table.
    """
    return linear_fp8.reference(x, canonical(stored, scheme), scheme)


def declare(
    schemes: Mapping[str, Scheme], kept: Sequence[str], tensors: Sequence[str] = ()
) -> Declaration:
    """The `quantization_config` of ModelOpt's export."""
    number = dict(NUMBER)
    return Declaration(
        config={
            "config_groups": {
                "group_0": {
                    "input_activations": number,
                    "targets": ["Linear"],
                    "weights": number,
                }
            },
            "ignore": sorted(kept),
            "producer": {"name": "modelopt", "version": "0.47.0"},
            "quant_algo": "FP8",
            "quant_method": "modelopt",
        }
    )
