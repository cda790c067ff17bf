"""Writing SVDQuant layers: smoothing, a low-rank branch, and four-bit codes for the rest.

1. *Smooth.* Input channels are divided by s = sqrt(input range / weight range), so that half of an
   outlier (in logarithms) moves into the weight, whose columns are multiplied by s.
2. *Split.* The largest R directions of the smoothed weight go to a 16-bit branch. It reads the raw
   input, so its `proj_down` is stored divided by s.
3. *Code.* What is left after the branch **as stored** is coded per group: int4 with a 16-bit scale
   amax / 7, or e2m1 with an e4m3 scale under one 16-bit scale for the layer (`wtscale`), or per part
   of a fused layer (`wcscales`).
4. *Fold.* Unsigned layers (int4 after a GELU) code x + 0.171875; what that adds is taken out of the
   bias.

AWQ layers are coded per group with a 16-bit scale amax / 7 and the zero -(7 scale).
"""

from __future__ import annotations

import torch

from quantmatrix.errors import UsageError
from quantmatrix.families.protocol import Calibration
from quantmatrix.kernels import svdq_packing as packing
from quantmatrix.kernels.number_formats import (
    E2M1_MAX,
    E4M3_MAX,
    decode_e2m1,
    encode_e2m1,
    encode_int4,
    pack_nibbles,
    round_e4m3,
)
from quantmatrix.kernels.svdq_arithmetic import SHIFT, SIGNED_MAX
from quantmatrix.scheme import Scheme

Tensors = dict[str, torch.Tensor]
SMALLEST = 1e-5
"""Ranges below this count as this when channels are smoothed."""
AWQ_ZERO = 7
AWQ_RANGES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
"""Parts of a group's range that its codes may span; what is outside is held at the end."""


def find_layer_dtype(weight: torch.Tensor) -> torch.dtype:
    """The 16-bit dtype of a layer's scales, factors and bias: float16 stays, others are bfloat16.

    Only the weight's dtype counts; it may have any shape.
    """
    return torch.float16 if weight.dtype == torch.float16 else torch.bfloat16


def check_shape(weight: torch.Tensor, scheme: Scheme) -> None:
    """Raises UsageError for a weight [N, K], of any dtype, whose sizes the tiles cannot hold."""
    rows, columns = weight.shape
    if scheme.op == "linear.w4a16":
        if rows % 4 or columns % scheme.group_size:
            raise UsageError(
                f"an AWQ layer needs out_features a multiple of 4 and in_features of "
                f"{scheme.group_size}, this one is {rows} x {columns}: keep it in full precision"
            )
    elif rows % packing.TILE or columns % packing.TILE:
        raise UsageError(
            f"an SVDQuant layer needs out_features and in_features that are multiples of "
            f"{packing.TILE}, this one is {rows} x {columns}: keep it in full precision"
        )


def find_smoothing(weight: torch.Tensor, calibration: Calibration | None) -> torch.Tensor:
    """Divisors [K] of the input, float64: sqrt(input range / weight range), 1 on average."""
    if calibration is None:
        return torch.ones(weight.shape[1], dtype=torch.float64)
    inputs = calibration.amax.double().clamp(min=SMALLEST)
    ratio = (inputs / weight.abs().amax(dim=0).double().clamp(min=SMALLEST)).sqrt()
    return ratio / ratio.log().mean().exp()


def find_low_rank(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(down [rank, K], up [N, rank]) whose product is the best of that rank; both float64.

    Directions come from the smaller Gram matrix of the weight, which is far quicker than its
    singular value decomposition and as good here: the rest is coded anyway. The sign of each is
    fixed, so that the result does not depend on the linear algebra library. Zeros fill up a rank
    above the full one.
    """
    rows, columns = weight.shape
    wide = rows <= columns
    gram = weight @ weight.T if wide else weight.T @ weight
    found = min(rank, len(gram))
    basis = torch.linalg.eigh(gram)[1].flip(1)[:, :found]
    largest = basis.gather(0, basis.abs().argmax(dim=0, keepdim=True))
    basis = basis * largest.sign()
    down = torch.zeros(rank, columns, dtype=torch.float64)
    up = torch.zeros(rows, rank, dtype=torch.float64)
    down[:found] = basis.T @ weight if wide else basis.T
    up[:, :found] = basis if wide else weight @ basis
    return down, up


def quantize_svdq(
    weight: torch.Tensor,
    scheme: Scheme,
    bias: torch.Tensor | None,
    calibration: Calibration | None,
    parts: int,
) -> Tensors:
    """On-disk tensors of a W4A4 layer with weight [N, K], `parts` original layers stacked.

    The weight and the bias [N] have any float dtype; gives tensors as in the table of
    `families.nunchaku_svdq`. Raises UsageError for sizes that the tiles cannot hold.
    """
    check_shape(weight, scheme)
    dtype = find_layer_dtype(weight)
    smooth = find_smoothing(weight, calibration).to(dtype)
    smoothed = weight.double() * smooth.double()
    down, up = find_low_rank(smoothed, scheme.rank)
    down, up = (down / smooth.double()).to(dtype), up.to(dtype)
    rest = (weight.double() - up.double() @ down.double()) * smooth.double()
    code = code_int4 if scheme.weight == "int4" else code_nvfp4
    codes, decoded, stored = code(rest.float(), scheme.group_size, dtype, parts)
    stored |= {
        "qweight": packing.pack_codes(pack_nibbles(codes)),
        "smooth_factor": packing.pack_channels(smooth),
        "smooth_factor_orig": packing.pack_channels(smooth),
        "proj_down": packing.pack_down(down),
        "proj_up": packing.pack_up(up),
    }
    if scheme.unsigned:
        fold = SHIFT * (decoded.double() / smooth.double()).sum(dim=1)
        bias = -fold if bias is None else bias.double() - fold
    if bias is not None:
        stored["bias"] = packing.pack_channels(bias.to(dtype))
    return stored


def code_int4(
    rest: torch.Tensor, group: int, dtype: torch.dtype, parts: int
) -> tuple[torch.Tensor, torch.Tensor, Tensors]:
    """(codes [N, K], the numbers they stand for, scales) of a smoothed weight, as int4.

    The weight is float32 [N, K]. Codes are uint8, numbers float32, `wscales` [K/group, N] of
    `dtype`, in tiles.
    """
    groups: torch.Tensor = rest.unflatten(1, (-1, group))
    amax = groups.abs().amax(dim=-1)
    scales = torch.where(amax > 0, amax / SIGNED_MAX, 1.0).to(dtype)
    numbers = (groups / scales.float().unsqueeze(-1)).round().clamp(-SIGNED_MAX - 1, SIGNED_MAX)
    decoded = (numbers * scales.float().unsqueeze(-1)).view(rest.shape)
    codes = encode_int4(numbers).view(rest.shape)
    return codes, decoded, {"wscales": packing.pack_scales(scales)}


def code_nvfp4(
    rest: torch.Tensor, group: int, dtype: torch.dtype, parts: int
) -> tuple[torch.Tensor, torch.Tensor, Tensors]:
    """(codes [N, K], the numbers they stand for, scales) of a smoothed weight, as nvfp4.

    The weight is float32 [N, K]. Codes are uint8, numbers float32, `wscales` float8_e4m3fn
    [K/group, N], in tiles; beside them `wtscale` [1] of `dtype`, or `wcscales` [N] where there are
    several parts.
    """
    amax = rest.unflatten(0, (parts, -1)).abs().amax(dim=(1, 2))
    whole = torch.where(amax > 0, amax / (E2M1_MAX * E4M3_MAX), 1.0).to(dtype)
    outer = whole.float().repeat_interleave(rest.shape[0] // parts).unsqueeze(1)
    groups: torch.Tensor = (rest / outer).unflatten(1, (-1, group))
    scales = round_e4m3(groups.abs().amax(dim=-1) / E2M1_MAX)
    safe = torch.where(scales.float() > 0, scales.float(), 1.0).unsqueeze(-1)
    codes = encode_e2m1(groups / safe)
    codes = torch.where(codes == 8, 0, codes)  # the format has no negative zero
    decoded = (decode_e2m1(codes) * scales.float().unsqueeze(-1)).view(rest.shape) * outer
    stored = {"wscales": packing.pack_scales(scales)}
    if parts > 1:
        stored["wcscales"] = packing.pack_channels(outer.flatten().to(dtype))
    else:
        stored["wtscale"] = whole
    return codes.view(rest.shape), decoded, stored


def quantize_awq(
    weight: torch.Tensor,
    scheme: Scheme,
    bias: torch.Tensor | None,
    calibration: Calibration | None,
) -> Tensors:
    """On-disk tensors of an AWQ layer with weight [N, K], rows in their order on disk.

    The weight and the bias [N] have any float dtype; gives tensors as in the table of
    `families.nunchaku_svdq`. Raises UsageError for sizes that the tiles cannot hold.
    """
    check_shape(weight, scheme)
    dtype = find_layer_dtype(weight)
    groups: torch.Tensor = weight.double().unflatten(1, (-1, scheme.group_size))
    middle = find_middle(weight, calibration)
    cost = middle.square().clamp(min=SMALLEST).view(groups.shape[1:])
    amax = groups.abs().amax(dim=-1)
    whole = torch.where(amax > 0, amax / AWQ_ZERO, 1.0)
    tried = [code_awq(groups, (whole * part).to(dtype)) for part in AWQ_RANGES]
    costs = torch.stack([((t[0] - groups).square() * cost).sum(dim=-1) for t in tried])
    best = costs.argmin(dim=0)
    decoded, codes, scales, zeros = (
        torch.stack(found).take_along_dim(
            best.view(1, *best.shape, *[1] * (found[0].ndim - best.ndim)), dim=0
        )[0]
        for found in zip(*tried, strict=True)
    )
    stored = {
        "qweight": packing.pack_awq(pack_nibbles(codes.view(weight.shape))),
        "wscales": scales.T.contiguous(),
        "wzeros": zeros.T.contiguous(),
    }
    if bias is not None:
        lost = (groups - decoded).view(weight.shape) @ middle
        stored["bias"] = (bias.double() + lost).to(dtype)
    return stored


def find_middle(weight: torch.Tensor, calibration: Calibration | None) -> torch.Tensor:
    """Middle [K] of each input's range, float64; zeros when nothing is known."""
    if calibration is None:
        return torch.zeros(weight.shape[1], dtype=torch.float64)
    return (calibration.low.double() + calibration.high.double()) / 2


def code_awq(
    groups: torch.Tensor, scales: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(numbers, codes, scales, zeros) of a weight [N, groups, 64] coded with scales [N, groups].

    The weight and the numbers are float64, codes uint8, scales and zeros of the scales' 16-bit
    dtype.
    """
    zeros = (-AWQ_ZERO * scales.double()).to(scales.dtype)
    wide, low = scales.double().unsqueeze(-1), zeros.double().unsqueeze(-1)
    codes = ((groups - low) / wide).round().clamp(0, 15)
    return codes * wide + low, codes.to(torch.uint8), scales, zeros
