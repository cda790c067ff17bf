"""Further models: base models that need no model file of their own, as data.

What a model of the tables must have besides its pipeline is a stand-in. A module here says it: id, name,
repository, classes, and the options of every small part. How such a model is loaded and called is known
from elsewhere: from the model file of its pipeline (`flux_1` runs FLUX.1-schnell), else from its classes
(`quantmatrix.models.generic`).
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from quantmatrix.models import Model
    from quantmatrix.models.stand_in import StandIn

IDS = (
    "flux-1-kontext",
    "flux-1-fill",
    "flux-1-krea",
    "flux-1-schnell",
    "flux-2-klein-4b",
    "flux-2-klein-9b",
    "qwen-image-2512",
    "qwen-image-edit",
    "qwen-image-edit-2509",
    "qwen-image-edit-2511",
    "z-image-base",
    "wan-2-1-t2v",
    "wan-2-1-i2v",
    "wan-2-2-i2v",
    "wan-2-2-ti2v",
    "hunyuan-video",
    "hunyuan-video-1-5",
    "hunyuan-image-2-1",
    "sd-3-5",
    "ltx-video",
    "cogview-4",
    "sana",
    "chroma",
    "glm-image",
)


def load_module(model: str) -> Described:
    """The module of one of `IDS`."""
    found = import_module(f"quantmatrix.models.further.{model.replace('-', '_')}")
    return cast("Described", found)


def list_repositories() -> dict[str, str]:
    """Each model's id by its repository."""
    return {load_module(model).REPO: model for model in IDS}


class Described(Protocol):
    """The names that every module here has; one may have more of those of `models.Model`: `FALLBACKS` of sets
    that were validated, `FULL` where the published transformer has other options than its class, `PICTURES`
    where a run needs as many to look at.
    """

    ID: str
    NAME: str
    REPO: str
    PIPELINE: str
    TRANSFORMER: str
    STAND_IN: StandIn


@dataclass(frozen=True)
class Further:
    """What the module of a model says, and for all else the model that runs its pipeline."""

    described: Described
    used: Model

    def __getattr__(self, name: str) -> Any:
        """A name of `models.Model`: of the module where it has it."""
        if name == "TINY":
            return self.described.STAND_IN.transformer
        return getattr(self.described, name, None) or getattr(self.used, name)
