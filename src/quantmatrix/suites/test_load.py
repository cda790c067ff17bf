"""Load: the checkpoint of a row becomes a model in which nothing is missing, left over or BF16.

So does each text encoder that the row's flags name.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from quantmatrix.harness.recorder import Proof
    from quantmatrix.measure.workbench import Workbench
    from quantmatrix.suites.conftest import Job
    from quantmatrix.tables.rows import Cell, CheckpointRow


@pytest.mark.check("load")
def test_load(cell: Cell, job: Job, workbench: Workbench, proof: Proof) -> None:
    row = workbench.tables.checkpoints[cell.checkpoint]
    assert set(job.quantized) == set(row.components), "components that are quantized"
    for name, part in job.quantized.items():
        assert part.family == cell.family, f"{name} was taken for {part.family} ({part.why})"
        kept = [layer for layer in part.layers if is_kept(row, layer)]
        assert not kept, f"quantized, although the checkpoint keeps {row.kept} in BF16: {kept}"
        start = time.perf_counter()
        model = load_component(job, name)
        proof.timings[f"load {name}"] = time.perf_counter() - start
        named = part.base.reference == row.base
        if model.witness is not None and workbench.tiny and not named:
            model.witness = examine_beside(workbench, job, name, row.base)
        proof.metrics[name] = judge_model(job, part, model)
        if model.witness is not None:
            proof.witness[name] = judge_witness(model.witness, tiny=workbench.tiny)
    paths = {*job.request.component_paths, *job.request.weights_paths}
    encoders = {name for name in paths if name.startswith("text_encoder")}
    assert set(job.plan.encoders) == encoders, "text encoders that are quantized"
    for name, part in job.plan.encoders.items():
        model = load_encoder(job, part)
        proof.metrics[name] = judge_model(job, part, model)
        if model.witness is not None:  # no sample for limits, which are of transformers
            found = judge_witness(model.witness, tiny=workbench.tiny)
            proof.metrics[name]["witness"] = found


def judge_model(job: Job, part: Any, model: Any) -> dict[str, Any]:
    """What a loaded component holds, which is what its plan says, and only finite numbers."""
    assert_finite(model)
    return {
        "layers": count_layers(part, model),
        "tensors": count_tensors(part, model),
        "dtypes": count_dtypes(job, part, model),
    }


def judge_witness(witness: Any, *, tiny: bool) -> dict[str, Any]:
    """What the witness found; the base model's stand-in is what a stand-in's codes were made from."""
    found: dict[str, Any] = witness.to_json()
    assert not tiny or witness.verdict == "agrees", found
    return found


def is_kept(row: CheckpointRow, layer: str) -> bool:
    """Whether a module belongs to the sets that the checkpoint's row leaves in full precision."""
    from quantmatrix import models

    sets = models.load(row.model).FALLBACKS
    return any(re.fullmatch(p, layer) for name in row.kept.split() for p in sets[name])


def load_component(job: Job, name: str) -> Any:
    """The component through the public function, as a user would load it."""
    from dataclasses import fields

    import torch

    from quantmatrix.api import load_transformer

    request = job.request
    given = ("model_path", "component_paths", "weights_paths", "backend", "device", "dtype")
    rest = {f.name: getattr(request, f.name) for f in fields(request) if f.name not in given}
    return load_transformer(
        request.model_path,
        component=name,
        transformer_path=request.component_paths.get(name),
        transformer_weights_path=request.weights_paths.get(name),
        backend=request.backend,
        device=request.device or "cpu",
        dtype=getattr(torch, request.dtype),
        **rest,
    )


def examine_beside(workbench: Workbench, job: Job, name: str, reference: str) -> Any:
    """The witness beside the model that the row's checkpoint is of, which a request with a whole quantized
    pipeline does not name."""
    from dataclasses import replace

    from quantmatrix.runtime.witness import base, verdict

    plain = workbench.plan(workbench.base_request(job.cell, job.request)).components[name]
    beside = base.Base(name, {name: plain.checkpoint}, reference)
    return verdict.examine(replace(job.quantized[name], base=beside), job.plan.request)


def load_encoder(job: Job, part: Any) -> Any:
    """A planned text encoder by itself, as a pipeline would load it."""
    from quantmatrix.runtime import load

    assert part.layers, f"{part.name}: no layer of it is quantized"
    return load.load_component(part, job.plan.request, device=job.plan.machine.device)


def count_layers(part: Any, model: Any) -> dict[str, Any]:
    """Census: the planned layers, and no other, are quantized, each by the planned kernel."""
    from quantmatrix.runtime.quantized_linear import QuantizedLinear

    found = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    owners = {name.partition(".parts.")[0] for name in found}
    assert owners == set(part.layers), "quantized modules of the model against the plan"
    backends = Counter(module.kernel.backend for module in found.values())
    assert dict(backends) == part.backends, "kernels of the model against the plan"
    return {"expected": len(part.layers), "found": len(owners), "backends": dict(backends)}


def count_tensors(part: Any, model: Any) -> dict[str, int]:
    """Every tensor of the checkpoint is part of a quantized layer, in the model, or left out for
    a reason that the family gives; every tensor of the model has a value."""
    from quantmatrix import families
    from quantmatrix.runtime.plan.placement import is_below

    wrappers = families.load(part.family).WRAPPERS if part.family else ()
    layers = {piece.layer for piece in part.pieces()}
    targets: dict[str, list[str]] = {}
    for plain in part.plain:
        targets.setdefault(plain.name, []).append(plain.parameter)
    parameters = model.named_parameters(remove_duplicate=False)  # a tied one has both names
    present = {name for name, _ in [*parameters, *model.named_buffers()]}
    counts: Counter[str] = Counter()
    lost = []
    for name in part.checkpoint.tensors:
        if name in part.ignored:
            counts["ignored"] += 1
        elif is_below(name, layers, wrappers):
            counts["quantized"] += 1
        elif name in targets and present.issuperset(targets[name]):
            counts["plain"] += 1
        else:
            lost.append(name)
    assert not lost, f"tensors of the checkpoint that went nowhere: {lost}"
    empty = [n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    assert not empty, f"tensors of the model without a value: {empty}"
    return {"checkpoint": len(part.checkpoint.tensors), **counts}


def holds_numbers(module: Any) -> bool:
    """Whether a layer's kernel says that it keeps decoded weights: 16 bits for each of them."""
    return bool(module.kernel.footprint(module.scheme, 1024, 1024, 2) >= 2 * 1024 * 1024)


def count_dtypes(job: Job, part: Any, model: Any) -> dict[str, int]:
    """Plain tensors have the compute dtype (or float32 where the model asks for it); a backend that
    keeps codes really keeps one byte or less per weight."""
    from quantmatrix.runtime.quantized_linear import QuantizedLinear

    allowed = {f"torch.{job.request.dtype}", "torch.float32"}
    wrong = [n for n, p in model.named_parameters() if str(p.dtype) not in allowed]
    assert not wrong, f"parameters of another dtype than {sorted(allowed)}: {wrong}"
    for name, module in model.named_modules():
        if not isinstance(module, QuantizedLinear) or holds_numbers(module):
            continue
        narrow = sum(b.numel() for b in module.buffers() if b.element_size() == 1)
        needed = module.in_features * module.out_features // 2
        assert narrow >= needed, f"{name}: no codes are kept, the layer holds plain numbers"
    everything = [*model.parameters(), *model.buffers()]
    return dict(Counter(str(tensor.dtype).removeprefix("torch.") for tensor in everything))


def assert_finite(model: Any) -> None:
    """No NaN and no infinity, in any tensor that holds numbers."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point():
            assert bool(tensor.float().isfinite().all()), f"{name} holds NaN or infinite numbers"
