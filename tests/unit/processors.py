"""What torch does on this processor, where processors differ."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from quantmatrix.hardware.probe import multiplies_int8_exactly


@cache
def has_scaled_product() -> bool:
    """Whether torch multiplies FP8 here: on a CPU without AVX-512 or AMX oneDNN has no such product."""
    codes, one = torch.ones(16, 16).to(torch.float8_e4m3fn), torch.ones(())
    try:
        torch._scaled_mm(codes, codes.t(), one, one, out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True


def keeps_bits_with_threads() -> bool:
    """Whether a plain float32 product has the same bits on one thread and on two."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(n, 1024, generator=generator) for n in (64, 256))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(left @ right.T)
    finally:
        torch.set_num_threads(before)
    return torch.equal(*found)


def skip_without_exact_int8() -> None:
    if not multiplies_int8_exactly():
        pytest.skip("torch's integer product is not exact on this processor")


def skip_without_scaled_product() -> None:
    if not has_scaled_product():
        pytest.skip("torch has no FP8 product on this processor")
