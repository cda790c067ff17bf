"""What a checkpoint in the format `float-quantized` of compressed-tensors declares.

| key | values that are read |
| --- | -------------------- |
| `quant_method`, `format` | `compressed-tensors`, `float-quantized`; or each group has this `format` |
| `config_groups` | objects with `targets`, `weights`, `input_activations`, `output_activations` |
| `targets` | `Linear`, names of layers, `re:` and a regular expression that names begin with |
| `weights` | `num_bits` 8, `type` float, symmetric, not dynamic; `strategy` tensor, channel or block |
| `input_activations` | absent; tensor (static or dynamic), token (dynamic), group of a block's columns |
| `ignore` | layers that were left alone, written as targets are |
| `quantization_status` | `compressed`, or absent |

Tensors of a layer: `weight` F8_E4M3 [N, K], `weight_scale` [1], [N, 1] or [ceil(N/bn), ceil(K/bk)],
`input_scale` [1] where inputs are static. A value that is not in the table is refused. Source: the
package compressed-tensors (`quant_args.py`, `quant_config.py`, `compressors`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantmatrix.errors import CheckpointError
from quantmatrix.quoting import quote_json

METHOD = "compressed-tensors"
FORMAT = "float-quantized"
EMPTY = ("kv_cache_scheme", "sparsity_config", "transform_config", "output_activations")
"""Keys that ask for more than codes and scales of linear layers."""
REGEX = "re:"
ENDLESS = re.compile(r"[+*}]\)[+*{]|.{200}")
"""Regular expressions that may take years to match, and longer ones than anybody writes."""
INPUTS: Mapping[tuple[str, bool], str] = {
    ("tensor", False): "tensor-static",
    ("tensor", True): "tensor-dynamic",
    ("token", True): "token-dynamic",
    ("group", True): "group-dynamic",
}
"""Activations of a scheme, by strategy and whether scales are found in every call."""


@dataclass(frozen=True)
class Group:
    """Layers that are quantized in one way."""

    targets: tuple[re.Pattern[str], ...]
    scale: str
    """Granularity of the weights' scales: `tensor`, `channel` or `block`."""
    block: tuple[int, int]
    """Rows and columns of a block; zeros without."""
    activation: str
    """As a scheme has it."""

    def holds(self, layer: str) -> bool:
        """Whether a linear layer of this name is in the group."""
        return any(pattern.match(layer) for pattern in self.targets)


def is_float_quantized(block: Mapping[str, Any]) -> bool:
    """Whether a quantization block declares this format, for the whole or for each group."""
    if str(block.get("quant_method", "")).lower() != METHOD:
        return False
    groups = block.get("config_groups")
    entries = list(groups.values()) if isinstance(groups, Mapping) else []
    own = [entry.get("format") for entry in entries if isinstance(entry, Mapping)]
    return {value or block.get("format") for value in own or [None]} == {FORMAT}


def read_groups(block: Mapping[str, Any], source: str) -> tuple[Group, ...]:
    """The groups of a block; raises CheckpointError for what is not in the module's table."""
    status = block.get("quantization_status")
    if status not in (None, "compressed"):
        raise _wrong(source, "quantization_status", status, "compressed")
    _check_empty(block, source)
    groups = block.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise _wrong(source, "config_groups", groups, "an object with a group")
    return tuple(read_group(group, f"{source}: {name}") for name, group in groups.items())


def read_group(group: Any, source: str) -> Group:
    """One group; raises CheckpointError for what is not in the module's table."""
    if not isinstance(group, Mapping):
        raise _wrong(source, "the group", group, "an object")
    _check_empty(group, source)
    weights, inputs = group.get("weights"), group.get("input_activations")
    _check_numbers(weights, source, "weights")
    assert isinstance(weights, Mapping)
    scale, block = weights.get("strategy"), (0, 0)
    if weights.get("dynamic") or scale not in ("tensor", "channel", "block"):
        raise _wrong(
            source, "weights", weights, "the strategy tensor, channel or block, not dynamic"
        )
    if scale == "block":
        block = read_block(weights.get("block_structure"), source)
    return Group(
        targets=tuple(read_patterns(group.get("targets"), source, "targets")),
        scale=scale,
        block=block,
        activation=read_activation(inputs, block, source),
    )


def read_block(size: Any, source: str) -> tuple[int, int]:
    """Rows and columns of a block, as a list or as `128x128`; CheckpointError otherwise."""
    numbers = size.split("x") if isinstance(size, str) else size
    try:
        rows, columns = (int(number) for number in numbers)
    except (TypeError, ValueError):
        rows = columns = 0
    if rows < 1 or columns < 1:
        raise _wrong(source, "block_structure", size, "rows and columns, as [128, 128]")
    return rows, columns


def read_activation(inputs: Any, block: tuple[int, int], source: str) -> str:
    """What becomes of a layer's inputs; CheckpointError for what is not in the module's table."""
    if inputs is None:
        return "none"
    _check_numbers(inputs, source, "input_activations")
    strategy, dynamic = inputs.get("strategy"), inputs.get("dynamic")
    found = INPUTS.get((strategy, dynamic)) if isinstance(dynamic, bool) else None
    if found is None or (found == "group-dynamic" and inputs.get("group_size") != block[1]):
        raise _wrong(
            source,
            "input_activations",
            inputs,
            "tensor, or dynamic token, or a dynamic group of as many columns as a block has",
        )
    return found


def read_patterns(entries: Any, source: str, key: str) -> list[re.Pattern[str]]:
    """Patterns for `match` on a layer's whole name; CheckpointError where they are no names."""
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise _wrong(source, key, entries, "a list of names")
    found = []
    for entry in entries:
        text = rf"{re.escape(entry)}\Z"
        if entry.startswith(REGEX):
            text = entry.removeprefix(REGEX)
            if ENDLESS.search(text):
                raise _wrong(source, key, entry, "a short expression without nested repeats")
        elif entry == "Linear":
            text = ""
        try:
            found.append(re.compile(text))
        except re.error as error:
            expected = f"a regular expression ({error})"
            raise _wrong(source, key, entry, expected) from error
    return found


def _check_numbers(args: Any, source: str, key: str) -> None:
    """Codes must be symmetric eight-bit floats."""
    known = isinstance(args, Mapping) and (args.get("num_bits"), args.get("type")) == (8, "float")
    if not known or args.get("symmetric") is False:
        raise _wrong(source, key, args, "symmetric floats of 8 bits")


def _check_empty(entry: Mapping[str, Any], source: str) -> None:
    """Nothing may ask for more than codes and scales of linear layers."""
    for key in EMPTY:
        value = entry.get(key)
        dense = isinstance(value, Mapping) and set(value.values()) <= {"dense", None}
        if value and not dense:
            raise _wrong(source, key, value, f"no {key}")


def _wrong(source: str, key: str, value: Any, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{source}: {key} is {quote_json(value, 120)}: expected {expected}. Correct the declaration, "
        "or quantize with a scheme that is known"
    )
