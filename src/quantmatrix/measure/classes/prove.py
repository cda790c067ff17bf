"""Proof of a transformer class: a small one of it quantized, written, loaded and run.

What is compared with what: the same inputs through the model of BF16 weights and through the model
that our loader built from the quantized folder; the error is the relative L2 distance of all that the
forward returns. A record is a line of `reports/transformer-classes.csv`.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn
from torch.utils import _pytree as pytree

from quantmatrix import families
from quantmatrix.errors import CheckpointError
from quantmatrix.families.protocol import Calibration
from quantmatrix.hardware import probe
from quantmatrix.measure.classes.inputs import UNKNOWN, make_inputs
from quantmatrix.measure.classes.options import shrink
from quantmatrix.proof.transformer_classes import ClassLine
from quantmatrix.request import Request
from quantmatrix.runtime.empty_model import find_blocks, list_block_layers, list_shapes
from quantmatrix.runtime.library_logs import quiet
from quantmatrix.runtime.load import count_quantized, load_component
from quantmatrix.runtime.plan.decide import plan_transformers
from quantmatrix.runtime.plan.types import require
from quantmatrix.tiny.weights import fill
from quantmatrix.tools.recipe import (
    Recipe,
    choose_schemes,
    quantize_layers,
    watch_inputs,
    write_folder,
)

FORMS = (
    ("fp8", "tensor-dynamic"),
    ("modelopt-fp8", "FP8"),
    ("modelopt-nvfp4", "NVFP4"),
    ("msmodelslim", "W8A8_DYNAMIC"),
)
"""Family and scheme of every form that a class is proved in."""


@dataclass(frozen=True)
class Small:
    """A small model of a class, on disk and in memory."""

    class_name: str
    model: nn.Module
    folder: Path
    inputs: Mapping[str, Any]
    output: torch.Tensor
    """All that its forward returns, float32 [elements]."""
    ranges: Mapping[str, Calibration]


@contextmanager
def open_small(class_name: str) -> Iterator[Small]:
    """A small model of a class of diffusers, which ran once; its folder is removed at the end."""
    with tempfile.TemporaryDirectory() as temporary, quiet(), torch.inference_mode(False):
        torch.manual_seed(0)
        own = getattr(diffusers, class_name)
        drawn: Any = own(**shrink(class_name))
        blocks = find_blocks(f"generic/{class_name}", list_shapes(drawn))
        fill(drawn, class_name, structured=blocks)
        base = Path(temporary) / "base"
        drawn.to(torch.bfloat16).save_pretrained(base)
        model = own.from_pretrained(base, torch_dtype=torch.bfloat16).eval().requires_grad_(False)
        inputs = make_inputs(class_name, model, torch.bfloat16)
        ranges = watch_inputs(model)
        yield Small(class_name, model, Path(temporary), inputs, run(model, inputs), ranges)


def run(model: nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor:
    """All floating-point numbers that a forward returns, float32 [elements]."""
    torch.manual_seed(0)
    plain = "return_dict" in inspect.signature(model.forward).parameters
    with torch.no_grad():
        found = pytree.tree_leaves(model(**inputs, **({"return_dict": False} if plain else {})))
    numbers = [x.flatten().float() for x in found if isinstance(x, torch.Tensor)]
    return torch.cat([x for x in numbers if x.numel()])


def prove_class(class_name: str, forms: Sequence[tuple[str, str]] = FORMS) -> list[ClassLine]:
    """A line for each form of a class of diffusers, or one with the reason why there is none.

    Raises what the package raises where the class runs, and one of the forms does not.
    """
    if why := UNKNOWN.get(class_name):
        return [ClassLine(class_name, diffusers.__version__, reason=why)]
    with open_small(class_name) as small:
        return [prove(small, family, scheme) for family, scheme in forms]


def prove(small: Small, family: str, scheme: str) -> ClassLine:
    """What a small model shows in one form; raises what `load_form` raises."""
    loaded = load_form(small, family, scheme)
    return ClassLine(
        small.class_name,
        diffusers.__version__,
        family,
        scheme,
        linear=len(list_shapes(small.model).linears),
        quantized=len(count_quantized(loaded)),
        error=measure(small.output, loaded, small),
        witness=loaded.witness.to_json()["verdict"],
    )


def measure(output: torch.Tensor, model: nn.Module, small: Small) -> float:
    """Relative L2 distance of what a model gives for the small one's inputs to `output`, float32 [elements]."""
    return float((run(model, small.inputs) - output).norm() / output.norm())


def load_form(small: Small, family: str, scheme: str, backend: str = "reference") -> Any:
    """A small model quantized, written, and loaded by the plan of its folder.

    Raises CheckpointError where other layers stand quantized than were written, and what planning
    and loading raise.
    """
    folder = small.folder / family
    written = write_form(small, family, scheme, folder)
    request = Request(
        model_path=str(small.folder / "base"),
        component_paths={"transformer": str(folder)},
        backend=backend,
        device="cpu",
    )
    part = require(plan_transformers(request, probe.probe("cpu"))).components["transformer"]
    loaded = load_component(part, request)
    found = count_quantized(loaded).keys()
    if found != written:
        raise CheckpointError(
            f"{small.class_name}, {family}: {len(written)} layers were written quantized, "
            f"{len(found)} stand in the model; expected the same ones"
        )
    return loaded


def write_form(small: Small, family: str, scheme: str, folder: Path) -> frozenset[str]:
    """Write a small model in one form; returns the layers that are quantized.

    They are the linear layers of the blocks that a forward calls, of a width that the scheme stores.
    """
    own, generic = families.load(family), f"generic/{small.class_name}"
    linear = list_block_layers(generic, list_shapes(small.model)) & small.ranges.keys()
    recipe = Recipe(generic, family, own.SCHEMES[scheme], lambda _: False, linear=linear)
    packed = small.model.state_dict()
    chosen = choose_schemes(recipe, packed)
    tensors, declaration = quantize_layers(own, recipe.dialect, packed, chosen, small.ranges)
    write_folder(tensors, declaration, folder, small.folder / "base", with_config=True)
    return frozenset(chosen)
