"""Layerwise offload: peak device memory of a run, with blocks streamed from host memory and without.

Device memory is counted by CUDA's allocator, so this needs a GPU; on a CPU it is skipped. That the
latents are the same bits is a unit test.
"""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from quantmatrix.measure.bench.synthetic import make_inputs, synthesize
from quantmatrix.runtime.offloading import stream_blocks

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="not measured: peak device memory needs a CUDA device"
)
FORMS = [("modelopt-fp8", "FP8"), ("modelopt-nvfp4", "NVFP4")]
SHARE = 0.5
"""Peak of an offloaded FLUX.1 forward over that of a resident one, at most."""


def measure_peak(
    family: str, scheme: str, *, offload: bool, benchmark: Any = None
) -> tuple[int, torch.Tensor]:
    """(bytes allocated at most, output) of one FLUX.1 forward at true size; a benchmark times more."""
    from quantmatrix.hardware import probe

    machine = probe.probe("cuda")
    gc.collect()  # an earlier model may still wait for it, on the device
    model = synthesize("flux-1", machine, family=family, scheme=scheme)
    inputs = make_inputs("flux-1", model, "cuda", torch.bfloat16)
    if offload:
        stream_blocks(model, "cuda")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()

    def run() -> torch.Tensor:
        with torch.no_grad():
            output: torch.Tensor = model(**inputs)[0].cpu()
        return output

    output = run()
    if benchmark is not None:
        benchmark.pedantic(run, rounds=3)
    return torch.cuda.max_memory_allocated(), output


@pytest.mark.parametrize(("family", "scheme"), FORMS)
def test_offload_lowers_the_peak(benchmark: Any, family: str, scheme: str) -> None:
    resident, expected = measure_peak(family, scheme, offload=False)
    streamed, output = measure_peak(family, scheme, offload=True, benchmark=benchmark)
    benchmark.extra_info |= {
        "device": torch.cuda.get_device_name(),
        "form": f"{family} {scheme}",
        "resident_bytes": resident,
        "streamed_bytes": streamed,
    }
    assert torch.equal(output, expected)
    assert streamed <= SHARE * resident
