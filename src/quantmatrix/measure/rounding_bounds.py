"""Rounding bounds: how far a decoded weight may be from the weight that it was rounded from.

Latents and layer outputs average over thousands of weights, and a scale swapped with its neighbour
drowns in that. Element by element it does not. With `a` the largest magnitude of the base weights
that share a scale, rounding to the nearest gives at most

| weight  | error / a | because |
| ------- | --------- | ------- |
| `e4m3`  | 1/28      | half the gap below 448, which is 32 |
| `e2m1`  | 1/6 + 1/16 | half the gap between 4 and 6; block scales are e4m3 themselves |
| `int8`  | 1/254     | 127 steps to each side |
| `int4`  | 1/14      | 7 steps to each side |
| `mx-e4m3` | 1/8     | a power of two as scale: the largest is up to 512 steps, the largest code is 448 |
| `mx-e2m1` | 1/4     | the same with 8 steps and the code 6 |
| `e4m3`, weights only, one scale | 1/16 | any scale, 1 too: half the gap at the lower end of a binade |
| `e5m2`, so too | 1/8 | the same |

Smoothing, a rotation and a low-rank branch move what is rounded. There the error is taken where the rounding
happened (columns multiplied by the smoothing, or rotated), and `a` is the scale times the largest code. `uint4`
layers (AWQ) search for a range and cut what is outside: no bound is known for them. `MARGIN` is
for scales kept in 16 bits and for weights that a converter held there.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from quantmatrix import families, kernels
from quantmatrix.checkpoints.opening import fetch
from quantmatrix.checkpoints.reader import TensorReader
from quantmatrix.kernels import Tensors, linear_convrot
from quantmatrix.proof.rounding_model import LARGEST_CODE, TOP_GAP
from quantmatrix.runtime.pieces import read_layer
from quantmatrix.runtime.plan.placement import select_rows
from quantmatrix.runtime.plan.types import ComponentPlan, Piece, Plan
from quantmatrix.runtime.witness.measure import split_groups
from quantmatrix.scheme import MX, WHOLE, Scheme, name_format

SCALE_ERRORS = {"e2m1": 1 / 16}
"""Error of the scale itself, where it is kept in 8 bits."""
BOUNDS = {
    name: gap / (2 * LARGEST_CODE[name]) + SCALE_ERRORS.get(name, 0.0)
    for name, gap in TOP_GAP.items()
} | {f"{MX}{name}": 1.0 - LARGEST_CODE[name] / end for name, end in (("e4m3", 512), ("e2m1", 8))}
FREE = {"e4m3": 1 / 16, "e5m2": 1 / 8}
"""Half the gap at the lower end of a binade: where a scale need not lead to the largest code (as in a
plain cast, whose scale is 1), the largest magnitude may lie there."""
MARGIN = 1.25


def find_bound(scheme: Scheme) -> float | None:
    """Largest error of an element over the magnitude of its group; None without a bound."""
    if scheme.weight in FREE and (scheme.scale, scheme.activation) == ("tensor", "none"):
        return FREE[scheme.weight]
    return BOUNDS.get(name_format(scheme).removesuffix(WHOLE))


def measure_error(base: torch.Tensor, decoded: torch.Tensor, scheme: Scheme) -> float:
    """The largest |decoded - base| over the magnitude of its group.

    Both are [out, in] of any float dtype; infinite where a number is not finite.
    """
    size = split_groups(base.float(), scheme).abs().amax(dim=1)
    error = split_groups(decoded.float() - base.float(), scheme).abs().amax(dim=1)
    if not bool(torch.isfinite(error).all()):
        return float("inf")
    return float((error / size.clamp_min(torch.finfo(torch.float32).tiny)).max())


def measure_residual(
    base: torch.Tensor, decoded: torch.Tensor, tensors: Tensors, scheme: Scheme
) -> float:
    """The same where smoothing and a low-rank branch moved what was rounded.

    `base` and `decoded` are [out, in] of any float dtype, `tensors` the canonical ones of the
    layer's op.
    """
    error = (decoded.float() - base.float()).abs()
    if "smooth" in tensors:
        error = error * tensors["smooth"].float().abs()
    if "pre_quant_scale" in tensors:
        error = error / tensors["pre_quant_scale"].float().abs()
    scale = tensors["weight_scale"].float()
    for name in ("channel_scale", "weight_scale_2"):
        if name in tensors:
            scale = scale * tensors[name].float().reshape(-1, 1)
    worst = error.reshape(*scale.shape, -1).amax(dim=-1)
    ratio = worst / (scale.abs() * LARGEST_CODE[scheme.weight])
    return float(ratio.max()) if bool(torch.isfinite(ratio).all()) else float("inf")


def measure_plan(plan: Plan, base: Plan) -> Iterator[tuple[str, Piece, float]]:
    """(component.module, a piece of it, error) of every piece that has a bound."""
    for name, part in plan.components.items():
        if not part.layers:
            continue
        plain = fetch(base.components[name].checkpoint, base.request.hub)
        coded = fetch(part.checkpoint, plan.request.hub)
        with TensorReader(plain, "cpu") as reader, TensorReader(coded, "cpu") as stored:
            for module, pieces in part.layers.items():
                weight = reader.read(f"{module}.weight")
                widths = [piece.in_features for piece in pieces]
                for piece, columns in zip(pieces, weight.split(widths, dim=1), strict=True):
                    if find_bound(piece.scheme) is not None:
                        yield f"{name}.{module}", piece, measure_piece(part, piece, columns, stored)


def measure_piece(
    part: ComponentPlan, piece: Piece, base: torch.Tensor, reader: TensorReader
) -> float:
    """The largest error of one layer on disk against base weights [out, in] of any float dtype."""
    family = families.load(str(part.family))
    tensors = read_layer(part.checkpoint, piece.layer, reader)
    if part.online:
        tensors = family.quantize(tensors["weight"], piece.scheme)
    canonical = family.canonical(tensors, piece.scheme)
    rows = select_rows(piece.target, piece.target.count_stored(piece.out_features))
    if rows is not None:
        canonical = kernels.take_rows(piece.scheme, canonical, rows)
    decoded = kernels.decode(piece.scheme, canonical)[0]
    if piece.scheme.op == "linear.convrot":
        size = piece.scheme.group_size
        base = linear_convrot.rotate(base.float(), size)
        decoded = linear_convrot.rotate(decoded.float(), size)
        return measure_residual(base, decoded, canonical, piece.scheme)
    if "mul_scale" in canonical:
        smooth = canonical["mul_scale"].float()
        return measure_error(base.float() / smooth, decoded.float() / smooth, piece.scheme)
    if piece.scheme.rank or piece.scheme.smoothed:
        return measure_residual(base, decoded, canonical, piece.scheme)
    return measure_error(base, decoded, piece.scheme)


def judge_weights(plan: Plan, base: Plan) -> list[str]:
    """Layers whose weights are further from the base model's than rounding can bring them."""
    problems = []
    for layer, piece, error in measure_plan(plan, base):
        bound = find_bound(piece.scheme)
        if bound is not None and not error <= bound * MARGIN:
            problems.append(
                f"{layer}: a weight is {error:.4g} of its group's magnitude away from the base "
                f"model's; {name_format(piece.scheme)} rounds by at most {bound:.4g}: a scale is not the "
                "one that its codes were made with"
            )
    return problems
