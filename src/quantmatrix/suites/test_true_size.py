"""True size: the row's form at its model's own width, and on an accelerator its depth, beside BF16.

Weights are random, so nothing is downloaded, and the record is of scope `true size`. It runs only
where `--check true-size` asks for it: a row takes seconds on a GPU, a minute on a CPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from quantmatrix.harness.recorder import Proof
    from quantmatrix.measure.workbench import Workbench
    from quantmatrix.tables.rows import Cell


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where checkpoints are kept for the cells of one row."""
    return tmp_path_factory.mktemp("true-size")


@pytest.mark.check("true-size")
def test_true_size(
    cell: Cell, workbench: Workbench, proof: Proof, written: Path, reports: Path
) -> None:
    from quantmatrix.measure import latents, true_size
    from quantmatrix.proof import known_limits, limit_classes

    workbench.release()
    row = workbench.tables.checkpoints[cell.checkpoint]
    request = workbench.request(cell)
    proof.command = f"quantmatrix true-size {cell.id}"
    proof.folders = {**workbench.folders(request), str(written): "$RANDOM"}
    found = true_size.measure(row, request, workbench.tables, written)
    proof.plan = found.plan.to_json()
    proof.files = found.plan.components[true_size.COMPONENT].checkpoint.files
    proof.timings.update(found.tell_times())
    proof.latents_digest = latents.digest_latents(found.quantized.latents)
    proof.metrics.update(found.to_json())
    kind = limit_classes.name_run([found.plan.components[true_size.COMPONENT]])
    allowed = known_limits.read(reports).find(kind, cell.model, cell.hardware)
    proof.metrics["class"] = kind
    proof.limits.update({"layer_error": {"at_most": allowed.layer_error}, "repeats": True})
    proof.limits.update({"finite": True, "identical": False})
    assert proof.metrics["finite"], "latents that are NaN or infinite"
    assert proof.metrics["repeats"], "the same noise gave other bits the second time"
    assert not proof.metrics["worst"]["identical"], (
        "the latents are those of BF16: nothing is quantized"
    )
    worst = found.errors.worst
    assert worst <= allowed.layer_error, (
        f"relative error {worst:.4g} of a layer on its own input, the limit is "
        f"{allowed.layer_error:.4g}: {proof.metrics['layers']}"
    )
