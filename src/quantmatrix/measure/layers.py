"""Layer errors: how far each quantized layer is from the BF16 layer that it stands for.

The latents of a run hide faults of single layers: normalisation after a projection undoes a wrong
scale, and a small block drowns in the residual stream. So the inputs that the layers really get in
a run are multiplied by the base model's weights, too, in float32, and the outputs compared:

    error = |y - (x W^T + b)| / |x W^T + b|        on the first call of each layer

What adapters add beside a layer is left out of y. The base weights come straight from the mapping of
the base checkpoint, one layer at a time, so that
nothing of the base model is loaded.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from quantmatrix.checkpoints.opening import fetch
from quantmatrix.checkpoints.reader import TensorReader
from quantmatrix.runtime.plan.types import Plan

USELESS = 1e6
"""The largest error that is reported: the output has nothing to do with the input."""


@dataclass
class LayerErrors:
    """Relative L2 error per layer, by component and module name; never more than `USELESS`."""

    found: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def worst(self) -> float:
        """The largest error of all layers; infinite when one gave NaN."""
        return max(
            (error for layers in self.found.values() for error in layers.values()), default=0
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data: per component the number of layers, the median, and the worst layer."""
        summary = {}
        for component, layers in self.found.items():
            if not layers:
                continue
            name = max(layers, key=lambda layer: layers[layer])
            summary[component] = {
                "layers": len(layers),
                "median": float(f"{statistics.median(layers.values()):.6g}"),
                "worst": float(f"{layers[name]:.6g}"),
                "worst_layer": name,
            }
        return summary


@contextmanager
def watch_layers(pipeline: Any, plan: Plan, base: Plan) -> Iterator[LayerErrors]:
    """Measure every quantized layer of a pipeline that is called inside the with block.

    `plan` planned the pipeline, `base` the same model in full precision.
    """
    errors = LayerErrors()
    with ExitStack() as stack:
        for name, part in plan.components.items():
            if not part.layers:
                continue
            checkpoint = fetch(base.components[name].checkpoint, base.request.hub)
            reader = stack.enter_context(TensorReader(checkpoint, plan.machine.device))
            layers = errors.found.setdefault(name, {})
            transformer = getattr(pipeline, name)
            for module in part.layers:
                layer = transformer.get_submodule(module)
                hook = make_hook(module, reader, checkpoint.tensors, layers)
                stack.callback(layer.register_forward_hook(hook).remove)
        yield errors


@contextmanager
def watch_encoders(pipeline: Any, plan: Plan) -> Iterator[LayerErrors]:
    """The same for the text encoders that `plan` has quantized, beside the base model's own.

    One whose base weights are not on this machine (`ComponentPlan.base`) is left out.
    """
    errors = LayerErrors()
    with ExitStack() as stack:
        for name, part in plan.encoders.items():
            if (base := part.base.weights.get(name)) is None:
                continue
            checkpoint = fetch(base, plan.request.hub)
            reader = stack.enter_context(TensorReader(checkpoint, plan.machine.device))
            layers = errors.found.setdefault(name, {})
            encoder = getattr(pipeline, name)
            for module in part.layers:
                hook = make_hook(module, reader, checkpoint.tensors, layers)
                layer = encoder.get_submodule(module)
                stack.callback(layer.register_forward_hook(hook).remove)
        yield errors


def make_hook(
    module: str, reader: TensorReader, known: Mapping[str, object], errors: dict[str, float]
) -> Any:
    """A forward hook that puts the error of a layer's first call into `errors[module]`.

    Weight and bias are read from the base checkpoint, whose tensors are `known` by name.
    """

    def compare(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if module in errors:
            return
        weight = reader.read(f"{module}.weight").float()
        bias = reader.read(f"{module}.bias").float() if f"{module}.bias" in known else None
        expected = functional.linear(inputs[0].float(), weight, bias)
        branch = getattr(layer, "low_rank", None)
        added = None if branch is None else branch(inputs[0])
        found = output.float() if added is None else output.float() - added.float()
        errors[module] = relative_error(expected, found)

    return compare


def relative_error(expected: torch.Tensor, found: torch.Tensor) -> float:
    """|found - expected| / |expected|, at most USELESS, which NaN counts as, too.

    Both have one shape, any shape, and float dtype.
    """
    size = float(expected.norm())
    distance = float((found - expected).norm())
    if distance == 0.0:
        return 0.0
    error = distance / size if size else math.inf
    return error if error < USELESS else USELESS
