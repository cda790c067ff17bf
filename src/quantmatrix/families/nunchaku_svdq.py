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
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from quantmatrix import svdq_packing as packing
from quantmatrix.checkpoint import METHOD_KEYS
from quantmatrix.errors import CheckpointError, UsageError
from quantmatrix.families import svdq_writer
from quantmatrix.families.protocol import Calibration, Declaration
from quantmatrix.kernels import linear_svdq, linear_w4a16
from quantmatrix.scheme import Scheme, TensorSpec

if TYPE_CHECKING:
    from quantmatrix.checkpoint import Checkpoint, TensorHeader

ID = "nunchaku-svdq"
DIALECT = "nunchaku"
"""A model's dialect of that name says what the layers of its files stand for; others have none."""
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
METHODS = ("svdquant", "nunchaku")
"""Words that declare the engine's layout; diffusers' `nunchaku_lite` is another one."""
FILE_NAME = re.compile(r"svdq-(int4|fp4)_r(\d+)")
LORA = re.compile(r"(^|[._])lora_(down|up|A|B)(\.|$)")
LIGHTNING = re.compile(r"lightning.*?(\d+)-?steps?", re.IGNORECASE)
PRECISIONS = {"int4": "int4", "e2m1": "nvfp4"}
"""Words for a scheme's weight format."""


def infer_from_name(reference: str) -> tuple[str, int] | None:
    """(`int4` or `nvfp4`, rank) of a path whose last part holds svdq-{int4|fp4}_r{rank}."""
    match = FILE_NAME.search(PurePosixPath(reference.rstrip("/")).name)
    if match is None:
        return None
    return ("int4" if match[1] == "int4" else "nvfp4"), int(match[2])


def lightning_steps(reference: str) -> int | None:
    """Denoising steps that a Lightning checkpoint is named for, or None."""
    match = LIGHTNING.search(PurePosixPath(reference.rstrip("/")).name)
    return int(match[1]) if match else None


def detect(checkpoint: Checkpoint) -> str | None:
    """What declares SVDQuant, or the first layer whose tensors show it; LoRA files raise."""
    coded = next((n for n, s in checkpoint.layers().items() if {"qweight", "wscales"} <= s), None)
    if coded is None:
        refuse_lora(checkpoint)
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


def refuse_lora(checkpoint: Checkpoint) -> None:
    """A file of low-rank factors alone goes on top of a model, and is none."""
    found = next((name for name in checkpoint.tensors if LORA.search(name)), None)
    if found is not None:
        raise CheckpointError(
            f"{checkpoint.reference}: tensor {found} and no quantized weights: this is a LoRA, "
            "which adds to a model; name the model's own svdq-... file"
        )


def schemes(checkpoint: Checkpoint) -> dict[str, Scheme]:
    """Scheme of each layer that holds codes; a header that says otherwise raises."""
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
    """Scheme of one layer from its tensors' headers; what cannot be right raises."""
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
    """A kind of layer in words."""
    return "an AWQ layer" if scheme is AWQ else f"an SVDQuant layer ({PRECISIONS[scheme.weight]})"


def refuse_extra(
    checkpoint: Checkpoint, name: str, layer: str, scheme: Scheme | None = None
) -> NoReturn:
    """A tensor that nothing would use: it may change what the layer means (a LoRA, a scale)."""
    kind = "a quantized layer" if scheme is None else describe(scheme)
    raise CheckpointError(
        f"{checkpoint.tensors[name].file}: tensor {name} is no part of {kind} as the engine reads "
        f"it, and {layer} is one: leaving it out could change the result. Take it out of the file "
        "if it means nothing (a LoRA must be merged before a model is quantized)"
    )


def check_alike(checkpoint: Checkpoint, found: Mapping[str, Scheme]) -> None:
    """A file has one precision and one rank: layers of two come from two checkpoints."""
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
    """The header's words about rank, number formats and groups must be those of the tensors."""
    block = checkpoint.quantization or {}
    place = checkpoint.quantization_from or checkpoint.reference
    stated = {"rank": block.get("rank")}
    for side in ("weight", "activation"):
        part = block.get(side) or {}
        if not isinstance(part, Mapping):
            raise CheckpointError(
                f"{place}: {side} is {json.dumps(part)[:120]}: expected a JSON object with dtype "
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
                f"{place}: {key} is {json.dumps(said)}, but the tensors of {name} say "
                f"{json.dumps(actual)}: the header belongs to another file"
            )
    if block.get("skip_refiners") and "_refiner." in name:
        raise CheckpointError(
            f"{place}: skip_refiners is true, but {name} is quantized: the header belongs to "
            "another file"
        )


def check_request(
    enable: bool | None,
    precision: str | None,
    rank: int | None,
    checkpoint: Checkpoint,
    steps: int | None = None,
) -> list[str]:
    """Compare the guide's three SVDQuant flags and the file name with what the file holds.

    `enable` is None when the flag was not given; an explicit False makes the name count for
    nothing. A flag overrules the name. `steps` are those that the run will take. Returns warnings;
    contradictions raise UsageError or CheckpointError.
    """
    why = detect(checkpoint)
    if enable is False:
        if why is not None:
            raise UsageError(
                f"--enable-svdquant false, but {checkpoint.reference} is an SVDQuant checkpoint "
                f"({why}): leave the flag out, or name full-precision weights"
            )
        return []
    names = (checkpoint.reference, *(checkpoint.files if len(checkpoint.files) == 1 else ()))
    named = next(filter(None, map(infer_from_name, names)), None)
    if why is None:
        return refuse_plain(checkpoint, bool(enable), named, (precision, rank))
    layers = [s for s in schemes(checkpoint).values() if s.op == "linear.svdq"]
    held_words = {PRECISIONS[scheme.weight] for scheme in layers}
    held_ranks = {scheme.rank for scheme in layers}
    for flag, given, of_name, held in (
        ("--quantization-precision", precision, named and named[0], held_words),
        ("--quantization-rank", rank, named and named[1], held_ranks),
    ):
        wanted = of_name if given is None else given
        if wanted is not None and wanted not in held:
            source = f"{flag} {given}" if given is not None else f"the file name says {of_name}"
            words = " and ".join(map(str, sorted(held))) or "AWQ layers only, which have neither"
            raise CheckpointError(
                f"{checkpoint.files[0]}: {source}, but its tensors are of {words}: correct the "
                f"{'flag' if given is not None else f'name, or overrule it with {flag}'}"
            )
    expected = next(filter(None, map(lightning_steps, names)), None)
    if expected is not None and steps is not None and steps != expected:
        return [
            f"{checkpoint.reference} is a Lightning checkpoint for {expected} steps, this run "
            f"takes {steps}: pass --num-inference-steps {expected}"
        ]
    return []


def refuse_plain(
    checkpoint: Checkpoint,
    enable: bool,
    named: tuple[str, int] | None,
    flags: tuple[str | None, int | None],
) -> list[str]:
    """Nothing in the file is SVDQuant: an error where that was promised, else warnings."""
    if enable or named:
        promise = "--enable-svdquant was given" if enable else "it is named like an SVDQuant file"
        raise CheckpointError(
            f"{checkpoint.reference}: {promise}, but no header says svdquant and no layer has "
            "qweight and wscales; --enable-svdquant false loads it as what it is"
        )
    if flags != (None, None):
        return ["--quantization-precision and --quantization-rank count for SVDQuant files only"]
    return []


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
    there only a scale tensor without any other number is a fault.
    """
    if scheme.op != "linear.svdq" or scheme.weight != "int4":
        return not scales.float().any() and bool(codes.any())
    empty = packing.unpack_scales(scales) == 0
    if not empty.any():
        return False
    groups = packing.unpack_codes(codes).unflatten(1, (empty.shape[1], -1))
    return bool((groups.any(dim=-1) & empty).any())


def find_fault(tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> tuple[str, str] | None:
    """(suffix, what it holds and what was expected) of numbers that cannot be meant."""
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


def quantize(
    weight: torch.Tensor,
    scheme: Scheme,
    *,
    bias: torch.Tensor | None = None,
    calibration: Calibration | None = None,
    parts: int = 1,
) -> dict[str, torch.Tensor]:
    """On-disk tensors of a layer with weight [N, K], rows in the order of the file.

    Without a calibration nothing is smoothed. `parts` is how many original layers are stacked in
    it: each gets its own nvfp4 scale. Raises UsageError for sizes that the tiles cannot hold.
    """
    if scheme.op == "linear.w4a16":
        return svdq_writer.quantize_awq(weight, scheme, bias, calibration)
    return svdq_writer.quantize_svdq(weight, scheme, bias, calibration, parts)


def canonical(tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> dict[str, torch.Tensor]:
    """On-disk tensors of one layer as canonical tensors of `scheme.op`, rows in the file's order."""
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
    """The layer's exact arithmetic on on-disk tensors, activations quantized too."""
    compute = linear_w4a16.reference if scheme.op == "linear.w4a16" else linear_svdq.reference
    return compute(x, canonical(tensors, scheme), scheme)


def declare(schemes: Mapping[str, Scheme], kept: Sequence[str]) -> Declaration:
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
