"""Dequantize: any checkpoint as a plain diffusers component folder.

Tensor by tensor, weights are decoded in float32, cast, and written in shards of at most 2 GB into a
temporary folder that is moved into place when it is complete.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from quantmatrix import kernels
from quantmatrix.checkpoints.opening import fetch
from quantmatrix.checkpoints.reader import TensorReader
from quantmatrix.checkpoints.writer import save_tensors
from quantmatrix.errors import CheckpointError, RefusedError, UsageError
from quantmatrix.files import check_writable, whole
from quantmatrix.hardware.machine import Machine
from quantmatrix.request import Request
from quantmatrix.runtime.empty_model import measure_model
from quantmatrix.runtime.load import read_plain
from quantmatrix.runtime.pieces import read_piece
from quantmatrix.runtime.plan.decide import plan_component
from quantmatrix.runtime.plan.placement import find_biases
from quantmatrix.runtime.plan.sources import find_sources
from quantmatrix.runtime.plan.types import ComponentPlan, Piece
from quantmatrix.runtime.witness import verdict

SHARD_BYTES = 2 * 1000**3


def dequantize(
    request: Request, output: str, *, component: str = "transformer", dtype: str = "float32"
) -> dict[str, Any]:
    """Write one component of a request as plain weights; returns what was written.

    A `--tiny` request comes with the hub of its stand-ins. The folder `output` must not exist.
    `dtype` is one of bfloat16, float16, float32. Raises UsageError for a folder that exists or
    cannot be written, CheckpointError for a checkpoint that cannot be used (WitnessError: is not
    its base model's), and RefusedError where no kernel decodes it.
    """
    target = Path(output)
    if target.exists():
        raise UsageError(f"{target} exists already: choose a new --output-path")
    check_writable(target)
    decode_plan = plan_decode(request, component)
    report = verdict.confirm(decode_plan, request)
    try:
        with whole(target) as temporary:
            temporary.mkdir()
            written = write_folder(decode_plan, request, temporary, getattr(torch, dtype))
    except OSError as error:
        raise UsageError(
            f"cannot write {target}: {error.strerror or error}; nothing was left behind"
        ) from error
    found = None if report is None else report.to_json()
    return {
        "output": str(target),
        "dtype": dtype,
        "family": decode_plan.family,
        "witness": found,
        **written,
    }


def plan_decode(request: Request, component: str) -> ComponentPlan:
    """The plan of one component on a plain CPU, whatever the machine.

    Raises UsageError for an unknown component, RefusedError where no kernel decodes it.
    """
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
        raise RefusedError(error.rule, error.message) from error


def decode_tensors(
    component: ComponentPlan, expected: Collection[str]
) -> Iterator[tuple[str, Callable[[TensorReader], torch.Tensor]]]:
    """(diffusers name, how to make the float tensor) of every tensor of a component.

    Weights are float32 [out, in], plain tensors as stored. Where the model has no bias a layer may
    still store one, of zeros, or folded.
    """
    for module, pieces in component.layers.items():
        assert component.family is not None  # nothing is quantized without one
        bias = f"{module}.bias"
        if bias in expected and any(
            find_biases(component.checkpoint, piece.layer, component.family) for piece in pieces
        ):
            parts = Parts(component, pieces)
            yield f"{module}.weight", partial(parts.take, 0)
            yield bias, partial(parts.take, 1)
        else:
            yield f"{module}.weight", partial(decode_bare, component, pieces)
    for plain in component.plain:
        yield plain.parameter, partial(read_plain, component, plain)


def list_tensors(
    component: ComponentPlan,
) -> list[tuple[str, Callable[[TensorReader], torch.Tensor], torch.Size]]:
    """(diffusers name, how to make the tensor, its shape in the model) of all that is planned.

    Tensors are those of `decode_tensors`: weights [out, in], float32 or as stored.
    """
    shapes = measure_model(component.class_name, component.config, component.config_from).tensors
    return [
        (name, make, torch.Size(shapes[name])) for name, make in decode_tensors(component, shapes)
    ]


@dataclass
class Parts:
    """Weight and bias of a module, decoded together; the one that is not taken yet is kept."""

    component: ComponentPlan
    pieces: tuple[Piece, ...]
    kept: dict[int, torch.Tensor] = field(default_factory=dict)

    def take(self, which: int, reader: TensorReader) -> torch.Tensor:
        """The weight [out, in] (0) or the bias [out] (1), float32."""
        if which not in self.kept:
            self.kept = dict(enumerate(decode_pieces(self.component, self.pieces, reader)))
        return self.kept.pop(which)


def decode_bare(
    component: ComponentPlan, pieces: tuple[Piece, ...], reader: TensorReader
) -> torch.Tensor:
    """The weight of a module without a bias, float32 [out, in].

    Raises CheckpointError for a stored bias that is not zero.
    """
    weight, bias = decode_pieces(component, pieces, reader)
    if bias.any():
        raise CheckpointError(
            f"{component.checkpoint.reference}: layer {pieces[0].layer} has a bias, "
            f"{component.class_name} of {component.config_from} expects none: is it of another model?"
        )
    return weight


def decode_pieces(
    component: ComponentPlan, pieces: tuple[Piece, ...], reader: TensorReader
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight [out, in], bias [out]) of a module in plain float32 numbers, its pieces put together."""
    weights, biases = [], []
    for piece in pieces:
        canonical = read_piece(component, piece, reader)
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
    """Write config, shards and (for several shards) the index into a folder.

    Raises CheckpointError for a tensor of another shape than the model's.
    """
    from tqdm import tqdm

    checkpoint = fetch(component.checkpoint, request.hub)
    declared = ("quantization_config", "compression_config")
    config = {k: v for k, v in component.config.items() if k not in declared}
    described = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(described, encoding="utf-8")
    shards: list[dict[str, torch.Tensor]] = [{}]
    files: list[Path] = []
    size = total = 0
    weight_map: dict[str, int] = {}

    def flush() -> None:
        path = folder / f"shard-{len(files):05d}.safetensors"
        save_tensors(shards.pop(), path, {"format": "pt"})
        files.append(path)
        shards.append({})

    with TensorReader(checkpoint, "cpu") as reader:
        shown = tqdm(list_tensors(component), desc="dequantizing", disable=not sys.stderr.isatty())
        for name, make, shape in shown:
            tensor = make(reader).to(dtype).contiguous().clone()
            if tensor.shape != shape:
                raise CheckpointError(
                    f"{checkpoint.reference}: {name} is {list(tensor.shape)}, {component.class_name} "
                    f"({component.config_from}) expects {list(shape)}: is it of another model?"
                )
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
        path = folder / "diffusion_pytorch_model.safetensors.index.json"
        path.write_text(text, encoding="utf-8")
    return {"files": names, "tensors": len(weight_map), "bytes": total}


def name_shards(files: list[Path]) -> list[str]:
    """Give shards their final names, now that their number is known."""
    names = []
    for number, path in enumerate(files, 1):
        suffix = f"-{number:05d}-of-{len(files):05d}" if len(files) > 1 else ""
        names.append(f"diffusion_pytorch_model{suffix}.safetensors")
        path.rename(path.with_name(names[-1]))
    return names
