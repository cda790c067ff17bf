"""What an fp8 checkpoint declares, every value checked before a layer is judged by it.

| key | values |
| --- | ------ |
| `activation_scheme` | `dynamic` (also when absent) or `static` |
| `weight_block_size` | two positive whole numbers, rows and columns of a block; absent: no blocks |
| `ignored_layers`, `modules_to_not_convert` | names of layers that were left alone |
| `fmt`, `scale_fmt` | how codes and scales are coded, where they are named: `e4m3`, `e5m2`; `float` |
| `format_version` | `1.0` or `1.1`, of a header that lists layers |
| `layers` | format name per layer: one with `float8` in it, `mxfp8`, or full precision (`bf16`) |
|          | beside it `full_precision_matrix_mult`: inputs are left alone, only weights have codes |
| `quant_configs` | `scale_recipe` per format name: `rowwise` |

A header entry `quantization: fp8r` (diffusers' conversion script) declares one F32 scale a row and
dynamic inputs, and nothing else.

An entry of an ignore list is a layer's full name, the name of a level above it, a pattern with `*`,
or the name that a runtime gives to projections that it fuses (`to_qkv`). A value that is not in the
table is refused: a wrong guess would give other numbers without an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantmatrix.errors import CheckpointError
from quantmatrix.families.producers import compressed_tensors

if TYPE_CHECKING:
    from quantmatrix.checkpoints.checkpoint import Checkpoint

IGNORE_KEYS = ("ignored_layers", "modules_to_not_convert")
VERSIONS = ("1.0", "1.1")
CODED, MXFP8 = "float8", "mxfp8"
MX_GROUP = 32
"""Columns that share a power of two, which an entry of MXFP8 may say."""
FOREIGN_CODES = ("fnuz", "e8m0")
"""Formats of eight bits that are neither float8_e4m3fn nor float8_e5m2."""
PLAIN_FORMATS = ("bf16", "bfloat16", "fp16", "float16", "fp32", "float32")
WHOLE_INPUTS = "full_precision_matrix_mult"
ROWWISE = "rowwise"
FP8R = "fp8r"
KNOWN_VALUES: Mapping[str, tuple[str | None, ...]] = {
    "activation_scheme": (None, "dynamic", "static"),
    "quant_algo": (None, "FP8"),
    "fmt": (None, "e4m3", "e4m3fn", "float8_e4m3fn", "e5m2", "float8_e5m2"),
    "scale_fmt": (None, "float", "float32"),
}
"""Keys that may have a few values only."""
FUSED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "w13": ("w1", "w3"),
}
"""Projections by the name under which runtimes fuse them; on disk each has its own."""


@dataclass(frozen=True)
class Declared:
    """A checked declaration."""

    source: str
    """Where it stands."""
    method: bool
    """Whether it names its quant_method; a header may just list layers."""
    static: bool
    block: tuple[int, int] | None
    formats: Mapping[str, str]
    """Format name per listed layer."""
    rowwise: frozenset[str]
    """Listed layers with one scale per output channel."""
    whole_inputs: frozenset[str]
    """Listed layers whose inputs are not quantized."""
    ignored: tuple[re.Pattern[str], ...]
    codes: str | None = None
    """Format of all codes, where it is named for the whole: `e4m3`, `e5m2` ..."""
    groups: tuple[compressed_tensors.Group, ...] = ()
    """Groups of layers, as compressed-tensors declares them."""

    def name_codes(self, layer: str) -> str:
        """The format that is declared for the codes of a layer, or an empty text."""
        return self.formats.get(layer) or self.codes or ""

    def is_coded(self, layer: str) -> bool:
        """Whether the list says that a layer holds e4m3 codes."""
        return names_codes(self.formats.get(layer, ""))

    def is_left_alone(self, layer: str) -> bool:
        """Whether a layer is said to stay in full precision.

        A list of layers without a quant_method is all there is: who is not on it has no codes.
        """
        if any(pattern.match(layer) for pattern in self.ignored):
            return True
        return not self.is_coded(layer) and (layer in self.formats or not self.method)


def names_codes(form: str) -> bool:
    """Whether a format of a layer has codes of eight-bit floats."""
    return CODED in form or form == MXFP8


def is_fp8r(checkpoint: Checkpoint) -> bool:
    """Whether the header's name of the quantization is that of scales per row, and nothing else
    is."""
    value = checkpoint.metadata.get("quantization", "").lower()
    return value == FP8R and not checkpoint.quantization


def read_declaration(checkpoint: Checkpoint) -> Declared:
    """The declaration of a checkpoint; raises CheckpointError for what is not known."""
    block = checkpoint.quantization or {}
    source = checkpoint.quantization_from or checkpoint.reference
    if is_fp8r(checkpoint):
        block, source = {"quant_method": "fp8"}, f"{checkpoint.files[0]}: quantization {FP8R}"
    if compressed_tensors.is_float_quantized(block):
        return read_groups(block, source)
    for key, known in KNOWN_VALUES.items():
        if block.get(key) not in known:
            raise wrong(source, key, block[key], f"{' or '.join(filter(None, known))}, or no {key}")
    version = block.get("format_version")
    if version is not None and str(version) not in VERSIONS:
        raise CheckpointError(
            f"{source}: format_version {version} is unknown; known: {', '.join(VERSIONS)}"
        )
    formats = read_formats(block)
    recipes = read_recipes(block, source, formats)
    for layer, form in formats.items():
        check_format(source, layer, form, block["layers"][layer])
    return Declared(
        source=source,
        method="quant_method" in block,
        static=block.get("activation_scheme") == "static",
        block=read_block_size(block, source),
        formats=formats,
        rowwise=frozenset(
            layer
            for layer, form in formats.items()
            if form.startswith(ROWWISE) or recipes.get(form) == ROWWISE
        ),
        whole_inputs=read_whole_inputs(block),
        ignored=tuple(read_ignored(block, source)),
        codes=block.get("fmt"),
    )


def read_groups(block: Mapping[str, Any], source: str) -> Declared:
    """What a block of compressed-tensors declares; CheckpointError for what is not known."""
    ignored = compressed_tensors.read_patterns(block.get("ignore") or [], source, "ignore")
    return Declared(
        source=source,
        method=True,
        static=False,
        block=None,
        formats={},
        rowwise=frozenset(),
        whole_inputs=frozenset(),
        ignored=tuple(ignored),
        groups=compressed_tensors.read_groups(block, source),
    )


def wrong(source: str, key: str, value: Any, expected: str) -> CheckpointError:
    """The error about one value of a declaration."""
    return CheckpointError(
        f"{source}: {key} is {json.dumps(value)[:120]}: expected {expected}. Correct the "
        "declaration, or quantize with a scheme that is known"
    )


def read_formats(block: Mapping[str, Any]) -> dict[str, str]:
    """Format name per layer of a header's `layers`, which holds names or objects."""
    layers = block.get("layers")
    if not isinstance(layers, Mapping):
        return {}
    return {
        str(layer): str(entry.get("format", "") if isinstance(entry, Mapping) else entry)
        for layer, entry in layers.items()
    }


def read_whole_inputs(block: Mapping[str, Any]) -> frozenset[str]:
    """Layers of a header's `layers` whose inputs are not quantized, as ComfyUI's writers say it."""
    layers = block.get("layers")
    entries = layers.items() if isinstance(layers, Mapping) else ()
    return frozenset(
        str(layer)
        for layer, entry in entries
        if isinstance(entry, Mapping) and entry.get(WHOLE_INPUTS) is True
    )


def check_format(source: str, layer: str, form: str, entry: Any) -> None:
    """A format must be known by name, and nothing beside it may ask for more.

    Raises CheckpointError otherwise.
    """
    coded = names_codes(form) and not any(part in form for part in FOREIGN_CODES)
    if not coded and form not in PLAIN_FORMATS:
        raise wrong(source, f"the format of {layer}", form, "float8_e4m3fn, float8_e5m2 or bf16")
    more = {key: value for key, value in entry.items() if value} if isinstance(entry, dict) else {}
    more.pop("format", None)
    if more.get(WHOLE_INPUTS) is True:
        del more[WHOLE_INPUTS]
    if form == MXFP8 and more.get("group_size") == MX_GROUP:
        del more["group_size"]
    if coded and more:
        raise wrong(source, f"what {layer} has beside its format", more, "nothing")


def read_recipes(
    block: Mapping[str, Any], source: str, formats: Mapping[str, str]
) -> dict[str, str]:
    """`scale_recipe` per format name that some layer has; only `rowwise` is known.

    Raises CheckpointError for any other.
    """
    configs = block.get("quant_configs") or {}
    if not isinstance(configs, Mapping):
        raise wrong(source, "quant_configs", configs, "a JSON object")
    found = {}
    for form, recipe in configs.items():
        stated = recipe.get("scale_recipe") if isinstance(recipe, Mapping) else recipe
        if form in formats.values() and stated != ROWWISE:
            raise CheckpointError(
                f"{source}: scale_recipe {stated} of {form} is unknown; known: {ROWWISE}"
            )
        found[form] = ROWWISE
    return found


def read_block_size(block: Mapping[str, Any], source: str) -> tuple[int, int] | None:
    """Rows and columns of a block, or None when scales are not by blocks.

    Raises CheckpointError for any other value, and for blocks with static activations.
    """
    size = block.get("weight_block_size")
    if size is None:
        return None
    numbers = size if isinstance(size, list) else []
    if len(numbers) != 2 or not all(type(n) is int and n > 0 for n in numbers):
        raise wrong(source, "weight_block_size", size, "rows and columns of a block, as [128, 128]")
    if block.get("activation_scheme") == "static":
        raise CheckpointError(
            f"{source}: weight_block_size with static activations: expected activation_scheme "
            "dynamic"
        )
    return numbers[0], numbers[1]


def read_ignored(block: Mapping[str, Any], source: str) -> list[re.Pattern[str]]:
    """Patterns of the layers that were left alone, for `match` on a layer's full name.

    Raises CheckpointError where a list holds anything but names.
    """
    patterns = []
    for key in IGNORE_KEYS:
        entries = block.get(key) or []
        if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
            raise wrong(source, key, entries, "a list of layer names")
        for entry in entries:
            above, dot, last = entry.rpartition(".")
            for part in FUSED.get(last, (last,)):
                text = re.escape(above + dot + part).replace(r"\*", ".*")
                patterns.append(re.compile(rf"{text}(\.|\Z)"))
    return patterns
