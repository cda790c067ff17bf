"""What headers of an fp8 file show to be wrong: layers and tensors that do not fit together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from quantmatrix.errors import CheckpointError
from quantmatrix.families.fp8.layers import CODES, SCALES, name_tensors

if TYPE_CHECKING:
    from quantmatrix.checkpoints.checkpoint import Checkpoint
    from quantmatrix.checkpoints.header import TensorHeader
    from quantmatrix.families.producers.comfyui import Declared
    from quantmatrix.scheme import Scheme

AGAIN = "Correct the file with what wrote it, or quantize again"
"""Headers that are whole and do not fit together came so from their writer."""
BESIDE = ("bias", "comfy_quant")
"""Suffixes that may stand in any layer."""


def check_plain(
    checkpoint: Checkpoint, declared: Declared, layer: str, suffixes: frozenset[str]
) -> None:
    """A layer without e4m3 codes has no scales, and nothing may say that it has codes.

    Raises CheckpointError for one that does.
    """
    header = checkpoint.tensors.get(f"{layer}.weight")
    dtype = header.dtype if header else "missing"
    scaled = sorted(suffixes & {*SCALES, "input_scale"})
    if scaled:
        raise CheckpointError(
            f"{checkpoint.tensors[f'{layer}.{scaled[0]}'].file}: tensor {layer}.{scaled[0]} "
            f"is a scale, but {layer}.weight is {dtype}: expected {' or '.join(CODES)}. {AGAIN}"
        )
    if declared.is_coded(layer):
        raise CheckpointError(
            f"{declared.source}: lists {layer} as {declared.formats[layer]}, but its "
            f"weight is {dtype}: expected {' or '.join(CODES)}. {AGAIN}"
        )


def check_matrix(header: TensorHeader) -> None:
    """Codes must have rows and columns before anything is counted in them; else CheckpointError."""
    if len(header.shape) != 2:
        raise CheckpointError(
            f"{header.file}: tensor {header.name} is {list(header.shape)}, not 2-D: expected codes "
            "of a linear layer; leave other layers in full precision"
        )


def check_tensors(
    checkpoint: Checkpoint, layer: str, scheme: Scheme, suffixes: frozenset[str]
) -> None:
    """Every tensor that the scheme needs must be there, in the right dtype and shape.

    `suffixes` are those of the layer. Raises CheckpointError for a tensor that is not as needed.
    """
    header = checkpoint.tensors[f"{layer}.weight"]
    check_matrix(header)
    for suffix, spec in name_tensors(scheme, header.shape, suffixes).items():
        found = checkpoint.tensors.get(f"{layer}.{suffix}")
        expected = f"{' or '.join(spec.dtypes)} {' or '.join(str(list(s)) for s in spec.shapes)}"
        if found is None:
            raise CheckpointError(
                f"{header.file}: tensor {layer}.{suffix} is missing beside {layer}.weight "
                f"({header.dtype}): expected {expected}; a missing scale is never assumed to be 1. "
                f"{AGAIN}"
            )
        if found.dtype not in spec.dtypes or found.shape not in spec.shapes:
            raise CheckpointError(
                f"{found.file}: tensor {found.name} is {found.dtype} {list(found.shape)}, "
                f"expected {expected}. {AGAIN}"
            )


def check_others(checkpoint: Checkpoint, found: Mapping[str, Scheme]) -> None:
    """A tensor of a quantized layer that nothing would use changes its numbers in unknown ways.

    Raises CheckpointError for one.
    """
    layers = checkpoint.layers()
    for name, header in checkpoint.tensors.items():
        layer, _, suffix = name.rpartition(".")
        above = layer.rpartition(".")[0]
        scheme = found.get(layer)
        known = () if scheme is None else (*name_tensors(scheme, (1, 1), layers[layer]), *BESIDE)
        if scheme is not None and scheme.activation == "none":
            known = (*known, "input_scale")
        if above in found or (scheme is not None and suffix not in known):
            raise CheckpointError(
                f"{header.file}: tensor {name} ({header.dtype} {list(header.shape)}) stands beside "
                f"the codes of {above if above in found else layer}, expected no more than "
                f"{', '.join(known or ('weight', 'bias', *SCALES))}: leaving it out would give "
                "other numbers without an error. Quantize with a scheme that is known"
            )
