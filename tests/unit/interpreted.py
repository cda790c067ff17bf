"""Our kernels run by Triton's interpreter, a process of its own: it must be chosen before the import.

Prints JSON: what was compared with plain arithmetic, and how many numbers differ. The interpreter's
own casts truncate (Triton 3.9), so they are done by torch. It knows no names of enclosing functions,
so those that a kernel uses are put into its module.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen
from torch.nn import functional

from quantmatrix.kernels import (
    exchange_triton,
    fp8_triton,
    gelu_triton,
    gguf_arithmetic,
    gguf_triton,
    int8_arithmetic,
    int8_triton,
    launching,
    norm_triton,
    nvfp4_arithmetic,
    packed_triton,
    rope_triton,
)
from quantmatrix.kernels.linear_w4a16 import UINT4_VALUES
from quantmatrix.kernels.number_formats import round_e4m3
from quantmatrix.scheme import BLOCKS, Scheme

INT4_VALUES = tuple(float(code if code < 8 else code - 16) for code in range(16))
DTYPES = {
    "fp32": (torch.float32, np.float32),
    "fp16": (torch.float16, np.float16),
    "bf16": (torch.bfloat16, np.uint16),
    "fp8e4nv": (torch.float8_e4m3fn, np.uint8),
}


def cast(numbers: Any, source: Any, target: Any, rounding: Any) -> Any:
    """Floating-point numbers of one of Triton's types as bits of another, cast by torch."""
    (taken, _), (wanted, form) = DTYPES[source.name], DTYPES[target.name]
    bits = torch.from_numpy(np.ascontiguousarray(numbers).view(np.uint8).copy())
    found = bits.view(taken).to(wanted).view(torch.uint8).numpy()
    return found.view(form).reshape(numbers.shape)


def reveal(module: Any) -> None:
    pending = list(module.compile_kernels())
    while pending:
        found = inspect.getclosurevars(pending.pop().fn).nonlocals
        pending += [
            v for n, v in found.items() if hasattr(v, "rewriter") and not hasattr(module, n)
        ]
        for name, value in found.items():
            setattr(module, name, value)


def differ(one: torch.Tensor, other: torch.Tensor) -> int:
    """Numbers that differ in any bit, NaN left out where both have one."""
    assert (one.dtype, one.shape) == (other.dtype, other.shape)
    wide, like = one.float(), other.float()
    same = (wide == like) & (wide.signbit() == like.signbit()) | (wide.isnan() & like.isnan())
    return int((~same).sum())


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def draw_codes(*shape: int) -> torch.Tensor:
    options: dict[str, Any] = {"generator": torch.Generator().manual_seed(1), "dtype": torch.uint8}
    return torch.randint(0, 256, shape, **options)


ALL_E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)


def decode_scales(arch: str, dtype: torch.dtype) -> int:
    """Each of the 256 codes of e4m3 as a scale, read as the architecture reads it."""
    packed_triton.view_scales = lambda scales: view_as(arch, scales)
    codes, scales, whole = draw_codes(32, 64), ALL_E4M3.view(32, 8), torch.tensor(0.37)
    found = packed_triton.decode(codes, scales, whole, dtype)
    plain = nvfp4_arithmetic.decode_codes(codes, scales.float() * whole, torch.float32)
    return differ(found, plain.to(dtype))


def view_as(arch: str, scales: torch.Tensor) -> torch.Tensor:
    has_type = launching.has_e4m3(arch) or scales.dtype != torch.float8_e4m3fn
    return scales if has_type else scales.view(torch.uint8)


def recode(arch: str) -> int:
    packed_triton.view_scales = lambda scales: view_as(arch, scales)
    codes, scales = draw_codes(32, 64), draw(32, 8).abs().to(torch.float8_e4m3fn)
    found = packed_triton.decode(codes, scales, None, torch.float8_e4m3fn)
    plain = nvfp4_arithmetic.decode_codes(codes, scales.float() / 6, torch.float32)
    return differ(found, plain.to(torch.float8_e4m3fn))


def decode_smoothed(arch: str, *, int4: bool) -> int:
    packed_triton.view_scales = lambda scales: view_as(arch, scales)
    codes, rows, columns = draw_codes(6, 640), draw(6), draw(1280, seed=2)
    scales = draw(6, 20).bfloat16() if int4 else draw(6, 80).to(torch.float8_e4m3fn)
    found = packed_triton.decode_smoothed(codes, scales, rows, columns, torch.bfloat16, int4=int4)
    by_row = scales.float() * rows[:, None]
    values = (INT4_VALUES,) if int4 else ()
    plain = nvfp4_arithmetic.decode_codes(codes, by_row, torch.float32, *values) * columns
    return differ(found, plain.bfloat16())


def decode_zeros() -> int:
    codes, scales, zeros = draw_codes(6, 64), draw(6, 2).bfloat16(), draw(6, 2, seed=3).bfloat16()
    found = packed_triton.decode_zeros(codes, scales, zeros, torch.bfloat16)
    plain = nvfp4_arithmetic.decode_codes(codes, scales.float(), torch.float32, UINT4_VALUES)
    plain += zeros.float().repeat_interleave(64, dim=1)
    return differ(found, plain.bfloat16())


def decode_gguf(kind: str, dtype: torch.dtype) -> int:
    """Random blocks, more than a whole number of programs, with every float16 that is a number."""
    columns, size = BLOCKS[kind]
    blocks = draw_codes(5, 7 * size).view(-1, size)
    for at in gguf_arithmetic.HALVES[kind]:
        scales = draw(len(blocks), 1, seed=at).half()
        scales[0] = 2**-24  # the smallest, which has no exponent of its own
        blocks[:, at : at + 2] = scales.view(torch.uint8)
    data = blocks.view(5, -1)
    scheme = Scheme("linear.gguf", kind, kind.lower(), "group", "none")
    found = gguf_triton.decode(data, scheme, dtype)
    plain = gguf_arithmetic.decode_blocks(data, kind).view(5, 7 * columns)
    return differ(found, plain.to(dtype))


def multiply(arch: str, rows: int, *, static: bool) -> int:
    int8_triton.find_arch = lambda _: arch
    integers: dict[str, Any] = {"generator": torch.Generator().manual_seed(4), "dtype": torch.int8}
    codes = torch.randint(-128, 128, (rows, 150), **integers)
    weight = torch.randint(-128, 128, (70, 150), **integers)
    by_column, by_row = draw(70), None if static else draw(rows, 1)
    bias = torch.arange(-35, 35, dtype=torch.int32) if static else draw(70, seed=5)
    found = int8_triton.multiply(codes, weight, by_column, by_row, bias, torch.bfloat16)
    total = codes.double() @ weight.double().T
    if by_row is None:
        plain = (total + bias).float() * by_column
    else:
        plain = total.float() * by_column * by_row + bias
    return differ(found, plain.bfloat16())


def quantize_int8(largest: int) -> int:
    x = draw(5, 300).bfloat16()
    found = int8_triton.quantize_tokens(x, largest)
    plain = int8_arithmetic.quantize_tokens(x, largest)
    return sum(map(differ, found, plain))


def quantize_int8_static() -> int:
    x, step, offset = draw(40, 300).bfloat16(), torch.tensor(0.0173), torch.tensor(-3.0)
    found = int8_triton.quantize_static(x, step, offset)
    return differ(found, int8_arithmetic.quantize_static(x, step, offset))


def quantize_e4m3(kind: str) -> int:
    x = draw(5, 512).bfloat16()
    scale = torch.tensor(0.0173)
    if kind == "static":
        found, scales = fp8_triton.launch_static(x, scale), scale
    elif kind == "groups":
        found, scales = fp8_triton.launch_groups(x, 128)
        scales = scales.repeat_interleave(128, dim=1)
    else:
        launch = {"tokens": fp8_triton.launch_tokens, "tensor": fp8_triton.launch_tensor}[kind]
        found, scales = launch(x)
    return differ(found, round_e4m3(x.float() / scales))


def exceed(found: torch.Tensor, exact: torch.Tensor, steps: float) -> int:
    """Numbers further from the exact ones than some steps of their dtype; all, where one in 100 is rounded
    to another side."""
    assert found.shape == exact.shape
    form = torch.finfo(found.dtype)
    room = steps * (exact.abs() * form.eps).clamp_min(form.smallest_normal * form.eps)
    others = int((found.float() != exact.to(found.dtype).float()).sum())
    return int(((found.double() - exact).abs() > room).sum()) or others * (
        others > found.numel() // 100
    )


def turn(form: str, *, whole: bool = False) -> int:
    """Two joined sequences of two samples, of which the second is a part of a wider tensor."""
    lengths, heads, width = (3, 5), 3, 16
    angles = draw(1, sum(lengths), width // 2, seed=7) * 3
    tables = angles if form != "twin" else angles.repeat_interleave(2, dim=2)
    wide = draw(2, 5, heads, 2 * width, seed=1).bfloat16()
    parts = [draw(2, 3, heads, width).bfloat16(), wide[..., width:]]
    weights = [1 + draw(heads * width if whole else width, seed=n).bfloat16() / 4 for n in (2, 3)]
    shares = [
        [one.split(lengths, dim=1)[n] for n in (0, 1)] for one in (tables.cos(), tables.sin())
    ]
    found = rope_triton.launch_rms_norm_rope(parts, weights, *shares, 1e-6)
    rows = []
    for x, weight in zip(parts, weights, strict=True):
        size = weight.numel()
        flat = x.double().flatten(2) if whole else x.double()
        rows.append(functional.rms_norm(flat, (size,), weight.double(), 1e-6).view(x.shape))
    joined = torch.cat(rows, dim=1)
    if form == "twin":
        pair = (tables[0].cos().double(), tables[0].sin().double())
        exact = rotate_exactly(joined, *pair)
    else:
        exact = rotate_exactly(
            joined, *(one[0].repeat_interleave(2, dim=1) for one in (tables.cos(), tables.sin()))
        )
    return exceed(found, exact, 1)


def rotate_exactly(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """diffusers' rotation, and the one with complex numbers, which have to agree."""
    real = apply_rotary_emb(x.double(), (cosines, sines), sequence_dim=1)
    turns = torch.complex(cosines[:, ::2].float(), sines[:, ::2].float())
    other = apply_rotary_emb_qwen(x.float(), turns, use_real=False)
    assert torch.allclose(real.float(), other, atol=1e-4)
    return real.double()


def quantize_norm(form: str) -> int:
    """A layer norm or an RMS norm, two sequences joined, widths that are no power of two."""
    width, lengths = (96, (4, 3)) if form != "wide" else (640, (8,))
    parts = [(draw(2, n, width, seed=n) * 3 + 1).bfloat16() for n in lengths]
    scale, shift, weight = (draw(2, width, seed=n) / 3 for n in (5, 6, 7))
    step, center = torch.tensor(0.013), form != "rms"
    given = {
        "layer": (None, scale, shift),
        "wide": (None, scale, shift),
        "affine": (weight[0], None, shift[:1].expand(2, -1)),
        "bare": (None, None, None),
        "rms": (weight[0].bfloat16(), scale.bfloat16(), None),
    }[form]
    found = norm_triton.launch_norm_codes(parts, *given, step, 1e-5, center)
    x = torch.cat(parts, dim=1).double()
    norm = functional.layer_norm if center else functional.rms_norm
    exact = norm(x, (width,), eps=1e-5)
    gain, by_sample, added = (None if one is None else one.double() for one in given)
    exact = exact if gain is None else exact * gain
    exact = exact if by_sample is None else exact * (1 + by_sample[:, None])
    exact = exact if added is None else exact + added[:, None]
    return exceed(found, (exact.flatten(0, 1) / step.double()).clamp(-448, 448), 1)


def quantize_gelu() -> int:
    left, x = draw(3, 70, seed=1).bfloat16(), (draw(3, 2300) * 4).bfloat16()
    step = torch.tensor(0.02)
    found = gelu_triton.launch_gelu_codes([left, x], [False, True], step)
    active = functional.gelu(x.double(), approximate="tanh")
    exact = torch.cat([left.double(), active], dim=1) / step.double()
    return exceed(found, exact.clamp(-448, 448), 1)


def exchange(dtype: torch.dtype, heads: int, shares: list[int]) -> int:
    """What three processes write into each other's memory, by the kernels and by plain torch."""
    batch, width, count, tokens = 2, 16, len(shares), sum(shares)
    most = -(-heads // count)
    held = [min(most, heads - process * most) for process in range(count)]
    q, k, v = (draw(batch, tokens, heads, width, seed=n).to(dtype) for n in range(3))
    wide = torch.cat([v, v], dim=3)[..., width:]
    found: list[list[torch.Tensor]] = []
    for launches in (True, False):
        exchange_triton.can_launch = lambda _, launches=launches: launches
        sizes = [3 * batch * tokens * most * width * 4, batch * max(shares) * heads * width * 4]
        memory = [torch.zeros(count, size, dtype=torch.uint8) for size in sizes]
        first, second = (
            exchange_triton.Landing(tuple(one), torch.tensor([x.data_ptr() for x in one]))
            for one in memory
        )
        owns = []
        for rank in range(count):
            mine = [x.split(shares, dim=1)[rank] for x in (q, k, wide)]
            own = torch.zeros(tokens, batch, 3, held[rank], width, dtype=dtype)
            exchange_triton.launch_send_heads(*mine, own, first, shares, rank)
            start = rank * most
            mixed = q[:, :, start : start + held[rank]]
            exchange_triton.launch_send_tokens(mixed, heads, second, shares, rank)
            owns.append(own)
        arrived = [
            exchange_triton.view_numbers(part, dtype, (batch, share, heads, width)).clone()
            for part, share in zip(second.parts, shares, strict=True)
        ]
        assert torch.cat(arrived, dim=1).equal(q) or launches
        found.append([*owns, *memory, *arrived])
    return sum(differ(one, other) for one, other in zip(*found, strict=True))


CASES: dict[str, Callable[[], int]] = {
    "all scales as bytes, sm80": lambda: decode_scales("sm80", torch.float32),
    "all scales as bytes, gfx942": lambda: decode_scales("gfx942", torch.bfloat16),
    "all scales as e4m3, sm90": lambda: decode_scales("sm90", torch.float32),
    "recoded, sm90": lambda: recode("sm90"),
    "recoded, sm86": lambda: recode("sm86"),
    "smoothed int4": lambda: decode_smoothed("sm80", int4=True),
    "smoothed e2m1, sm80": lambda: decode_smoothed("sm80", int4=False),
    "smoothed e2m1, sm90": lambda: decode_smoothed("sm90", int4=False),
    "zeros": decode_zeros,
    **{
        f"multiply {rows} rows{', static' * static}, {arch}": (
            lambda rows=rows, static=static, arch=arch: multiply(arch, rows, static=static)
        )
        for rows in (3, 130)
        for static in (False, True)
        for arch in ("sm90", "gfx942")
    },
    **{
        f"gguf {kind}, {dtype}": lambda kind=kind, dtype=dtype: decode_gguf(kind, dtype)
        for kind in gguf_triton.TYPES
        for dtype in (torch.bfloat16, torch.float32)
    },
    "int8 tokens": lambda: quantize_int8(127),
    "int4 tokens": lambda: quantize_int8(7),
    "int8 static": quantize_int8_static,
    "turned pairs": lambda: turn("pairs"),
    "turned twins": lambda: turn("twin"),
    "turned pairs, all heads": lambda: turn("pairs", whole=True),
    "gelu beside": quantize_gelu,
    "exchange of three": lambda: exchange(torch.bfloat16, 7, [3, 2, 2]),
    "exchange of two": lambda: exchange(torch.float32, 4, [4, 4]),
    **{f"norm {form}": lambda form=form: quantize_norm(form) for form in (
        "layer", "wide", "affine", "bare", "rms",
    )},
    **{f"e4m3 {kind}": lambda kind=kind: quantize_e4m3(kind) for kind in (
        "static", "tokens", "tensor", "groups",
    )},
}  # fmt: skip


def main() -> None:
    from triton import knobs
    from triton.runtime import interpreter

    assert knobs.runtime.interpret, "TRITON_INTERPRET=1 has to be set"
    interpreter._convert_float = cast
    ours = (
        packed_triton,
        int8_triton,
        fp8_triton,
        gguf_triton,
        rope_triton,
        norm_triton,
        gelu_triton,
        exchange_triton,
    )
    for module in ours:
        reveal(module)
    for module in (rope_triton, norm_triton, gelu_triton):
        module.can_launch = lambda _: True
    gelu_triton.libdevice = SimpleNamespace(fast_dividef=lambda one, other: one / other)
    print(json.dumps({name: compare() for name, compare in CASES.items()}))


if __name__ == "__main__":
    main()
