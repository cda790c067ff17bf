"""W8A8 layers on a CPU beside the BF16 linear of the same shape, quantize and scale included.

Both run in one process, in turn (A B A B ...), on one thread: on a busy machine the threads of a
parallel region wait for each other, and that waiting would be measured. The bar is on the least
CPU time of each, the one that neighbours disturbed least; the median of the paired ratios is
reported beside it. Shapes (M x K x N) are those of Wan2.2-A14B (5120, 13824) and of 3072-wide
transformers, with M tokens from 512 up.
"""

from __future__ import annotations

import pytest
import torch
from paired import judge, time_pairs

from quantmatrix.families import msmodelslim
from quantmatrix.families.protocol import Calibration
from quantmatrix.kernels import linear_int8

LIMIT = 0.7
ROUNDS = 7
SHAPES = (
    (512, 3072, 12288),
    (1024, 3072, 3072),
    (4096, 3072, 3072),
    (512, 5120, 13824),
    (1024, 5120, 5120),
)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("word", ["W8A8", "W8A8_DYNAMIC"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_w8a8_layer(benchmark, shape, word):
    rows, columns, out = shape
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out, columns, generator=generator).bfloat16()
    bias = torch.randn(out, generator=generator).bfloat16()
    x = torch.randn(rows, columns, generator=generator).bfloat16()
    scheme = msmodelslim.SCHEMES[word]
    ranges = Calibration(x.float().amin(dim=0), x.float().amax(dim=0))
    stored = msmodelslim.quantize(weight, scheme, bias=bias, calibration=ranges)
    kernel = next(k for k in linear_int8.KERNELS if k.backend == "int8")
    tensors = msmodelslim.canonical(stored, scheme)
    del tensors["bias"]
    buffers = kernel.prepare(tensors, scheme, torch.bfloat16)
    with torch.inference_mode():
        pairs = time_pairs(
            lambda: kernel.run(x, buffers, bias, scheme),
            lambda: torch.nn.functional.linear(x, weight, bias),
            ROUNDS,
        )
        benchmark.pedantic(lambda: kernel.run(x, buffers, bias, scheme), rounds=3)
    judge(benchmark, pairs, LIMIT)
