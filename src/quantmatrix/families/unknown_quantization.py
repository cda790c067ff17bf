"""Unknown quantization: why a checkpoint that no family takes is not one in full precision.

`explain_unknown` alone says so. It looks first for the formats of `FORMATS`, which
are known by name and read by no family; then at what the checkpoint declares, and at last for codes
that nothing declares. A format is recognised by any of these:

| what tells it | for example |
| ------------- | ----------- |
| a name: `quant_method`, `quant_algo`, `method`, or the format of a layer in a list | `torchao` |
| a string in the header | `quantization_format: quanto` |
| the tensors of a layer, by the ends of their names | `qweight`, `qzeros`, `scales` |
| the dtype of a tensor | F8_E5M2 |

Sources: files of torchao 0.18, optimum-quanto 0.2.7 and SDNQ 0.2.8; bitsandbytes and AutoRound as
diffusers loads them, comfy-kitchen's and compressed-tensors' names; the pages of mflux and ExLlama.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from quantmatrix import families
from quantmatrix.checkpoints.adapters import explain_adapter
from quantmatrix.checkpoints.declaration import METHOD_KEYS
from quantmatrix.checkpoints.gguf import MAGIC
from quantmatrix.families.producers.comfyui import PLAIN_FORMATS
from quantmatrix.families.producers.compressed_tensors import is_float_quantized

if TYPE_CHECKING:
    from quantmatrix.checkpoints.checkpoint import Checkpoint

LISTED = (
    "float8_e4m3fn",
    "float8_e4m3fn_rowwise",
    "float8_e5m2",
    "int8_tensorwise",
    "mxfp8",
    "nvfp4",
)
"""Formats of a layer in ComfyUI's lists that a family takes."""
PLAIN_DTYPES = ("BF16", "F16", "F32", "F64", "I64", "I32", "BOOL")
INTEGERS = ("U8", "I8", "U16", "I16", "U32", "I32")
SCALE = re.compile(r"\.(weight_scale|input_scale|comfy_quant|qweight)$")
"""Tensors that stand beside codes only."""
CODED = re.compile(r"weight[^.]*(\._\w+)?$")
"""Names that weights have, whichever library took them apart."""
WEIGHT = r"(^|\.)(weight|bias)$"
DIFFUSERS = "in diffusers load it with from_pretrained, then dequantize() and save_pretrained()"
FULL = "Name weights in full precision"


@dataclass(frozen=True)
class Format:
    """One format that no family reads, how it is recognised and what can be done."""

    name: str
    advice: str
    names: tuple[str, ...] = ()
    """What declares it, in lower case with `_` for `-`."""
    header: str = ""
    """Regular expression over `key: value` of the header's strings."""
    layers: tuple[frozenset[str], ...] = ()
    """Ends of names; a layer with all of one set is of this format."""
    codes: tuple[str, ...] = ()
    """Dtypes of which one is that of such a layer's weight; empty: any."""
    dtypes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Dtypes by the regular expression of the names that have them; empty: any."""
    bare: bool = False
    """Recognised by its tensors only where nothing declares a quantization."""


def _sets(*texts: str) -> tuple[frozenset[str], ...]:
    return tuple(frozenset(text.split()) for text in texts)


def _decode(library: str, how: str) -> str:
    return f"Let {library} write plain weights ({how}), or name others in full precision"


GGUF_ITSELF = "Name the .gguf file itself, whose tensors say their types, or full precision"
_COMFY = "Name a file in float8_e4m3fn, int8_tensorwise or nvfp4, or in full precision"
FORMATS = (
    Format(
        "torchao",
        _decode("torchao", DIFFUSERS),
        names=("torchao",),
        header=r'"_tensor_data_names":',
        layers=_sets("_weight_qdata", "_weight:qdata", "_weight_tensor_impl"),
    ),
    Format(
        "quanto",
        _decode("optimum-quanto", "its weights have dequantize()"),
        names=("quanto",),
        header=r"^quantization_(format: quanto|map_base64:)",
        layers=_sets("_data _scale", "_scale _shift"),
    ),
    Format(
        "bitsandbytes",
        _decode("bitsandbytes", DIFFUSERS),
        names=("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit"),
        layers=_sets(
            "absmax quant_map", "SCB", "weight_format", "bitsandbytes__nf4", "bitsandbytes__fp4"
        ),
    ),
    Format(
        "AutoRound",
        f"{FULL}: AutoRound packs weights as GPTQ or AWQ do, for kernels of its own",
        names=("auto_round", "autoround", "intel/auto_round", "intel_auto_round"),
    ),
    Format(
        "SDNQ",
        _decode("sdnq", "its loader dequantizes a model"),
        names=("sdnq", "sdnq_training"),
        layers=_sets("weight scale", "weight svd_up svd_down"),
        codes=INTEGERS,
    ),
    Format(
        "AWQ or GPTQ",
        f"{FULL}: this packing of int4 codes, AutoRound's too, is for language models' kernels",
        names=("awq", "gptq", "gptq_v2", "gptqmodel", "marlin"),
        layers=_sets("qweight qzeros scales"),
    ),
    Format(
        "HQQ",
        _decode("hqq", "its layers have dequantize()"),
        names=("hqq",),
        layers=_sets("W_q"),
    ),
    Format(
        "MLX (Apple's, mflux's too)",
        _decode("mlx", "mlx.core.dequantize gives each layer's"),
        names=("mlx",),
        header=r"^(mflux_version|quantization_level): ",
        layers=_sets("weight scales biases"),
        codes=("U32",),
    ),
    Format(
        "EXL2 or EXL3",
        f"{FULL}: this packing is for a language model's kernels",
        names=("exl2", "exl3"),
        layers=_sets("q_weight q_scale", "trellis suh svh"),
    ),
    Format(
        "Quark (AMD's)",
        _decode("quark", "its ModelImporter, then save_pretrained()"),
        names=("quark",),
    ),
    Format("FBGEMM's FP8", _decode("fbgemm-gpu", DIFFUSERS), names=("fbgemm_fp8",)),
    Format("GGUF", GGUF_ITSELF, (MAGIC.decode().lower(),)),
    Format(
        "compressed-tensors",
        _decode("compressed-tensors", "its ModelCompressor decompresses a model"),
        names=("compressed_tensors",),
        layers=_sets("weight_packed", "weight_global_scale"),
    ),
    Format("ComfyUI's INT8 in blocks", _COMFY, ("int8_blockwise", "int8_rowwise")),
    Format("ConvRot W4A4", _COMFY, ("convrot_w4a4",)),
    Format("ConvRot W4A8", _COMFY, ("asym_w4a8_int8",)),
    Format("ConvRot INT8", _COMFY, ("convrot_int8",)),
    Format("ComfyUI's SVDQuant", _COMFY, ("svdquant_w4a4",)),
    Format(
        "MXFP8",
        f"{FULL}, or a file of ComfyUI or msmodelslim, whose MXFP8 is read",
        dtypes={r"scale(_inv)?$": ("F8_E8M0",)},
        bare=True,
    ),
    Format("MXFP4", f"{FULL}, or NVFP4, which has blocks of 16", names=("mxfp4",)),
    Format(
        "FP8 in FNUZ (AMD's, another bias of exponents)",
        "The file is whole: name one in e4m3fn, or multiply weights and scales into plain numbers",
        names=("float8_e4m3fnuz", "float8_e5m2fnuz", "e4m3fnuz", "e5m2fnuz"),
        dtypes={WEIGHT: ("F8_E4M3FNUZ", "F8_E5M2FNUZ")},
    ),
    Format(
        "ModelOpt's simulation of a quantized model",
        "The model was saved (save_pretrained), not exported, so that its weights are not what the "
        "simulation computed with: write it with modelopt.torch.export.export_hf_checkpoint",
        dtypes={r"_quantizer\.": ()},
        bare=True,
    ),
)
"""Formats that are known by name and read by no family, more specific ones first."""


def explain_unknown(checkpoint: Checkpoint) -> str | None:
    """Why a checkpoint is neither of a family nor in full precision; None: it is.

    The text names the file, what was found in it, the format where it is known, and what can be
    done. What a checkpoint declares counts even where every tensor is plain: whoever names it
    expects a quantized model.
    """
    return (
        explain_adapter(checkpoint)
        or explain_format(checkpoint)
        or (None if families.detect(checkpoint) else explain_declaration(checkpoint))
    )


def explain_format(checkpoint: Checkpoint) -> str | None:
    """Why a checkpoint in one of `FORMATS` is not taken; None: it is in none of them."""
    declared = dict(list_declared(checkpoint))
    for known in FORMATS:
        said = next((text for name, text in declared.items() if name in known.names), None)
        if said is not None:
            return f"{said}, which no quant family takes: this is {known.name}. {known.advice}"
    for known in FORMATS:
        found = find_tensor(checkpoint, known)
        if found is not None:
            return f"{found} belongs to {known.name}, which no quant family takes. {known.advice}"
    return None


def list_declared(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """(name that declares a format, where it is declared) of the whole and of each listed layer."""
    block = read_block(checkpoint)
    stated = describe_block(block)
    for key in METHOD_KEYS:
        if block.get(key):
            name = str(block[key]).lower().replace("-", "_")
            if not is_float_quantized(block):
                yield name, f"{checkpoint.quantization_from} declares {stated}"
    for layer, name in list_formats(checkpoint):
        yield name.lower(), f"{checkpoint.quantization_from}: {layer} has the format {name}"


def list_formats(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """(layer, format) of every layer to which a list gives a format."""
    listed = (checkpoint.quantization or {}).get("layers")
    for layer, entry in listed.items() if isinstance(listed, Mapping) else ():
        name = entry.get("format") if isinstance(entry, Mapping) else entry
        if name and isinstance(name, str):
            yield str(layer), name


def read_block(checkpoint: Checkpoint) -> Mapping[str, object]:
    """What a checkpoint declares, a nested description made flat."""
    block = checkpoint.quantization or {}
    nested = block.get("quantization")
    return {**block, **nested} if isinstance(nested, Mapping) else block


def describe_block(block: Mapping[str, object]) -> str:
    """A declaration's own names of its format."""
    keys = (*METHOD_KEYS, "format") if "quant_method" in block else METHOD_KEYS
    return ", ".join(f"{key} {block[key]}" for key in keys if block.get(key))


def find_tensor(checkpoint: Checkpoint, known: Format) -> str | None:
    """The first string, layer or tensor by which a file is of a format, as text; None: it is
    not."""
    if known.bare and (checkpoint.quantization is not None or checkpoint.description is not None):
        return None
    for key, value in checkpoint.metadata.items() if known.header else ():
        if re.search(known.header, f"{key}: {value}"):
            return f"{checkpoint.files[0]}: {key} in the header, {value[:80]!r},"
    for layer, suffixes in checkpoint.layers().items() if known.layers else ():
        weight = checkpoint.tensors.get(f"{layer}.weight")
        fits = not known.codes or (weight is not None and weight.dtype in known.codes)
        ends = next((ends for ends in known.layers if ends <= suffixes), None)
        if ends is not None and fits:
            first = checkpoint.tensors[f"{layer}.{min(ends)}"]
            return f"{first.file}: layer {layer} with {', '.join(sorted(ends))}"
    for pattern, dtypes in known.dtypes.items():
        for name, header in checkpoint.tensors.items():
            if (not dtypes or header.dtype in dtypes) and re.search(pattern, name):
                what = "" if known.bare else f" ({header.dtype} {list(header.shape)})"
                return f"{header.file}: tensor {name}{what}"
    return None


def explain_declaration(checkpoint: Checkpoint) -> str | None:
    """Why a checkpoint that no family takes, of no known format, is not in full precision."""
    source = checkpoint.quantization_from
    block = read_block(checkpoint)
    for layer, name in list_formats(checkpoint):
        if name not in (*LISTED, *PLAIN_FORMATS):
            return (
                f"{source}: {layer} has the format {name}, which no quant family takes: known are "
                f"{', '.join(LISTED)}. Quantize with one of these"
            )
    if declared := describe_block(block):
        lists = (families.load(family).ALGORITHMS for family in families.written())
        known = ", ".join(name for algorithms in lists for name in algorithms)
        return (
            f"{source} declares {declared}, which no quant family takes: known are "
            f"{', '.join(families.written())}, of ModelOpt the quant_algo {known}. Quantize with "
            "one of these, or name a checkpoint in full precision"
        )
    if block and "format_version" not in block:
        return (
            f"{source} describes a quantization by {', '.join(block)}, but says nowhere which: "
            "expected a quant_method. Add it, or remove the description"
        )
    return explain_codes(checkpoint)


def explain_codes(checkpoint: Checkpoint) -> str | None:
    """Why a file that declares nothing is not in full precision; None: no tensor shows it."""
    for name, header in checkpoint.tensors.items():
        coded = header.dtype not in PLAIN_DTYPES and CODED.search(name)
        if coded or SCALE.search(name):
            return (
                f"{header.file}: tensor {name} ({header.dtype} {list(header.shape)}) is quantized, "
                "but nothing declares how: expected a quantization_config in config.json or in the "
                "file's header, or a quant_model_description.json"
            )
    return None
