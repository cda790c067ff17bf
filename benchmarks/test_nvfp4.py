"""Decoding NVFP4 on a CPU: what a BF16 linear costs when its weight is decoded for every call.

The `decode` backend decodes once, at load; this is the price of a layer whose packed weight is all
that fits in memory, and of loading. Both sides run in one process, in turn (A B A B ...), on one
thread; the bar is on the least CPU time of each, the one that neighbours disturbed least.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from paired import judge, time_pairs

from quantmatrix.families.modelopt_nvfp4 import NVFP4
from quantmatrix.kernels.nvfp4_arithmetic import decode_to, encode

LIMIT = 1.15
ROUNDS = 5
SHAPES = ((4096, 3072, 3072), (4096, 3072, 12288))
"""M x K x N."""


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_decode_and_multiply(benchmark, shape):
    rows, columns, out = shape
    generator = torch.Generator().manual_seed(0)
    codes, scales, whole = encode(torch.randn(out, columns, generator=generator))
    layer = {"weight": codes, "weight_scale": scales, "weight_scale_2": whole}
    x = torch.randn(rows, columns, generator=generator).bfloat16()
    weight = decode_to(layer, NVFP4, torch.bfloat16)

    def decode_and_multiply() -> torch.Tensor:
        return torch.nn.functional.linear(x, decode_to(layer, NVFP4, torch.bfloat16))

    with torch.inference_mode():
        plain = partial(torch.nn.functional.linear, x, weight)
        pairs = time_pairs(decode_and_multiply, plain, ROUNDS)
        benchmark.pedantic(lambda: decode_to(layer, NVFP4, torch.bfloat16), rounds=3)
    judge(benchmark, pairs, LIMIT)
