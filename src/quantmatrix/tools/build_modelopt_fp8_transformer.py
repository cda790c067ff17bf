"""build_modelopt_fp8_transformer: a loadable FP8 transformer from a ModelOpt export.

    python -m quantmatrix.tools.build_modelopt_fp8_transformer \\
        --modelopt-hf-dir EXPORT --modelopt-backbone-ckpt EXPORT/backbone.pt \\
        --base-transformer-dir BASE/transformer --output-dir BUILT

EXPORT is what ModelOpt's diffusers export wrote (or its `transformer` folder), `backbone.pt` the
calibrated model that ModelOpt saved. Scale = amax / 448 for every module with both amaxes in there:

| tensor | dtype | shape | made from |
| ------ | ----- | ----- | --------- |
| `<m>.weight` | F8_E4M3 | [N, K] | the export's weight / scale, or its FP8 codes |
| `<m>.weight_scale` | F32 | [1] | `<m>.weight_quantizer._amax` |
| `<m>.input_scale` | F32 | [1] | `<m>.input_quantizer._amax` |

Modules that a model keeps in BF16 (`--model-type`, `--keep-bf16-pattern`) get the weight of the
base transformer and no scales; only the weight, a bias stays the export's. Keys with `_quantizer.`
in them are dropped. Shards keep their names; config.json and the headers say what was done: `ignore`
names every layer in BF16, under SGLang's name, too (`runtime_names`). A pattern is tried on both; one
that matches no module and a kept layer that the base cannot supply are errors.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from quantmatrix import models
from quantmatrix.checkpoints.dtypes import FLOATS
from quantmatrix.checkpoints.header import TensorHeader
from quantmatrix.checkpoints.reader import TensorReader
from quantmatrix.checkpoints.writer import Item
from quantmatrix.errors import CheckpointError, QuantmatrixError, UsageError
from quantmatrix.kernels.number_formats import E4M3_MAX, round_e4m3
from quantmatrix.kernels.nvfp4_arithmetic import cut_rows
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

HUNYUAN_VIDEO = (
    r"context_embedder\..+",
    r"x_embedder\.proj",
    r"time_text_embed\.(timestep_embedder|guidance_embedder|text_embedder)\.linear_[12]",
    r"norm_out\.linear",
    r"proj_out",
    r"transformer_blocks\.\d+\.(norm1|norm1_context)\.linear",
    r"single_transformer_blocks\.\d+\.norm\.linear",
)
"""A model that only this tool knows."""
PROFILES = {"flux1": "flux-1", "flux2": "flux-2", "qwen-image": "qwen-image"}
"""Fallback profile -> the model whose FALLBACKS hold it under the same name."""
HUNYUAN = "hunyuan-video"
MODEL_TYPES = ("auto", *PROFILES, HUNYUAN, "none")
QUANTIZERS = {"weight_scale": ".weight_quantizer._amax", "input_scale": ".input_quantizer._amax"}
SCALES = tuple(QUANTIZERS)
CALIBRATORS = 4
"""An amax that minimizes the error may be so many times smaller or larger than the weight's own."""


@dataclass(frozen=True)
class Build:
    """Everything that is read, and what was decided about it."""

    source: TransformerFolder
    base: TransformerFolder | None
    scales: Mapping[str, Mapping[str, torch.Tensor]]
    """`weight_scale` and `input_scale`, float32 [1], of each calibrated module."""
    kept: frozenset[str]
    """Modules that take the base's weight."""
    ignored: frozenset[str]
    """Modules that stay as the export has them."""
    class_name: str
    """Class by which SGLang names the layers."""

    @property
    def quantized(self) -> frozenset[str]:
        """Modules that are written as FP8."""
        return frozenset(self.source.modules()) - self.kept - self.ignored


def build(
    modelopt_hf_dir: Path,
    modelopt_backbone_ckpt: Path,
    output_dir: Path,
    *,
    base_transformer_dir: Path | None = None,
    model_type: str = "auto",
    keep_bf16_patterns: Sequence[str] = (),
    maxbound: float = E4M3_MAX,
    overwrite: bool = False,
) -> dict[str, int]:
    """Build the transformer; returns the statistics. Nothing is left behind when it fails.

    Raises UsageError for arguments that contradict each other or the files, CheckpointError for an
    export, backbone or base that does not fit.
    """
    source = open_transformer(modelopt_hf_dir, "--modelopt-hf-dir")
    profile = find_profile(model_type, source.class_name)
    if (profile or keep_bf16_patterns) and base_transformer_dir is None:
        raise UsageError("--base-transformer-dir is missing: layers kept in BF16 are taken from it")
    base = None
    if base_transformer_dir is not None:
        base = open_transformer(base_transformer_dir, "--base-transformer-dir")
    check_output(output_dir, overwrite, [source.root, *([base.root] if base else [])])
    class_name = runtime_names.HUNYUAN_VIDEO if model_type == HUNYUAN else source.class_name
    kept = find_kept(source, profile, keep_bf16_patterns, class_name)
    scales = read_scales(modelopt_backbone_ckpt, maxbound)
    block = read_block(source)
    ignored = find_ignored(source, block, scales, class_name) - kept
    plan = Build(source, base, scales, kept, ignored, class_name)
    check_plan(plan, block)
    config = describe(plan, block)
    text = json.dumps(config["quantization_config"], sort_keys=True)
    metadata = {
        "_class_name": str(config.get("_class_name")),
        "config": json.dumps(config, sort_keys=True),
        "quantization_config": text,
        "_quantization_metadata": text,
    }
    with (
        TensorReader(source.checkpoint, "cpu") as reader,
        TensorReader((base or source).checkpoint, "cpu") as base_reader,
    ):
        check_scales(plan, reader)
        shards = {
            shard: list_items(plan, source.tensors_of(shard), reader, base_reader)
            for shard in source.shards
        }
        write_transformer(output_dir, source, shards, config, metadata)
    return {
        "quantized_weights": len(plan.quantized),
        "bf16_fallback_weights": len(kept),
        "preserved_ignored_weights": len(plan.ignored),
        "added_scale_tensors": len(SCALES) * len(plan.quantized),
        "output_shards": len(shards),
    }


def find_profile(model_type: str, class_name: str) -> tuple[str, ...]:
    """Regular expressions, over whole module names, of the layers that a model keeps in BF16."""
    if model_type == "auto":
        model = models.by_class(class_name)
        known = {model_id: name for name, model_id in PROFILES.items()}
        model_type = HUNYUAN if class_name == runtime_names.HUNYUAN_VIDEO else "none"
        model_type = known.get(model or "", model_type)
    if model_type in PROFILES:
        return models.load(PROFILES[model_type]).FALLBACKS[model_type]
    return HUNYUAN_VIDEO if model_type == HUNYUAN else ()


def find_kept(
    source: TransformerFolder, profile: Sequence[str], patterns: Sequence[str], class_name: str
) -> frozenset[str]:
    """Modules kept in BF16: a profile matches whole names, `patterns` any part of one.

    `patterns` are tried on the names that SGLang gives the modules, too. Raises UsageError for a
    pattern that is no regular expression, CheckpointError for one that matches nothing.
    """
    modules = source.modules()
    kept: set[str] = set()
    try:
        tests = [(p, re.compile(p).fullmatch) for p in profile]
        tests += [(p, re.compile(p).search) for p in patterns]
    except re.error as error:
        raise UsageError(f"--keep-bf16-pattern: {error.pattern!r}: {error}") from error
    names = {module: runtime_names.list_names(module, class_name) for module in modules}
    for pattern, match in tests:
        found = [module for module in modules if any(map(match, names[module]))]
        if not found:
            raise CheckpointError(
                f"{source.root}: BF16 pattern {pattern!r} matches none of its {len(modules)} "
                f"modules, by the file's names or by SGLang's: a module is named like "
                f"{next(iter(modules), 'proj_out')}. Choose another --model-type (or none), or "
                "correct the pattern"
            )
        kept.update(found)
    return frozenset(kept)


def read_scales(path: Path, maxbound: float) -> dict[str, dict[str, torch.Tensor]]:
    """Scales, float32 [1] by name, of the modules with both amaxes in ModelOpt's saved model.

    Raises CheckpointError for an amax of several numbers, and where no module has both; UsageError
    where there is no such file.
    """
    file = path / "backbone.pt" if path.is_dir() else path
    state = read_state(file)
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name in state:
        module = name.removesuffix(QUANTIZERS["weight_scale"])
        if name == module or module + QUANTIZERS["input_scale"] not in state:
            continue
        found[module] = {}
        for scale, suffix in QUANTIZERS.items():
            amax = state[module + suffix]
            if amax.numel() != 1:
                raise CheckpointError(
                    f"{file}: {module}{suffix} has {amax.numel()} elements: only one scale per "
                    "tensor can be written; quantize with FP8_DEFAULT_CFG"
                )
            found[module][scale] = amax.float().reshape(1) / maxbound
    if not found:
        raise CheckpointError(
            f"{file}: no module has both a weight and an input amax: expected "
            "`<module>.weight_quantizer._amax` and `<module>.input_quantizer._amax` in its "
            "model_state_dict; was the model calibrated?"
        )
    return found


def read_state(file: Path) -> Mapping[str, torch.Tensor]:
    """`model_state_dict` of a file that ModelOpt saved; nothing but tensors is loaded from it.

    Tensors are mapped, of any shape and dtype. Raises UsageError where there is no file,
    CheckpointError for one of another form.
    """
    if not file.is_file():
        raise UsageError(f"--modelopt-backbone-ckpt {file}: no such file")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, UnpicklingError) as error:
        raise CheckpointError(
            f"{file}: cannot be read as a file of tensors: {str(error).splitlines()[0]}"
        ) from error
    state = content.get("model_state_dict") if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{file}: expected a dictionary with the key model_state_dict")
    return state


def find_ignored(
    source: TransformerFolder,
    block: Mapping[str, Any],
    scales: Mapping[str, Any],
    class_name: str,
) -> frozenset[str]:
    """Modules that ModelOpt left alone: listed in `ignore`, or without a pair of scales.

    An entry may be SGLang's name of the layer. A convolution may have a pair (Wan's
    patch_embedding): it is simulated, but not written as FP8.
    """
    patterns = [
        re.compile(".*".join(re.escape(part) for part in str(entry).split("*")) + r"\Z")
        for entry in block.get("ignore") or ()
    ]
    names = partial(runtime_names.list_names, class_name=class_name)
    return frozenset(
        module
        for module in source.modules()
        if module not in scales
        or len(source.checkpoint.tensors[f"{module}.weight"].shape) != 2
        or any(pattern.match(name) for pattern in patterns for name in names(module))
    )


def check_plan(plan: Build, block: Mapping[str, Any]) -> None:
    """Refuse what would be written wrongly; raises CheckpointError, which names the module."""
    source = plan.source.root / "config.json"
    algorithm = str(block.get("quant_algo") or "FP8")
    if algorithm.upper() != "FP8":
        raise CheckpointError(
            f"{source}: quant_algo is {algorithm}: expected FP8, one scale per tensor; quantize with "
            "FP8_DEFAULT_CFG"
        )
    tensors = plan.source.checkpoint.tensors
    for module in sorted(plan.ignored):
        stored = tensors[f"{module}.weight"]
        if stored.dtype == "F8_E4M3":
            raise CheckpointError(
                f"{stored.file}: {module}.weight is FP8, but the backbone checkpoint has no amax "
                "pair for it, or `ignore` lists it: are the two of one export?"
            )
    for module in sorted(plan.quantized):
        stored = tensors[f"{module}.weight"]
        if stored.dtype not in (*FLOATS, "F8_E4M3"):
            raise CheckpointError(
                f"{stored.file}: {stored.name} is {stored.dtype}: expected FP8 codes or plain "
                "numbers; this is not an FP8 export"
            )
        for name, scale in plan.scales[module].items():
            if not (torch.isfinite(scale) & (scale > 0)).all():
                raise CheckpointError(
                    f"{stored.file}: {module} has the {name} {scale.item():g} in the backbone "
                    "checkpoint: expected a positive number. Calibrate with inputs that reach it, "
                    "or keep it in BF16: --keep-bf16-pattern"
                )
    for module in sorted(plan.kept):
        name = f"{module}.weight"
        header = plan.base.checkpoint.tensors.get(name) if plan.base else None
        found = f"has {header.dtype} {list(header.shape)}" if header else "has no such tensor"
        if header is None or header.shape != tensors[name].shape or header.dtype not in FLOATS:
            raise CheckpointError(
                f"{plan.base.root if plan.base else 'no base'}: {name} is to be kept in BF16 "
                f"({list(tensors[name].shape)}), but the base {found}"
            )


def check_scales(plan: Build, reader: TensorReader) -> None:
    """Weights that are FP8 in the export already must have been divided by the same scale.

    Raises CheckpointError for one that was not.
    """
    for module in sorted(plan.quantized):
        header = plan.source.checkpoint.tensors.get(f"{module}.weight_scale")
        if header is None or plan.source.checkpoint.tensors[f"{module}.weight"].dtype != "F8_E4M3":
            continue
        stored = reader.read(header.name).float().reshape(-1)
        if not torch.allclose(stored, plan.scales[module]["weight_scale"], rtol=1e-3, atol=0):
            raise CheckpointError(
                f"{header.file}: {header.name} is {stored[0].item():g}, but the backbone "
                f"checkpoint gives {plan.scales[module]['weight_scale'].item():g}: the two are not "
                "of one export, or --maxbound is not the export's"
            )


def describe(plan: Build, block: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the output."""
    left = plan.ignored | plan.kept
    runtime = runtime_names.list_ignored(left, plan.source.modules(), plan.class_name)
    ignore = {*map(str, block.get("ignore") or ()), *left, *runtime}
    algorithm = block.get("quant_algo") or "FP8"
    quantization = {**block, "quant_algo": algorithm, "ignore": sorted(ignore)}
    quantization.setdefault("quant_type", str(algorithm).upper())
    return {**plan.source.config, "quantization_config": quantization}


def list_items(
    plan: Build,
    tensors: Mapping[str, TensorHeader],
    reader: TensorReader,
    base_reader: TensorReader,
) -> list[Item]:
    """The tensors of one output shard, each loaded when it is written."""
    items = []
    for name, header in tensors.items():
        module, _, suffix = name.rpartition(".")
        if "_quantizer." in name or (suffix in SCALES and module in plan.quantized | plan.kept):
            continue
        if suffix == "weight" and module in plan.kept and plan.base is not None:
            found = plan.base.checkpoint.tensors[name]
            items.append(Item(name, found.dtype, found.shape, partial(base_reader.read, name)))
        elif suffix == "weight" and module in plan.quantized:
            scale = plan.scales[module]["weight_scale"]
            load = partial(read_fp8, reader, header, scale)
            items.append(Item(name, "F8_E4M3", header.shape, load))
            for scale_name, value in plan.scales[module].items():
                scale_item = partial(torch.clone, value)
                items.append(Item(f"{module}.{scale_name}", "F32", (1,), scale_item))
        else:
            items.append(Item(name, header.dtype, header.shape, partial(reader.read, name)))
    return items


def read_fp8(reader: TensorReader, header: TensorHeader, scale: torch.Tensor) -> torch.Tensor:
    """The FP8 codes of a weight, which may hold them already; some rows at a time.

    They are float8_e4m3fn, in the weight's shape [out, in]; `scale` is float32 [1]. The codes are
    all that is kept of a weight: in float32 FLUX.2's largest takes 1.4 GB. Raises CheckpointError
    where the weight does not reach what its scale is for.
    """
    weight = reader.read(header.name)
    if header.dtype == "F8_E4M3":
        return weight
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    rows = weight.shape[0] if weight.ndim else 1
    peak = 0.0
    for part in cut_rows(rows, weight.numel() // max(1, rows)):
        values = weight[part].float() / scale
        peak = max(peak, values.abs().amax().item())
        codes[part] = round_e4m3(values)
    if not (peak == 0 or E4M3_MAX / CALIBRATORS <= peak <= E4M3_MAX * CALIBRATORS):
        raise CheckpointError(
            f"{header.file}: {header.name} reaches {peak:.4g} times the scale that the backbone "
            f"checkpoint gives it: expected about {E4M3_MAX:g}; the two are not of one model"
        )
    return codes


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="python -m quantmatrix.tools.build_modelopt_fp8_transformer",
        description="Make a loadable FP8 transformer from a ModelOpt diffusers export.",
    )
    parser.add_argument("--modelopt-hf-dir", type=Path, required=True, help="ModelOpt's export")
    parser.add_argument(
        "--modelopt-backbone-ckpt", type=Path, required=True, help="backbone.pt or its folder"
    )
    parser.add_argument("--output-dir", type=Path, required=True, help="folder to write")
    parser.add_argument("--base-transformer-dir", type=Path, help="source of BF16 weights")
    parser.add_argument("--model-type", choices=MODEL_TYPES, default="auto")
    parser.add_argument(
        "--keep-bf16-pattern",
        dest="keep_bf16_patterns",
        action="append",
        default=[],
        metavar="REGEX",
        help="more layers to keep in BF16; may be repeated",
    )
    parser.add_argument("--maxbound", type=float, default=E4M3_MAX, help="amax / maxbound = scale")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    return parser.parse_args(normalize_flags(sys.argv[1:] if argv is None else argv))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit code (0: written, 1: a bad checkpoint, 2: bad flags)."""
    try:
        statistics = build(**vars(parse_arguments(argv)))
    except (QuantmatrixError, OSError) as error:
        print(f"build_modelopt_fp8_transformer: {limit_message(str(error))}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    print(json.dumps(statistics, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
