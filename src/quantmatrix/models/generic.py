"""Generic: a pipeline of diffusers that no model file describes, by what its classes say themselves.

Its id is `MODEL/CLASS`, and MODEL says what is known of the transformer:

| id | transformer | call |
| -- | ----------- | ---- |
| `flux-1/FluxKontextPipeline` | as in `models/flux_1.py`: dialects, fallback sets, blocks | the pipeline's |
| `generic/HunyuanVideoPipeline` | diffusers' own names; blocks are its lists of modules | the pipeline's |
| `generic/HunyuanVideoTransformer3DModel` | the same, of a component alone | none |

The class of the transformer decides which of these it is. Arguments of a call go by the signature: a
flag that the pipeline does not take is an error, one that is not given is left to the pipeline's own
default. A model file is needed for foreign names, validated fallback sets and a stand-in only.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from quantmatrix.errors import UsageError
from quantmatrix.models.dialect import DIFFUSERS
from quantmatrix.models.forward import Step

if TYPE_CHECKING:
    from quantmatrix.models import Defaults, Model
    from quantmatrix.models.dialect import Dialect
    from quantmatrix.models.forward import Draw
    from quantmatrix.request import Request

UNKNOWN = "generic"
"""The first part of an id whose transformer has no model file."""
TRANSFORMERS = "diffusers.models.transformers"
"""The package that diffusers keeps its transformers in."""
PICTURE, CLIP = (1024, 1024), (480, 832)
"""Height and width that are reckoned with where a pipeline computes its own."""
FRAMES = 81
"""Frames that are reckoned with where a pipeline of clips computes their number."""
CLIPS = ("num_frames", "num_videos_per_prompt")
"""Arguments that only a pipeline of clips has."""
PICTURES = ("height", "num_images_per_prompt", *CLIPS)
"""Arguments of which a pipeline of pictures or clips has at least one."""
TINY_SIDE, TINY_FRAMES, TINY_STEPS, TINY_GUIDANCE = 64, 9, 4, 4.0
"""Pixels a side, frames, steps and guidance of a stand-in's run."""
TINY_CALL: Mapping[str, Any] = {
    "max_sequence_length": 32,
    "use_resolution_binning": False,  # to a picture of the published size
    "_auto_resize": False,  # of a given picture, to about a million pixels
    "complex_human_instruction": None,  # hundreds of tokens before the prompt
}
"""What the call of a stand-in is given besides, where the pipeline takes it."""
WHOLE_TEXT = ("WanImageToVideoPipeline",)
"""Pipelines whose transformer counts on 512 tokens of text: what lies before them is the picture's."""
MOST_PICTURES: Mapping[str, int] = {
    "QwenImageEditPlusPipeline": 3,
    **dict.fromkeys(("Flux2Pipeline", "Flux2KleinPipeline", "Flux2KleinKVPipeline"), 10),
}
"""Pictures that a pipeline composes; one with an argument `image` and without an entry takes one."""
BESIDE = ("FluxKontextPipeline", "QwenImageEditPipeline", *MOST_PICTURES)
"""Pipelines that lay the patches of pictures beside those of the latents."""
PICTURE_AREA, PATCH = 1024 * 1024, 16
"""Pixels that such a pipeline brings a picture to, and those of a patch's side."""
OURS = {"prompt", "generator"}
"""Arguments that every run gives: a pipeline that does not take them cannot be proved."""


@dataclass(frozen=True)
class Generic:
    """What a model file says, of a pipeline or transformer without one."""

    ID: str
    NAME: str
    PIPELINE: str
    COMPONENTS: tuple[str, ...]
    DEFAULTS: Defaults
    TRANSFORMER: str = ""
    REPO: str = ""
    DIALECTS: tuple[Dialect, ...] = (DIFFUSERS,)
    FALLBACKS: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    BLOCKS: tuple[str, ...] = ()
    """Empty: the transformer's own lists (`runtime.empty_model.list_block_layers`)."""
    TINY: Mapping[str, Any] = field(default_factory=dict)
    FULL: Mapping[str, Any] = field(default_factory=dict)
    ONE_BLOCK: Mapping[str, Any] = field(default_factory=dict)
    STEP: Step = field(default_factory=Step)
    own: Model | None = None
    """The model file of the transformer's class."""

    @property
    def TINY_DEFAULTS(self) -> Defaults:
        """What a stand-in's run takes: a small picture or clip in a few steps."""
        clip = self.DEFAULTS.frames > 1
        return replace(
            self.DEFAULTS,
            height=TINY_SIDE,
            width=TINY_SIDE,
            steps=TINY_STEPS,
            guidance=TINY_GUIDANCE,
            frames=TINY_FRAMES if clip else 1,
        )

    def call_arguments(self, request: Request) -> dict[str, Any]:
        """Keyword arguments of the pipeline call: what the request gives, by the call's signature.

        Raises UsageError for a flag that the call does not take, and for what it needs and no flag
        gives.
        """
        parameters = read_call(self.PIPELINE)
        check_call(self.PIPELINE, parameters, pictures=bool(request.image_path))
        given: dict[str, Any] = {
            "height": request.height,
            "width": request.width,
            "num_frames": request.num_frames,
            "num_inference_steps": request.num_inference_steps,
            "negative_prompt": request.negative_prompt,
        }
        arguments = {name: value for name, value in given.items() if value is not None}
        if request.guidance_scale is not None:
            arguments[name_guidance(parameters)] = request.guidance_scale
        if unknown := sorted(arguments.keys() - parameters.keys()):
            flag = unknown[0].replace("_", "-")
            raise UsageError(f"--{flag}: {self.PIPELINE} takes none; leave the flag out")
        if "negative_prompt" in arguments and "true_cfg_scale" in parameters:
            guidance = request.guidance_scale
            arguments["true_cfg_scale"] = self.DEFAULTS.guidance if guidance is None else guidance
        if request.tiny:
            arguments = {**self.tiny_arguments(parameters), **arguments}
        if "max_area" in parameters and {"height", "width"} <= arguments.keys():
            arguments["max_area"] = arguments["height"] * arguments["width"]
        return arguments

    def tiny_arguments(self, parameters: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
        """What the call of a stand-in is given where the request is silent, as far as it takes it."""
        defaults = self.TINY_DEFAULTS
        given = {
            "height": defaults.height,
            "width": defaults.width,
            "num_frames": defaults.frames,
            "num_inference_steps": defaults.steps,
            name_guidance(parameters): defaults.guidance,
            **TINY_CALL,
        }
        if self.PIPELINE in WHOLE_TEXT:
            del given["max_sequence_length"]
        return {name: value for name, value in given.items() if name in parameters}

    def forward_inputs(self, config: Any, draw: Draw, *, tiny: bool) -> dict[str, Any]:
        """Arguments of one forward, as the transformer's model file has them; UsageError without."""
        if self.own is None:
            raise UsageError(f"{self.ID}: no model file says what a forward takes")
        return self.own.forward_inputs(config, draw, tiny=tiny)


def describe(model: str, own: Model | None) -> Generic:
    """The model of an id `MODEL/CLASS`; `own` is the file of MODEL, None where there is none.

    Raises KeyError for a class that is no such thing in diffusers.
    """
    from quantmatrix.models import Defaults

    class_name = model.partition("/")[2]
    if is_transformer(class_name):
        return Generic(model, class_name, "", ("transformer",), Defaults(*PICTURE, 1, 0.0))
    if find_pipeline(class_name) is None:
        raise KeyError(f"no such pipeline or transformer in diffusers: {class_name}")
    components, defaults = list_transformers(class_name), read_defaults(class_name)
    if own is None:
        return Generic(model, class_name, class_name, components, defaults)
    return Generic(
        ID=own.ID,
        NAME=class_name,
        PIPELINE=class_name,
        COMPONENTS=components,
        DEFAULTS=defaults,
        TRANSFORMER=own.TRANSFORMER,
        DIALECTS=own.DIALECTS,
        FALLBACKS=own.FALLBACKS,
        BLOCKS=own.BLOCKS,
        TINY=own.TINY,
        FULL=own.FULL,
        ONE_BLOCK=own.ONE_BLOCK,
        STEP=own.STEP,
        own=own,
    )


def find_pipeline(class_name: str) -> Any:
    """The pipeline class of diffusers of this name, or None."""
    import diffusers

    found = getattr(diffusers, class_name, None)
    is_pipeline = isinstance(found, type) and issubclass(found, diffusers.DiffusionPipeline)
    return found if is_pipeline else None


def is_transformer(class_name: str) -> bool:
    """Whether diffusers has a transformer of this name."""
    import diffusers

    found = getattr(diffusers, class_name, None)
    module = getattr(found, "__module__", "")
    return isinstance(found, type) and module.startswith(f"{TRANSFORMERS}.")


@cache
def list_transformers(pipeline: str) -> tuple[str, ...]:
    """Components of a pipeline class that are transformers, primary first; by its constructor."""
    parameters = inspect.signature(find_pipeline(pipeline).__init__).parameters
    return tuple(
        name
        for name, parameter in parameters.items()
        if name.startswith("transformer") or f"{TRANSFORMERS}." in str(parameter.annotation)
    )


def read_call(pipeline: str) -> Mapping[str, inspect.Parameter]:
    """Arguments of a pipeline's call, `self` left out; UsageError where there is no pipeline."""
    found = find_pipeline(pipeline)
    if found is None:
        raise UsageError(
            "the model is one transformer alone, which makes no picture: name a whole pipeline "
            "with --model-path, and this folder with --transformer-path"
        )
    parameters = dict(inspect.signature(found.__call__).parameters)
    return {name: one for name, one in parameters.items() if name != "self"}


def check_call(
    pipeline: str, parameters: Mapping[str, inspect.Parameter], *, pictures: bool = False
) -> None:
    """Refuse a call that a run cannot make; UsageError. `pictures`: the request has some."""
    if missing := sorted(OURS - parameters.keys()):
        raise UsageError(
            f"{pipeline}: its call takes no {missing[0]}, which every run gives: the transformer "
            "alone can be loaded (quantmatrix.load_transformer)"
        )
    if not set(PICTURES) & parameters.keys():
        raise UsageError(
            f"{pipeline}: it makes neither pictures nor clips, and nothing else can be saved or "
            "compared: the transformer alone can be loaded (quantmatrix.load_transformer)"
        )
    needed = [name for name in list_needed(parameters) if name not in OURS]
    if needed == ["image"]:
        if pictures:
            return
        raise UsageError(f"{pipeline}: its call needs image: name a picture with --image-path")
    if needed:
        raise UsageError(
            f"{pipeline}: its call needs {', '.join(needed)}, which no flag gives: the transformer "
            "alone can be loaded (quantmatrix.load_transformer, quantmatrix.load_pipeline)"
        )


def count_picture_rows(pipeline: str) -> int:
    """Rows that a picture adds to the latents' in a pipeline; 0 where it adds channels, or none."""
    return PICTURE_AREA // PATCH**2 if pipeline in BESIDE else 0


def list_needed(parameters: Mapping[str, inspect.Parameter]) -> Iterator[str]:
    """Arguments without a default."""
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    for name, one in parameters.items():
        if one.default is inspect.Parameter.empty and one.kind not in several:
            yield name


def name_guidance(parameters: Mapping[str, inspect.Parameter]) -> str:
    """The argument that takes `--guidance-scale`.

    Qwen-Image's pipelines have `true_cfg_scale`, and beside it a `guidance_scale` that no published
    model uses, whose default is None.
    """
    own = parameters.get("guidance_scale")
    unused = own is None or own.default is None
    return "true_cfg_scale" if unused and "true_cfg_scale" in parameters else "guidance_scale"


@cache
def read_defaults(pipeline: str) -> Defaults:
    """The defaults of a pipeline's call; of a size that it computes, one to reckon with."""
    from quantmatrix.models import Defaults

    parameters = read_call(pipeline)

    def default(name: str, other: Any) -> Any:
        found = parameters[name].default if name in parameters else None
        return other if found in (None, inspect.Parameter.empty) else found

    is_clip = any(name in parameters for name in CLIPS)
    height, width = CLIP if is_clip else PICTURE
    return Defaults(
        height=int(default("height", height)),
        width=int(default("width", width)),
        steps=int(default("num_inference_steps", 1)),
        guidance=float(default(name_guidance(parameters), 1.0)),
        frames=int(default("num_frames", FRAMES)) if is_clip else 1,
        fps=int(default("fps", default("frame_rate", 16))),
    )


def describe_use(model: str) -> str:
    """What the plan says of a model of this id: what is known, and from where."""
    name, _, class_name = model.partition("/")
    if name != UNKNOWN:
        return (
            f"{class_name}: its transformer is that of {name}, whose names and sets are used; its "
            "call goes by the pipeline's own signature and defaults"
        )
    return (
        f"{class_name} has no model file: it is taken as diffusers has it, names, blocks, call and "
        "defaults alike; no fallback set of it was validated"
    )
