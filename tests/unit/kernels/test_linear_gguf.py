"""linear.gguf: every type bit by bit against the `gguf` package, on whole and on ragged shapes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from quantmatrix.kernels import Kernel, gguf_arithmetic, gguf_grids, linear_gguf
from quantmatrix.scheme import BLOCKS, Scheme

package = pytest.importorskip("gguf", reason="needs the package gguf: the extra `gguf`")
TYPES = package.GGMLQuantizationType
SHAPES = ((1, 1), (3, 1), (5, 3), (17, 2))
"""Rows, and blocks of a row."""


def scheme_of(kind: str) -> Scheme:
    return Scheme("linear.gguf", kind, kind.lower(), "group", "none", group_size=32)


def draw(kind: str, rows: int, blocks: int) -> torch.Tensor:
    """Random bytes: any block is one, NaN among the scales included."""
    size = blocks * BLOCKS[kind][1]
    return torch.from_numpy(np.random.default_rng(rows).integers(0, 256, (rows, size), np.uint8))


def decode_by_package(data: torch.Tensor, kind: str) -> torch.Tensor:
    with np.errstate(all="ignore"):
        return torch.from_numpy(package.quants.dequantize(data.numpy(), TYPES[kind]))


def is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether every bit is, NaN left out where both have one."""
    assert (one.dtype, one.shape) == (other.dtype, other.shape)
    bits = one.contiguous().view(torch.int32) == other.contiguous().view(torch.int32)
    return bool((bits | (one.isnan() & other.isnan())).all())


def test_every_type_that_the_package_decodes_is_decoded() -> None:
    names = {kind.name for kind in package.quants._type_traits} - {"BF16"}
    assert names == set(BLOCKS) == set(gguf_arithmetic.DECODERS)


@pytest.mark.parametrize("kind", BLOCKS)
def test_decoding_is_the_packages_bit_by_bit(kind: str) -> None:
    for rows, blocks in SHAPES:
        data = draw(kind, rows, blocks)
        found = linear_gguf.decode({"weight": data}, scheme_of(kind))
        assert is_same(found, decode_by_package(data, kind)), (rows, blocks)


@pytest.mark.parametrize("kind", gguf_grids.VALUES)
def test_grids_are_the_packages(kind: str) -> None:
    own = getattr(package.quants, kind)
    own.init_grid()
    grid = gguf_grids.find_grid(kind, torch.device("cpu"))
    assert np.array_equal(own.grid.reshape(own.grid_shape), grid.numpy())


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "IQ2_XS"])
def test_blocks_that_begin_anywhere_are_decoded(kind: str) -> None:
    """A mapped file may be aligned to one byte."""
    data = draw(kind, 2, 1)
    moved = torch.cat([torch.zeros(1, dtype=torch.uint8), data.flatten()])[1:]
    assert is_same(
        gguf_arithmetic.decode_blocks(moved, kind), decode_by_package(data, kind).flatten()
    )


def weigh(rows: int, columns: int) -> torch.Tensor:
    weight = torch.randn((rows, columns), generator=torch.Generator().manual_seed(rows)) * 0.05
    weight[0] = 0.0
    weight[1] = weight[1].abs()
    weight[2, ::7] *= 40.0
    return weight


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_0"])
def test_encoding_is_the_packages_byte_by_byte(kind: str) -> None:
    weight = weigh(9, 96)
    encode = {"Q8_0": gguf_arithmetic.encode_q8_0, "Q5_0": gguf_arithmetic.encode_q5_0}[kind]
    assert np.array_equal(
        encode(weight).numpy(), package.quants.quantize(weight.numpy(), TYPES[kind])
    )


def test_q4_k_is_no_worse_than_five_bits_for_four_of_the_package() -> None:
    """The package encodes Q4_1, with a scale and a minimum of 16 bits for every 32 columns."""
    weight = weigh(9, 512)
    found = decode_by_package(gguf_arithmetic.encode_q4_k(weight), "Q4_K")
    other = package.quants.quantize(weight.numpy(), TYPES.Q4_1)
    other = torch.from_numpy(package.quants.dequantize(other, TYPES.Q4_1))
    assert not found[0].any()
    for row in range(1, len(weight)):
        own, theirs = ((x[row] - weight[row]).norm() for x in (found, other))
        assert own < 1.25 * theirs, row
    assert (found[3:] - weight[3:]).norm() < 0.1 * weight[3:].norm()


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_scale_that_is_no_number_is_seen(kind: str) -> None:
    data = torch.zeros(3, BLOCKS[kind][1], dtype=torch.uint8)
    assert not gguf_arithmetic.holds_bad_scale(data, kind)
    places = gguf_arithmetic.HALVES.get(kind, ())
    for at in places:
        for bad in (float("nan"), float("inf"), float("-inf")):
            wrong = data.clone()
            wrong[1, at : at + 2] = torch.tensor([bad]).half().view(torch.uint8)
            assert gguf_arithmetic.holds_bad_scale(wrong, kind)
    if kind == "IQ1_M":
        data[1, 53], data[1, 55] = 0xC0, 0x70
        assert not gguf_arithmetic.decode_blocks(data, kind).isfinite().all()
        assert gguf_arithmetic.holds_bad_scale(data, kind)
    else:
        assert bool(places) == (kind not in ("MXFP4", "NVFP4"))


@pytest.mark.parametrize("kind", [kind for kind in BLOCKS if kind != "IQ1_M"])
def test_a_byte_is_looked_at_where_it_can_spoil_a_block(kind: str) -> None:
    for at in range(BLOCKS[kind][1]):
        data = torch.zeros(2, BLOCKS[kind][1], dtype=torch.uint8)
        data[1, at] = 0x7C
        spoilt = not gguf_arithmetic.decode_blocks(data, kind).isfinite().all()
        assert gguf_arithmetic.holds_bad_scale(data, kind) == spoilt, at


@pytest.mark.parametrize(("kind", "scales"), [("MXFP4", 1), ("NVFP4", 4)])
def test_every_scale_of_one_byte(kind: str, scales: int) -> None:
    data = draw(kind, 256, 1)
    for place in range(scales):
        data[:, place] = (torch.arange(256) + 37 * place).to(torch.uint8)
    found = gguf_arithmetic.decode_blocks(data, kind)
    assert is_same(found, decode_by_package(data, kind).flatten())


def kernel_of(backend: str) -> Kernel:
    return next(kernel for kernel in linear_gguf.KERNELS if kernel.backend == backend)


def make(kind: str = "Q4_K") -> tuple[dict[str, torch.Tensor], Scheme]:
    data = draw(kind, 6, 2)
    data[:, :4] = torch.tensor([0.01, 0.02]).half().view(torch.uint8)
    data[:, 144:148] = data[:, :4]
    return {"weight": data}, scheme_of(kind)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_packed_is_decode_made_for_the_call(dtype: torch.dtype) -> None:
    tensors, scheme = make()
    x = torch.randn(3, 512, generator=torch.Generator().manual_seed(1)).to(dtype)
    bias = torch.arange(6.0)
    found = {}
    for backend in ("decode", "packed"):
        kernel = kernel_of(backend)
        kept = kernel.prepare(tensors, scheme, dtype)
        found[backend] = kernel.run(x, kept, bias.to(dtype), scheme)
    assert torch.equal(found["decode"], found["packed"])
    assert found["packed"].dtype == dtype
    plain = x.double() @ decode_by_package(tensors["weight"], "Q4_K").double().T + bias
    exact = kernel_of("reference").run(x, tensors, bias, scheme)
    assert torch.allclose(exact.double(), plain, rtol=0.01, atol=0.01)
    assert torch.allclose(found["packed"].double(), plain, rtol=0.05, atol=0.15)


def test_packed_keeps_the_blocks_themselves() -> None:
    tensors, scheme = make()
    kept = kernel_of("packed").prepare(tensors, scheme, torch.bfloat16)
    assert kept["weight"] is tensors["weight"]
    assert linear_gguf.measure_stored(scheme, 6, 512, 2) == tensors["weight"].numel() + 6 * 2
    assert linear_gguf.measure_decoded(scheme, 6, 512, 2) == 6 * 513 * 2


@pytest.mark.parametrize("rows", [slice(2, 5), torch.tensor([5, 0, 3])], ids=["slice", "order"])
def test_rows_are_cut_without_decoding(rows: Any) -> None:
    tensors, scheme = make()
    taken = linear_gguf.take_rows(tensors, rows)
    whole = linear_gguf.decode(tensors, scheme)
    assert is_same(linear_gguf.decode(taken, scheme), whole[rows])
