"""True size, at tiny widths: every family and form is written, planned, loaded, deepened and stepped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quantmatrix import models
from quantmatrix.errors import UsageError
from quantmatrix.measure import true_size
from quantmatrix.measure.bench.speed import flatten_output
from quantmatrix.measure.workbench import Workbench
from quantmatrix.proof import limit_classes, limits
from quantmatrix.runtime import empty_model
from quantmatrix.runtime.load import load_component
from quantmatrix.tables import read
from quantmatrix.tables.rows import Cell, Matrix

TABLES = read.read()
SAMPLES = Path(__file__).parents[3] / "reports" / "limits.csv"


def list_cells() -> list[Cell]:
    """Cells of an H200 with which each family, form and model is met once at least."""
    met: set[tuple[str, str]] = set()
    found = []
    for cell in TABLES.cells:
        row = TABLES.checkpoints[cell.checkpoint]
        kinds = {(row.family, row.form), ("model", row.model), ("scheme", row.scheme[:5])}
        if "true-size" in cell.checks and cell.hardware == "h200" and not kinds <= met:
            met |= kinds
            found.append(cell)
    return found


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Matrix]:
    """The models at the stand-ins' width: two blocks of each kind are their true depth."""
    for name in models.IDS:
        monkeypatch.setattr(models.load(name), "FULL", dict(models.load(name).TINY))
    true_size.measure_plain.cache_clear()
    yield TABLES
    true_size.measure_plain.cache_clear()


def measure(cell: Cell, tables: Matrix, folder: Path, **options: Any) -> true_size.TrueSize:
    request = Workbench(tables).request(replace(cell, hardware="cpu", backend=""))
    row = tables.checkpoints[cell.checkpoint]
    return true_size.measure(row, request, tables, folder, **options)


@pytest.mark.parametrize("one", list_cells(), ids=lambda one: one.row)
def test_every_form_is_measured(one: Cell, narrow: Matrix, tmp_path: Path) -> None:
    found = measure(one, narrow, tmp_path, deep=True)
    said = found.to_json()
    assert said["repeats"]
    assert said["finite"]
    assert len(said["steps"]) == true_size.STEPS
    assert 0 < said["worst"]["relative_l2"] < 0.5
    assert said["size"] == true_size.WHOLE
    part = found.plan.components["transformer"]
    assert part.family == one.family
    assert set(found.errors.found["transformer"]) == set(part.layers)  # each was called
    kind = limit_classes.name_run([part])
    allowed = limits.read(SAMPLES).find(kind, one.model, "cpu").layer_error
    assert 0 < found.errors.worst <= allowed
    assert set(found.tell_times()) == {"step bf16", "step quantized", "write", "load"}


def test_blocks_are_repeated_with_memory_of_their_own(narrow: Matrix) -> None:
    shallow = true_size.draw_blocks("flux-1", "cpu")
    assert [len(getattr(shallow, name)) for name in models.load("flux-1").BLOCKS] == [1, 1]
    deep = true_size.deepen(true_size.draw_blocks("flux-1", "cpu"), "flux-1")
    assert [len(getattr(deep, name)) for name in models.load("flux-1").BLOCKS] == [2, 2]
    first, second = (block.attn.to_q.weight for block in deep.transformer_blocks)
    assert torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr()
    assert empty_model.build_plain("flux-1", "blocks").config.guidance_embeds


def test_a_checkpoint_is_written_once_for_the_cells_of_a_row(
    narrow: Matrix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = list_cells()[0]
    first = measure(cell, narrow, tmp_path)
    monkeypatch.setattr(true_size, "quantize_layers", lambda *_: pytest.fail("written again"))
    again = measure(cell, narrow, tmp_path)
    assert first.to_json() == again.to_json()
    assert first.size == true_size.BLOCKS_ONLY


def test_every_copy_computes_with_its_own_codes(narrow: Matrix, tmp_path: Path) -> None:
    """Zeros in the last block alone change what the model gives."""
    cell = list_cells()[0]
    plan = measure(cell, narrow, tmp_path).plan
    quantized = load_component(plan.components["transformer"], plan.request)
    true_size.deepen(quantized, cell.model)
    inputs = true_size.choose_inputs(cell.model, quantized, "cpu")
    before = flatten_output(quantized(**inputs)).clone()
    for buffer in quantized.transformer_blocks[1].buffers():
        buffer.zero_()
    assert not torch.equal(before, flatten_output(quantized(**inputs)))
    assert all(bool(b.any()) for b in quantized.transformer_blocks[0].attn.to_q.buffers())


def test_a_wrong_kernel_shows(
    narrow: Matrix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error of a layer tells when its output is off by a tenth."""
    from quantmatrix.runtime import quantized_linear

    cell = list_cells()[0]
    right = measure(cell, narrow, tmp_path).errors.worst
    forward = quantized_linear.QuantizedLinear.forward
    monkeypatch.setattr(
        quantized_linear.QuantizedLinear, "forward", lambda self, x: forward(self, x) * 1.1
    )
    assert measure(cell, narrow, tmp_path).errors.worst > right + 0.05


def test_what_is_quantized_while_it_is_loaded_has_no_file(narrow: Matrix, tmp_path: Path) -> None:
    cell = next(c for c in narrow.cells if c.row == "fp8-flux-1-online")
    with pytest.raises(UsageError, match="has no file to write"):
        measure(cell, narrow, tmp_path)


def test_a_structured_weight_has_its_gain_a_low_rank_and_a_few_large_channels() -> None:
    """Half of its energy is of rank 8; an input channel of 64 has six times the amplitude of others."""
    generator = torch.Generator().manual_seed(0)
    white = torch.randn(512, 256, generator=generator) / 16
    found = true_size.structure(white, generator)
    assert found.norm() == pytest.approx(white.norm(), rel=0.05)
    channels = found.norm(dim=0).sort(descending=True).values
    large = 256 // true_size.OUTLIERS
    assert channels[:large].mean() / channels[large:].mean() == pytest.approx(6.0, rel=0.25)
    plain = found[:, found.norm(dim=0) <= channels[large]]
    energy = torch.linalg.svdvals(plain).square()
    assert energy[: true_size.RANK].sum() / energy.sum() == pytest.approx(0.5, abs=0.1)
