"""cache-dit, an accelerator of diffusers' pipelines: `enable_cache` around what diffusers loads, and its
own `quantize` for weights that are quantized while loading.

Known from its user guide (quantization) and its examples. Files are loaded by diffusers, so that a file
which diffusers refuses is refused here, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quantmatrix.peers import common
from quantmatrix.peers import diffusers as shipped
from quantmatrix.peers.protocol import Answer, Found, Task

if TYPE_CHECKING:
    from pathlib import Path

    from quantmatrix.models import Model

ID = "cache-dit"
QUANTIZE = "quantize"
QUANT_TYPE = "float8_weight_only"


def probe() -> Found:
    """The version of the package."""
    return common.find_package("cache-dit")


def ways(task: Task) -> tuple[str, ...]:
    """Those of diffusers; its own where weights are quantized while loading."""
    return (QUANTIZE,) if task.online == "fp8" else shipped.ways(task)


def command(task: Task) -> str:
    """The statements of Python."""
    if task.way == QUANTIZE:
        return f"cache_dit.quantize(pipe.transformer, quant_type={QUANT_TYPE!r}); cache_dit.enable_cache(pipe)"
    return f"{shipped.command(task)}; cache_dit.enable_cache(pipe)"


def run(task: Task, folder: Path) -> Answer:
    """Load, wrap and generate; see `quantmatrix.peers.protocol`."""
    return shipped.run_with(task, folder, load_pipeline)


def load_pipeline(task: Task, model: Model) -> Any:
    """The pipeline with its cache enabled."""
    import cache_dit
    import diffusers
    import torch

    if task.way == QUANTIZE:
        kind = getattr(diffusers, model.PIPELINE)
        pipeline = kind.from_pretrained(task.base, torch_dtype=torch.bfloat16)
        for name in task.checkpoint.components:
            part = getattr(pipeline, name)
            setattr(pipeline, name, cache_dit.quantize(part, quant_type=QUANT_TYPE))
    else:
        pipeline = shipped.load_pipeline(task, model)
    cache_dit.enable_cache(pipeline)
    return pipeline


def explain(answer: Answer) -> str:
    """The class of the exception and the first line of its text."""
    return shipped.explain(answer)
