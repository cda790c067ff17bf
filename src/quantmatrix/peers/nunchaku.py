"""nunchaku, the SVDQuant engine, in diffusers' pipelines: `from_pretrained` of its transformer classes.

Known from the engine's examples. Only its own files have a way; the package of that name on the public
index is another one, which the probe tells apart.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quantmatrix.hardware.packages import inspect_nunchaku, read_versions
from quantmatrix.peers import diffusers as shipped
from quantmatrix.peers.protocol import Answer, Found, Task

if TYPE_CHECKING:
    from pathlib import Path

    from quantmatrix.models import Model

ID = "nunchaku"
CLASSES = {
    "flux-1": "NunchakuFluxTransformer2dModel",
    "qwen-image": "NunchakuQwenImageTransformer2DModel",
    "z-image": "NunchakuZImageTransformer2DModel",
}
"""Its transformer class of each base model that it has one for."""


def probe() -> Found:
    """The version of the engine; the unrelated package of the same name counts as none."""
    kind, text = inspect_nunchaku()
    if kind != "engine":
        return Found(why=text)
    return Found(version=read_versions(("nunchaku",)).get("nunchaku", "unknown"))


def ways(task: Task) -> tuple[str, ...]:
    """One for a single file of a model that it has a class for."""
    if task.baseline:
        return shipped.ways(task)
    fits = task.weights.endswith(".safetensors") and task.checkpoint.model in CLASSES
    return ("from_pretrained",) if fits else ()


def command(task: Task) -> str:
    """The statement of Python that loads the transformer."""
    if task.baseline:
        return shipped.command(task)
    name = CLASSES.get(task.checkpoint.model, "")
    return f"nunchaku.{name}.from_pretrained({task.weights!r}, torch_dtype=torch.bfloat16)"


def run(task: Task, folder: Path) -> Answer:
    """Load by the engine and generate in diffusers; see `quantmatrix.peers.protocol`."""
    return shipped.run_with(task, folder, shipped.load_pipeline if task.baseline else load_pipeline)


def load_pipeline(task: Task, model: Model) -> Any:
    """The pipeline of diffusers with the engine's transformer in it."""
    import diffusers
    import nunchaku
    import torch

    kind = getattr(nunchaku, CLASSES[task.checkpoint.model])
    loaded = kind.from_pretrained(task.weights, torch_dtype=torch.bfloat16)
    pipeline = getattr(diffusers, model.PIPELINE)
    return pipeline.from_pretrained(task.base, transformer=loaded, torch_dtype=torch.bfloat16)


def explain(answer: Answer) -> str:
    """The class of the exception and the first line of its text."""
    return shipped.explain(answer)
