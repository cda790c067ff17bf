"""SVDQuant once more, written from the format's formulas and without the package's code.

Positions are computed index by index (the package uses views and transpositions), sums are float64,
and `layer` can make, on request, each mistake that the format invites, so that a test can show that
it would be seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

Tensors = Mapping[str, torch.Tensor]
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]).double()
SHIFT = 0.171875


def grid(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column numbers of every element of a matrix."""
    return torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")


def take_channels(stored: torch.Tensor) -> torch.Tensor:
    c = torch.arange(len(stored))
    inside = ((c % 128) // 16) * 16 + ((c % 8) // 2) * 4 + ((c % 16) // 8) * 2 + c % 2
    return stored[(c // 128) * 128 + inside]


def take_codes(stored: torch.Tensor) -> torch.Tensor:
    """Codes 0..15 [N, K] of a `qweight`."""
    rows, columns = stored.shape[0], 2 * stored.shape[1]
    n, k = grid(rows, columns)
    word = (((n // 128) * (columns // 64) + k // 64) * 8 + (n % 128) // 16) * 8 + n % 8
    word = (word * 4 + (k % 32) // 8) * 4 + ((n % 16) // 8) * 2 + (k % 64) // 32
    data = stored.contiguous().view(torch.uint8).flatten().long()[4 * word + (k % 8) // 2]
    return torch.where(k % 2 == 0, data % 16, data // 16)


def take_scales(stored: torch.Tensor) -> torch.Tensor:
    """Scales [N, K/g] of `wscales` [K/g, N], float64."""
    groups, rows = stored.shape
    n, g = grid(rows, groups)
    if stored.dtype == torch.float8_e4m3fn:
        place = (n // 128) * groups * 128 + (g // 4) * 512 + (n % 8) * 64
        place = place + ((n % 32) // 8) * 16 + ((n % 128) // 32) * 4 + g % 4
    else:
        c = n % 128
        inside = (c // 16) * 16 + ((c % 8) // 2) * 4 + ((c % 16) // 8) * 2 + c % 2
        place = (n // 128) * groups * 128 + g * 128 + inside
    return stored.double().flatten()[place]


def take_factor(stored: torch.Tensor, *, down: bool) -> torch.Tensor:
    """The low-rank factor of `proj_down` [K, R] as [R, K], or of `proj_up` [N, R]; float64."""
    channels, rank = stored.shape
    c, r = grid(channels, rank)
    i, j = (r % 16, c % 16) if down else (c % 16, r % 16)
    block = (c // 16) * (rank // 16) + r // 16
    inside = (i % 8) * 32 + ((j % 8) // 2) * 8 + (i // 8) * 4 + (j // 8) * 2 + j % 2
    plain = stored.double().flatten()[block * 256 + inside]
    return plain.T if down else plain


@dataclass(frozen=True)
class Layer:
    """A W4A4 layer in plain float64 numbers."""

    codes: torch.Tensor
    """[N, K], what the codes stand for."""
    scales: torch.Tensor
    """[N, K/g]"""
    smooth: torch.Tensor
    down: torch.Tensor
    up: torch.Tensor
    channel: torch.Tensor
    """[N]"""
    bias: torch.Tensor
    """[N], as stored; zeros when there is none."""
    group: int
    dtype: torch.dtype
    """Of the stored int4 scales."""
    int4: bool
    unsigned: bool = field(default=False)

    @property
    def residual(self) -> torch.Tensor:
        """[N, K], without smoothing."""
        whole = self.codes * self.scales.repeat_interleave(self.group, dim=1)
        return whole * self.channel[:, None]

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight of the raw input."""
        return self.residual / self.smooth + self.up @ self.down

    @property
    def plain_bias(self) -> torch.Tensor:
        """The bias before the shift was folded into it."""
        fold = SHIFT * (self.residual / self.smooth).sum(dim=1)
        return self.bias + fold if self.unsigned else self.bias


def read_layer(tensors: Tensors, *, unsigned: bool = False) -> Layer:
    """A W4A4 layer from its tensors on disk, names old or new."""

    def find(*names: str) -> torch.Tensor | None:
        return next((tensors[name] for name in names if name in tensors), None)

    def need(*names: str) -> torch.Tensor:
        found = find(*names)
        assert found is not None, names
        return found

    qweight, wscales = need("qweight"), need("wscales")
    int4 = wscales.dtype != torch.float8_e4m3fn
    numbers = take_codes(qweight)
    rows = qweight.shape[0]
    channel = torch.ones(rows).double()
    wtscale, wcscales, bias = find("wtscale"), find("wcscales"), find("bias")
    if wtscale is not None:
        channel = channel * wtscale.double()
    if wcscales is not None:
        channel = channel * take_channels(wcscales.double())
    return Layer(
        codes=torch.where(numbers > 7, numbers - 16, numbers).double() if int4 else E2M1[numbers],
        scales=take_scales(wscales),
        smooth=take_channels(need("smooth_factor", "smooth").double()),
        down=take_factor(need("proj_down", "lora_down"), down=True),
        up=take_factor(need("proj_up", "lora_up"), down=False),
        channel=channel,
        bias=torch.zeros(rows).double() if bias is None else take_channels(bias.double()),
        group=64 if int4 else 16,
        dtype=wscales.dtype,
        int4=int4,
        unsigned=unsigned,
    )


def round_e2m1(x: torch.Tensor) -> torch.Tensor:
    """Nearest of the eight magnitudes, ties to the even code."""
    size = x.abs().clamp(max=6)
    distance = (size.unsqueeze(-1) - E2M1[:8]).abs()
    distance = distance + torch.tensor([0.0, 1e-9] * 4).double()
    return E2M1[distance.argmin(dim=-1)] * torch.sign(x)


def compute(x: torch.Tensor, layer: Layer, mistake: str = "") -> torch.Tensor:
    """The layer's exact arithmetic in float64; `mistake` names one to be made."""
    raw = x.double()
    shift = SHIFT if layer.unsigned and mistake != "no shift" else 0.0
    if mistake == "shift everywhere":
        shift = SHIFT
    moved = raw + shift
    smoothed = moved * layer.smooth if mistake == "multiply" else moved / layer.smooth
    groups = smoothed.unflatten(-1, (-1, layer.group))
    amax = groups.abs().amax(dim=-1, keepdim=True)
    if layer.int4:
        top = 15.0 if layer.unsigned else 7.0
        exact = (amax / top).float().double()
        kept = exact.to(layer.dtype).double()
    else:
        exact = (amax / 6.0).clamp(max=448)
        kept = exact.float().to(torch.float8_e4m3fn).double()
    used = kept if mistake == "rounded scale" else exact
    quotient = groups / torch.where(used > 0, used, 1.0)
    if layer.int4:
        low, high = (0, 15) if layer.unsigned else (-8, 7)
        codes = quotient.round().clamp(low, high)
    else:
        codes = round_e2m1(quotient)
    coded = (codes * kept).flatten(-2)
    residual = layer.residual
    if mistake == "no channel scale":
        residual = residual / layer.channel[:, None]
    low_rank = raw
    if mistake == "smooth the branch":
        low_rank = raw / layer.smooth
    elif mistake == "shift the branch":
        low_rank = raw + SHIFT
    return coded @ residual.T + layer.bias + low_rank @ layer.down.T @ layer.up.T


def take_awq(tensors: Tensors) -> torch.Tensor:
    """The weight [N, K] of an AWQ layer, float64, rows in the order on disk."""
    qweight = tensors["qweight"]
    rows, columns = 4 * qweight.shape[0], 2 * qweight.shape[1]
    n, k = grid(rows, columns)
    word = ((((n // 4) * (columns // 64) + k // 64) * 4 + n % 4) * 2 + (k % 64) // 32) * 8 + k % 8
    data = qweight.contiguous().view(torch.uint8).flatten().long()
    words = data[::2] + 256 * data[1::2]
    codes = (words[word] >> (4 * ((k % 32) // 8))) % 16
    scales, zeros = tensors["wscales"].double(), tensors["wzeros"].double()
    return codes * scales[k // 64, n] + zeros[k // 64, n]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()
