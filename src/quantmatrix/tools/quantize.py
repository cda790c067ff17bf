"""Quantize: a full-precision model as a checkpoint of any family that our loader, and its own, reads.

| family | what is written to `--output-path` |
| ------ | ---------------------------------- |
| `nunchaku-svdq` | one file, `svdq-{int4,fp4}_r{rank}-NAME.safetensors` |
| `fp8`, `modelopt-fp8`, `modelopt-nvfp4` | one file (`NAME.safetensors`) or a component folder |
| `gguf` | one file (`NAME.gguf`) or a component folder with one |
| `msmodelslim` | the whole pipeline, with a description beside each component's weights |

A model with two transformers (Wan2.2) gives a folder with one component folder each. Calibration is a
run of the model itself. Everything is written beside its path and moved there when it is complete;
what stood there goes only then. Two runs on one machine give the same bytes.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from quantmatrix import families, models
from quantmatrix.checkpoints.opening import fetch, fetch_pipeline
from quantmatrix.checkpoints.reader import TensorReader
from quantmatrix.errors import UsageError
from quantmatrix.families.protocol import Calibration
from quantmatrix.files import check_writable, whole
from quantmatrix.hardware import probe
from quantmatrix.request import WEIGHT_FILES, Request
from quantmatrix.runtime.empty_model import list_block_layers, measure_model
from quantmatrix.runtime.library_logs import quiet
from quantmatrix.runtime.pictures import call_arguments
from quantmatrix.runtime.pipeline import build_pipeline
from quantmatrix.runtime.plan.decide import plan_transformers
from quantmatrix.runtime.plan.types import ComponentPlan, Plan, require
from quantmatrix.scheme import Scheme
from quantmatrix.tables import read
from quantmatrix.tools.packing import pack_tensors
from quantmatrix.tools.recipe import (
    Recipe,
    choose_schemes,
    quantize_layers,
    watch_inputs,
    write_file,
    write_folder,
)

PROMPTS = (
    "a portrait of an old fisherman, soft window light, 85 mm",
    "a red bicycle leaning against a yellow wall, hard shadows",
    "a bowl of ramen seen from above, steam, wooden table",
    "a city at night in the rain, neon signs, reflections",
)
"""What is generated for calibration when no prompts are given."""
Written = Mapping[str, Any]
Show = Callable[[str, Iterable[Any]], Iterable[Any]]


def quantize(
    request: Request,
    *,
    family: str,
    output: str | Path,
    scheme: str | None = None,
    precision: str | None = None,
    rank: int | None = None,
    kept: Sequence[str] | None = None,
    prompts: Sequence[str] = PROMPTS,
    overwrite: bool = False,
    show: Show = lambda _, things: things,
) -> dict[str, Any]:
    """Quantize the model of a request and write it; returns what was written.

    A `--tiny` request comes with the hub of its stand-ins; calibration runs on this machine. `kept`
    are names of the model's sets, or regular expressions over diffusers' module names, of layers
    left alone; None takes the set that the tables have for the family. `show` wraps long loops:
    (what is done, the things). Raises UsageError before any work for arguments that do not fit.
    """
    start, target = time.monotonic(), Path(output)
    if request.lora_path:
        raise UsageError(
            "--lora-path: an adapter is not part of the weights that are written; give it with the "
            "checkpoint, when it is used"
        )
    scheme_name, chosen = find_scheme(family, scheme, precision, rank)
    check_writable(target)
    plan = require(plan_transformers(request, probe.probe(request.device)))
    check_base(plan, family, target, chosen, overwrite)
    recipe = find_recipe(plan, family, chosen, find_kept(plan.model, family, scheme_name, kept))
    check_names(plan, recipe)
    ranges = calibrate(plan, prompts, show)
    try:
        with whole(target, overwrite=overwrite) as temporary:
            layers = write_all(plan, recipe, ranges, target, temporary, show)
            if target.exists() and not overwrite:
                raise UsageError(
                    f"{target} appeared while this ran, and was left alone: choose another "
                    "--output-path, or give --overwrite"
                )
    except OSError as error:
        raise UsageError(
            f"cannot write {target}: {error.strerror or error}; nothing was left behind"
        ) from error
    sizes = [path.stat().st_size for path in list_files(target)]
    return {
        "output": str(target),
        "model": plan.model,
        "family": family,
        "scheme": chosen.name,
        "components": layers,
        "prompts": len(prompts),
        "bytes": sum(sizes),
        "seconds": round(time.monotonic() - start, 3),
    }


def find_recipe(plan: Plan, family: str, scheme: Scheme, kept: Callable[[str], bool]) -> Recipe:
    """What becomes of the layers of a planned model: the linear ones of its components' blocks."""
    linear = {
        name
        for part in plan.components.values()
        for name in list_block_layers(
            plan.model, measure_model(part.class_name, part.config, part.config_from)
        )
    }
    return Recipe(plan.model, family, scheme, kept, linear=frozenset(linear))


def find_scheme(
    family: str, scheme: str | None, precision: str | None, rank: int | None
) -> tuple[str, Scheme]:
    """(its name, the scheme) that the arguments name; UsageError when they do not fit the
    family."""
    if family not in families.IDS:
        raise UsageError(f"--family {family}: expected one of {', '.join(families.IDS)}")
    own = families.load(family)
    name = own.name_scheme(scheme, precision, rank)
    return name, own.SCHEMES[name]


def check_base(plan: Plan, family: str, target: Path, scheme: Scheme, overwrite: bool) -> None:
    """The model must be in full precision, the family must have files for it, the path be free.

    Raises UsageError where one of these fails.
    """
    for name, component in plan.components.items():
        if component.family is not None:
            raise UsageError(
                f"{plan.base}: {name} is quantized already ({component.why}): name the model that "
                "it was made from"
            )
    if plan.pipeline_class is None:
        raise UsageError(f"{plan.base} is one component: calibration needs the whole pipeline")
    own = families.load(family)
    dialects = [dialect.name for dialect in models.load(plan.model).DIALECTS]
    if own.DIALECT and own.DIALECT not in dialects:
        raise UsageError(f"{family} has no files for {plan.model}")
    if own.MODELS and models.load(plan.model).ID not in own.MODELS:
        known = " and ".join(models.load(name).NAME for name in own.MODELS)
        raise UsageError(f"{family} describes {known} only, the model is {plan.model}")
    own.check_output(plan.model, scheme, target)
    if target.suffix in WEIGHT_FILES and target.suffix != own.ENDING:
        raise UsageError(
            f"--output-path {target}: a single file of {family} ends in {own.ENDING}: call it "
            f"{target.stem}{own.ENDING}, or name a folder"
        )
    if target.suffix == own.ENDING and (len(plan.components) > 1 or own.WHOLE_PIPELINE):
        raise UsageError(f"--output-path {target}: several components need a folder")
    check_target(plan, target, overwrite)


def check_target(plan: Plan, target: Path, overwrite: bool) -> None:
    """UsageError for an output that exists, unless it may go, and for one that is read from."""
    if target.exists() and not overwrite:
        raise UsageError(f"--output-path {target} exists already: choose another, or --overwrite")
    path = target.resolve()
    for source in list_sources(plan):
        if path == source or path in source.parents or source in path.parents:
            raise UsageError(
                f"--output-path {target}: the model is read from {source}, which would be written "
                "over: choose another path"
            )


def list_sources(plan: Plan) -> list[Path]:
    """The folders and files that the model is read from, as far as they are on this machine."""
    files = [file for part in plan.components.values() for file in part.checkpoint.files]
    return [path.resolve() for path in map(Path, (plan.base, *files)) if path.exists()]


def find_kept(
    model: str, family: str, scheme: str, names: Sequence[str] | None
) -> Callable[[str], bool]:
    """Whether a module stays in full precision.

    Without names, what the tables' checkpoints keep: those of this scheme before others of the
    family, files with diffusers' names before raw ones. Raises UsageError for a pattern that is
    neither a set of the model nor a regular expression.
    """
    sets, own = models.load(model).FALLBACKS, models.load(model).ID
    if names is None:
        rows = [
            row
            for row in read.read().checkpoints.values()
            if (row.family, row.model) == (family, own) and row.form != "online"
        ]
        rows.sort(key=lambda row: (row.scheme != scheme, row.form == "raw"))
        names = rows[0].kept.split() if rows else ()
    given = [pattern for name in names for pattern in sets.get(name, (name,))]
    known = (
        f"neither a set of {model} ({', '.join(sets) or 'it has none'}) nor a regular expression"
    )
    return Keeper(compile_patterns("--keep", given, known))


def compile_patterns(
    flag: str, given: Iterable[str], wrong: str = "no regular expression"
) -> list[re.Pattern[str]]:
    """The patterns that a flag names; UsageError says what is `wrong` with one that is none."""
    patterns = []
    for text in given:
        try:
            patterns.append(re.compile(text))
        except re.error as error:
            raise UsageError(f"{flag} {text}: {wrong}: {error}") from error
    return patterns


class Keeper:
    """The modules that match one of several patterns."""

    def __init__(self, patterns: Sequence[re.Pattern[str]]) -> None:
        """Take the patterns; an empty sequence keeps nothing."""
        self.patterns = tuple(patterns)

    def __call__(self, module: str) -> bool:
        """Whether a module is kept."""
        return any(pattern.fullmatch(module) for pattern in self.patterns)


def check_names(plan: Plan, recipe: Recipe) -> None:
    """Every pattern must match a module: one that matches nothing would quantize what it names.

    Raises UsageError for one that matches none.
    """
    keeper = recipe.kept
    assert isinstance(keeper, Keeper)
    modules = {
        name.rpartition(".")[0]
        for component in plan.components.values()
        for name in component.checkpoint.tensors
    }
    for pattern in keeper.patterns:
        if not any(pattern.fullmatch(module) for module in modules):
            raise UsageError(
                f"--keep {pattern.pattern}: matches none of the {len(modules)} modules of "
                f"{plan.base}; `quantmatrix inspect --layers` lists them"
            )


def calibrate(plan: Plan, prompts: Sequence[str], show: Show) -> dict[str, dict[str, Calibration]]:
    """Input range of every linear layer of every component, over a generation per prompt.

    Raises UsageError without prompts, and for a layer that no step called.
    """
    if not prompts:
        raise UsageError("calibration needs at least one prompt")
    pipeline = build_pipeline(plan)
    found = {name: watch_inputs(getattr(pipeline, name)) for name in plan.components}
    arguments = call_arguments(models.load(plan.model), plan.request)
    with torch.inference_mode(), quiet():
        for number, prompt in enumerate(show("calibrating", list(prompts))):
            seed = torch.Generator("cpu").manual_seed(number)
            pipeline(prompt=prompt, generator=seed, output_type="latent", **arguments)
    for name, ranges in found.items():
        check_coverage(name, getattr(pipeline, name), ranges)
    return {
        name: {layer: move(seen) for layer, seen in ranges.items()}
        for name, ranges in found.items()
    }


def check_coverage(name: str, component: torch.nn.Module, seen: Mapping[str, Any]) -> None:
    """Every linear layer must have been called: without a range there is nothing to scale by.

    Raises UsageError for one that was not.
    """
    linear = [n for n, m in component.named_modules() if isinstance(m, torch.nn.Linear)]
    missed = [layer for layer in linear if layer not in seen]
    if missed:
        raise UsageError(
            f"calibration called {len(linear) - len(missed)} of the {len(linear)} linear layers of "
            f"{name}; {missed[0]} was never reached: give more --num-inference-steps (a second "
            "expert takes only some of them)"
        )


def move(seen: Calibration) -> Calibration:
    """A range in host memory."""
    return Calibration(seen.low.cpu(), seen.high.cpu())


def write_all(
    plan: Plan,
    recipe: Recipe,
    ranges: Mapping[str, Mapping[str, Calibration]],
    target: Path,
    temporary: Path,
    show: Show,
) -> dict[str, dict[str, int]]:
    """Write every component below (or as) `temporary`; returns how many layers became what."""
    counts: dict[str, dict[str, int]] = {}
    whole = families.load(recipe.family).WHOLE_PIPELINE
    several = whole or len(plan.components) > 1
    if whole:
        base = fetch_pipeline(plan.base, plan.request.hub, without=tuple(plan.components))
        leave = shutil.ignore_patterns("*.safetensors*")
        shutil.copytree(base, temporary, ignore=lambda folder, names: (
            leave(folder, names) if Path(folder).name in plan.components else set()
        ))  # fmt: skip
    for name, component in plan.components.items():
        packed = read_packed(plan, component, recipe)
        chosen = choose_schemes(recipe, packed)
        shown = lambda things, name=name: show(f"quantizing {name}", things)  # noqa: E731
        family = families.load(recipe.family)
        tensors, declaration = quantize_layers(
            family, recipe.dialect, packed, chosen, ranges[name], shown
        )
        counts[name] = {"quantized": len(chosen), "kept": count_kept(packed, chosen)}
        config = find_config(plan, name)
        if target.suffix == family.ENDING:
            write_file(tensors, declaration, temporary, config)
        else:
            folder = temporary / name if several else temporary
            write_folder(tensors, declaration, folder, config, with_config=True)
    return counts


def count_kept(packed: Mapping[str, torch.Tensor], chosen: Mapping[str, Scheme]) -> int:
    """Layers with a weight [out, in], of any dtype, that were left alone."""
    weights = [n for n, t in packed.items() if n.endswith(".weight") and t.ndim == 2]
    return len(weights) - len(chosen)


def read_packed(plan: Plan, component: ComponentPlan, recipe: Recipe) -> dict[str, torch.Tensor]:
    """A component's tensors under the names and in the packing of the family's dialect.

    Weights are [out, in]; floating-point tensors are in the request's dtype.
    """
    checkpoint = fetch(component.checkpoint, plan.request.hub)
    dtype = getattr(torch, plan.request.dtype)
    with TensorReader(checkpoint, "cpu") as reader:
        plain = {name: reader.read(name) for name in checkpoint.tensors}
    plain = {n: t.to(dtype) if t.is_floating_point() else t for n, t in plain.items()}
    return pack_tensors(plain, recipe.dialect, recipe.kept)


def find_config(plan: Plan, name: str) -> Path:
    """The folder that holds a component's config.json."""
    others = tuple(plan.components)
    return Path(fetch_pipeline(plan.base, plan.request.hub, without=others)) / name


def list_files(path: Path) -> list[Path]:
    """A file, or the files below a folder."""
    return [path] if path.is_file() else [p for p in sorted(path.rglob("*")) if p.is_file()]
