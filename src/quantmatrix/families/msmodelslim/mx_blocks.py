"""MXFP8 blocks: 32 neighbouring columns share a power of two, stored as one byte (E8M0).

The exponent is floor(log2(largest magnitude)) - 8, so that the largest code lies between 256 and
448; the byte is the exponent plus 127. Codes are e4m3, ties away from zero as msmodelslim's writer
rounds them (`torch`'s own cast rounds ties to even), values above 448 clamped to it. Sources: the
OCP microscaling formats specification (E8M0, MXFP8) and msmodelslim 26.1.0.
"""

from __future__ import annotations

import torch

BLOCK = 32
BIAS = 127
LARGEST = 448.0
SMALLEST_EXPONENT = -6
"""Of normal e4m3 numbers; below it steps stay 2**-9."""


def encode_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes float8_e4m3fn [N, K], exponents uint8 [N, K / 32]); K a multiple of 32."""
    blocks = weight.float().unflatten(1, (-1, BLOCK))
    exponents = find_exponents(blocks.abs().amax(dim=-1))
    scaled = torch.ldexp(blocks, -exponents[..., None])
    steps = torch.frexp(scaled).exponent.clamp(min=SMALLEST_EXPONENT + 1) - 4
    magnitudes = torch.ldexp((torch.ldexp(scaled.abs(), -steps) + 0.5).floor(), steps)
    codes = (magnitudes.clamp(max=LARGEST) * scaled.sign()).flatten(1)
    return codes.to(torch.float8_e4m3fn), (exponents + BIAS).to(torch.uint8)


def find_exponents(largest: torch.Tensor) -> torch.Tensor:
    """Exponents int32 of blocks with these largest magnitudes; the least one for zeros.

    `largest` is float32 of any shape, which stays.
    """
    exponents = torch.frexp(largest).exponent - 1 - 8
    return torch.where(largest > 0, exponents, -BIAS).clamp(min=-BIAS)


def decode_exponents(stored: torch.Tensor) -> torch.Tensor:
    """Scales float32 [N, K / 32] of stored exponents uint8."""
    return torch.ldexp(torch.ones(stored.shape, device=stored.device), stored.int() - BIAS)
