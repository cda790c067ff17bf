"""wan_repack: Wan2.2 as msmodelslim wrote it, turned into the Diffusers layout that loaders read.

msmodelslim keeps Wan's original names and writes one folder per expert; Diffusers wants its own
names in `transformer` (high noise) and `transformer_2` (low noise):

    python -m quantmatrix.tools.wan_repack --input-path QUANTIZED --output-path CONVERTED

writes those two folders, each from the `quant_model_weight*.safetensors` of its expert, whatever else
lies beside them; copy everything else of the original Diffusers checkpoint beside them,
and the `config.json` of each transformer into its folder. With

    python -m quantmatrix.tools.wan_repack --model-type Wan2.2-T2V-A14B \\
        --original-model-path DIFFUSERS --quant-path QUANTIZED --output-path CONVERTED

the tool copies all of that itself. Either way a transformer becomes one
`diffusion_pytorch_model.safetensors` and a `quant_model_description.json` whose keys are renamed
alike. Only names change: no tensor is recast, and one at a time is in memory. Names and shapes are
compared with diffusers' own WanTransformer3DModel, and the tensors of quantized layers with their
schemes, before anything is moved into place.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from quantmatrix import models
from quantmatrix.checkpoints.checkpoint import Checkpoint
from quantmatrix.checkpoints.declaration import read_json
from quantmatrix.checkpoints.folders import open_folder
from quantmatrix.checkpoints.header import TensorHeader
from quantmatrix.checkpoints.indexes import find_index, read_index
from quantmatrix.checkpoints.opening import build_checkpoint, open_component
from quantmatrix.errors import CheckpointError, QuantmatrixError, UsageError
from quantmatrix.families.msmodelslim.description import check_known
from quantmatrix.files import put, staging, whole
from quantmatrix.models.dialect import Dialect
from quantmatrix.quoting import limit_message, quote_json
from quantmatrix.request import Hub, normalize_flags

MODEL = "wan-2-2"
TRANSFORMER = "WanTransformer3DModel"
EXPERTS = {"transformer": "high_noise_model", "transformer_2": "low_noise_model"}
"""Component in Diffusers' layout, and the folder that msmodelslim writes for it."""
MODEL_TYPES: Mapping[str, tuple[str, ...]] = {
    "Wan2.2-T2V-A14B": ("transformer", "transformer_2"),
    "Wan2.2-I2V-A14B": ("transformer", "transformer_2"),
    "Wan2.2-TI2V-5B": ("transformer",),
}
QUANTIZED = "quant_model_weight"
"""How the names of the files begin into which msmodelslim writes tensors."""
WEIGHTS = "diffusion_pytorch_model.safetensors"
DESCRIPTION = "quant_model_description.json"
BLOCK = re.compile(r"blocks\.(\d+)\.")
WRAPPER = re.compile(r"\.(linear|div)(?=\.[^.]+$)")
"""The level that smoothing adds above a layer's tensors."""


def repack(input_path: Path, output_path: Path) -> dict[str, int]:
    """Write the transformers of a quantized folder below `output_path`, which may exist already.

    Returns the number of tensors of each transformer. Nothing is written when anything is wrong.
    Raises UsageError for an output that exists and an input that is not a folder, CheckpointError
    for weights that are not what msmodelslim writes.
    """
    sources = find_experts(input_path, None)
    taken = [name for name in sources if (output_path / name).exists()]
    if taken:
        raise UsageError(f"{output_path / taken[0]} exists already: choose a new --output-path")
    with staging(output_path) as beside:
        built = beside / output_path.name
        counts = {name: convert(source, built / name) for name, source in sources.items()}
        move_into(built, output_path)
    return counts


def repack_pipeline(
    model_type: str, original_path: Path, quant_path: Path, output_path: Path
) -> dict[str, int]:
    """Write a whole pipeline: the original's files, with the transformers of `quant_path`.

    `output_path` must not exist. Returns the number of tensors of each transformer. Raises
    UsageError and CheckpointError as `repack` does, UsageError for an original that is no pipeline,
    too.
    """
    if output_path.exists():
        raise UsageError(f"{output_path} exists already: choose a new --output-path")
    if not (original_path / "model_index.json").is_file():
        raise UsageError(
            f"{original_path}: no model_index.json in it: --original-model-path takes a folder in "
            "Diffusers' layout; `hf download Wan-AI/Wan2.2-T2V-A14B-Diffusers` makes one"
        )
    sources = find_experts(quant_path, model_type)
    counts = {}
    with whole(output_path) as built:
        for name, source in sources.items():
            config = original_path / name / "config.json"
            if not config.is_file():
                raise UsageError(f"{config} is missing: is {original_path} a {model_type}?")
            counts[name] = convert(source, built / name, config)
        left_out = shutil.ignore_patterns(".git", ".cache")
        for path in sorted(original_path.iterdir()):
            if path.name in (".git", ".cache", *EXPERTS):
                continue
            if path.is_dir():
                shutil.copytree(path, built / path.name, ignore=left_out)
            else:
                shutil.copy(path, built / path.name)
    return counts


def move_into(built: Path, output: Path) -> None:
    """Move a folder to its place, or its entries into the folder that is there: all or none."""
    if not output.exists():
        return put(built, output)
    moved: list[str] = []
    try:
        for path in sorted(built.iterdir()):
            put(path, output / path.name)
            moved.append(path.name)
    except BaseException:  # an interruption, too
        for name in moved:
            put(output / name, built / name)
        raise
    return None


def find_experts(folder: Path, model_type: str | None) -> dict[str, Checkpoint]:
    """The quantized weights of each transformer component of a folder that msmodelslim wrote.

    Raises UsageError where there is no folder, CheckpointError where an expert or its description
    is missing.
    """
    if not folder.is_dir():
        raise UsageError(
            f"{folder} is not a folder: expected what msmodelslim wrote to --save_path"
        )
    dual = any((folder / expert).is_dir() for expert in EXPERTS.values())
    names = MODEL_TYPES[model_type] if model_type else tuple(EXPERTS) if dual else ("transformer",)
    found = {}
    for name in names:
        path = folder / EXPERTS[name] if len(names) > 1 else folder
        if not path.is_dir():
            raise CheckpointError(f"{path} is missing: {name} is made from it")
        checkpoint = open_expert(path)
        if checkpoint.description is None:
            raise CheckpointError(
                f"{path}: no quant_model_description*.json in it: was it written by msmodelslim?"
            )
        found[name] = checkpoint
    return found


def open_expert(path: Path) -> Checkpoint:
    """What msmodelslim wrote into a folder; weights of other names beside it are left alone.

    Without a file of its name the folder is read as any component's.
    """
    folder, _ = open_folder(str(path), Hub())
    names = [name for name in folder.top if name.startswith(QUANTIZED)]
    files = [name for name in names if name.endswith(".safetensors")]
    if not files:
        return open_component(str(path), Hub())
    index = find_index(folder, names)
    selection = read_index(folder, index) if index else dict.fromkeys(files, frozenset())
    return build_checkpoint(str(path), folder, selection)


def convert(source: Checkpoint, target: Path, config_file: Path | None = None) -> int:
    """Write one transformer under its new names into the folder `target`; returns the tensors.

    Raises CheckpointError for names, shapes or schemes that are not the original model's.
    """
    dialect = models.dialect_of(MODEL, source.tensors)
    if dialect.name != "wan-original":
        raise CheckpointError(
            f"{source.reference}: its tensors are named like {next(iter(source.tensors))}, not as "
            "in the original Wan model: it needs no repacking, or it is another model"
        )
    renamed = {name: rename(name, dialect) for name in source.tensors}
    found = rename_headers(source, renamed)
    described = {
        renamed.get(key, key): quant_type for key, quant_type in (source.description or {}).items()
    }
    config = read_config(source, config_file)
    check_known(source)
    check_smoothing(source)
    verify(source, found, described, config or infer_config(source, found))
    target.mkdir(parents=True)
    write_weights(source, renamed, target / WEIGHTS)
    write_json(target / DESCRIPTION, described)
    if config is not None:
        write_json(target / "config.json", config)
    return len(renamed)


def rename(name: str, dialect: Dialect) -> str:
    """Diffusers' name of a tensor; a level that smoothing added disappears."""
    name = WRAPPER.sub("", name)
    whole = dialect.tensor_targets(name)
    if whole is not None:
        return whole[0].module
    layer, _, leaf = name.rpartition(".")
    return f"{dialect.layer_targets(layer)[0].module}.{leaf}"


def rename_headers(source: Checkpoint, renamed: Mapping[str, str]) -> dict[str, TensorHeader]:
    """Headers by their new names; raises CheckpointError for two tensors of one name."""
    found: dict[str, TensorHeader] = {}
    for old, new in renamed.items():
        if new in found:
            raise CheckpointError(
                f"{source.reference}: {old} and {found[new].name} both become {new}"
            )
        found[new] = source.tensors[old]
    return found


def check_smoothing(source: Checkpoint) -> None:
    """Without the level that smoothing added, nothing would tell that its factors are missing.

    Raises CheckpointError for a layer without them.
    """
    for name, header in source.tensors.items():
        layer, _, leaf = name.partition(".linear.")
        if leaf and f"{layer}.div.mul_scale" not in source.tensors:
            raise CheckpointError(
                f"{header.file}: tensor {name} belongs to a smoothed layer, but tensor "
                f"{layer}.div.mul_scale is missing: was the folder written completely?"
            )


def read_config(source: Checkpoint, config_file: Path | None) -> dict[str, Any] | None:
    """Diffusers' configuration of the transformer, if there is one.

    Raises CheckpointError for one of another class.
    """
    if config_file is not None:
        config = read_json(config_file)
        if config.get("_class_name") != TRANSFORMER:
            raise CheckpointError(
                f"{config_file}: _class_name is {quote_json(config.get('_class_name'))}, expected {TRANSFORMER}: "
                "is the original another model?"
            )
        return config
    if (source.config or {}).get("_class_name") == TRANSFORMER:
        return dict(source.config or {})
    return None


def infer_config(source: Checkpoint, found: Mapping[str, TensorHeader]) -> dict[str, Any]:
    """A configuration with the names and shapes of these tensors (heads do not show in them)."""

    def shape(name: str) -> tuple[int, ...]:
        if name not in found:
            raise CheckpointError(
                f"{source.reference}: tensor {name} (in diffusers' naming) is missing: a quantized "
                "folder holds every tensor of the model; was it written completely?"
            )
        return found[name].shape

    patch = shape("patch_embedding.weight")
    size = patch[2:]
    image, added = "condition_embedder.image_embedder", "blocks.0.attn2.add_k_proj.weight"

    def optional(name: str, dimension: int) -> int | None:
        return shape(name)[dimension] if name in found else None

    return {
        "patch_size": size,
        "num_attention_heads": 1,
        "attention_head_dim": patch[0],
        "in_channels": patch[1],
        "out_channels": shape("proj_out.weight")[0] // math.prod(size),
        "text_dim": shape("condition_embedder.text_embedder.linear_1.weight")[1],
        "freq_dim": shape("condition_embedder.time_embedder.linear_1.weight")[1],
        "ffn_dim": shape("blocks.0.ffn.net.0.proj.weight")[0],
        "num_layers": 1 + max(int(match[1]) for name in found if (match := BLOCK.match(name))),
        "cross_attn_norm": "blocks.0.norm2.weight" in found,
        "image_dim": optional(f"{image}.norm1.weight", 0),
        "pos_embed_seq_len": optional(f"{image}.pos_embed", 1),
        "added_kv_proj_dim": optional(added, 1),
        "rope_max_seq_len": 32,
    }


def list_tensors(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of diffusers' WanTransformer3DModel with this configuration."""
    from accelerate import init_empty_weights
    from diffusers import WanTransformer3DModel

    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    with init_empty_weights():
        model = WanTransformer3DModel.from_config(plain)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def verify(
    source: Checkpoint,
    found: Mapping[str, TensorHeader],
    described: Mapping[str, Any],
    config: Mapping[str, Any],
) -> None:
    """The tensors must be those of the model, with side tensors of quantized layers at most.

    Raises CheckpointError for one that is missing, unknown or of another shape.
    """
    expected = list_tensors(config)
    missing = [name for name in expected if name not in found]
    quantized = {
        key.removesuffix(".weight")
        for key, quant_type in described.items()
        if key.endswith(".weight") and quant_type != "FLOAT"
    }
    unknown = [
        found[name].name
        for name in found
        if name not in expected
        and name.rpartition(".")[0] not in quantized
        and not name.endswith(("_rot", ".mul_scale"))
    ]
    for what, names in (("lacks", missing), ("has, but the model does not know,", unknown)):
        if names:
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            raise CheckpointError(
                f"{source.reference} {what} {', '.join(names[:8])}{more}: expected the "
                f"{len(expected)} tensors of diffusers' WanTransformer3DModel; nothing was written"
            )
    for name, shape in expected.items():
        header = found[name]
        if header.shape != shape and header.dtype != "U8":
            raise CheckpointError(
                f"{header.file}: tensor {header.name} has shape {list(header.shape)}, diffusers "
                f"expects {list(shape)} for {name}: is this model of another size?"
            )


def write_weights(source: Checkpoint, renamed: Mapping[str, str], path: Path) -> None:
    """Copy every tensor under its new name, one at a time."""
    from quantmatrix.checkpoints.reader import TensorReader
    from quantmatrix.checkpoints.writer import Item, write_file

    with TensorReader(source, "cpu") as reader:
        items = []
        for old, new in renamed.items():
            header = source.tensors[old]
            items.append(Item(new, header.dtype, header.shape, partial(reader.read, old)))
        write_file(path, items, {"format": "pt"})


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file as the other files of a pipeline are written."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags of either form."""
    parser = argparse.ArgumentParser(
        prog="python -m quantmatrix.tools.wan_repack",
        description="Turn a Wan2.2 model that msmodelslim wrote into the Diffusers layout.",
    )
    short = parser.add_argument_group("transformers only")
    short.add_argument("--input-path", type=Path, help="folder that msmodelslim wrote")
    whole = parser.add_argument_group("whole pipeline")
    whole.add_argument("--model-type", choices=tuple(MODEL_TYPES))
    whole.add_argument("--original-model-path", type=Path, help="original in Diffusers' layout")
    whole.add_argument("--quant-path", type=Path, help="folder that msmodelslim wrote")
    parser.add_argument("--output-path", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args(normalize_flags(sys.argv[1:] if argv is None else argv))
    given = [arguments.model_type, arguments.original_model_path, arguments.quant_path]
    complete = all(given) if arguments.input_path is None else not any(given)
    if not complete:
        parser.error(
            "give --input-path and --output-path, or --model-type, --original-model-path, "
            "--quant-path and --output-path"
        )
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit code (0: written, 1: a bad checkpoint, 2: bad flags)."""
    arguments = parse_arguments(argv)
    output = arguments.output_path
    try:
        if arguments.input_path is not None:
            counts = repack(arguments.input_path, output)
        else:
            counts = repack_pipeline(
                arguments.model_type, arguments.original_model_path, arguments.quant_path, output
            )
    except (QuantmatrixError, OSError) as error:
        print(f"wan_repack: {limit_message(str(error))}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    for name, count in counts.items():
        print(f"{output / name}: {count} tensors")
    if arguments.input_path is not None:
        print(
            f"Now copy all other files of the original Diffusers checkpoint into {output}, and the "
            f"config.json of {' and '.join(counts)}."
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
