"""Request: everything a run is described by, and the flags that say it.

The names and meanings are those of the quantization guide. Dashes and underscores are the same;
boolean flags take nothing, `true` or `false`. Besides the fixed flags there is one family of
dynamic ones: `--<component>-path X` replaces a component, `--<component>-weights-path X` only its
weights, and `--component-paths.<component> X` is the long form of the first. A weights flag is
recognised before the shorter suffix, or `transformer_2_weights` would become a component.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from quantmatrix.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any


@dataclass(frozen=True)
class Hub:
    """Where hub ids and the guide's placeholder paths are looked up."""

    cache_dir: str | None = None
    """A hub cache folder; None: the user's own."""
    offline: bool = False
    local_root: str | None = None
    """Folder whose `path/to/...` stands in for paths that begin with /path/to/."""
    revision: str | None = None


DTYPES = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Dtypes that a run may compute in, by torch's names, and the bytes of an item."""
PRECISIONS = ("int4", "nvfp4")
WITNESS = ("auto", "require", "off")
NIBBLE_ORDERS, NVFP4_LAYOUTS = ("low", "high"), ("rows", "tiles")
WEIGHT_FILES = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt")
FP4_BACKEND_VARIABLE = "SGLANG_DIFFUSION_FLASHINFER_FP4_GEMM_BACKEND"
"""The guide's environment variable for `Request.fp4_gemm_backend`; only the CLI reads it."""
SEVERAL = (
    *("prompt", "seed", "quantization_ignored_layers", "image_path"),
    *("lora_path", "lora_weight_name", "lora_scale"),
)
"""Fields of a request that hold several values."""
WEIGHTS_ALIASES = ("transformer_weights_path", "transformer_quantized_path", "quantized_model_path")
"""Older names of the weights override in config files and keyword arguments, best first."""


@dataclass(frozen=True)
class Request:
    """One run, described by its arguments alone. Paths may be hub ids; sizes are pixels."""

    model_path: str = ""
    model_id: str | None = None
    component_paths: Mapping[str, str] = field(default_factory=dict)
    weights_paths: Mapping[str, str] = field(default_factory=dict)
    enable_svdquant: bool | None = None
    quantization_precision: str | None = None
    quantization_rank: int | None = None
    quantization: str | None = None
    quantization_ignored_layers: tuple[str, ...] = ()
    lora_path: tuple[str, ...] = ()
    """Adapters beside the transformers' layers: files, folders or hub ids."""
    lora_weight_name: tuple[str, ...] = ()
    """The file of each adapter, where a folder has several; one stands for all."""
    lora_scale: tuple[float, ...] = ()
    """The scale of each adapter; one stands for all, none for 1."""
    witness: str = "auto"
    """Whether decoded layers are compared with the base model's own: where its weights are at hand
    (`auto`), always (`require`: an error where they are not, and where a base model that is only a
    guess disagrees), or never (`off`)."""
    nibble_order: str | None = None
    """Where the even column of NVFP4 codes lies, `low` or `high`; None: as the file declares."""
    nvfp4_layout: str | None = None
    """How NVFP4 block scales lie, `rows` or `tiles`; None: as the file declares."""
    dit_layerwise_offload: bool | None = None
    dit_cpu_offload: bool | None = None
    compile: bool = False
    """Compile the repeated blocks of the transformers."""
    cuda_graph: bool = False
    """Capture each transformer's forward in a CUDA graph."""
    backend: str | None = None
    fp4_gemm_backend: str | None = None
    device: str | None = None
    nproc_per_node: int = 1
    """Devices of the machine that share each generation, one process on each."""
    shard_weights: bool = False
    """Keep a share of the transformers' weights on each of these devices, instead of all of them."""
    dtype: str = "bfloat16"
    hardware: str | None = None
    """A row of matrix/hardware.csv to plan for, instead of this machine."""
    hub: Hub = field(default_factory=Hub)
    tiny: bool = False
    prompt: tuple[str, ...] = ("",)
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    seed: tuple[int, ...] = (0,)
    image_path: tuple[str, ...] = ()
    """Pictures that the pipeline is given: files here, `FILE#sha256:HEX` where one is pinned."""
    mask_path: str | None = None
    """The white part of the picture is painted."""

    def __post_init__(self) -> None:
        """Check what can be checked without reading a file."""
        if self.dtype not in DTYPES:
            raise UsageError(f"--dtype {self.dtype}: expected one of {', '.join(DTYPES)}")
        for name, known in (
            ("witness", WITNESS),
            ("nibble_order", (None, *NIBBLE_ORDERS)),
            ("nvfp4_layout", (None, *NVFP4_LAYOUTS)),
        ):
            if getattr(self, name) not in known:
                choices = ", ".join(filter(None, known))
                raise UsageError(f"--{_dashed(name)} {getattr(self, name)}: expected {choices}")
        self._check_generation()
        object.__setattr__(self, "component_paths", dict(self.component_paths))
        object.__setattr__(self, "weights_paths", dict(self.weights_paths))
        offloaded = self.dit_layerwise_offload or self.dit_cpu_offload
        if offloaded and (self.compile or self.cuda_graph):
            flag = "--compile" if self.compile else "--cuda-graph"
            raise UsageError(f"{flag} needs the transformer on its device: leave out the offload")
        self._sort_overrides()

    def _check_generation(self) -> None:
        """Numbers that no generation can have; a pipeline would fail on them late, or ignore them."""
        for name in ("height", "width", "num_frames", "num_inference_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{_dashed(name)} {value}: expected 1 or more")
        if self.guidance_scale is not None and not math.isfinite(self.guidance_scale):
            raise UsageError(f"--guidance-scale {self.guidance_scale}: expected a number")
        for name, kind in (("prompt", str), ("seed", int), ("image_path", str)):
            value = getattr(self, name)
            if isinstance(value, kind):  # one alone, which for a text would be its letters
                object.__setattr__(self, name, (value,))
            elif not value and name != "image_path":
                raise UsageError(f"--{name}: none given, expected one or more")
        for seed in self.seed:
            if not -(2**63) <= seed < 2**64:
                raise UsageError(f"--seed {seed}: expected a number of 64 bits")

    def _sort_overrides(self) -> None:
        """A `--X-path` that names one weight file is a weights override of X."""
        components = dict(self.component_paths)
        weights = dict(self.weights_paths)
        for name, value in list(components.items()):
            if PurePath(value).suffix.lower() not in WEIGHT_FILES:
                continue
            if weights.get(name, value) != value:
                raise UsageError(
                    f"--{_dashed(name)}-path {value} names a weight file, and "
                    f"--{_dashed(name)}-weights-path {weights[name]} names another: give one"
                )
            weights[name] = components.pop(name)
        object.__setattr__(self, "component_paths", components)
        object.__setattr__(self, "weights_paths", weights)

    @classmethod
    def from_words(cls, argv: Sequence[str], **extra: Any) -> Request:
        """The request of command-line arguments (without `quantmatrix generate`)."""
        parser = argparse.ArgumentParser(prog="quantmatrix generate", exit_on_error=False)
        add_request_flags(parser)
        add_sharing_flag(parser)
        add_output_flags(parser)
        arguments, rest = parser.parse_known_args(normalize_flags(argv))
        return cls.from_arguments(arguments, rest, **extra)

    @classmethod
    def from_arguments(
        cls, arguments: argparse.Namespace, rest: Sequence[str], **extra: Any
    ) -> Request:
        """The request of parsed flags; `rest` holds the dynamic `--<component>-path` flags."""
        components, weights = parse_overrides(rest)
        values = {
            f.name: getattr(arguments, f.name)
            for f in fields(cls)
            if getattr(arguments, f.name, None) is not None
        }
        for name in SEVERAL:
            if name in values:
                values[name] = tuple(values[name])
        return cls(**{**values, **extra}, component_paths=components, weights_paths=weights)


def _dashed(component: str) -> str:
    return component.replace("_", "-")


def parse_bool(text: str) -> bool:
    """`true` or `false`, any case; raises ArgumentTypeError for anything else."""
    value = text.lower()
    if value not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, not {text!r}")
    return value == "true"


def parse_number(text: str) -> float:
    """A finite number; raises ArgumentTypeError for anything else.

    Nothing is smaller than `nan`, so a limit of `nan` would hold for everything.
    """
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"expected a number, not {text!r}")
    return number


def normalize_flags(argv: Sequence[str]) -> list[str]:
    """The arguments with underscores in flag names turned into dashes; values are left alone."""
    normal = []
    for argument in argv:
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            head, dot, component = name.partition(".")
            argument = head.replace("_", "-") + dot + component + equals + value
        normal.append(argument)
    return normal


def parse_overrides(rest: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """(component paths, weights paths) from the arguments that the fixed flags left over.

    Raises UsageError for an unknown flag, one without a value and one given twice.
    """
    components: dict[str, str] = {}
    weights: dict[str, str] = {}
    argv = list(rest)
    unknown = []
    while argv:
        argument = argv.pop(0)
        name, equals, value = argument.partition("=")
        target, component = _override_of(name, components, weights)
        if target is None:
            unknown.append(argument)
            continue
        if not equals and (not argv or argv[0].startswith("--")):
            raise UsageError(f"{name}: expected a file, a folder or a hub id after it")
        value = value if equals else argv.pop(0)
        if target.get(component, value) != value:
            raise UsageError(f"{name} is given twice: {target[component]} and {value}")
        target[component] = value
    if unknown:
        raise UsageError(f"unrecognized arguments: {' '.join(unknown)}")
    return components, weights


def _override_of(
    name: str, components: dict[str, str], weights: dict[str, str]
) -> tuple[dict[str, str] | None, str]:
    if match := re.fullmatch(r"--component-paths\.([\w-]+)", name):
        return components, match[1].replace("-", "_")
    if match := re.fullmatch(r"--([a-z][\w-]*)-weights-path", name):
        return weights, match[1].replace("-", "_")
    if match := re.fullmatch(r"--([a-z][\w-]*)-path", name):
        return components, match[1].replace("-", "_")
    return None, ""


def _add_bool(group: argparse._ArgumentGroup, flag: str, text: str) -> None:
    group.add_argument(
        flag, nargs="?", const=True, default=None, type=parse_bool, metavar="true|false", help=text
    )


def add_request_flags(parser: argparse.ArgumentParser, *, needed: bool = True) -> None:
    """The flags that describe a checkpoint, a machine and a generation.

    A command that knows its model from elsewhere, too, does without `--model-path` (`needed`).
    """
    parser.set_defaults(**dict.fromkeys(f.name for f in fields(Request)))
    what = parser.add_argument_group("checkpoint")
    what.add_argument("--model-path", required=needed, help="base model: a folder or a hub id")
    what.add_argument("--model-id", help="short name of the base model (FLUX.1-dev), for mirrors")
    _document_overrides(what)
    _add_bool(what, "--enable-svdquant", "the weights are an SVDQuant (nunchaku) checkpoint")
    what.add_argument(
        "--quantization-precision", metavar="int4|nvfp4", help="precision of an SVDQuant file"
    )
    what.add_argument("--quantization-rank", type=int, help="low-rank size of an SVDQuant file")
    what.add_argument(
        "--quantization",
        metavar="NAME",
        help="quantize BF16 weights while loading: fp8, mxfp8, mxfp4",
    )
    what.add_argument(
        "--quantization-ignored-layers",
        nargs="+",
        metavar="NAME",
        help="layers that --quantization leaves in full precision",
    )
    what.add_argument(
        "--lora-path", action="append", help="an adapter: a file, folder or hub id; repeatable"
    )
    what.add_argument(
        "--lora-weight-name",
        action="append",
        metavar="FILE",
        help="its file name, when the path is a folder",
    )
    what.add_argument(
        "--lora-scale", action="append", type=parse_number, help="its scale (default 1)"
    )
    what.add_argument(
        "--witness",
        choices=WITNESS,
        help="compare decoded layers with the base model's own weights: when they are available "
        "(auto, the default), always (an error when they are missing, or when a guessed base "
        "model disagrees), or never",
    )
    what.add_argument(
        "--nvfp4-layout", choices=NVFP4_LAYOUTS, help="layout of NVFP4 block scales, if undeclared"
    )
    what.add_argument(
        "--nibble-order",
        choices=NIBBLE_ORDERS,
        help="nibble that holds the even column of NVFP4 codes, if undeclared",
    )
    what.add_argument("--revision", help="revision (branch, tag or commit) of hub ids")
    what.add_argument(
        "--tiny",
        action="store_true",
        help="use tiny stand-ins in the true formats, written on first use",
    )
    where = parser.add_argument_group("machine")
    where.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: the best there is)")
    where.add_argument("--dtype", choices=DTYPES, help="compute dtype (default bfloat16)")
    where.add_argument("--backend", help="use only this kernel backend")
    _add_bool(where, "--dit-layerwise-offload", "keep transformer blocks in host memory")
    _add_bool(where, "--dit-cpu-offload", "keep the whole transformer in host memory")
    where.add_argument("--compile", action="store_true", help="compile the repeated blocks")
    where.add_argument(
        "--cuda-graph", action="store_true", help="replay each forward from a CUDA graph"
    )
    how = parser.add_argument_group("generation")
    how.add_argument("--prompt", nargs="+", help="one or more prompts")
    how.add_argument("--negative-prompt")
    how.add_argument(
        "--image-path",
        nargs="+",
        metavar="FILE",
        help="pictures to start from or to change; FILE#sha256:HEX pins one",
    )
    how.add_argument("--mask-path", metavar="FILE", help="mask of the picture: white is painted")
    how.add_argument("--height", type=int, help="pixels")
    how.add_argument("--width", type=int, help="pixels")
    how.add_argument("--num-frames", type=int)
    how.add_argument("--num-inference-steps", type=int)
    how.add_argument("--guidance-scale", type=float)
    how.add_argument("--seed", type=int, nargs="+", help="one or more seeds (default 0)")


def _document_overrides(group: argparse._ArgumentGroup) -> None:
    """Show the dynamic flags in --help; `parse_overrides` reads them."""
    group.description = (
        "--transformer-path X replaces the component `transformer` (config and weights), "
        "--transformer-weights-path X only its weights; --<component>-path and "
        "--<component>-weights-path do the same for any other (--transformer-2-path, "
        "--text-encoder-path, --text-encoder-2-path: a folder, or a weight file alone)."
    )


def add_sharing_flag(parser: argparse.ArgumentParser) -> None:
    """The flag of the commands that can share a generation between devices."""
    text = "devices of this machine that share each generation (context parallelism)"
    parser.add_argument("--nproc-per-node", type=int, metavar="N", help=text)
    text = (
        "with --nproc-per-node: each device keeps a share of the weights and gathers block by block"
    )
    parser.add_argument("--shard-weights", action="store_true", default=None, help=text)


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say where results go."""
    out = parser.add_argument_group("output")
    out.add_argument(
        "--save-output",
        action="store_true",
        default=True,
        help="save the picture or clip (the default)",
    )
    out.add_argument("--no-save-output", action="store_false", dest="save_output")
    out.add_argument("--output-path", default="outputs", help="a folder, or one file")
    out.add_argument("--json", action="store_true", help="print the result as JSON")


GENERATION = ("prompt", "negative_prompt", "height", "width", "num_frames", "num_inference_steps")

GENERATION_FIELDS = (*GENERATION, "guidance_scale", "seed", "image_path", "mask_path")


def blank_generation() -> dict[str, Any]:
    """Values with which a request no longer says what to generate."""
    blank: dict[str, Any] = dict.fromkeys(GENERATION_FIELDS)
    return {**blank, "prompt": ("",), "seed": (0,), "image_path": ()}


def strip_quantization(request: Request, base: str) -> Request:
    """The request with everything removed that is about a quantized transformer.

    Other components that it names, text encoders among them, and adapters are those of both runs.
    """

    def keep(paths: Mapping[str, str]) -> dict[str, str]:
        return {name: path for name, path in paths.items() if not name.startswith("transformer")}

    return replace(
        request,
        model_path=base,
        model_id=None,
        component_paths=keep(request.component_paths),
        weights_paths=keep(request.weights_paths),
        enable_svdquant=None,
        quantization_precision=None,
        quantization_rank=None,
        quantization=None,
        quantization_ignored_layers=(),
        witness="auto",
        nibble_order=None,
        nvfp4_layout=None,
        nproc_per_node=1,
        shard_weights=False,
        backend=None,
        fp4_gemm_backend=None,
    )
