"""Schemes: the family of a checkpoint and how each of its layers is stored."""

from __future__ import annotations

from collections import Counter
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from quantmatrix import families
from quantmatrix.errors import CheckpointError, UsageError
from quantmatrix.families.producers.comfyui import FUSED
from quantmatrix.families.unknown_quantization import explain_unknown
from quantmatrix.runtime.empty_model import find_blocks, list_block_layers, measure_model
from quantmatrix.runtime.plan.dialects import find_dialect

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from quantmatrix.checkpoints.checkpoint import Checkpoint
    from quantmatrix.request import Request
    from quantmatrix.runtime.plan.sources import Source
    from quantmatrix.scheme import Scheme


def find_schemes(
    source: Source, model: str, request: Request
) -> tuple[str | None, str, dict[str, Scheme], bool]:
    """(family, why, scheme of each quantized layer on disk, whether it is made while loading).

    Raises CheckpointError for a quantization that no family reads, and a declared one that no layer
    has; UsageError for `--quantization` that does not fit.
    """
    checkpoint = source.checkpoint
    if unknown := explain_unknown(checkpoint):
        raise CheckpointError(unknown)
    detected = families.detect(checkpoint)
    if detected:
        if request.quantization and source.primary:
            raise UsageError(
                f"--quantization {request.quantization} asks to quantize, but "
                f"{checkpoint.reference} is quantized already ({detected[1]}): leave the flag out"
            )
        family, why = detected
        schemes = families.load(family).schemes(checkpoint)
        if not schemes:
            raise CheckpointError(
                f"{checkpoint.reference}: declared as {family} ({why}), but no layer in "
                f"{', '.join(checkpoint.files)} is quantized"
            )
        return family, why, schemes, False
    if request.quantization and source.primary:
        family, scheme = online_scheme(request.quantization)
        schemes = online_schemes(source, model, request, scheme)
        return family, f"--quantization {request.quantization}", schemes, True
    return None, "nothing in it is quantized", {}, False


def list_doubts(
    checkpoint: Checkpoint, family: str | None, schemes: Mapping[str, Scheme]
) -> list[str]:
    """Warnings about a checkpoint that is taken: what its files leave open, or hold besides."""
    found = families.load(family).doubts(checkpoint, schemes) if family else []
    if checkpoint.aside:
        parts = ", ".join(f"{count} of {part}*" for part, count in checkpoint.aside.items())
        own = f" ({checkpoint.prefix}*)" if checkpoint.prefix else ""
        found.append(
            f"{checkpoint.reference} is a whole checkpoint: of its tensors those of the transformer"
            f"{own} are used, {parts} are left aside; the base model's own components replace them"
        )
    return found


def online_schemes(
    source: Source, model: str, request: Request, scheme: Scheme
) -> dict[str, Scheme]:
    """Schemes of `--quantization NAME`: every linear layer of the blocks that is not ignored.

    Raises UsageError for a pattern that matches nothing, and where nothing is left.
    """
    checkpoint = source.checkpoint
    names = {name: header.shape for name, header in checkpoint.tensors.items()}
    dialect = find_dialect(source, model, names)
    shapes = measure_model(source.class_name, source.config, source.config_from)
    linear = list_block_layers(model, shapes)
    ignored = request.quantization_ignored_layers
    hits: Counter[str] = Counter()
    schemes: dict[str, Scheme] = {}
    for name, header in checkpoint.tensors.items():
        layer, _, leaf = name.rpartition(".")
        modules = [target.module for target in dialect.layer_targets(layer)]
        matching = [p for p in ignored if is_part_of_path(p, (layer, *modules))]
        hits.update(matching)
        inside = any(module in linear for module in modules)
        if leaf == "weight" and len(header.shape) == 2 and inside and not matching:
            schemes[layer] = scheme
    unmatched = [pattern for pattern in ignored if not hits[pattern]]
    if unmatched:
        raise UsageError(
            f"--quantization-ignored-layers {' '.join(unmatched)}: matches no linear layer "
            f"of {checkpoint.reference}, nor any other; one is named like "
            f"{next(iter(schemes), 'to_q')}: expected such a name, dotted parts of it, or a "
            "pattern with *"
        )
    if not schemes:
        raise UsageError(
            f"--quantization {request.quantization}: no linear layer of {checkpoint.reference} is left to quantize: "
            f"expected some in {', '.join(find_blocks(model, shapes))} that --quantization-ignored-layers leaves over"
        )
    return schemes


def online_scheme(name: str) -> tuple[str, Scheme]:
    """(family, scheme) that layers get while loading, by the name of `--quantization`.

    Raises UsageError for a name that makes none.
    """
    online: dict[str, tuple[str, Scheme]] = {}
    for family in families.written():
        module = families.load(family)
        names = {**module.ONLINE_NAMES, **({family: module.ONLINE} if module.ONLINE else {})}
        online |= {other: (family, module.SCHEMES[scheme]) for other, scheme in names.items()}
    if name not in online:
        raise UsageError(
            f"--quantization {name}: only {', '.join(online)} can be made while loading"
        )
    return online[name]


def is_part_of_path(pattern: str, paths: Iterable[str]) -> bool:
    """Whether a name from --quantization-ignored-layers is a path, or dotted parts of one.

    A level above a layer is a part of its path (`transformer_blocks.0`), as are those in the middle
    (`attn.to_k`); `*` stands for any characters, as in a shell. The last part may be the name under
    which runtimes fuse projections (`to_qkv`).
    """
    above, dot, last = pattern.rstrip(".").rpartition(".")
    parts = [f"*.{above}{dot}{name}.*" for name in FUSED.get(last, (last,))]
    return any(fnmatchcase(f".{path}.", part) for path in paths for part in parts)
