"""build_modelopt_nvfp4_transformer: a mixed BF16 + NVFP4 transformer from a ModelOpt export.

    python -m quantmatrix.tools.build_modelopt_nvfp4_transformer \\
        --base-transformer-dir BASE/transformer --modelopt-hf-dir EXPORT --output-dir BUILT \\
        --pattern-preset flux1-nvfp4

The tensors of modules that match a pattern (`*` stands for any characters, over the whole module
name) are taken from the base transformer, biases included; their scales are dropped. Everything
else is copied bit for bit: no repacking, no change of nibbles or of the scale layout.
config.json and the headers gain the patterns in `ignore`, SGLang's names of layers in full precision
where it has others (`runtime_names`), and `swap_weight_nibbles`. A pattern that
matches no module, and a module whose weight the base does not have under the same name and shape,
are errors: such a layer would stay quantized although the configuration says that it is not.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from quantmatrix import families
from quantmatrix.checkpoints.dtypes import FLOATS
from quantmatrix.checkpoints.header import TensorHeader
from quantmatrix.checkpoints.reader import TensorReader
from quantmatrix.checkpoints.writer import Item
from quantmatrix.errors import CheckpointError, QuantmatrixError, UsageError
from quantmatrix.quoting import limit_message
from quantmatrix.request import normalize_flags
from quantmatrix.tools import runtime_names
from quantmatrix.tools.transformer_folder import (
    TransformerFolder,
    check_output,
    open_transformer,
    read_block,
    write_transformer,
)

PRESETS = {
    "none": (),
    "flux1-nvfp4": (
        "transformer_blocks.*.norm1.linear*",
        "transformer_blocks.*.norm1_context.linear*",
        "transformer_blocks.*.ff.net.0.proj*",
        "transformer_blocks.*.ff.net.2*",
        "transformer_blocks.*.ff_context.net.0.proj*",
        "transformer_blocks.*.ff_context.net.2*",
        "single_transformer_blocks.*.norm.linear*",
        "single_transformer_blocks.*.proj_mlp*",
    ),
}
SUFFIX = re.compile(
    r"\.(weight_scale_2|weight_scale|input_scale|weight|bias"
    r"|pre_quant_scale|svdquant_lora_a|svdquant_lora_b)$"
)
"""What stands after a module's name in the name of one of its tensors."""


def build(
    base_transformer_dir: Path,
    modelopt_hf_dir: Path,
    output_dir: Path,
    *,
    pattern_preset: str = "none",
    keep_bf16_patterns: Sequence[str] = (),
    swap_weight_nibbles: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Build the transformer; returns the statistics. Nothing is left behind when it fails."""
    source = open_transformer(modelopt_hf_dir, "--modelopt-hf-dir")
    base = open_transformer(base_transformer_dir, "--base-transformer-dir")
    check_output(output_dir, overwrite, [source.root, base.root])
    patterns = [*PRESETS[pattern_preset], *keep_bf16_patterns]
    kept = find_kept(source, base, patterns)
    config = describe(source, patterns, kept, swap_weight_nibbles)
    warn_of_tiles(source)
    text = json.dumps(config["quantization_config"], sort_keys=True)
    metadata = {"quantization_config": text, "_quantization_metadata": text}
    counts = {"replaced": 0, "removed": 0}
    with (
        TensorReader(source.checkpoint, "cpu") as reader,
        TensorReader(base.checkpoint, "cpu") as base_reader,
    ):
        shards = {
            shard: list_items(source.tensors_of(shard), base, kept, reader, base_reader, counts)
            for shard in source.shards
        }
        write_transformer(output_dir, source, shards, config, metadata)
    return {
        "fallback_modules": len(kept),
        "replaced_tensors": counts["replaced"],
        "removed_aux_tensors": counts["removed"],
        "output_shards": len(shards),
        "swap_weight_nibbles": swap_weight_nibbles,
    }


def name_module(tensor: str) -> str:
    """The module that a tensor belongs to: its name without the suffix of a layer's tensor."""
    return SUFFIX.sub("", tensor)


def find_kept(
    source: TransformerFolder, base: TransformerFolder, patterns: Sequence[str]
) -> frozenset[str]:
    """Modules that take the base's tensors; each pattern must match, each module be replaceable.

    Raises CheckpointError otherwise.
    """
    modules = source.modules()
    kept: set[str] = set()
    for pattern in patterns:
        parts = (re.escape(part) for part in pattern.split("*"))
        match = re.compile(".*".join(parts)).fullmatch
        found = [module for module in modules if match(module)]
        if not found:
            raise CheckpointError(
                f"{source.root}: BF16 pattern {pattern!r} matches none of its {len(modules)} "
                "modules: choose another --pattern-preset, or correct the pattern"
            )
        kept.update(found)
    for module in sorted(kept):
        check_replaceable(module, source, base)
    return frozenset(kept)


def check_replaceable(module: str, source: TransformerFolder, base: TransformerFolder) -> None:
    """The base must have the module's weight in full precision, and of the same size.

    Raises CheckpointError where it does not.
    """
    name = f"{module}.weight"
    stored, found = source.checkpoint.tensors[name], base.checkpoint.tensors.get(name)
    rows, *columns = stored.shape
    packed = stored.dtype == "U8"
    shape = (rows, *(2 * c for c in columns)) if packed else stored.shape
    if found is None or found.shape != shape or found.dtype not in FLOATS:
        has = "has no such tensor" if found is None else f"has {found.dtype} {list(found.shape)}"
        raise CheckpointError(
            f"{base.root}: {name} is to be kept in BF16 (expected {list(shape)}), but the base "
            f"{has}: it would stay quantized; is this the transformer that was exported?"
        )


def describe(
    source: TransformerFolder,
    patterns: Sequence[str],
    kept: frozenset[str],
    swap_weight_nibbles: bool,
) -> dict[str, Any]:
    """config.json of the output; raises CheckpointError for an export that is not NVFP4."""
    block = read_block(source)
    algorithm = str(block.get("quant_algo"))
    listed = block.get("quantized_layers") or {}
    algorithms = {algorithm, *(str(entry.get("quant_algo")) for entry in listed.values())}
    if not any("FP4" in name for name in algorithms):
        raise CheckpointError(
            f"{source.root / 'config.json'}: quant_algo is {algorithm}: expected NVFP4; for FP8 "
            "exports there is build_modelopt_fp8_transformer"
        )
    left = {m for m in source.modules() if m in kept or not is_coded(source, m)}
    runtime = runtime_names.list_ignored(left, source.modules(), source.class_name)
    ignore = dict.fromkeys([*map(str, block.get("ignore") or ()), *patterns, *runtime])
    quantization = {
        "quant_type": algorithm.upper(),
        **drop_layers(block, kept),
        "ignore": list(ignore),
        "swap_weight_nibbles": swap_weight_nibbles,
    }
    return {**source.config, "quantization_config": quantization}


def is_coded(source: TransformerFolder, module: str) -> bool:
    """Whether an export stores a module's weight as codes."""
    return source.checkpoint.tensors[f"{module}.weight"].dtype not in FLOATS


def drop_layers(block: Mapping[str, Any], kept: frozenset[str]) -> dict[str, Any]:
    """A block without the modules that are kept in BF16.

    Only a MIXED_PRECISION block names its layers, in `quantized_layers` and in the `targets` of
    `config_groups`. Wan's exports are of this kind as soon as the inputs are smoothed (NVFP4_AWQ,
    NVFP4_SVD), since ModelOpt counts their patch embedding apart.
    """
    if not block.get("quantized_layers"):
        return dict(block)
    layers = {n: entry for n, entry in block["quantized_layers"].items() if n not in kept}
    groups = {
        name: {**group, "targets": [n for n in group.get("targets") or () if n not in kept]}
        for name, group in (block.get("config_groups") or {}).items()
    }
    return {**block, "quantized_layers": layers, "config_groups": groups}


def warn_of_tiles(source: TransformerFolder) -> None:
    """Pass on what the export leaves open about its block scales: the output no longer tells."""
    block = source.config.get("quantization_config")
    declared = replace(source.checkpoint, quantization=block)
    for shard, metadata in source.metadata.items():
        names = (str(source.root / shard),)
        shown = replace(declared, files=names, metadata=metadata)
        if notes := families.load("modelopt-nvfp4").doubts(shown, {}):
            for note in notes:
                warnings.warn(note, stacklevel=2)
            return


def list_items(
    tensors: Mapping[str, TensorHeader],
    base: TransformerFolder,
    kept: frozenset[str],
    reader: TensorReader,
    base_reader: TensorReader,
    counts: dict[str, int],
) -> list[Item]:
    """The tensors of one output shard, each loaded when it is written; counts what is changed."""
    items = []
    for name, header in tensors.items():
        if "_quantizer." in name:
            continue
        if name_module(name) not in kept:
            items.append(Item(name, header.dtype, header.shape, partial(reader.read, name)))
        elif found := base.checkpoint.tensors.get(name):
            items.append(Item(name, found.dtype, found.shape, partial(base_reader.read, name)))
            counts["replaced"] += 1
        else:
            counts["removed"] += 1
    return items


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="python -m quantmatrix.tools.build_modelopt_nvfp4_transformer",
        description="Make a mixed BF16 + NVFP4 transformer from a ModelOpt diffusers export.",
    )
    parser.add_argument(
        "--base-transformer-dir", type=Path, required=True, help="source of BF16 weights"
    )
    parser.add_argument("--modelopt-hf-dir", type=Path, required=True, help="ModelOpt's export")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder to write")
    parser.add_argument("--pattern-preset", choices=tuple(PRESETS), default="none")
    parser.add_argument(
        "--keep-bf16-pattern",
        dest="keep_bf16_patterns",
        action="append",
        default=[],
        metavar="GLOB",
        help="more layers to keep in BF16; may be repeated",
    )
    parser.add_argument(
        "--swap-weight-nibbles",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="written into the configuration; nothing is repacked",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    return parser.parse_args(normalize_flags(sys.argv[1:] if argv is None else argv))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit code (0: written, 1: a bad checkpoint, 2: bad flags)."""
    try:
        statistics = build(**vars(parse_arguments(argv)))
    except (QuantmatrixError, OSError) as error:
        print(f"build_modelopt_nvfp4_transformer: {limit_message(str(error))}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    print(json.dumps(statistics, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
