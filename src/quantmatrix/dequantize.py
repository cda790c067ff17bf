"""Dequantize: any checkpoint as a plain diffusers component folder.

Tensor by tensor, weights are decoded in float32, cast, and written in shards of at most 2 GB into a
temporary folder that is moved into place when it is complete.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from quantmatrix import families, kernels
from quantmatrix.errors import RefusedError, UsageError
from quantmatrix.hardware import Machine
from quantmatrix.load import (
    DTYPES,
    TensorReader,
    check_scales,
    check_values,
    plain_targets,
    read_layer,
    select_rows,
)
from quantmatrix.planning import ComponentPlan, Piece, Refusal, ignored_names, plan_component
from quantmatrix.references import fetch
from quantmatrix.request import Request
from quantmatrix.sources import find_sources, use_tiny

SHARD_BYTES = 2 * 1000**3


def dequantize(
    request: Request, output: str, *, component: str = "transformer", dtype: str = "float32"
) -> dict[str, Any]:
    """Write one component of a request as plain weights; returns what was written.

    The folder `output` must not exist. `dtype` is one of bfloat16, float16, float32.
    """
    target = Path(output)
    if target.exists():
        raise UsageError(f"{target} exists already: choose a new --output-path")
    request = use_tiny(request)
    made = plan_decode(request, component)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        written = write_folder(made, request, temporary, DTYPES[dtype])
        os.replace(temporary, target)
    except OSError as error:
        raise UsageError(
            f"cannot write {target}: {error.strerror or error}; nothing was left behind"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return {"output": str(target), "dtype": dtype, "family": made.family, **written}


def plan_decode(request: Request, component: str) -> ComponentPlan:
    """The plan of one component on a plain CPU, whatever the machine."""
    found = find_sources(request)
    if component not in found.components:
        raise UsageError(
            f"{found.base} has no transformer component {component}; "
            f"it has {', '.join(found.components)}"
        )
    machine = Machine(name="cpu", vendor="cpu", arch="cpu", memory_bytes=0)
    try:
        source = found.components[component]
        return plan_component(component, source, found.model, request, machine, [])
    except kernels.NoKernel as error:
        refusal = Refusal(error.rule, error.message)
        raise RefusedError(refusal.rule, refusal.message) from error


def decode_tensors(
    component: ComponentPlan, request: Request
) -> Iterator[tuple[str, Callable[[TensorReader], torch.Tensor]]]:
    """(diffusers name, how to make the float tensor) of every tensor of a component."""
    quantized = {piece.layer for piece in component.pieces()}
    ignored = ignored_names(component.checkpoint, component.family)
    for module, pieces in component.layers.items():
        yield f"{module}.weight", partial(decode_part, component, pieces, 0)
        if any(has_bias(component, piece) for piece in pieces):
            yield f"{module}.bias", partial(decode_part, component, pieces, 1)
    for name in component.checkpoint.tensors:
        if name in ignored or any(name.startswith(f"{layer}.") for layer in quantized):
            continue
        for rule, parameter in plain_targets(component, name):

            def take(reader: TensorReader, name: str = name, rule: Any = rule) -> torch.Tensor:
                tensor = reader.read(name)
                rows = select_rows(rule, tensor.shape[0] if tensor.ndim else 0)
                return tensor if rows is None else tensor[rows]

            yield parameter, take


def decode_part(
    component: ComponentPlan, pieces: tuple[Piece, ...], which: int, reader: TensorReader
) -> torch.Tensor:
    """The weight (0) or the bias (1) of a module."""
    return decode_pieces(component, pieces, reader)[which]


def has_bias(component: ComponentPlan, piece: Piece) -> bool:
    """Whether a layer on disk has a bias tensor."""
    kinds = ("bias", "linear.bias", "quant_bias", "linear.quant_bias")
    return any(f"{piece.layer}.{kind}" in component.checkpoint.tensors for kind in kinds)


def decode_pieces(
    component: ComponentPlan, pieces: tuple[Piece, ...], reader: TensorReader
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight, bias) of a module in plain float32 numbers, its pieces put together."""
    assert component.family is not None
    family = families.load(component.family)
    weights, biases = [], []
    for piece in pieces:
        stored = read_layer(component.checkpoint, piece.layer, reader)
        if component.online:
            stored = family.quantize(stored["weight"], piece.scheme, bias=stored.get("bias"))
        check_scales(component.checkpoint, piece.layer, stored)
        check_values(component, piece, stored)
        canonical = family.canonical(stored, piece.scheme)
        rows = select_rows(piece.target, piece.out_features * piece.target.part[1])
        if rows is not None:
            canonical = kernels.take_rows(piece.scheme, canonical, rows)
        weight, bias = kernels.decode(piece.scheme, canonical)
        if bias is not None and piece.target.plus_one:
            bias = bias.clone()
            width = piece.out_features // piece.target.interleave
            bias.view(-1, width)[list(piece.target.plus_one)] -= 1
        weights.append(weight)
        biases.append(torch.zeros(weight.shape[0]) if bias is None else bias)
    return torch.cat(weights, dim=1), torch.stack(biases).sum(dim=0)


def write_folder(
    component: ComponentPlan, request: Request, folder: Path, dtype: torch.dtype
) -> dict[str, Any]:
    """Write config, shards and (for several shards) the index into a folder."""
    from safetensors.torch import save_file
    from tqdm import tqdm

    checkpoint = fetch(component.checkpoint, request.hub)
    config = {k: v for k, v in component.config.items() if k != "quantization_config"}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    shards: list[dict[str, torch.Tensor]] = [{}]
    files: list[Path] = []
    size = total = 0
    weight_map: dict[str, int] = {}

    def flush() -> None:
        path = folder / f"shard-{len(files):05d}.safetensors"
        save_file(shards.pop(), path, metadata={"format": "pt"})
        files.append(path)
        shards.append({})

    with TensorReader(checkpoint, "cpu") as reader:
        for name, make in tqdm(list(decode_tensors(component, request)), desc="dequantizing"):
            tensor = make(reader)
            floating = tensor.is_floating_point()
            tensor = (tensor.to(dtype) if floating else tensor).contiguous().clone()
            nbytes = tensor.numel() * tensor.element_size()
            if size and size + nbytes > SHARD_BYTES:
                flush()
                size = 0
            shards[-1][name] = tensor
            weight_map[name] = len(files)
            size += nbytes
            total += nbytes
        flush()
    names = name_shards(files)
    if len(files) > 1:
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: names[number] for name, number in sorted(weight_map.items())},
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(text)
    return {"files": names, "tensors": len(weight_map), "bytes": total}


def name_shards(files: list[Path]) -> list[str]:
    """Give shards their final names, now that their number is known."""
    names = []
    for number, path in enumerate(files, 1):
        suffix = f"-{number:05d}-of-{len(files):05d}" if len(files) > 1 else ""
        names.append(f"diffusion_pytorch_model{suffix}.safetensors")
        path.rename(path.with_name(names[-1]))
    return names
