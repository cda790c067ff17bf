"""The public functions that load: a transformer alone, or a whole pipeline."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch

from quantmatrix.errors import RefusedError, UsageError
from quantmatrix.request import WEIGHTS_ALIASES, Request
from quantmatrix.runtime.load import load_component
from quantmatrix.runtime.pipeline import build_pipeline
from quantmatrix.runtime.plan.decide import plan, plan_transformers
from quantmatrix.runtime.plan.types import Refusal

if TYPE_CHECKING:
    from typing import Any

    from torch import nn


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
    is needed where the override holds every tensor. Further keyword arguments are Request's
    fields. What the plan warns of is a Python warning here. Raises CheckpointError for a bad
    checkpoint and RefusedError where no kernel fits.
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
    made = plan_transformers(request)
    if isinstance(made, Refusal):
        raise RefusedError(made.rule, made.message)
    for text in made.warnings:
        warnings.warn(text, stacklevel=2)
    if component not in made.components:
        raise UsageError(
            f"{model_path} has no transformer component {component!r}; "
            f"it has {', '.join(made.components)}"
        )
    return load_component(made.components[component], made.request, device=device)


def load_pipeline(request: Request | None = None, /, **fields: Any) -> Any:
    """The diffusers pipeline of a request (keyword arguments are Request's fields)."""
    request = request if request is not None else Request(**fields)
    made = plan(request)
    if isinstance(made, Refusal):
        raise RefusedError(made.rule, made.message)
    return build_pipeline(made)
