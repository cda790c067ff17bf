"""True size: a transformer at its model's own width and depth, quantized beside the same in BF16.

Nothing is downloaded, and every number is random; what is real are the shapes, the file form, the
plan, the loader, the kernels and the scheduler:

1. One block of each kind is drawn at true width, in BF16, with everything around the blocks.
2. The family's own writer quantizes it on the device and writes a checkpoint in the row's form.
3. The plan and the loader make a model of that checkpoint, as they would of any.
4. Each quantized layer is compared with the BF16 layer that it stands for, on its own input.
5. On an accelerator the blocks are repeated to the model's true depth, each copy with memory of its
   own; on a CPU one of each kind is left, and the input is small.
6. Four steps of the model's scheduler are made from the same noise, twice in each form: the second time
   is timed, and its bits must be those of the first.

Repeating one block keeps writing at seconds, even where it takes a singular value decomposition. Of a
model with two experts (Wan2.2) the first is measured; a step is one forward, without guidance.
"""

from __future__ import annotations

import copy
import gc
import json
import math
import shutil
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from quantmatrix import families, models
from quantmatrix.api import require_plan
from quantmatrix.errors import UsageError
from quantmatrix.families.protocol import Calibration
from quantmatrix.measure.bench.speed import count_bytes, flatten_output
from quantmatrix.measure.bench.synthetic import fill_plain, make_inputs
from quantmatrix.measure.latents import compare_trajectories, digest_latents, summarize
from quantmatrix.measure.layers import LayerErrors, relative_error
from quantmatrix.request import Hub
from quantmatrix.runtime.empty_model import build_plain
from quantmatrix.runtime.load import load_component
from quantmatrix.runtime.plan.types import Plan
from quantmatrix.runtime.quantized_linear import share_inputs
from quantmatrix.tiny.checkpoints import (
    choose_schemes,
    find_kept,
    find_recipe,
    finish_tensors,
    write_component,
)
from quantmatrix.tiny.weights import OUTLIER_GAIN, OUTLIERS, RANK
from quantmatrix.tools.packing import pack_tensors
from quantmatrix.tools.recipe import WEIGHTS, quantize_layers, save, watch_inputs

if TYPE_CHECKING:
    from quantmatrix.models.forward import Step
    from quantmatrix.request import Request
    from quantmatrix.tables.rows import CheckpointRow, Matrix

STEPS = 4
TIMESTEPS = 1000
"""Of a scheduler, from noise to picture."""
COMPONENT = "transformer"
DTYPE = torch.bfloat16
FORMS = ("bf16", "quantized")
BLOCKS_ONLY = "one block of each kind at true width"
WHOLE = "true width and depth"


@dataclass
class Measured:
    """Four steps of one form."""

    latents: list[torch.Tensor]
    """After each step, float32, on the CPU."""
    seconds: float
    """Of one step, of the second run."""
    repeats: bool
    """Whether both runs gave the same bits."""
    peak_bytes: int
    """Most memory of the device while the steps ran, weights included; 0 on a CPU."""
    weight_bytes: int


@dataclass
class TrueSize:
    """What the check shows of one cell."""

    plan: Plan
    """Of the checkpoint with one block of each kind."""
    size: str
    bf16: Measured
    quantized: Measured
    errors: LayerErrors
    seconds: dict[str, float] = field(default_factory=dict)
    """Of writing and loading."""

    def to_json(self) -> dict[str, Any]:
        """The metrics of the check; times are kept apart, for they never repeat."""
        steps = compare_trajectories(self.bf16.latents, self.quantized.latents)
        forms = {"bf16": self.bf16, "quantized": self.quantized}
        return {
            **summarize(steps),
            "size": self.size,
            "layers": self.errors.to_json(),
            "repeats": self.bf16.repeats and self.quantized.repeats,
            "finite": all(bool(torch.isfinite(x).all()) for x in self.quantized.latents),
            "peak": {f"{name}_bytes": one.peak_bytes for name, one in forms.items()},
            "weights": {f"{name}_bytes": one.weight_bytes for name, one in forms.items()},
        }

    def tell_times(self) -> dict[str, float]:
        """Seconds of a step in both forms, of writing and of loading."""
        steps = {"step bf16": self.bf16.seconds, "step quantized": self.quantized.seconds}
        return {**steps, **self.seconds}


def measure(
    row: CheckpointRow, request: Request, tables: Matrix, folder: Path, *, deep: bool | None = None
) -> TrueSize:
    """Measure a row's checkpoint; `request` is a cell's, with its device and backend.

    `deep` repeats the blocks to the true depth; None: on an accelerator only. `folder` takes the
    checkpoint, and keeps it for other cells of the row. Raises RefusedError where the plan refuses,
    UsageError for a row that has no file of its own.
    """
    device = request.device or "cpu"
    deep = not device.startswith("cpu") if deep is None else deep
    base = tables.models[row.model].repo
    bf16 = measure_plain(row.model, base, device, deep)
    release(device)
    start = time.perf_counter()
    shallow = draw_blocks(row.model, device)
    checkpoint = write_once(row, shallow, folder, base, device)
    seconds = {"write": time.perf_counter() - start}
    plan = plan_checkpoint(row, request, name_base(folder, row), checkpoint)
    start = time.perf_counter()
    quantized = load_component(plan.components[COMPONENT], plan.request, device=device)
    seconds["load"] = time.perf_counter() - start
    if deep:  # before any forward: what a kernel keeps of a call would be copied, too
        deepen(quantized, row.model)
    errors = compare_layers(row.model, plan, shallow, quantized, device)
    del shallow
    found = measure_steps(row.model, base, quantized, device)
    size = WHOLE if deep else BLOCKS_ONLY
    return TrueSize(plan, size, bf16, found, errors, seconds)


@lru_cache(maxsize=1)
def measure_plain(model: str, base: str, device: str, deep: bool) -> Measured:
    """The BF16 side, which every row of a model shares."""
    module = draw_blocks(model, device)
    return measure_steps(model, base, deepen(module, model) if deep else module, device)


def draw_blocks(model: str, device: str, seed: int = 0) -> nn.Module:
    """The model with one block of each kind, random BF16 weights of gain 1; a seed gives its bits."""
    built = build_plain(model, "blocks")
    generator = torch.Generator(device).manual_seed(seed)
    fill_plain(built, device, DTYPE, generator)
    for name, layer in built.named_modules():
        if isinstance(layer, nn.Linear) and name.split(".")[0] in models.load(model).BLOCKS:
            layer.weight.data = structure(layer.weight.data, generator)
    return built.eval().requires_grad_(False)


def structure(weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A white weight [N, K] with what low-rank branches and smoothing are for, its gain unchanged.

    As in the stand-ins (`tiny_weights`): a rank-8 component of the same energy, and one input
    channel of 64 is six times as large. The weight's dtype is kept.
    """
    rows, columns = weight.shape

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=weight.device)

    white = weight.float() * math.sqrt(columns)
    mixed = white + draw(rows, RANK) @ draw(RANK, columns) / math.sqrt(RANK)
    count = max(1, columns // OUTLIERS)
    order = torch.randperm(columns, generator=generator, device=weight.device)
    mixed[:, order[:count]] *= OUTLIER_GAIN
    energy = 1 + (OUTLIER_GAIN**2 - 1) * count / columns
    return (mixed / math.sqrt(2 * energy * columns)).to(weight.dtype)


def deepen(module: nn.Module, model: str) -> nn.Module:
    """Repeat the only block of each kind to the model's true depth."""
    whole = build_plain(model, "full")
    for name in models.load(model).BLOCKS:
        first = getattr(module, name)[0]
        copies = [copy.deepcopy(first) for _ in range(len(getattr(whole, name)) - 1)]
        setattr(module, name, nn.ModuleList([first, *copies]))
    share_inputs(module)
    return module


def write_once(
    row: CheckpointRow, shallow: nn.Module, folder: Path, base: str, device: str
) -> Path:
    """The checkpoint of a row, written by its family from these weights unless it is there.

    Those of other rows are removed. Raises UsageError for a row that is quantized while it is
    loaded.
    """
    if row.form == "online":
        raise UsageError(f"{row.id} is quantized while it is loaded: it has no file to write")
    target, plain = folder / row.id, name_base(folder, row)
    done = target / "written"
    if not done.is_file():
        for (
            other
        ) in folder.iterdir():  # cells come row by row, and a disk does not hold all of them
            shutil.rmtree(other, ignore_errors=True)
        write_base(row, shallow, plain)
        recipe = find_recipe(row)
        ranges = watch_forward(row.model, shallow, device)
        if families.load(row.family).WRITES_ON_CPU:
            device = "cpu"
            ranges = {n: Calibration(seen.low.cpu(), seen.high.cpu()) for n, seen in ranges.items()}
        weights = {name: tensor.to(device) for name, tensor in shallow.state_dict().items()}
        packed = pack_tensors(weights, recipe.dialect, find_kept(row))
        chosen = choose_schemes(row, packed, recipe.dialect)
        with torch.device(device):  # the writers make small tensors where they are asked to
            family = families.load(row.family)
            built = quantize_layers(family, recipe.dialect, packed, chosen, ranges)
        tensors, declaration = finish_tensors(row, *built, chosen)
        stored = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        inner = Path(row.reference).name
        written = write_component(row, (stored, declaration), COMPONENT, inner, target, plain)
        done.write_text(str(written), encoding="utf-8")
    return Path(done.read_text(encoding="utf-8"))


def name_base(folder: Path, row: CheckpointRow) -> Path:
    """Where the base model of a row's checkpoint lies."""
    return folder / f"base-of-{row.id}"


def write_base(row: CheckpointRow, shallow: nn.Module, folder: Path) -> None:
    """Write the model's configuration, and for raw files, which declare nothing, its weights: a witness
    tells by them how the codes lie."""
    model: Any = shallow
    model.save_config(folder)
    if row.form == "raw":
        weights = {name: tensor.cpu() for name, tensor in shallow.state_dict().items()}
        save(weights, sorted(weights), folder / WEIGHTS, {"format": "pt"})


def watch_forward(model: str, shallow: nn.Module, device: str) -> dict[str, Calibration]:
    """Ranges of the inputs of the linear layers in one forward, as a calibration finds them."""
    watched = copy.deepcopy(shallow)
    ranges = watch_inputs(watched)
    with torch.no_grad():
        watched(**choose_inputs(model, watched, device))
    return ranges


def plan_checkpoint(row: CheckpointRow, request: Request, base: Path, checkpoint: Path) -> Plan:
    """The plan of the written checkpoint with a cell's flags; RefusedError when it is a refusal."""
    named: dict[str, Any] = {"model_path": str(base), "component_paths": {}, "weights_paths": {}}
    if row.selector == "--transformer-path":
        named["component_paths"] = {COMPONENT: str(checkpoint)}
    elif row.selector == "--transformer-weights-path":
        named["weights_paths"] = {COMPONENT: str(checkpoint)}
    else:
        named["model_path"] = str(checkpoint)
    own = replace(
        request, **named, tiny=False, hub=Hub(offline=True), model_id=None, nproc_per_node=1
    )
    return require_plan(own)


def compare_layers(
    model: str, plan: Plan, plain: nn.Module, quantized: nn.Module, device: str
) -> LayerErrors:
    """Error of every quantized layer against the BF16 one, on the input that it gets in a forward."""
    found: dict[str, float] = {}
    layers = plan.components[COMPONENT].layers
    with ExitStack() as stack, torch.no_grad():
        for name in layers:
            twin: Any = plain.get_submodule(name)

            def compare(
                _: nn.Module, given: Any, output: torch.Tensor, name: str = name, twin: Any = twin
            ) -> None:
                bias = None if twin.bias is None else twin.bias.float()
                exact = functional.linear(given[0].float(), twin.weight.float(), bias)
                found.setdefault(name, relative_error(exact, output.float()))

            hook = quantized.get_submodule(name).register_forward_hook(compare)
            stack.callback(hook.remove)
        quantized(**choose_inputs(model, quantized, device))
    return LayerErrors({COMPONENT: found})


def measure_steps(model: str, base: str, module: nn.Module, device: str) -> Measured:
    """Four steps, twice; the second time is what counts."""
    release(device)
    accelerated = not device.startswith("cpu")
    if accelerated:
        accelerator(device).reset_peak_memory_stats(device)
    first, _ = make_steps(model, base, module, device)
    again, seconds = make_steps(model, base, module, device)
    peak = int(accelerator(device).max_memory_allocated(device)) if accelerated else 0
    same = digest_latents(first) == digest_latents(again)
    return Measured(again, seconds, same, peak, count_bytes(module))


def make_steps(
    model: str, base: str, module: nn.Module, device: str
) -> tuple[list[torch.Tensor], float]:
    """(latents after each step, seconds of a step), from noise that the seed decides.

    Latents are float32 on the CPU, in the shape [batch, ...] that the model takes.
    """
    inputs = choose_inputs(model, module, device)
    scheduler = open_scheduler(base, module, inputs, device)
    kept, step = [], models.load(model).STEP
    synchronize(device)
    start = time.perf_counter()
    with torch.no_grad():
        for moment in scheduler.timesteps:
            passed, latents = set_moment(step, inputs, moment)
            guess = flatten_output(module(**passed))
            guess = -guess if step.sign < 0 else guess
            latents = scheduler.step(guess.view_as(latents), moment, latents.float())[0]
            put_latents(step, inputs, latents.to(DTYPE))
            kept.append(latents)
    synchronize(device)
    seconds = (time.perf_counter() - start) / len(kept)
    return [latents.float().cpu() for latents in kept], seconds


def choose_inputs(model: str, module: nn.Module, device: str) -> dict[str, Any]:
    """The inputs of a forward at the model's usual size, or small ones on a CPU."""
    size = "tiny" if device.startswith("cpu") else "full"
    return make_inputs(model, module, device, DTYPE, size=size)


def set_moment(
    step: Step, inputs: Mapping[str, Any], moment: torch.Tensor
) -> tuple[dict[str, Any], torch.Tensor]:
    """(arguments of the forward at a timestep, the latents), as each pipeline passes them.

    `moment` is one of the scheduler's timesteps, a number [] in the scheduler's dtype; the latents
    are those among `inputs`.
    """
    given = inputs[step.latents]
    latents: torch.Tensor = given[0] if step.listed else given
    scaled = ((TIMESTEPS - moment) if step.left else moment) / step.per
    return {**inputs, step.time: scaled.reshape(1).to(inputs[step.time])}, latents


def put_latents(step: Step, inputs: dict[str, Any], latents: torch.Tensor) -> None:
    """Let the next forward start from these latents: any shape and dtype, those of the ones before."""
    inputs[step.latents] = [latents] if step.listed else latents


def open_scheduler(base: str, module: nn.Module, inputs: Mapping[str, Any], device: str) -> Any:
    """The model's own scheduler, as its pipeline configures it, set to four steps."""
    import diffusers

    from quantmatrix.tiny import hub

    folder = hub.default_folder()
    hub.ensure(base, folder)
    path = hub.find_snapshot(base, folder) / "scheduler"
    config = json.loads((path / "scheduler_config.json").read_text(encoding="utf-8"))
    scheduler = getattr(diffusers, config["_class_name"]).from_pretrained(path)
    options: dict[str, Any] = {}
    if config.get("use_dynamic_shifting"):
        tokens = inputs["hidden_states"].shape[1]
        options["mu"] = shift_of(tokens, config)
    scheduler.set_timesteps(STEPS, device=device, **options)
    return scheduler


def shift_of(tokens: int, config: Mapping[str, Any]) -> float:
    """How far a scheduler with dynamic shifting moves its steps for so many tokens.

    Linear between two sequence lengths, as in the pipelines of FLUX.1 and Qwen-Image.
    """
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    least, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return float(least + (most - least) * (tokens - low) / (high - low))


def accelerator(device: str) -> Any:
    """torch.cuda, torch.npu ..."""
    return getattr(torch, device.partition(":")[0])


def synchronize(device: str) -> None:
    """Wait for an accelerator."""
    if not device.startswith("cpu"):
        accelerator(device).synchronize()


def release(device: str) -> None:
    """Give back what is no longer used."""
    gc.collect()
    if not device.startswith("cpu"):
        accelerator(device).empty_cache()
