"""Tiny packing: a diffusers model's tensors as the layers of another dialect.

A dialect's rules lead from a layer on disk to diffusers' modules. Here they are followed backwards:
the parts of a fused layer are stacked, columns of a split one are cut out, rows are interleaved or
their halves swapped, and a 1 is folded into a bias, so that loading gives the modules back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch

from quantmatrix.models.dialect import Dialect, Rule, Target, find_sources

Tensors = dict[str, torch.Tensor]


def keep_none(_: str) -> bool:
    """No module is left in full precision."""
    return False


def pack_tensors(
    plain: Mapping[str, torch.Tensor], dialect: Dialect, kept: Callable[[str], bool] = keep_none
) -> Tensors:
    """All tensors of a diffusers model under the names, and in the packing, of a dialect.

    `kept` says which modules stay in full precision; some of them are not fused. Tensors are those
    of the model, weights [out, in], of any dtype, which is kept.
    """
    packed: Tensors = {}
    rest = {}
    for name, tensor in plain.items():
        sources = find_sources(dialect.tensors, name)
        packed |= dict.fromkeys(sources, tensor)
        if not sources:
            rest[name] = tensor
    for layer in list_layers(dialect, {split(name)[0] for name in rest}, kept):
        for suffix, tensor in pack_layer(dialect, layer, rest).items():
            packed[f"{layer}.{suffix}".lstrip(".")] = tensor
    return packed


def list_layers(
    dialect: Dialect, modules: Iterable[str], kept: Callable[[str], bool] = keep_none
) -> list[str]:
    """Names on disk of the layers that hold these modules; a module may lie in several.

    One that is kept has its own name where the dialect's would say that it is a part, or coded.
    """
    layers: dict[str, None] = {}
    for module in sorted(modules):
        rules = [rule for rule in dialect.layers if not (is_coded_form(rule) and kept(module))]
        layers |= dict.fromkeys(find_sources(rules, module) or [module])
    return list(layers)


def is_coded_form(rule: Rule) -> bool:
    """Whether only a quantized layer is stored as the rule says."""
    parts = any(target.columns[2] > 1 or target.unsigned for target in rule.targets)
    return rule.quantized_only or parts


def pack_layer(dialect: Dialect, layer: str, weights: Mapping[str, torch.Tensor]) -> Tensors:
    """The tensors of one layer on disk, by suffix, from a diffusers model's tensors by name.

    A weight [N, K] of the model becomes rows (and some columns) of the layer's weight; its dtype is
    kept.
    """
    parts = []
    for target in dialect.layer_targets(layer):
        own = {split(name)[1]: t for name, t in weights.items() if split(name)[0] == target.module}
        parts.append({suffix: pack_part(target, suffix, t) for suffix, t in own.items()})
    return {suffix: torch.cat([part[suffix] for part in parts]) for suffix in parts[0]}


def pack_part(target: Target, suffix: str, tensor: torch.Tensor) -> torch.Tensor:
    """A module's tensor, weight [out, in] or bias [out], as its layer on disk holds it.

    The dtype is kept. Only the last columns carry the bias.
    """
    start, stop, of = target.columns
    if of > 1 and suffix == "weight":
        unit = tensor.shape[1] // of
        tensor = tensor[:, start * unit : stop * unit]
    if of > 1 and suffix == "bias" and stop != of:
        tensor = torch.zeros_like(tensor)
    if target.swap_halves:
        half = tensor.shape[0] // 2
        tensor = torch.cat([tensor[half:], tensor[:half]])
    if target.interleave > 1:
        chunks = tensor.unflatten(0, (target.interleave, -1)).clone()
        if suffix == "bias":
            chunks[list(target.plus_one)] += 1
        tensor = chunks.transpose(0, 1).flatten(0, 1)
    return tensor.contiguous()


def split(name: str) -> tuple[str, str]:
    """(layer, suffix) of a tensor name; the layer of a name without dots is empty."""
    layer, _, suffix = name.rpartition(".")
    return layer, suffix
