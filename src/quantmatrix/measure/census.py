"""Census: whether a checkpoint is quantized as it declares, layer by layer.

Two questions. Of the files (`find_undeclared`): is a layer stored in full precision although its
like in other blocks is quantized, and nothing in the declaration leaves it alone? Of the model that
was built from them (`find_differences`): are the planned layers quantized, each by the planned
kernel, and no others?

Layers are alike when their names differ in block numbers only. A declaration leaves a layer alone
by an `ignore` list (names, globs, or `re:` patterns, on a whole name or on a level above it), or by
a name for it in a list of layers (`FLOAT`, `bf16`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantmatrix.checkpoints.checkpoint import Checkpoint
    from quantmatrix.runtime.plan.types import ComponentPlan

IGNORE_KEYS = ("ignore", "ignored_layers", "modules_to_not_convert", "exclude_modules")
PLAIN_FORMATS = ("float", "bf16", "bfloat16", "float16", "float32", "fp16", "fp32", "none")
"""Names of full precision, lower case."""


def find_undeclared(part: ComponentPlan) -> dict[str, str]:
    """Modules in full precision that should be quantized, each with the reason."""
    kinds: dict[str, list[str]] = {}
    for module in part.layers:
        kinds.setdefault(name_kind(module), []).append(module)
    problems = {}
    for layer, module in list_plain_layers(part):
        alike = kinds.get(name_kind(module), [])
        if alike and not is_left_alone(part.checkpoint, layer, module):
            header = part.checkpoint.tensors[f"{layer}.weight"]
            problems[module] = (
                f"{layer}.weight is {header.dtype} in {header.file}, while {len(alike)} of its "
                f"kind are quantized ({alike[0]}) and no ignore list names it"
            )
    return problems


def name_kind(module: str) -> str:
    """A module's name with the block numbers taken out; a name without any is its own kind."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "N", module)


def list_plain_layers(part: ComponentPlan) -> Iterator[tuple[str, str]]:
    """(name on disk, module) of every layer with a matrix that is stored in full precision."""
    for plain in part.plain:
        layer, _, leaf = plain.name.rpartition(".")
        if leaf == "weight" and len(part.checkpoint.tensors[plain.name].shape) == 2:
            yield layer, plain.parameter.removesuffix(".weight")


def is_left_alone(checkpoint: Checkpoint, layer: str, module: str) -> bool:
    """Whether the declaration says that a layer stays in full precision."""
    block = checkpoint.quantization or {}
    names = {layer, module}
    entries = [str(entry) for key in IGNORE_KEYS for entry in block.get(key) or ()]
    if any(matches(entry, name) for entry in entries for name in names):
        return True
    return any(name.lower() in PLAIN_FORMATS for name in read_formats(block, names))


def matches(entry: str, name: str) -> bool:
    """Whether an entry of an ignore list is about a layer: its name, a part of it, or a pattern."""
    if entry.startswith("re:"):
        return re.match(entry[3:], name) is not None
    if any(mark in entry for mark in "*?["):
        return fnmatchcase(name, entry)
    return f".{name}.".find(f".{entry}.") >= 0


def read_formats(block: Mapping[str, Any], names: Iterable[str]) -> Iterator[str]:
    """What a declaration with one entry per layer says about any of the names."""
    listed = block.get("layers")
    blocks = [block, listed] if isinstance(listed, Mapping) else [block]
    for source in blocks:
        for name in names:
            entry = source.get(name, source.get(f"{name}.weight"))
            if isinstance(entry, Mapping):
                entry = entry.get("format")
            if isinstance(entry, str):
                yield entry


def find_differences(part: ComponentPlan, model: Any) -> dict[str, str]:
    """Where the quantized layers of a model are not those of its plan, as text by module."""
    from quantmatrix.runtime.quantized_linear import QuantizedLinear

    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            found.setdefault(name.partition(".parts.")[0], []).append(module.kernel.backend)
    planned = {name: [p.backend for p in pieces] for name, pieces in part.layers.items()}
    problems = dict.fromkeys(found, "quantized, although the plan has it in full precision")
    problems = {name: why for name, why in problems.items() if name not in planned}
    for name, backends in planned.items():
        if name not in found:
            problems[name] = "in full precision, although the plan has it quantized"
        elif sorted(found[name]) != sorted(backends):
            problems[name] = f"computed by {found[name]}, planned was {backends}"
    return problems
