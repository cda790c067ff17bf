"""What a plan starts at its model's true size, without weights and without a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quantmatrix import kernels, models
from quantmatrix.kernels import launching, packed_triton
from quantmatrix.measure import true_launches
from quantmatrix.measure.workbench import Workbench
from quantmatrix.runtime.plan.types import Plan
from quantmatrix.tables import read, rows

pytest.importorskip("triton", reason="needs triton: the extra `compile`")

TABLES = read.read()
CELLS = {cell.id: cell for cell in TABLES.cells}
ROWS = {"flux-1": 4608, "flux-2": 4608, "wan-2-2": 32760, "qwen-image": 4096, "z-image": 4224}
"""Tokens of a picture of 1024 x 1024 pixels (a clip of 81 frames in 480p), with text where it joins."""


def plan(cell: str) -> Plan:
    bench = Workbench(TABLES, tiny=True)
    return bench.plan(bench.planned_request(CELLS[cell]))


@pytest.mark.parametrize("model", models.IDS)
def test_layers_have_the_size_that_their_model_has(model: str) -> None:
    layers = true_launches.list_layers(model)
    blocks = models.load(model).BLOCKS
    inside = {kind: layer for kind, layer in layers.items() if kind.split(".")[0] in blocks}
    assert max(layer.rows for layer in inside.values()) == ROWS[model]
    assert min(layer.rows for layer in inside.values()) in (1, 128, 512)
    assert all(shape[-1] == it.in_features for it in layers.values() for shape in it.inputs)


def test_launches_are_those_of_the_true_layers() -> None:
    launches, problems = true_launches.list_launches(
        plan("modelopt-nvfp4-flux-1-packed@h200+packed")
    )
    assert problems == []
    sizes = {tuple(launch.tensors[3].shape) for launch in launches}
    assert sizes == {(3072, 3072), (3072, 15360)}  # attention and proj_out; the MLPs stay in BF16
    assert {launch.kernel for launch in launches} == {packed_triton.compile_kernels()[0]}
    assert {launch.tensors[1].dtype for launch in launches} == {torch.float8_e4m3fn}


def test_scales_are_bytes_where_the_architecture_has_no_e4m3() -> None:
    for cell, dtype in (
        ("modelopt-nvfp4-flux-1-packed-elsewhere@rtx-3090", torch.uint8),
        ("modelopt-nvfp4-flux-1-packed-elsewhere@rtx-4090", torch.float8_e4m3fn),
        ("modelopt-nvfp4-flux-1-packed-elsewhere@mi300x", torch.uint8),
    ):
        launches, _ = true_launches.list_launches(plan(cell))
        assert {launch.tensors[1].dtype for launch in launches} == {dtype}


def test_a_layer_of_two_files_is_followed_in_both_parts() -> None:
    """FLUX.1's `proj_out` of a single block: 3072 columns of attention and 12288 of the MLP."""
    launches, _ = true_launches.list_launches(plan("svdq-flux-1-int4-r32-packed@h200"))
    columns = {launch.tensors[-1].shape[1] for launch in launches}
    assert columns == {3072, 12288}


def test_kernels_of_others_are_left_to_them() -> None:
    planned = plan("svdq-flux-1-int4-r32-engine@a100")
    assert {piece.backend for part in planned.components.values() for piece in part.pieces()} == {
        "nunchaku"
    }
    assert true_launches.list_launches(planned) == ([], [])


def test_a_cpu_starts_nothing() -> None:
    assert true_launches.list_launches(plan("msmodelslim-w8a8@cpu+int8")) == ([], [])


def test_a_kernel_that_does_not_take_the_true_size_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = plan("modelopt-nvfp4-flux-1-packed@h200+packed")
    found = true_launches.find_kernel(next(planned.components["transformer"].pieces()))
    narrow = replace(found, needs=replace(found.needs, max_rows=1024))
    monkeypatch.setattr(true_launches, "find_kernel", lambda piece: narrow)
    launches, problems = true_launches.list_launches(planned)
    assert len(launches) < len(problems)
    assert "at its true size: packed takes inputs of at most 1024 rows, this run has 4096" in (
        " ".join(problems)
    )


def test_nothing_is_watched_afterwards() -> None:
    true_launches.list_launches(plan("modelopt-nvfp4-flux-1-packed@h200+packed"))
    x = torch.empty(4, device="meta")
    assert not launching.is_watched(x)
    with pytest.raises(ZeroDivisionError), launching.watch("sm90"):
        1 / 0  # noqa: B018
    assert not launching.can_launch(x)


@pytest.mark.parametrize("backend", rows.PLAIN_BACKENDS)
def test_plain_backends_start_nothing(backend: str) -> None:
    """Their cells have no check `compile`, whatever their row says."""
    for op in kernels.OPS:
        for kernel in kernels.kernels_of(op):
            if kernel.backend == backend:
                assert true_launches.is_ours(kernel)
                assert "triton" not in (
                    kernel.needs.package,
                    *(n.package for n in kernel.needs.further),
                )
    cell = CELLS["svdq-flux-1-fp4-r32-hopper@h200+merged"]
    assert "compile" not in cell.checks
    assert "compile" in CELLS["svdq-flux-1-fp4-r32-hopper@h200+packed"].checks
