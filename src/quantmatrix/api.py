"""The public functions, and the edge at which a request meets the tables and the stand-ins.

Planning and running take all they need as arguments: the hub that a request's references lie in,
and the machine that it is for. Here both are found: `resolve` opens the stand-ins of a `--tiny`
request, and looks up the row of `--hardware`, or describes this machine.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch

from quantmatrix.errors import UsageError
from quantmatrix.hardware import probe
from quantmatrix.request import WEIGHTS_ALIASES, Request
from quantmatrix.runtime import generate as generating
from quantmatrix.runtime.load import load_component
from quantmatrix.runtime.lora import load_requested
from quantmatrix.runtime.pipeline import build_pipeline
from quantmatrix.runtime.plan import decide
from quantmatrix.runtime.plan.types import require
from quantmatrix.tables import identify, read
from quantmatrix.tiny.hub import use_tiny

if TYPE_CHECKING:
    from typing import Any

    from torch import nn

    from quantmatrix.hardware.machine import Machine
    from quantmatrix.runtime.plan.types import Plan, Refusal
    from quantmatrix.runtime.run import Run


def load_transformer(
    model_path: str,
    *,
    component: str = "transformer",
    transformer_path: str | None = None,
    transformer_weights_path: str | None = None,
    backend: str | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    **fields: Any,
) -> nn.Module:
    """A diffusers transformer, ready for `forward`, with the checkpoint's layers quantized.

    `model_path` is a hub id, a pipeline folder or a bare component folder; only its `config.json`
    is needed when the override holds every tensor. Further keyword arguments are Request's fields.
    Warnings of the plan are raised as Python warnings. Weights that are not quantized have the
    dtype given.

    Raises UsageError for arguments that contradict each other and for a component that the model
    lacks, CheckpointError for a bad checkpoint (UnreachableError: one that cannot be had,
    WitnessError: one that is not its base model's), and RefusedError where no kernel fits. With
    `tiny` a small stand-in of the same format replaces the repositories:

        >>> import quantmatrix
        >>> transformer = quantmatrix.load_transformer(
        ...     "black-forest-labs/FLUX.1-dev",
        ...     transformer_path="BBuf/flux1-dev-modelopt-fp8-sglang-transformer",
        ...     tiny=True,
        ... )
        >>> type(transformer).__name__
        'FluxTransformer2DModel'
    """
    aliased = [fields.pop(name) for name in WEIGHTS_ALIASES if fields.get(name)]
    weights = next((path for path in (transformer_weights_path, *aliased) if path), None)
    request = Request(
        model_path=model_path,
        component_paths={component: transformer_path} if transformer_path else {},
        weights_paths={component: weights} if weights else {},
        backend=backend,
        device=device,
        dtype=str(dtype).removeprefix("torch."),
        **fields,
    )
    plan = require(decide.plan_transformers(*resolve(request)))
    for text in plan.warnings:
        warnings.warn(text, stacklevel=2)
    if component not in plan.components:
        raise UsageError(
            f"{model_path} has no transformer component {component!r}; "
            f"it has {', '.join(plan.components)}"
        )
    model = load_component(plan.components[component], plan.request, device=device)
    load_requested({component: model}, plan.pipeline_class, plan.request)
    return model


def load_pipeline(request: Request | None = None, /, **fields: Any) -> Any:
    """The diffusers pipeline of a request (keyword arguments are Request's fields).

    Raises UsageError for fields that contradict each other, CheckpointError for a bad checkpoint,
    UnusableError for what is not to be had here (a repository, a package), and RefusedError where
    no kernel fits.

        >>> import quantmatrix
        >>> pipeline = quantmatrix.load_pipeline(
        ...     model_path="black-forest-labs/FLUX.1-dev",
        ...     component_paths={"transformer": "BBuf/flux1-dev-modelopt-fp8-sglang-transformer"},
        ...     tiny=True,
        ... )
        >>> type(pipeline).__name__
        'FluxPipeline'
    """
    return build_pipeline(require_plan(request if request is not None else Request(**fields)))


def plan(request: Request | None = None, /, **fields: Any) -> Plan | Refusal:
    """How a request will run, or why it cannot. Keyword arguments are Request's fields.

    Raises CheckpointError and UsageError for what is wrong with the input, whichever part of the
    pipeline it is in.
    """
    return decide.plan(*resolve(request if request is not None else Request(**fields)))


def require_plan(request: Request) -> Plan:
    """The plan of a request; raises RefusedError where it is a refusal, and what `plan` raises."""
    return require(plan(request))


def generate_all(request: Request) -> list[Run]:
    """Plan a request and generate for every prompt and seed of it.

    Raises UsageError for fields that contradict each other, CheckpointError for a bad checkpoint,
    RefusedError where no kernel fits, and BrokenRunError for latents that are not finite.
    """
    return generating.generate_all(request, plan=require_plan(request))


def generate(request: Request) -> Run:
    """The same for its first prompt and seed; raises what `generate_all` raises."""
    return generating.generate(request, plan=require_plan(request))


def resolve(request: Request) -> tuple[Request, Machine]:
    """(the request with the hub of its stand-ins, the machine that it is for).

    Missing stand-ins are written first. Raises UsageError for a `--hardware` that is not a row.
    """
    return use_tiny(request), find_machine(request)


def find_machine(request: Request) -> Machine:
    """The machine of `--hardware`, or this one; raises UsageError for an unknown row."""
    if request.hardware is None:
        return probe.probe(request.device)
    rows = read.read().hardware
    if request.hardware not in rows:
        raise UsageError(f"--hardware {request.hardware}: no such row; known: {', '.join(rows)}")
    return identify.from_row(rows[request.hardware])
