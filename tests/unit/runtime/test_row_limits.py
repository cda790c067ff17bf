"""The number of rows of a run is planned for: a kernel with a limit gives way to another one."""

from __future__ import annotations

import pytest

from quantmatrix.api import plan
from quantmatrix.kernels.nvfp4_flashinfer import CUTLASS_ROWS
from quantmatrix.request import Request
from quantmatrix.runtime.plan.kernel_choice import count_rows
from quantmatrix.runtime.plan.types import Plan, Refusal

WAN = {
    "model_path": "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
    "component_paths": {"transformer": "BBuf/wan22-t2v-a14b-modelopt-nvfp4-sglang-transformer"},
    "tiny": True,
    "hardware": "b200",
}
LARGE = {"height": 720, "width": 1280, "num_frames": 81}
SMALL = {"height": 480, "width": 832, "num_frames": 81}


@pytest.mark.parametrize(
    ("model", "size", "rows"),
    [
        ("wan-2-2", LARGE, 45 * 80 * 21 + 512),
        ("wan-2-2", SMALL, 30 * 52 * 21 + 512),
        ("flux-1", {}, 4096 + 512),
        ("z-image", {"height": 2048, "width": 1024}, 128 * 64 + 512),
    ],
)
def test_rows_of_a_run(model: str, size: dict[str, int], rows: int) -> None:
    assert count_rows(model, Request(model_path="x", **size)) == rows


def test_a_kernel_gives_way_to_another_where_the_run_is_too_large() -> None:
    assert 30 * 52 * 21 + 512 < CUTLASS_ROWS < 45 * 80 * 21 + 512
    found = {}
    for name, size in (("small", SMALL), ("large", LARGE)):
        planned = plan(Request(**WAN, **size, fp4_gemm_backend="cutlass"))
        assert isinstance(planned, Plan)
        found[name] = planned
    backends = {
        name: set(planned.components["transformer"].backends) for name, planned in found.items()
    }
    assert backends["small"] == {"flashinfer-cutlass"}
    assert "flashinfer-cutlass" not in backends["large"]
    said = [text for text in found["large"].warnings if f"at most {CUTLASS_ROWS} rows" in text]
    assert len(said) == 1
    assert "FLASHINFER_FP4_GEMM_BACKEND=cutlass is not used" in said[0]
    assert not any("rows" in text for text in found["small"].warnings)


def test_a_backend_that_was_asked_for_alone_is_refused() -> None:
    planned = plan(Request(**WAN, **LARGE, backend="flashinfer-cutlass"))
    assert isinstance(planned, Refusal)
    assert f"takes inputs of at most {CUTLASS_ROWS} rows" in planned.message
