"""What the tensors of an SVDQuant file say of its layers: every one of them is accounted for.

`nunchaku_svdq` has the table of the tensors. Precision and rank are those of the tensors; a header
that says otherwise, a tensor that nothing would use and a number that cannot be meant are errors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, NoReturn

import torch

from quantmatrix.errors import CheckpointError
from quantmatrix.kernels import svdq_packing as packing
from quantmatrix.scheme import Scheme, TensorSpec

if TYPE_CHECKING:
    from quantmatrix.checkpoints.checkpoint import Checkpoint
    from quantmatrix.checkpoints.header import TensorHeader

INT4 = Scheme("linear.svdq", "svdq-int4", "int4", "group", "group-dynamic", group_size=64)
NVFP4 = Scheme("linear.svdq", "svdq-nvfp4", "e2m1", "group", "group-dynamic", group_size=16)
AWQ = Scheme("linear.w4a16", "awq-int4", "uint4", "group", "none", group_size=64)
RANKS = (16, 32, 64, 128, 256)
SCHEMES: Mapping[str, Scheme] = {
    **{f"int4_r{rank}": replace(INT4, rank=rank) for rank in RANKS},
    **{f"nvfp4_r{rank}": replace(NVFP4, rank=rank) for rank in RANKS},
    "awq": AWQ,
}
FLOATS = ("BF16", "F16")
NUMBERS = (*FLOATS, "F32")
OLDER_NAMES = {
    "smooth": "smooth_factor",
    "smooth_orig": "smooth_factor_orig",
    "lora_down": "proj_down",
    "lora_up": "proj_up",
}
"""Suffixes of older files (FLUX.1), and what they are called now."""
CODE_PARTS = frozenset(
    ("wscales", "wzeros", "wcscales", "wtscale", *OLDER_NAMES.values(), "smooth", "smooth_orig")
)
"""Suffixes that stand beside a qweight only; `lora_down` and `lora_up` are those of a LoRA, too."""
POSITIVE = ("smooth_factor", "wcscales", "wtscale")
"""What inputs are divided by, and outputs multiplied; a single group's scale may be zero."""
BARE_SCALE = 16.0
"""Group scales above this belong under a scale of the layer: alone they make weights above 96."""
PRECISIONS = {"int4": "int4", "e2m1": "nvfp4"}
"""Names of a scheme's weight format."""


def schemes(checkpoint: Checkpoint) -> dict[str, Scheme]:
    """Scheme of each layer that holds codes.

    Raises CheckpointError for tensors that do not make up a layer, and for a header that says
    otherwise.
    """
    found: dict[str, Scheme] = {}
    layers = checkpoint.layers()
    for name, suffixes in layers.items():
        if "qweight" in suffixes:
            found[name] = judge_layer(checkpoint, name, suffixes)
        elif own := suffixes & CODE_PARTS:
            other = checkpoint.tensors[f"{name}.{min(own)}"]
            raise CheckpointError(
                f"{other.file}: tensor {name}.qweight is missing beside {other.name}: expected the "
                "codes of the layer; the file is incomplete"
            )
    for name, suffixes in layers.items():
        above = name.rpartition(".")[0]
        if above in found:
            refuse_extra(checkpoint, f"{name}.{min(suffixes)}", above)
    check_alike(checkpoint, found)
    for name, scheme in found.items():
        if scheme.op == "linear.svdq":
            check_header(checkpoint, name, scheme)
    return found


def judge_layer(checkpoint: Checkpoint, name: str, suffixes: frozenset[str]) -> Scheme:
    """Scheme of one layer from its tensors' headers.

    Raises CheckpointError for tensors that are missing, of another form or of no use.
    """
    own: dict[str, TensorHeader] = {}
    for suffix in sorted(suffixes):
        part, today = checkpoint.tensors[f"{name}.{suffix}"], OLDER_NAMES.get(suffix, suffix)
        if today in own:
            raise CheckpointError(
                f"{part.file}: tensors {own[today].name} and {part.name} are two names of one "
                "thing, of which a layer has one: remove the one that is not meant"
            )
        own[today] = part
    scheme = AWQ
    if own["qweight"].dtype != "I32" and "wzeros" not in own:
        wscales, down = own.get("wscales"), own.get("proj_down")
        scheme = NVFP4 if wscales is not None and wscales.dtype == "F8_E4M3" else INT4
        rank = down.shape[1] if down is not None and len(down.shape) == 2 else 0
        scheme = replace(scheme, rank=rank)
        if down is not None and (rank == 0 or rank % packing.RANK_TILE):
            raise CheckpointError(
                f"{down.file}: tensor {down.name} has shape {list(down.shape)}: expected [K, rank] "
                f"with a rank that is a multiple of {packing.RANK_TILE}; the file is damaged or of "
                "another format"
            )
    shape = own["qweight"].shape
    rows, columns = (4, 2) if scheme is AWQ else (1, 2)
    out, into = (shape[0] * rows, shape[1] * columns) if len(shape) == 2 else (0, 0)
    tile = 64 if scheme is AWQ else packing.TILE
    if not out or not into or into % tile or (scheme is not AWQ and out % tile):
        raise CheckpointError(
            f"{own['qweight'].file}: tensor {name}.qweight has shape {list(shape)}, which is no "
            f"layer whose sizes are multiples of {tile}: the file is damaged or of another format"
        )
    specs = {**tensors(scheme, out, into), "bias": TensorSpec(NUMBERS, ((out,),), optional=True)}
    for suffix, spec in specs.items():
        header = own.pop(suffix, None)
        if header is None and not spec.optional:
            raise CheckpointError(
                f"{checkpoint.tensors[f'{name}.qweight'].file}: tensor {name}.{suffix} is missing "
                f"beside {name}.qweight: expected the tensors of {describe(scheme)}; the file is "
                "incomplete"
            )
        if header is None:
            continue
        if header.dtype not in spec.dtypes or header.shape not in spec.shapes:
            raise CheckpointError(
                f"{header.file}: tensor {header.name} is {header.dtype} {list(header.shape)}, "
                f"expected {' or '.join(spec.dtypes)} "
                f"{' or '.join(str(list(s)) for s in spec.shapes)} beside a qweight of "
                f"{list(shape)}: the file is damaged or of another format"
            )
    for part in own.values():
        refuse_extra(checkpoint, part.name, name, scheme)
    return scheme


def describe(scheme: Scheme) -> str:
    """A kind of layer as text."""
    return "an AWQ layer" if scheme is AWQ else f"an SVDQuant layer ({PRECISIONS[scheme.weight]})"


def refuse_extra(
    checkpoint: Checkpoint, name: str, layer: str, scheme: Scheme | None = None
) -> NoReturn:
    """A tensor that nothing would use: it may change what the layer means (a LoRA, a scale).

    Raises CheckpointError in every case.
    """
    kind = "a quantized layer" if scheme is None else describe(scheme)
    raise CheckpointError(
        f"{checkpoint.tensors[name].file}: tensor {name} is not part of {kind} as the engine reads "
        f"it, and {layer} is one: leaving it out could change the result. Take it out of the file "
        "if it means nothing (a LoRA must be merged before a model is quantized)"
    )


def check_alike(checkpoint: Checkpoint, found: Mapping[str, Scheme]) -> None:
    """A file has one precision and one rank: layers of two come from two checkpoints.

    Raises CheckpointError for such a file.
    """
    first: dict[tuple[str, int], str] = {}
    for name, scheme in found.items():
        if scheme.op == "linear.svdq":
            first.setdefault((PRECISIONS[scheme.weight], scheme.rank), name)
    if len(first) > 1:
        (one, a), (two, b) = list(first.items())[:2]
        raise CheckpointError(
            f"{checkpoint.tensors[f'{b}.qweight'].file}: layer {a} is {one[0]} of rank {one[1]}, "
            f"layer {b} is {two[0]} of rank {two[1]}: expected one of each throughout a file; it "
            "was put together from two checkpoints"
        )


def check_header(checkpoint: Checkpoint, name: str, scheme: Scheme) -> None:
    """Rank, number formats and groups in the header must be those of the tensors.

    Raises CheckpointError where they are not.
    """
    block = checkpoint.quantization or {}
    source = checkpoint.quantization_from or checkpoint.reference
    stated = {"rank": block.get("rank")}
    for side in ("weight", "activation"):
        part = block.get(side) or {}
        if not isinstance(part, Mapping):
            raise CheckpointError(
                f"{source}: {side} is {json.dumps(part)[:120]}: expected a JSON object with dtype "
                "and group_size"
            )
        stated[f"{side}.dtype"] = part.get("dtype")
        stated[f"{side}.group_size"] = part.get("group_size")
    number = "int4" if scheme.weight == "int4" else "fp4_e2m1_all"
    for key, said in stated.items():
        actual = {"rank": scheme.rank, "dtype": number}.get(
            key.rpartition(".")[2], scheme.group_size
        )
        if key.endswith("dtype") and str(said).startswith("fp4"):
            said = "fp4_e2m1_all"
        if said is not None and said != actual:
            raise CheckpointError(
                f"{source}: {key} is {json.dumps(said)}, but the tensors of {name} say "
                f"{json.dumps(actual)}: the header belongs to another file"
            )
    if block.get("skip_refiners") and "_refiner." in name:
        raise CheckpointError(
            f"{source}: skip_refiners is true, but {name} is quantized: the header belongs to "
            "another file"
        )


def tensors(scheme: Scheme, out_features: int, in_features: int) -> dict[str, TensorSpec]:
    """The tensors of a layer on disk, by suffix in today's spelling, `bias` left out."""
    groups = in_features // scheme.group_size
    if scheme.op == "linear.w4a16":
        padded = (-(-groups // 16) * 16, out_features)
        scales = TensorSpec(FLOATS, ((groups, out_features), padded))
        codes = TensorSpec(("I32",), ((out_features // 4, in_features // 2),))
        return {"qweight": codes, "wscales": scales, "wzeros": scales}
    numbers = FLOATS if scheme.weight == "int4" else ("F8_E4M3",)
    found = {
        "qweight": TensorSpec(("I8",), ((out_features, in_features // 2),)),
        "wscales": TensorSpec(numbers, ((groups, out_features),)),
        "smooth_factor": TensorSpec(FLOATS, ((in_features,),)),
        "smooth_factor_orig": TensorSpec(FLOATS, ((in_features,),), optional=True),
        "proj_down": TensorSpec(FLOATS, ((in_features, scheme.rank),)),
        "proj_up": TensorSpec(FLOATS, ((out_features, scheme.rank),)),
    }
    if scheme.weight == "e2m1":
        found["wcscales"] = TensorSpec(NUMBERS, ((out_features,),), optional=True)
        found["wtscale"] = TensorSpec(NUMBERS, ((1,), ()), optional=True)
    return found


def loses_codes(scales: torch.Tensor, codes: torch.Tensor, scheme: Scheme) -> bool:
    """Whether scales of zero stand beside codes that are not: of int4 in any group of them.

    Small groups of nvfp4 round to a scale of zero, AWQ pads with zeros and has no code for a zero:
    there only a scale tensor without any other number is a fault. `scales` and `codes` are
    `wscales` and `qweight`, tensors as in the table of `families.nunchaku_svdq`.
    """
    if scheme.op != "linear.svdq" or scheme.weight != "int4":
        return not scales.float().any() and bool(codes.any())
    empty = packing.unpack_scales(scales) == 0
    if not empty.any():
        return False
    groups = packing.unpack_codes(codes).unflatten(1, (empty.shape[1], -1))
    return bool((groups.any(dim=-1) & empty).any())


def after_gelu(scheme: Scheme) -> Scheme:
    """The scheme of a layer whose inputs follow a GELU: int4 codes them shifted, without a sign."""
    coded = scheme.op == "linear.svdq" and scheme.weight == "int4"
    return replace(scheme, unsigned=True) if coded else scheme


def find_wrong_number(
    tensors: Mapping[str, torch.Tensor], scheme: Scheme
) -> tuple[str, str] | None:
    """(suffix, what it holds and what was expected) of numbers that cannot be meant.

    None where there are none. Tensors as in the table of `families.nunchaku_svdq`.
    """
    own = {OLDER_NAMES.get(suffix, suffix): suffix for suffix in tensors}
    for today, suffix in own.items():
        if today == "smooth_factor_orig" or not tensors[suffix].is_floating_point():
            continue
        numbers = tensors[suffix].float()
        if not torch.isfinite(numbers).all():
            return suffix, "holds NaN or infinite numbers: expected finite ones"
        if today in POSITIVE and not (numbers > 0).all():
            return suffix, "holds zero or negative numbers: expected positive ones"
        if today == "wscales" and (numbers < 0).any():
            return suffix, "holds negative scales: expected positive ones"
        if today == "wscales" and loses_codes(tensors[suffix], tensors["qweight"], scheme):
            return suffix, "holds zero scales beside codes that are not 0: expected positive ones"
    if scheme.weight == "e2m1" and not own.keys() & {"wtscale", "wcscales"}:
        largest = tensors["wscales"].float().amax().item()
        if largest > BARE_SCALE:
            return "wscales", (
                f"holds scales of up to {largest:g} with neither wtscale nor wcscales beside it: "
                "expected the scale of the layer, or of its outputs, that they go with"
            )
    return None
