"""Triton kernel before an attention: a query or key is read once, normalized, rotated and written once.

A compiler that fuses the same operations reads each number of a pair for the other one again, with
an address and a mask of its own, and joins texts and pictures in another pass: two to five times as
long as the traffic takes. `quantmatrix::rms_norm_rope` is put in their angle where blocks are
compiled (`quantmatrix.runtime.rewrites`).

| argument | what it holds |
| -------- | ------------- |
| `parts` | [B, S, H, D] each, of one float dtype: sequences that are joined along their tokens |
| `weights` | [D] each, or [H D] where all heads of a token are normalized together |
| `cosines`, `sines` | float32 [B or 1, S, K] each; K is D/2, or D for one angle per number |

With n the normalized numbers, a pair (n[2k], n[2k+1]) becomes
(n[2k] cos[2k] - n[2k+1] sin[2k], n[2k+1] cos[2k+1] + n[2k] sin[2k+1]). All is computed in float32 and
rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from quantmatrix.kernels.launching import can_launch, launch

HEADS = 8
"""Heads of a token per program, where each is normalized by itself."""
WARPS = 2


@cache
def compile_kernels() -> tuple[Any]:
    """The kernel, defined where triton is."""
    import triton
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator]
    def rms_norm_rope(  # type: ignore
        x, weight, cosine, sine, out,
        tokens, total, start, heads, x_batch, x_token, x_head, table_batch, table_token, step,
        EPS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr, TWIN: tl.constexpr,
    ):  # fmt: skip
        number = tl.program_id(0).to(tl.int64)
        batch, token = number // tokens, number % tokens
        head = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        column = tl.arange(0, WIDTH)
        inside = (head < heads)[:, None]
        given = x + batch * x_batch + token * x_token
        values = tl.load(given + head[:, None] * x_head + column[None, :], mask=inside, other=0.0)
        values = values.to(tl.float32)
        if WHOLE:
            mean = tl.sum(tl.sum(values * values, axis=1), axis=0) / (heads * WIDTH)
            of_token = head[:, None] * WIDTH + column[None, :]
            gain = tl.load(weight + of_token, mask=inside, other=0.0).to(tl.float32)
            values = values * tl.rsqrt(mean + EPS) * gain
        else:
            mean = tl.sum(values * values, axis=1) / WIDTH
            gain = tl.load(weight + column).to(tl.float32)
            values = values * tl.rsqrt(mean + EPS)[:, None] * gain[None, :]
        first, second = tl.split(tl.reshape(values, (ROWS, WIDTH // 2, 2)))
        angle = batch * table_batch + token * table_token + tl.arange(0, WIDTH // 2) * step
        cosine_1, sine_1 = tl.load(cosine + angle)[None, :], tl.load(sine + angle)[None, :]
        cosine_2, sine_2 = cosine_1, sine_1
        if TWIN:
            cosine_2 = tl.load(cosine + angle + step // 2)[None, :]
            sine_2 = tl.load(sine + angle + step // 2)[None, :]
        pairs = tl.join(first * cosine_1 - second * sine_1, second * cosine_2 + first * sine_2)
        turned = tl.reshape(pairs, (ROWS, WIDTH))
        row = (batch * total + start + token) * heads + head
        target = out + row[:, None] * WIDTH + column[None, :]
        tl.store(target, turned.to(out.dtype.element_ty), mask=inside)

    return (rms_norm_rope,)


def launch_rms_norm_rope(
    parts: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    cosines: Sequence[torch.Tensor],
    sines: Sequence[torch.Tensor],
    eps: float,
) -> torch.Tensor:
    """[B, all tokens, H, D], contiguous, from the module's arguments; plain torch where nothing launches.

    D is a power of two, the dtype that of the parts.
    """
    if not can_launch(parts[0]):
        turned = map(normalize_and_rotate, parts, weights, cosines, sines, [eps] * len(parts))
        return torch.cat(list(turned), dim=1)
    out, start, (kernel,) = draw_output(parts), 0, compile_kernels()
    for x, weight, cosine, sine in zip(parts, weights, cosines, sines, strict=True):
        batch, tokens, heads, width = x.shape
        x = x if x.stride(3) == 1 else x.contiguous()
        if cosine.stride() != sine.stride():
            cosine, sine = cosine.contiguous(), sine.contiguous()
        whole, twin = weight.numel() != width, cosine.shape[2] == width
        rows = 1 << (heads - 1).bit_length() if whole else HEADS
        table = (cosine.stride(0) if cosine.shape[0] > 1 else 0, cosine.stride(1))
        step = cosine.stride(2) * (2 if twin else 1)
        launch(
            kernel,
            (batch * tokens, -(-heads // rows)),
            (x, weight, cosine, sine, out),
            (tokens, out.shape[1], start, heads, *x.stride()[:3], *table, step),
            (eps, rows, width, whole, twin),
            num_warps=8 if whole else WARPS,
        )
        start += tokens
    return out


def normalize_and_rotate(
    x: torch.Tensor, weight: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, eps: float
) -> torch.Tensor:
    """The same of one part in plain torch: [B, S, H, D] in x's dtype."""
    numbers = x.float().flatten(2) if weight.numel() != x.shape[3] else x.float()
    scale = (numbers.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    first, second = (numbers * scale * weight.float()).view(x.shape).unflatten(3, (-1, 2)).unbind(4)
    angles = [table.float().unsqueeze(2) for table in (cosine, sine)]
    if cosine.shape[2] == x.shape[3]:
        (cos_1, cos_2), (sin_1, sin_2) = (one.unflatten(3, (-1, 2)).unbind(4) for one in angles)
    else:
        (cos_1, sin_1), (cos_2, sin_2) = angles, angles
    turned = torch.stack((first * cos_1 - second * sin_1, second * cos_2 + first * sin_2), dim=4)
    return turned.flatten(3).to(x.dtype)


def draw_output(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Memory for the joined parts, [B, all tokens, H, D] in their dtype."""
    batch, _, heads, width = parts[0].shape
    return parts[0].new_empty(batch, sum(part.shape[1] for part in parts), heads, width)


rms_norm_rope = torch.library.custom_op(
    "quantmatrix::rms_norm_rope", launch_rms_norm_rope, mutates_args=()
)


@rms_norm_rope.register_fake
def _(
    parts: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    cosines: Sequence[torch.Tensor],
    sines: Sequence[torch.Tensor],
    eps: float,
) -> torch.Tensor:
    return draw_output(parts)
