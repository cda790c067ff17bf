"""Fallback: which quantized layers should stay in full precision, found by running the model.

1. Each quantized module (or block of modules) runs alone in the full-precision model: how far do the
   final latents move? The square of that distance is its share of the error.
2. Modules are taken back to full precision in the order of their shares. Errors of different layers
   are nearly independent, so the shares say about how many are needed; what is proposed is then run,
   and the smallest prefix that was seen to meet the target is the answer.

Nothing is extrapolated: every number in the result belongs to a run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantmatrix.api import require_plan
from quantmatrix.errors import UsageError
from quantmatrix.measure.latents import StepMetrics, compare_tensors
from quantmatrix.request import Request
from quantmatrix.runtime.generate import generate
from quantmatrix.runtime.pipeline import build_pipeline

Show = Callable[[str, Iterable[Any]], Iterable[Any]]


@dataclass(frozen=True)
class Share:
    """What one group of modules does to the final latents when it alone is quantized."""

    modules: tuple[str, ...]
    """`component.module`, by diffusers' names."""
    relative_l2: float
    psnr_db: float

    @property
    def name(self) -> str:
        """The module, or the common beginning of a block's modules."""
        if len(self.modules) == 1:
            return self.modules[0]
        found = BLOCK.match(self.modules[0])
        return found[0] if found else self.modules[0]


BLOCK = re.compile(r".*?\.\d+(?=\.)")


class Study:
    """A full-precision pipeline whose modules can be exchanged for their quantized forms."""

    def __init__(self, request: Request) -> None:
        """Load both; raises UsageError when nothing is quantized."""
        plain = replace(request, component_paths={}, weights_paths={}, backend=None)
        self.request = plain
        self.plan, quantized = require_plan(plain), require_plan(request)
        if not any(part.layers for part in quantized.components.values()):
            raise UsageError(
                "no layer of the checkpoint is quantized: name one by --transformer-path or "
                "--transformer-weights-path"
            )
        if any(part.layers for part in self.plan.components.values()):
            raise UsageError(
                f"{self.plan.base} is quantized itself: name the full-precision model by "
                "--model-path, and the checkpoint by --transformer-path"
            )
        self.pipeline = build_pipeline(self.plan)
        other = build_pipeline(quantized)
        self.forms: dict[str, tuple[nn.Module, nn.Module]] = {}
        for name, part in quantized.components.items():
            for module in part.layers:
                own = getattr(self.pipeline, name).get_submodule(module)
                coded = getattr(other, name).get_submodule(module)
                self.forms[f"{name}.{module}"] = (own, coded)
        self.reference = self.run(())

    def run(self, quantized: Iterable[str]) -> torch.Tensor:
        """Final latents with these modules quantized and all others in full precision.

        They have the pipeline's own shape [batch, ...] and dtype.
        """
        chosen = set(quantized)
        for name, (own, coded) in self.forms.items():
            component, _, module = name.partition(".")
            parent, _, child = module.rpartition(".")
            owner = getattr(self.pipeline, component).get_submodule(parent)
            replace_child(owner, child, coded if name in chosen else own)
        return generate(self.request, plan=self.plan, pipeline=self.pipeline).latents[-1]

    def measure(self, kept: Iterable[str]) -> StepMetrics:
        """Distance from full precision when all modules but `kept` are quantized."""
        left = set(kept)
        return compare_tensors(self.reference, self.run(n for n in self.forms if n not in left))


def replace_child(owner: nn.Module, child: str, module: nn.Module) -> None:
    """Replace a module by another (numbered children of lists included)."""
    owner._modules[child] = module


def group_modules(names: Iterable[str], by: str) -> list[tuple[str, ...]]:
    """Modules one by one (`layer`) or by the numbered block that holds them (`block`).

    Raises UsageError for any other `by`.
    """
    if by not in ("layer", "block"):
        raise UsageError(f"--by {by}: expected layer or block")
    groups: dict[str, list[str]] = {}
    for name in names:
        found = BLOCK.match(name) if by == "block" else None
        groups.setdefault(found[0] if found else name, []).append(name)
    return [tuple(group) for group in groups.values()]


def rank_modules(study: Study, by: str = "layer", show: Show = lambda _, x: x) -> list[Share]:
    """The groups, the one that moves the latents most first."""
    shares = []
    for group in show("measuring", group_modules(study.forms, by)):
        found = compare_tensors(study.reference, study.run(group))
        shares.append(Share(group, found.relative_l2, found.psnr_db))
    return sorted(shares, key=lambda share: (-share.relative_l2, share.name))


def find_smallest(
    study: Study, shares: Sequence[Share], target_db: float, show: Show = lambda _, x: x
) -> tuple[int, dict[int, StepMetrics]]:
    """(groups to keep, distances of the prefixes that were run); all are kept if none meets it.

    Bisection over prefixes of the ranking, each of which is run. `target_db` is a PSNR in dB.
    """
    seen: dict[int, StepMetrics] = {}

    def meets(count: int) -> bool:
        kept = [name for share in shares[:count] for name in share.modules]
        seen[count] = study.measure(kept)
        return seen[count].psnr_db >= target_db

    low, high = 0, len(shares)
    for _ in show("proposing", range(len(shares).bit_length() + 1)):
        if low >= high:
            break
        middle = (low + high) // 2
        if meets(middle):
            high = middle
        else:
            low = middle + 1
    if high not in seen:
        meets(high)
    return high, seen


def propose(
    request: Request, *, target_db: float, by: str = "layer", show: Show = lambda _, x: x
) -> dict[str, Any]:
    """The measured shares and the smallest set of layers to keep in full precision.

    `target_db` is the PSNR of the final latents against full precision that is to be met.
    `target_db` is the PSNR of the final latents in dB.
    """
    study = Study(request)
    shares = rank_modules(study, by, show)
    count, seen = find_smallest(study, shares, target_db, show)
    kept = [name for share in shares[:count] for name in share.modules]
    return {
        "model": study.plan.model,
        "target_psnr_db": target_db,
        "met": seen[count].psnr_db >= target_db,
        "psnr_db": finite(seen[count].psnr_db),
        "kept": kept,
        "patterns": [f"{name.partition('.')[2]}" for name in kept],
        "all_quantized_psnr_db": finite(study.measure(()).psnr_db),
        "tried": {str(n): finite(found.psnr_db) for n, found in sorted(seen.items())},
        "shares": [
            {
                "name": share.name,
                "modules": list(share.modules),
                "relative_l2": share.relative_l2,
                "psnr_db": finite(share.psnr_db),
                "kept": index < count,
            }
            for index, share in enumerate(shares)
        ],
    }


def finite(value: float) -> float | None:
    """A number that JSON has, or None for infinity."""
    return value if value < float("inf") else None


def draw_shares(found: dict[str, Any], path: Path) -> None:
    """Write the shares as horizontal bars, kept layers in another colour (SVG)."""
    shares = found["shares"]
    largest = max((share["relative_l2"] for share in shares), default=0.0) or 1.0
    height = 18 * len(shares) + 40
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="860" height="{height}" '
        'font-family="sans-serif" font-size="11" role="img">',
        f"<title>How far each layer moves the final latents of {found['model']}</title>",
        '<text x="8" y="18">relative L2 of the final latents with this layer alone quantized; '
        "orange: kept in full precision</text>",
    ]
    for row, share in enumerate(shares):
        y = 30 + 18 * row
        width = 380 * share["relative_l2"] / largest
        colour = "#d9730d" if share["kept"] else "#4c78a8"
        lines += [
            f'<text x="8" y="{y + 11}">{share["name"]}</text>',
            f'<rect x="390" y="{y}" width="{width:.1f}" height="13" fill="{colour}"/>',
            f'<text x="{396 + width:.1f}" y="{y + 11}">{share["relative_l2"]:.2e}</text>',
        ]
    path.write_text("\n".join([*lines, "</svg>", ""]), encoding="utf-8")
