"""GGUF arithmetic: what a block of codes and scales decodes to, and how three types are encoded.

A block holds 32, 64 or 256 columns of one row. `d`, its scale, is a float16, `dmin` beside it one
for minima; the K types have a scale of their own, of 4, 6 or 8 bits, for every 16 or 32 columns:

| types | a weight is |
| ----- | ----------- |
| Q4_0, Q5_0, Q8_0, TQ1_0, TQ2_0 | d * (code - half of the range) |
| Q4_1, Q5_1 | d * code + m |
| Q2_K, Q4_K, Q5_K | (d * scale) * code - dmin * minimum |
| Q3_K, Q6_K | (d * scale) * (code - half of the range) |
| IQ4_NL, IQ4_XS, MXFP4, NVFP4 | (d * scale) * a value of a table of sixteen |
| IQ2_XXS ... IQ3_S | (d * scale) * a point of a grid * signs |
| IQ1_S, IQ1_M | (d * scale) * (a point of a grid + or - 1/8) |

Products are formed in float32 in the order of the `gguf` package's `quants`, so that every bit is
the same; only `encode` rounds. Codes of less than a byte lie in runs: of the bytes of a run first
all lowest bits, then the next ones (`spread`). Where they stand in a block is written beside each
function. Source: `ggml-quants.c`, and `quants.py` of the package, version 0.19.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from quantmatrix.kernels.gguf_grids import find_grid
from quantmatrix.scheme import BLOCKS

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
E2M1_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
IQ1_DELTA = 0.125

HALVES: Mapping[str, tuple[int, ...]] = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
    "TQ1_0": (52,), "TQ2_0": (64,), "IQ2_XXS": (0,), "IQ2_XS": (0,), "IQ2_S": (0,),
    "IQ3_XXS": (0,), "IQ3_S": (0,), "IQ1_S": (0,), "IQ4_NL": (0,), "IQ4_XS": (0,),
}  # fmt: skip
"""Where the float16 numbers of a block begin, by type; the others have none in one piece."""


def read_half(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """float32 [B, 1]: the float16 at a byte of blocks, uint8 [B, bytes]."""
    return blocks[:, at : at + 2].clone().view(torch.float16).float()


def read_numbers(blocks: torch.Tensor, size: int) -> torch.Tensor:
    """Little-endian numbers of `size` bytes, int64 [B, n], of uint8 [B, n * size]."""
    parts = blocks.reshape(blocks.shape[0], -1, size).long()
    fields: torch.Tensor = parts[..., 0]
    for index in range(1, size):
        fields = fields | (parts[..., index] << (8 * index))
    return fields


def spread(data: torch.Tensor, width: int, bits: int) -> torch.Tensor:
    """Codes of so many bits, uint8 [B, n * 8 / bits], of bytes [B, n] in runs of `width`."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=data.device).view(1, 1, -1, 1)
    runs = data.reshape(data.shape[0], -1, 1, width)
    codes: torch.Tensor = (runs >> shifts) & (2**bits - 1)
    return codes.reshape(data.shape[0], -1)


def look_up(values: tuple[int, ...], codes: torch.Tensor) -> torch.Tensor:
    """float32 values of codes of any integer dtype, in their shape [...]."""
    return torch.tensor(values, dtype=torch.float32, device=codes.device)[codes.int()]


def scale_groups(scales: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """float32 [B, groups, columns of a group]: codes [B, columns] times scales [B, groups]."""
    grouped = codes.reshape(codes.shape[0], scales.shape[1], -1)
    return scales.unsqueeze(-1) * grouped.float()


def decode_q4_0(b: torch.Tensor) -> torch.Tensor:
    """float32 [B, columns] of blocks, uint8 [B, bytes].

    2 bytes d, 16 of codes.
    """
    return read_half(b, 0) * (spread(b[:, 2:], 16, 4).float() - 8)


def decode_q4_1(b: torch.Tensor) -> torch.Tensor:
    """float32 [B, columns] of blocks, uint8 [B, bytes].

    2 bytes d, 2 m, 16 of codes.
    """
    return read_half(b, 0) * spread(b[:, 4:], 16, 4).float() + read_half(b, 2)


def decode_q5_0(b: torch.Tensor) -> torch.Tensor:
    """float32 [B, columns] of blocks, uint8 [B, bytes].

    2 bytes d, 4 of fifth bits, 16 of codes.
    """
    codes = spread(b[:, 6:], 16, 4) | (spread(b[:, 2:6], 1, 1) << 4)
    return read_half(b, 0) * (codes.float() - 16)


def decode_q5_1(b: torch.Tensor) -> torch.Tensor:
    """float32 [B, columns] of blocks, uint8 [B, bytes].

    2 bytes d, 2 m, 4 of fifth bits, 16 of codes.
    """
    codes = spread(b[:, 8:], 16, 4) | (spread(b[:, 4:8], 1, 1) << 4)
    return read_half(b, 0) * codes.float() + read_half(b, 2)


def decode_q8_0(b: torch.Tensor) -> torch.Tensor:
    """float32 [B, columns] of blocks, uint8 [B, bytes].

    2 bytes d, 32 codes.
    """
    return b[:, 2:].view(torch.int8).float() * read_half(b, 0)


def decode_q2_k(b: torch.Tensor) -> torch.Tensor:
    """float32 [B, columns] of blocks, uint8 [B, bytes].

    16 bytes of scales (low half) and minima, 64 of codes, 2 d, 2 dmin.
    """
    scales = read_half(b, 80) * (b[:, :16] & 15).float()
    minima = read_half(b, 82) * (b[:, :16] >> 4).float()
    return scale_groups(scales, spread(b[:, 16:80], 32, 2)) - minima.unsqueeze(-1)


def decode_q3_k(b: torch.Tensor) -> torch.Tensor:
    """float32 [B, columns] of blocks, uint8 [B, bytes].

    32 bytes of third bits (0 takes 4 away), 64 of codes, 12 of scales, 2 d.
    """
    low, high = spread(b[:, 96:104], 8, 4), spread(b[:, 104:108], 4, 2)
    scales = read_half(b, 108) * ((low | (high << 4)).float() - 32)
    codes = spread(b[:, 32:96], 32, 2) | (spread(b[:, :32], 32, 1) << 2)
    return scale_groups(scales, codes.float() - 4)


def read_k_scales(b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and minima, uint8 [B, 8] of six bits, of the twelve bytes of Q4_K and Q5_K."""
    low, middle, high = b[:, :4], b[:, 4:8], b[:, 8:12]
    scales = torch.cat([low & 63, (high & 15) | ((low >> 2) & 48)], dim=1)
    minima = torch.cat([middle & 63, (high >> 4) | ((middle >> 2) & 48)], dim=1)
    return scales, minima


def decode_k(b: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """float32 [B, columns] of blocks, uint8 [B, bytes].

    What Q4_K and Q5_K share: 2 bytes d, 2 dmin, 12 of scales and minima, then codes.
    """
    scales, minima = read_k_scales(b[:, 4:16])
    offsets = read_half(b, 2) * minima.float()
    return scale_groups(read_half(b, 0) * scales.float(), codes) - offsets.unsqueeze(-1)


def decode_q4_k(b: torch.Tensor) -> torch.Tensor:
    """float32 [B, columns] of blocks, uint8 [B, bytes].

    As `decode_k`, 128 bytes of codes.
    """
    return decode_k(b, spread(b[:, 16:], 32, 4))


def decode_q5_k(b: torch.Tensor) -> torch.Tensor:
    """float32 [B, columns] of blocks, uint8 [B, bytes].

    As `decode_k`, 32 bytes of fifth bits, 128 of codes.
    """
    return decode_k(b, spread(b[:, 48:], 32, 4) | (spread(b[:, 16:48], 32, 1) << 4))


def decode_q6_k(b: torch.Tensor) -> torch.Tensor:
    """float32 [B, columns] of blocks, uint8 [B, bytes].

    128 bytes of codes, 64 of their two high bits, 16 scales (int8), 2 d.
    """
    codes = spread(b[:, :128], 64, 4) | (spread(b[:, 128:192], 32, 2) << 4)
    scales = read_half(b, 208) * b[:, 192:208].view(torch.int8).float()
    return scale_groups(scales, codes.float() - 32)


def decode_tq1_0(b: torch.Tensor) -> torch.Tensor:
    """float32 [B, columns] of blocks, uint8 [B, bytes].

    48 bytes of five and 4 of four digits to the base 3, as fractions of 256; 2 d.
    """
    parts = []
    for start, stop, digits in ((0, 32, 5), (32, 48, 5), (48, 52, 4)):
        powers = torch.tensor([3**n for n in range(digits)], device=b.device).view(1, -1, 1)
        parts.append(((b[:, None, start:stop].int() * powers) & 255).flatten(1))
    codes = (torch.cat(parts, dim=1) * 3) >> 8
    return read_half(b, 52) * (codes.float() - 1)


def decode_tq2_0(b: torch.Tensor) -> torch.Tensor:
    """float32 [B, columns] of blocks, uint8 [B, bytes].

    64 bytes of codes, 2 d.
    """
    return read_half(b, 64) * (spread(b[:, :64], 32, 2).float() - 1)


def decode_mxfp4(b: torch.Tensor) -> torch.Tensor:
    """float32 [B, columns] of blocks, uint8 [B, bytes].

    1 byte e, the scale 2^(e - 128); 16 of codes.
    """
    e = b[:, :1].int()
    bits = torch.where(e < 2, 0x00200000 << e.clamp(max=1), (e - 1) << 23)
    return bits.view(torch.float32) * look_up(E2M1_DOUBLED, spread(b[:, 1:], 16, 4))


def decode_nvfp4(b: torch.Tensor) -> torch.Tensor:
    """float32 [B, columns] of blocks, uint8 [B, bytes].

    4 bytes of e4m3 scales without a sign (half of their number counts), 4 times 8 of codes.
    """
    code = b[:, :4].int()
    exponent, mantissa = (code >> 3) & 15, (code & 7).float()
    small, large = mantissa * 2**-9, torch.ldexp(1.0 + mantissa / 8.0, exponent - 7)
    number = torch.where(exponent == 0, small, large) * 0.5
    scales = torch.where((code == 0) | (code == 0x7F), 0.0, number)
    return scale_groups(scales, look_up(E2M1_DOUBLED, spread(b[:, 4:], 8, 4)))


def decode_iq4_nl(b: torch.Tensor) -> torch.Tensor:
    """float32 [B, columns] of blocks, uint8 [B, bytes].

    2 bytes d, 16 of codes.
    """
    return read_half(b, 0) * look_up(IQ4_VALUES, spread(b[:, 2:], 16, 4))


def decode_iq4_xs(b: torch.Tensor) -> torch.Tensor:
    """float32 [B, columns] of blocks, uint8 [B, bytes].

    2 bytes d, 2 of the high and 4 of the low bits of scales, 128 of codes.
    """
    scales = (spread(b[:, 4:8], 1, 4) | (spread(b[:, 2:4], 1, 2) << 4)).float() - 32
    return scale_groups(read_half(b, 0) * scales, look_up(IQ4_VALUES, spread(b[:, 8:], 16, 4)))


def read_signs(bits: torch.Tensor) -> torch.Tensor:
    """float32 [..., 8] of 1 and -1 by the bits of bytes, of any shape and integer dtype."""
    shifts = torch.arange(8, device=bits.device, dtype=bits.dtype)
    return 1.0 - 2.0 * ((bits.unsqueeze(-1) >> shifts) & 1).float()


def complete_signs(seven: torch.Tensor) -> torch.Tensor:
    """Bytes of eight signs by seven of them, int64 of any shape: the number of minus signs is even."""
    parity = seven ^ (seven >> 4)
    parity = parity ^ (parity >> 2)
    return seven | (((parity ^ (parity >> 1)) & 1) << 7)


def take_points(
    kind: str, scales: torch.Tensor, index: torch.Tensor, signs: torch.Tensor
) -> torch.Tensor:
    """float32 [B, columns]: points of a grid, times scales [B, groups], times signs.

    `index` is [B, points], of any integer dtype; `signs` hold eight for every eight columns.
    """
    points = find_grid(kind, index.device)[index.int()].flatten(1)
    return scale_groups(scales, points).flatten(1) * signs.flatten(1)


def decode_iq2_xxs(b: torch.Tensor) -> torch.Tensor:
    """float32 [B, columns] of blocks, uint8 [B, bytes].

    2 bytes d; 8 times 4 of points, 4 of four times seven signs and a scale of four bits.
    """
    groups = b[:, 2:].reshape(b.shape[0], 8, 8)
    fields = read_numbers(groups[:, :, 4:].flatten(1), 4)
    scales = read_half(b, 0) * (0.5 + (fields >> 28).float()) * 0.25
    return take_points("IQ2_XXS", scales, groups[:, :, :4].flatten(1), split_signs(fields))


def split_signs(fields: torch.Tensor) -> torch.Tensor:
    """float32 [B, groups, 4, 8] of the four times seven signs in fields, int64 [B, groups]."""
    shifts = torch.tensor([0, 7, 14, 21], device=fields.device)
    return read_signs(complete_signs((fields.unsqueeze(-1) >> shifts) & 127))


def decode_iq2_xs(b: torch.Tensor) -> torch.Tensor:
    """float32 [B, columns] of blocks, uint8 [B, bytes].

    2 bytes d, 32 times 2 of a point (9 bits) and seven signs, 8 of scales.
    """
    fields = read_numbers(b[:, 2:66], 2)
    scales = read_half(b, 0) * (0.5 + spread(b[:, 66:], 1, 4).float()) * 0.25
    return take_points("IQ2_XS", scales, fields & 511, read_signs(complete_signs(fields >> 9)))


def decode_iq2_s(b: torch.Tensor) -> torch.Tensor:
    """float32 [B, columns] of blocks, uint8 [B, bytes].

    2 bytes d, 32 of points, 32 of signs, 8 of the points' high bits, 8 of scales.
    """
    index = b[:, 2:34].int() | (spread(b[:, 66:74], 1, 2).int() << 8)
    scales = read_half(b, 0) * (0.5 + spread(b[:, 74:], 1, 4).float()) * 0.25
    return take_points("IQ2_S", scales, index, read_signs(b[:, 34:66]))


def decode_iq3_xxs(b: torch.Tensor) -> torch.Tensor:
    """float32 [B, columns] of blocks, uint8 [B, bytes].

    2 bytes d, 64 of points, 8 times 4 of four times seven signs and a scale of four bits.
    """
    fields = read_numbers(b[:, 66:], 4)
    scales = read_half(b, 0) * (0.5 + (fields >> 28).float()) * 0.5
    return take_points("IQ3_XXS", scales, b[:, 2:66], split_signs(fields))


def decode_iq3_s(b: torch.Tensor) -> torch.Tensor:
    """float32 [B, columns] of blocks, uint8 [B, bytes].

    2 bytes d, 64 of points, 8 of their ninth bits, 32 of signs, 4 of scales.
    """
    index = b[:, 2:66].int() | (spread(b[:, 66:74], 1, 1).int() << 8)
    scales = read_half(b, 0) * (1 + 2 * spread(b[:, 106:], 1, 4)).float()
    return take_points("IQ3_S", scales, index, read_signs(b[:, 74:106]))


def decode_iq1_s(b: torch.Tensor) -> torch.Tensor:
    """float32 [B, columns] of blocks, uint8 [B, bytes].

    2 bytes d, 32 of points, 8 times 2 of their high bits, a scale and the sign of the delta.
    """
    fields = read_numbers(b[:, 34:], 2)
    scales = read_half(b, 0) * (2 * ((fields >> 12) & 7) + 1).float()
    shifts = torch.tensor([0, 3, 6, 9], device=b.device)
    high = ((fields.unsqueeze(-1) >> shifts) & 7).flatten(1)
    points = find_grid("IQ1_S", b.device)[(b[:, 2:34].long() | (high << 8))]
    delta = torch.where((fields & 0x8000) == 0, IQ1_DELTA, -IQ1_DELTA)
    return scale_groups(scales, points.reshape(b.shape[0], 8, 32) + delta.unsqueeze(-1))


def decode_iq1_m(b: torch.Tensor) -> torch.Tensor:
    """float32 [B, columns] of blocks, uint8 [B, bytes].

    32 bytes of points, 16 of their high bits and deltas, 4 times 2 of four scales and a part of d.
    """
    fields = read_numbers(b[:, 48:], 2)
    parts = [((fields[:, n] & 0xF000) >> (12 - 4 * n)) for n in range(4)]
    bits = parts[0] | parts[1] | parts[2] | parts[3]
    d = bits.to(torch.int16).view(torch.float16).float().unsqueeze(1)
    shifts = torch.tensor([0, 3, 6, 9], device=b.device)
    scales = d * (2 * ((fields.unsqueeze(-1) >> shifts) & 7) + 1).flatten(1).float()
    high = spread(b[:, 32:48], 1, 4)
    points = find_grid("IQ1_S", b.device)[b[:, :32].int() | ((high & 7).int() << 8)]
    delta = torch.where((high & 8) == 0, IQ1_DELTA, -IQ1_DELTA)
    return scale_groups(scales, points + delta.unsqueeze(-1))


DECODERS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Q4_0": decode_q4_0, "Q4_1": decode_q4_1, "Q5_0": decode_q5_0, "Q5_1": decode_q5_1,
    "Q8_0": decode_q8_0, "Q2_K": decode_q2_k, "Q3_K": decode_q3_k, "Q4_K": decode_q4_k,
    "Q5_K": decode_q5_k, "Q6_K": decode_q6_k, "TQ1_0": decode_tq1_0, "TQ2_0": decode_tq2_0,
    "MXFP4": decode_mxfp4, "NVFP4": decode_nvfp4, "IQ2_XXS": decode_iq2_xxs,
    "IQ2_XS": decode_iq2_xs, "IQ2_S": decode_iq2_s, "IQ3_XXS": decode_iq3_xxs,
    "IQ3_S": decode_iq3_s, "IQ1_S": decode_iq1_s, "IQ1_M": decode_iq1_m,
    "IQ4_NL": decode_iq4_nl, "IQ4_XS": decode_iq4_xs,
}  # fmt: skip
"""What decodes blocks, uint8 [B, bytes of a block], to float32 numbers, by type (`scheme.BLOCKS`)."""


def decode_blocks(data: torch.Tensor, kind: str) -> torch.Tensor:
    """float32 [numbers] of whole blocks of a type, uint8 of any shape."""
    return DECODERS[kind](data.reshape(-1, BLOCKS[kind][1])).flatten()


def holds_bad_scale(data: torch.Tensor, kind: str) -> bool:
    """Whether a float16 in the blocks of a type (uint8, any shape) is NaN or infinite."""
    blocks = data.reshape(-1, BLOCKS[kind][1])
    if kind == "IQ1_M":  # its bits lie in the high halves of bytes
        return bool(((blocks[:, 55] & 0x70 == 0x70) & (blocks[:, 53] & 0xC0 == 0xC0)).any())
    return any(bool((blocks[:, at + 1] & 0x7C == 0x7C).any()) for at in HALVES.get(kind, ()))


def encode_q8_0(weight: torch.Tensor) -> torch.Tensor:
    """Blocks of Q8_0, uint8 [N, bytes of a row], of a float32 weight [N, K].

    Every bit is as the package's `quantize` has it: codes are rounded half away from zero, by the
    scale before it is a float16.
    """
    groups = weight.reshape(-1, 32)
    d = groups.abs().amax(dim=1, keepdim=True) / 127
    inverse = torch.where(d == 0, 0.0, 1 / d)
    scaled = groups * inverse
    whole = scaled.abs().floor()
    rounded = whole + (2 * (scaled.abs() - whole)).floor()
    codes = (torch.sign(scaled) * rounded).to(torch.int8).view(torch.uint8)
    return torch.cat([d.half().view(torch.uint8), codes], dim=1).view(weight.shape[0], -1)


def encode_q5_0(weight: torch.Tensor) -> torch.Tensor:
    """Blocks of Q5_0, uint8 [N, bytes of a row], of a float32 weight [N, K]; bits as the package's."""
    groups = weight.reshape(-1, 32)
    largest = groups.gather(1, groups.abs().argmax(dim=1, keepdim=True))
    d = largest / -16
    inverse = torch.where(d == 0, 0.0, 1 / d)
    codes = (groups * inverse + 16.5).trunc().clamp(0, 31).to(torch.uint8)
    shifts = torch.arange(8, dtype=torch.uint8, device=weight.device)
    fifth = ((codes >> 4).view(-1, 4, 8) << shifts).sum(dim=2, dtype=torch.uint8)
    low = (codes[:, :16] & 15) | ((codes[:, 16:] & 15) << 4)
    return torch.cat([d.half().view(torch.uint8), fifth, low], dim=1).view(weight.shape[0], -1)


def encode_q4_k(weight: torch.Tensor) -> torch.Tensor:
    """Blocks of Q4_K, uint8 [N, bytes of a row], of a float32 weight [N, K].

    The package decodes the type and does not encode it. Of every 32 columns the range (zero within)
    gives scale and minimum; both are rounded to six bits of the largest of the block, then each code
    to the nearest number that these can give. ggml's own search shifts the range for a little less
    error still.
    """
    groups = weight.reshape(-1, 8, 32)
    dmin, minimum_codes = _round_six_bits(-groups.amin(dim=2).clamp(max=0))
    offset = dmin.float() * minimum_codes
    d, scale_codes = _round_six_bits((groups.amax(dim=2) + offset).clamp(min=0) / 15)
    step = d.float() * scale_codes
    safe = torch.where(step == 0, 1.0, step).unsqueeze(-1)
    codes = ((groups + offset.unsqueeze(-1)) / safe).round().clamp(0, 15).to(torch.uint8)
    pairs = codes.view(-1, 4, 2, 32)
    packed = (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).flatten(1)
    halves = torch.cat([d, dmin], dim=1).contiguous().view(torch.uint8)
    twelve = _pack_k_scales(scale_codes.to(torch.uint8), minimum_codes.to(torch.uint8))
    return torch.cat([halves, twelve, packed], dim=1).view(weight.shape[0], -1)


def _round_six_bits(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(float16 [B, 1], whole numbers 0..63 in float32 [B, 8]) whose products are near numbers."""
    d = (numbers.amax(dim=1, keepdim=True) / 63).half()
    wide = d.float()
    codes = torch.where(wide == 0, 0.0, numbers / torch.where(wide == 0, 1.0, wide))
    return d, codes.round().clamp(0, 63)


def _pack_k_scales(scales: torch.Tensor, minima: torch.Tensor) -> torch.Tensor:
    """The twelve bytes, uint8 [B, 12], of six-bit scales and minima, uint8 [B, 8]."""
    low = scales[:, :4] | ((scales[:, 4:] & 48) << 2)
    middle = minima[:, :4] | ((minima[:, 4:] & 48) << 2)
    high = (scales[:, 4:] & 15) | ((minima[:, 4:] & 15) << 4)
    return torch.cat([low, middle, high], dim=1)
