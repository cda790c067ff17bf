"""Validate: one checkpoint against its base model, for the person who publishes it.

The base model runs first, then the checkpoint, with the same prompts and seeds; only one of them is
in memory. What is measured:

| part      | content |
| --------- | ------- |
| `census`  | per component the quantized layers, what is not as declared or not as planned, and what |
|           | no step of the first run called, and is therefore not measured |
| `witness` | per component, decoded layers beside the base model's own weights (see `witness`) |
| `layers`  | error of every quantized layer on the inputs that it gets (see `layer_errors`) |
| `runs`    | per prompt and seed: distance of the latents of every step and of the pictures |
| `quality` | PSNR, SSIM, MS-SSIM and FLIP over all runs: mean, worst, and of which prompt (see `quality`); LPIPS |
|           | and CLIP score, which are optional, where their weights are in the caches (see `networks`) |
| `scope`   | what was measured: `stand-in`, `published`, or `local files` that are in no repository yet |
| `memory`  | bytes of transformer weights; the accelerator's peak where there is one |
| `machine`, `versions`, `checkpoint`, `command` | what it was measured on, and with |

The result is a list of problems; it is empty for a checkpoint that holds what it declares. How far
is too far for a picture is the publisher's choice, so distances are reported, not judged; a run
that is not finite, or that equals the base model's bit for bit, is a problem. Nothing is timed: one
cold run after another says nothing about speed, for which there is `quantmatrix bench`.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from quantmatrix import models, strict_json
from quantmatrix.api import require_plan
from quantmatrix.errors import UsageError
from quantmatrix.hardware import probe
from quantmatrix.measure.census import find_differences, find_undeclared
from quantmatrix.measure.latents import compare_trajectories, find_worst, summarize
from quantmatrix.measure.layers import LayerErrors, watch_layers
from quantmatrix.measure.networks import Networks, find_networks
from quantmatrix.measure.pictures import measure_media
from quantmatrix.measure.quality import measure_quality, summarize_quality
from quantmatrix.proof import record as records
from quantmatrix.proof import scopes
from quantmatrix.request import Request, strip_quantization
from quantmatrix.runtime.generate import generate_all
from quantmatrix.runtime.pipeline import build_pipeline
from quantmatrix.runtime.plan.types import Plan
from quantmatrix.runtime.run import Run
from quantmatrix.runtime.witness.verdict import examine_plan

SCHEMA = 1
LOCAL = "local files"
"""Scope of a checkpoint that lies in no repository: what a publisher measures before uploading it."""
USELESS_LAYER = 0.8
"""A layer that is this far from the base model's is another layer: W4A4 per channel gives 0.5."""
Say = Callable[[str], None]


@dataclass
class Validation:
    """What was found; `report` is plain data, `runs` holds (BF16, quantized) pairs."""

    report: dict[str, Any]
    problems: list[str]
    runs: list[tuple[Run, Run]] = field(default_factory=list)


def validate(request: Request, command: str, say: Say = lambda _: None) -> Validation:
    """Compare the checkpoint of a request with its base model; RefusedError when it cannot run."""
    plan = plan_quantized(request)
    base_request = strip_quantization(request, request.model_path)
    base = require_plan(base_request)
    say(f"base model: {describe_runs(request)}")
    baselines = generate_all(base_request, plan=base)
    release_memory()
    say(f"checkpoint: {describe_runs(request)}")
    unproved = replace(plan, request=replace(plan.request, witness="off"))
    pipeline = build_pipeline(unproved)  # what the witness finds is a finding here, not an end
    census, problems = take_census(plan, pipeline)
    reports = examine_plan(plan)
    problems += [text for found in reports for text in (*found.problems, *found.warnings)]
    runs = generate_all(request, plan=plan, pipeline=pipeline)
    say("layers on their own inputs")
    with watch_layers(pipeline, plan, base) as errors:
        generate_all(replace(request, prompt=request.prompt[:1], seed=request.seed[:1]),
                     plan=plan, pipeline=pipeline)  # fmt: skip
    for name, found in errors.found.items():
        census[name]["not_called"] = sorted(set(plan.components[name].layers) - set(found))
    pairs = list(zip(baselines, runs, strict=True))
    problems += judge_layers(errors) + judge_runs(pairs)
    quantized = {name: part for name, part in plan.components.items() if part.layers}
    files = [file for part in quantized.values() for file in part.checkpoint.files]
    networks = find_networks()
    described = [describe_pair(pair, networks) for pair in pairs]
    report = {
        "schema": SCHEMA,
        "ok": not problems,
        "problems": problems,
        "command": command,
        "base": request.model_path,
        "base_id": name_base(request, plan),
        "scope": name_scope(request, files),
        "pipeline_tag": "text-to-video" if pairs[0][1].is_video else "text-to-image",
        "references": {name: part.checkpoint.reference for name, part in quantized.items()},
        "census": census,
        "witness": {found.component: found.to_json() for found in reports},
        "layers": {"summary": errors.to_json(), "errors": errors.found},
        "runs": described,
        "quality": summarize_quality(described),
        "memory": describe_memory(base, plan, pairs),
        "plan": plan.to_json(),
        "machine": probe.fingerprint(),
        "versions": records.list_versions(),
        "commit": records.find_commit(),
        "checkpoint": records.describe_files(files),
        "made": records.tell_time(),
    }
    folders = name_folders(
        [*files, *(f for p in base.components.values() for f in p.checkpoint.files)]
    )
    return Validation(records.make_portable(report, folders), problems, pairs)


def release_memory() -> None:
    """Give back what the base model held, so that the two are never in memory together."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def plan_quantized(request: Request) -> Plan:
    """The plan of the checkpoint; UsageError when nothing in it is quantized."""
    plan = require_plan(request)
    if not any(part.layers for part in plan.components.values()):
        raise UsageError(
            f"{request.model_path}: no transformer component is quantized, so there is nothing to "
            "validate; name the checkpoint with --transformer-path or --transformer-weights-path"
        )
    if not (request.component_paths or request.weights_paths or request.quantization):
        raise UsageError(
            f"--model-path {request.model_path} is quantized itself: give the base model with "
            "--model-path, and this one's transformer with --transformer-path"
        )
    return plan


def describe_runs(request: Request) -> str:
    """`2 prompts, 1 seed`."""
    prompts, seeds = len(request.prompt), len(request.seed)
    return f"{prompts} prompt{'s' * (prompts > 1)}, {seeds} seed{'s' * (seeds > 1)}"


def name_folders(files: Iterable[str]) -> dict[str, str]:
    """Folders of this machine that must not stand in a report; a snapshot of the hub's is its id."""
    from quantmatrix.tiny import hub

    folders = {str(hub.default_folder()): "$HUB", str(Path.home()): "$HOME"}
    for file in files:
        if origin := scopes.find_origin([file]):
            cache = scopes.find_snapshot(Path(file))
            folders[f"{cache}/snapshots/{origin['revision']}"] = origin["repository"]
    return folders


def name_scope(request: Request, files: Sequence[str]) -> str:
    """What was measured: a stand-in, a repository of the hub, or files that are in none."""
    if request.tiny:
        return scopes.STAND_IN
    return scopes.PUBLISHED if scopes.find_origin(files) else LOCAL


def name_base(request: Request, plan: Plan) -> str:
    """Hub id of the base model: that of the request, or of the model where a folder was named."""
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", request.model_path)
    if is_hub_id and not Path(request.model_path).exists():
        return request.model_path
    return models.load(plan.model).REPO


def take_census(plan: Plan, pipeline: Any) -> tuple[dict[str, Any], list[str]]:
    """(counts and deviations per component, the deviations as problems)."""
    census: dict[str, Any] = {}
    problems = []
    for name, part in plan.components.items():
        if not part.layers:
            continue
        undeclared = find_undeclared(part)
        differences = find_differences(part, getattr(pipeline, name))
        census[name] = {
            "family": part.family,
            "precision": part.precision,
            "quantized": len(part.layers),
            "linear_layers": part.total_layers,
            "backends": part.backends,
            "not_as_declared": undeclared,
            "not_as_planned": differences,
        }
        problems += [f"{name}.{layer}: {why}" for layer, why in undeclared.items()]
        problems += [f"{name}.{layer}: {why}" for layer, why in differences.items()]
    return census, problems


def judge_layers(errors: LayerErrors) -> list[str]:
    """Layers that are not the base model's at all."""
    return [
        f"{part}.{layer}: relative error {error:.3g} against the base model's layer on the same "
        "input: its weights or scales are of another layer, or another model"
        for part, layers in errors.found.items()
        for layer, error in layers.items()
        if not error <= USELESS_LAYER
    ]


def judge_runs(pairs: Sequence[tuple[Run, Run]]) -> list[str]:
    """Runs that are not finite, and such that did not use the quantized weights."""
    problems = []
    for base, run in pairs:
        worst = find_worst(compare_trajectories(base.latents, run.latents))
        what = f"prompt {run.prompt!r}, seed {run.seed}"
        if worst.nonfinite:
            problems.append(f"{what}: {worst.nonfinite} elements of the latents are not finite")
        if worst.identical:
            problems.append(f"{what}: equals the base model bit for bit, nothing is quantized")
    return problems


def describe_pair(pair: tuple[Run, Run], networks: Networks | None = None) -> dict[str, Any]:
    """Distances of one prompt and seed."""
    base, run = pair
    steps = summarize(compare_trajectories(base.latents, run.latents))
    return {
        "prompt": run.prompt,
        "seed": run.seed,
        "latents": steps,
        "media": measure_media(base.media, run.media),
        "quality": measure_quality(base.media, run.media, networks, run.prompt),
    }


def describe_memory(base: Plan, plan: Plan, pairs: Sequence[tuple[Run, Run]]) -> dict[str, Any]:
    """Bytes of transformer weights, and peaks where the device counts them apart."""

    def weigh(found: Plan) -> int:
        return sum(part.bytes for part in found.components.values())

    memory: dict[str, Any] = {"bf16": {"weight_bytes": weigh(base)}}
    memory["quantized"] = {"weight_bytes": weigh(plan)}
    if plan.machine.vendor != "cpu":  # a process on a CPU has one peak, that of the larger model
        memory["bf16"]["peak_bytes"] = max(pair[0].peak_bytes for pair in pairs)
        memory["quantized"]["peak_bytes"] = max(pair[1].peak_bytes for pair in pairs)
    return memory


def read_prompts(path: Path) -> tuple[str, ...]:
    """One prompt per line; empty lines and those that start with `#` are left out.

    Raises UsageError for a file that cannot be read, is too large for one of prompts, or holds none.
    """
    try:
        text = strict_json.read_bytes(path, Path(path.absolute().anchor)).decode("utf-8")
        lines = [line.strip() for line in text.splitlines()]
    except (OSError, UnicodeDecodeError, strict_json.JsonError) as error:
        raise UsageError(f"--prompts {path}: {error}") from error
    prompts = tuple(line for line in lines if line and not line.startswith("#"))
    if not prompts:
        raise UsageError(f"--prompts {path}: holds no prompt; write one per line")
    return prompts
