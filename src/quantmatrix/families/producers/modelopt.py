"""How one layer of a ModelOpt-style checkpoint is stored, judged by its tensors' headers.

The dtype of `weight` decides: U8 means NVFP4 codes, F8_E4M3 an FP8 layer, anything else full
precision. Whatever does not add up is refused with the layer's name, since a wrong guess would
decode without an error. `modelopt_nvfp4` describes the tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from quantmatrix.checkpoints.dtypes import FLOATS
from quantmatrix.errors import CheckpointError
from quantmatrix.kernels.nvfp4_arithmetic import GROUP
from quantmatrix.kernels.scale_layouts import pad_shape
from quantmatrix.scheme import Scheme, TensorSpec

if TYPE_CHECKING:
    from quantmatrix.checkpoints.checkpoint import Checkpoint
    from quantmatrix.checkpoints.header import TensorHeader

FP8 = Scheme("linear.fp8", "FP8", "e4m3", "tensor", "tensor-static")
WEIGHT_ONLY = "W4A16_NVFP4"
FP8_ALGORITHMS = ("FP8",)
NVFP4_ALGORITHMS = ("NVFP4", "NVFP4_SVD", WEIGHT_ONLY, "NVFP4_AWQ")
"""Algorithms that one layer may have, by its codes."""
MIXED = "MIXED_PRECISION"
"""The algorithm of a file whose layers differ."""
SCALES = frozenset(
    ("weight_scale", "weight_scale_2", "pre_quant_scale", "svdquant_lora_a", "svdquant_lora_b")
)
"""Suffixes that mean nothing beside a weight in full precision."""
BESIDE = frozenset(("bias", "comfy_quant"))
"""Suffixes that may stand in any layer."""


@dataclass(frozen=True)
class StoredLayer:
    """The tensors below one layer name."""

    checkpoint: Checkpoint
    name: str
    suffixes: frozenset[str]

    def header(self, suffix: str) -> TensorHeader | None:
        """Header of one tensor, or None."""
        return self.checkpoint.tensors.get(f"{self.name}.{suffix}")

    def describe(self, suffix: str) -> str:
        """Dtype and shape of a tensor as text."""
        header = self.header(suffix)
        return "missing" if header is None else f"{header.dtype} {list(header.shape)}"

    def fits(self, suffix: str, spec: TensorSpec) -> bool:
        """Whether a tensor has one of the dtypes and one of the shapes asked for."""
        header = self.header(suffix)
        return header is not None and header.dtype in spec.dtypes and header.shape in spec.shapes

    def wrong(self, what: str) -> CheckpointError:
        """An error about the layer, naming the file that holds its first tensor."""
        first = self.header(min(self.suffixes))
        file = first.file if first else self.checkpoint.reference
        return CheckpointError(f"{file}: layer {self.name} {what}")


def refuse_others(layer: StoredLayer, known: Iterable[str]) -> None:
    """A tensor of a quantized layer that nothing would use changes its numbers in unknown ways.

    Raises CheckpointError for one that is not `known`.
    """
    others = sorted(layer.suffixes - {*known, *BESIDE})
    if others:
        raise layer.wrong(
            f"has {', '.join(others)} beside {', '.join(sorted(known))}: no such layer is known, "
            "and leaving a tensor out would give other numbers without an error"
        )


def read_block(checkpoint: Checkpoint) -> dict[str, Any]:
    """The quantization block, a nested one (as in hf_quant_config.json) made flat."""
    block = dict(checkpoint.quantization or {})
    nested = block.pop("quantization", None)
    if isinstance(nested, Mapping):
        block = {"quant_method": "modelopt", **block, **nested}
    if "exclude_modules" in block:
        block["ignore"] = block.pop("exclude_modules")
    return block


def read_method(block: Mapping[str, Any]) -> tuple[str, str]:
    """(quant_method in lower case, quant_algo in upper case); empty when not given."""
    return str(block.get("quant_method") or "").lower(), str(block.get("quant_algo") or "").upper()


def is_nvfp4(layer: StoredLayer) -> bool:
    """Whether the tensors are NVFP4 codes; an FP8 layer's scalar scale is not a block scale."""
    weight, scale = layer.header("weight"), layer.header("weight_scale")
    if weight is None or scale is None:
        return False
    return weight.dtype == "U8" and scale.dtype == "F8_E4M3" and len(scale.shape) >= 2


def judge_layer(layer: StoredLayer, layout: Scheme, algorithm: str) -> Scheme | None:
    """Scheme of a layer, None for full precision; raises CheckpointError when nothing fits.

    `layout` holds the file's nibble order and scale layout, `algorithm` the quant_algo declared
    for the layer or for the whole file (empty: none).
    """
    weight = layer.header("weight")
    if weight is not None and weight.dtype == "U8":
        return judge_nvfp4(layer, layout, algorithm)
    if weight is not None and weight.dtype == "F8_E4M3":
        return judge_fp8(layer)
    if layer.suffixes & SCALES:
        what = "no weight" if weight is None else f"a {weight.dtype} weight"
        scales = ", ".join(sorted(layer.suffixes & SCALES))
        raise layer.wrong(
            f"has {scales} but {what}: expected U8 (NVFP4) or F8_E4M3 (FP8) codes beside them"
        )
    return None


def judge_fp8(layer: StoredLayer) -> Scheme:
    """Scheme of a layer of e4m3 codes with one scale; raises CheckpointError for other scales."""
    if layer.fits("weight_scale", TensorSpec(("F32",), ((), (1,)))):
        static = "input_scale" in layer.suffixes
        scheme = FP8 if static else replace(FP8, activation="tensor-dynamic")
        refuse_others(layer, list_tensors(scheme, 0, 0))
        return scheme
    scale = layer.header("weight_scale")
    kind = "" if scale is None else "MXFP8: " if scale.dtype == "U8" else "per-channel FP8: "
    raise layer.wrong(
        f"is {kind}F8_E4M3 with weight_scale {layer.describe('weight_scale')}; expected one F32 "
        "scale for the layer. Quantize it with FP8 per tensor, or leave it in BF16"
    )


def judge_nvfp4(layer: StoredLayer, layout: Scheme, algorithm: str) -> Scheme:
    """Scheme of a layer of e2m1 codes, every tensor that it needs checked.

    What the algorithm promises must be there: a smoothed layer without its multipliers decodes to
    other numbers. Raises CheckpointError where it is not.
    """
    scheme = layout
    if algorithm == "NVFP4_SVD" or {"svdquant_lora_a", "svdquant_lora_b"} & layer.suffixes:
        branch = layer.header("svdquant_lora_a")
        rank = branch.shape[0] if branch and branch.shape else 1
        scheme = replace(scheme, name="NVFP4_SVD", rank=rank, smoothed=True)
    elif algorithm == "NVFP4_AWQ" or "pre_quant_scale" in layer.suffixes:
        scheme = replace(scheme, name="NVFP4_AWQ", smoothed=True)
    if algorithm == WEIGHT_ONLY:
        if "input_scale" in layer.suffixes:
            raise layer.wrong(f"has an input_scale, but its quant_algo is {WEIGHT_ONLY}")
        scheme = replace(scheme, name=WEIGHT_ONLY, activation="none")
    check_nvfp4(layer, scheme, algorithm)
    return scheme


def check_nvfp4(layer: StoredLayer, scheme: Scheme, algorithm: str) -> None:
    """Every tensor of the scheme must be there, in the shape that the weight asks for.

    Raises CheckpointError where one is not.
    """
    weight = layer.header("weight")
    if weight is None or len(weight.shape) != 2 or 2 * weight.shape[1] % GROUP:
        raise layer.wrong(
            f"has weight {layer.describe('weight')}: expected U8 [N, K/2], K a multiple of {GROUP}"
        )
    rows, columns = weight.shape[0], 2 * weight.shape[1]
    specs = list_tensors(scheme, rows, columns)
    for suffix, spec in specs.items():
        header = layer.header(suffix)
        if header is None and not spec.optional:
            raise layer.wrong(f"has no {suffix}{explain_missing(suffix, algorithm)}")
        if header is None or layer.fits(suffix, spec):
            continue
        expected = " or ".join(str(list(shape)) for shape in spec.shapes)
        text = f"has {suffix} {layer.describe(suffix)}: expected {'/'.join(spec.dtypes)} {expected}"
        if suffix == "weight_scale" and header.dtype == "F8_E4M3" and is_larger(header, spec):
            text += (
                ". These scales are padded: export again without padding_strategy and without "
                "enable_swizzle_layout"
            )
        raise layer.wrong(text)
    refuse_others(layer, specs)


def explain_missing(suffix: str, algorithm: str) -> str:
    """Why a tensor must be there, and what to do."""
    if suffix != "input_scale":
        return ": the checkpoint is incomplete"
    return (
        f", which every layer of an {algorithm or 'NVFP4'} export has. If inputs are meant to stay "
        f'in full precision, declare "quant_algo": "{WEIGHT_ONLY}"; otherwise calibrate and export '
        "again"
    )


def is_larger(header: TensorHeader, spec: TensorSpec) -> bool:
    """Whether a 2-D tensor exceeds the shape asked for."""
    if len(header.shape) != 2:
        return False
    return any(have > want for have, want in zip(header.shape, spec.shapes[0], strict=True))


def list_tensors(scheme: Scheme, out_features: int, in_features: int) -> dict[str, TensorSpec]:
    """The tensors of a layer on disk, by suffix, `bias` left out."""
    scalar = TensorSpec(("F32",), ((), (1,)))
    if scheme.op == "linear.fp8":
        weight = TensorSpec(("F8_E4M3",), ((out_features, in_features),))
        found = {"weight": weight, "weight_scale": scalar}
        return {**found, "input_scale": scalar} if scheme.activation == "tensor-static" else found
    table = (out_features, in_features // GROUP)
    shape = pad_shape(*table) if scheme.tiled_scales else table
    specs = {
        "weight": TensorSpec(("U8",), ((out_features, in_features // 2),)),
        "weight_scale": TensorSpec(("F8_E4M3",), (shape,)),
        "weight_scale_2": scalar,
    }
    if scheme.activation != "none":
        specs["input_scale"] = replace(scalar, optional=scheme.tiled_scales)
    if scheme.smoothed:
        specs["pre_quant_scale"] = TensorSpec(FLOATS, ((in_features,),))
    if scheme.rank:
        specs["svdquant_lora_a"] = TensorSpec(FLOATS, ((scheme.rank, in_features),))
        specs["svdquant_lora_b"] = TensorSpec(FLOATS, ((out_features, scheme.rank),))
    return specs
