"""The tables of this project: complete with respect to the guide, and agreeing with the code."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

import quantmatrix
from quantmatrix import families, models
from quantmatrix.models import further
from quantmatrix.request import Request
from quantmatrix.tables import read
from quantmatrix.tables.lint import list_modules
from quantmatrix.tables.rows import Cell

PACKAGE = Path(quantmatrix.__file__).parent
TABLES = read.read()
GUIDE = {
    "guide-quick-reference": """
        quantmatrix generate
        --model-path black-forest-labs/FLUX.2-dev
        --transformer-weights-path black-forest-labs/FLUX.2-dev-NVFP4
        --prompt "a curious pikachu"
    """,
    "guide-component-folder": """
        quantmatrix generate
        --model-path /path/to/base-model
        --transformer-path /path/to/quantized-transformer
        --prompt "A Logo With Bold Large Text: SGL Diffusion"
    """,
    "guide-modelopt-fp8-flux-2": """
        quantmatrix generate
        --model-path black-forest-labs/FLUX.2-dev
        --transformer-path BBuf/flux2-dev-modelopt-fp8-sglang-transformer
        --prompt "A Logo With Bold Large Text: SGL Diffusion"
        --save-output
    """,
    "guide-modelopt-fp8-wan-2-2": """
        quantmatrix generate
        --model-path Wan-AI/Wan2.2-T2V-A14B-Diffusers
        --transformer-path BBuf/wan22-t2v-a14b-modelopt-fp8-sglang-transformer
        --prompt "a fox walking through neon rain"
        --save-output
    """,
    "guide-modelopt-nvfp4-flux-1": """
        quantmatrix generate
        --model-path black-forest-labs/FLUX.1-dev
        --transformer-path BBuf/flux1-dev-modelopt-nvfp4-sglang-transformer
        --prompt "A Logo With Bold Large Text: SGL Diffusion"
        --save-output
    """,
    "guide-modelopt-nvfp4-flux-2": """
        quantmatrix generate
        --model-path black-forest-labs/FLUX.2-dev
        --transformer-weights-path black-forest-labs/FLUX.2-dev-NVFP4
        --prompt "A Logo With Bold Large Text: SGL Diffusion"
        --save-output
    """,
    "guide-modelopt-nvfp4-flux-2-base": """
        quantmatrix generate
        --model-path black-forest-labs/FLUX.2-dev-NVFP4
        --prompt "A Logo With Bold Large Text: SGL Diffusion"
        --save-output
    """,
    "guide-modelopt-nvfp4-wan-2-2": """
        SGLANG_DIFFUSION_FLASHINFER_FP4_GEMM_BACKEND=cudnn
        quantmatrix generate
        --model-path Wan-AI/Wan2.2-T2V-A14B-Diffusers
        --transformer-path BBuf/wan22-t2v-a14b-modelopt-nvfp4-sglang-transformer
        --prompt "a fox walking through neon rain"
        --save-output
    """,
    "guide-nunchaku-qwen-image": """
        quantmatrix generate
        --model-path Qwen/Qwen-Image
        --transformer-weights-path /path/to/svdq-int4_r32-qwen-image.safetensors
        --prompt "a beautiful sunset"
        --save-output
    """,
    "guide-nunchaku-manual": """
        quantmatrix generate
        --model-path Qwen/Qwen-Image
        --transformer-weights-path /path/to/custom_nunchaku_checkpoint.safetensors
        --enable-svdquant
        --quantization-precision int4
        --quantization-rank 128
        --prompt "a beautiful sunset"
        --save-output
    """,
    "guide-msmodelslim-wan-2-2": """
        quantmatrix generate
        --model-path Eco-Tech/Wan2.2-T2V-A14B-Diffusers-w8a8
        --prompt "a beautiful sunset"
        --save-output
    """,
}
"""The guide's usage examples, word for word but for the program's name, by row."""
VALIDATED = {
    "BBuf/flux1-dev-modelopt-fp8-sglang-transformer": ("FP8", "flux-1", "transformer"),
    "BBuf/flux2-dev-modelopt-fp8-sglang-transformer": ("FP8", "flux-2", "transformer"),
    "BBuf/wan22-t2v-a14b-modelopt-fp8-sglang-transformer": ("FP8", "wan-2-2", "transformer"),
    "BBuf/flux1-dev-modelopt-nvfp4-sglang-transformer": ("NVFP4", "flux-1", "transformer"),
    "black-forest-labs/FLUX.2-dev-NVFP4": ("NVFP4", "flux-2", "transformer-weights"),
    "BBuf/wan22-t2v-a14b-modelopt-nvfp4-sglang-transformer": ("NVFP4", "wan-2-2", "transformer"),
}
NUNCHAKU_FILES = (
    "svdq-int4_r32-qwen-image.safetensors",
    "svdq-int4_r128-qwen-image.safetensors",
    "svdq-fp4_r32-qwen-image.safetensors",
    "svdq-fp4_r128-qwen-image.safetensors",
    "svdq-int4_r32-qwen-image-lightningv1.0-4steps.safetensors",
    "svdq-int4_r128-qwen-image-lightningv1.1-8steps.safetensors",
)
HARDWARE = {
    "cpu": "cpu",
    "a100": "sm80",
    "rtx-3090": "sm86",
    "rtx-4090": "sm89",
    "h100": "sm90",
    "h200": "sm90",
    "h200-x2": "sm90",
    "b200": "sm100",
    "rtx-5090": "sm120",
    "rtx-5090-x4": "sm120",
    "ascend-910b": "910b",
    "mi300x": "gfx942",
}
CELLS = [cell for cell in TABLES.cells if cell.claim != "planned"]
WRITTEN = [cell for cell in CELLS if cell.family in families.written()]
CHOSEN = [cell for cell in WRITTEN if cell.backend]


def named(cells: list[Cell]) -> list[object]:
    return [pytest.param(cell, id=cell.id) for cell in cells]


def proves(cell: Cell) -> bool:
    """Whether the row runs on the CPU and asks for everything that the harness can check."""
    return cell.hardware == "cpu" and {"load", "latents", "generate"} <= set(cell.checks)


@pytest.mark.parametrize("row", GUIDE)
def test_every_example_of_the_guide_is_a_row(row: str) -> None:
    claimed = [cell for cell in TABLES.cells if cell.row == row]
    assert {cell.claim for cell in claimed} == {"validated"}
    portable = [cell for cell in TABLES.cells if cell.row == f"{row}-cpu"]
    assert all(proves(cell) for cell in portable)
    assert portable
    for cell in (*claimed, *portable):
        assert shlex.split(cell.shell(TABLES)) == shlex.split(GUIDE[row])


def test_no_other_row_calls_itself_the_guide() -> None:
    rows = {cell.row for cell in TABLES.cells if cell.row.startswith("guide-")}
    assert rows == {*GUIDE, *(f"{row}-cpu" for row in GUIDE)}


def test_the_six_validated_checkpoints() -> None:
    rows = {row.reference: row for row in TABLES.checkpoints.values() if row.algo}
    assert set(rows) == set(VALIDATED)
    for reference, (algo, model, flag) in VALIDATED.items():
        row = rows[reference]
        assert (row.algo, row.model, row.cli) == (algo, model, f"--{flag}-path")
        assert row.selector == row.cli
        assert row.base == TABLES.models[model].repo
        assert row.components == ("transformer",)
        assert row.scope
        assert row.notes


def test_every_nunchaku_file_name_of_the_guide() -> None:
    found = {row.reference.rpartition("/")[2]: row for row in TABLES.checkpoints.values()}
    for name in NUNCHAKU_FILES:
        row = found[name]
        precision, _, rank = row.scheme.partition("_")
        assert f"svdq-{precision.replace('nv', '')}_{rank}-" in name
        cells = [cell for cell in TABLES.cells if cell.checkpoint == row.id]
        assert any(proves(cell) for cell in cells)
        if (
            steps := name.partition("-lightning")[2]
            .partition("-")[2]
            .removesuffix("steps.safetensors")
        ):
            pairs = [" ".join(cell.flags) for cell in cells]
            assert set(pairs) == {f"--num-inference-steps {steps}"}


def test_msmodelslim_methods() -> None:
    every = [row for row in TABLES.checkpoints.values() if row.family == "msmodelslim"]
    rows = [row for row in every if row.model == "wan-2-2"]
    claims = {
        row.scheme: {c.claim for c in TABLES.cells if c.checkpoint == row.id} - {"refused"}
        for row in rows
    }
    mx = {"W8A8_MXFP8", "W4A4_MXFP4", "W4A4_MXFP4_DUALSCALE"}
    assert set(claims) == {"W8A8", "W8A8_DYNAMIC", "W4A4_DYNAMIC", *mx}
    assert {name: claims.pop(name) for name in mx} == {
        "W8A8_MXFP8": {"expected"},
        "W4A4_MXFP4": {"expected"},
        "W4A4_MXFP4_DUALSCALE": {"expected"},
    }
    assert all("validated" in found for found in claims.values())
    stored = [row for row in rows if row.form != "online"]
    assert {row.components for row in stored} == {("transformer", "transformer_2")}
    others = {(row.model, row.scheme): row.components for row in every if row not in rows}
    for scheme in ("W8A8", "W4A4_DYNAMIC"):
        assert others.pop(("wan-2-2-i2v", scheme)) == ("transformer", "transformer_2")
        assert others.pop(("wan-2-2-ti2v", scheme)) == ("transformer",)
    assert others == {}


def test_hardware() -> None:
    assert {row.id: row.arch for row in TABLES.hardware.values()} == HARDWARE
    assert TABLES.hardware["b200"].job == "multimodal-gen-test-1-b200"
    assert TABLES.groups["hopper"] == ("h100", "h200")
    assert set(TABLES.groups["all"]) == set(HARDWARE)
    jobs = [row.job for row in TABLES.hardware.values()]
    assert len(set(jobs)) == len(jobs)


def test_four_cards_of_the_guides_benchmark_have_a_cell() -> None:
    row = TABLES.hardware["rtx-5090-x4"]
    assert (row.devices, row.memory_gib) == (4, TABLES.hardware["rtx-5090"].memory_gib)
    [cell] = TABLES.select(hardware=["rtx-5090-x4"])
    assert "4x RTX 5090 benchmark" in TABLES.checkpoints[cell.checkpoint].scope
    request = Request.from_words(cell.command(TABLES)[2:])
    assert (request.nproc_per_node, cell.claim) == (4, "validated")
    assert {row.devices for row in TABLES.hardware.values()} == {1, 2, 4}


def test_fp8_covers_every_model_form_and_scheme_on_cpu() -> None:
    found = {
        (cell.model, TABLES.checkpoints[cell.checkpoint].form, cell.backend)
        for cell in TABLES.select(family=["fp8"], hardware=["cpu"])
        if proves(cell)
    }
    schemes = {
        (cell.model, TABLES.checkpoints[cell.checkpoint].scheme)
        for cell in TABLES.select(family=["fp8"], hardware=["cpu"])
    }
    words = ("tensor-dynamic", "tensor-static", "channel-dynamic", "block-dynamic")
    for model in models.IDS:
        for backend in ("reference", "decode"):
            for form in ("component-folder", "single-file", "sharded", "online"):
                assert (model, form, backend) in found
        assert {(model, word) for word in words} <= schemes


@pytest.mark.parametrize("model", models.IDS)
def test_modelopt_fp8_covers_every_model_on_cpu(model: str) -> None:
    cells = [c for c in TABLES.select(family=["modelopt-fp8"], model=[model]) if proves(c)]
    assert {"reference", "decode"} <= {cell.backend for cell in cells}
    assert any("--dit-layerwise-offload" in cell.flags for cell in cells)


def test_every_family_says_what_is_refused_and_what_works_instead() -> None:
    for family in families.IDS:
        refused = TABLES.select(family=[family], claim=["refused"])
        assert refused
        for cell in refused:
            works = TABLES.select(family=[family], hardware=["cpu"], claim=["expected"])
            assert any(cell.model == other.model for other in works)


@pytest.mark.parametrize(("package", "ids"), [("families", families.IDS), ("models", models.IDS)])
def test_ids_of_rows_are_those_of_the_modules(package: str, ids: tuple[str, ...]) -> None:
    """What the lint reads from the folder is what the code imports, and what the tables hold."""
    found = list_modules(PACKAGE / package)
    assert set(found) == set(ids) == set(getattr(TABLES, package)) - set(further.IDS)
    for name, module in found.items():
        assert (PACKAGE / module).exists()
        assert Path(module).stem == name.replace("-", "_")
    assert set(families.written()) == set(families.IDS)


@pytest.mark.parametrize("model", models.IDS)
def test_models_agree_with_their_modules(model: str) -> None:
    row, module = TABLES.models[model], models.load(model)
    assert (row.name, row.repo, row.transformers) == (module.NAME, module.REPO, module.COMPONENTS)


def test_sets_of_kept_layers_are_the_models() -> None:
    for row in TABLES.checkpoints.values():
        assert not row.kept or row.kept in models.load(row.model).FALLBACKS, row.id


@pytest.mark.parametrize("claim", named(CELLS))
def test_commands_are_understood(claim: Cell) -> None:
    request = Request.from_words(claim.command(TABLES)[2:])
    row = TABLES.checkpoints[claim.checkpoint]
    given = (
        request.model_path,
        request.quantization,
        *request.component_paths.values(),
        *request.weights_paths.values(),
    )
    assert row.reference in given
    assert request.backend == (claim.backend or None)


@pytest.mark.parametrize("family", families.written())
def test_schemes_are_the_families(family: str) -> None:
    module = families.load(family)
    for cell in CELLS:
        if cell.family == family:
            assert TABLES.checkpoints[cell.checkpoint].scheme in module.SCHEMES, cell.checkpoint


@pytest.mark.parametrize("claim", named(CHOSEN))
def test_claims_agree_with_what_kernels_need(claim: Cell) -> None:
    """A backend that a row names takes the row's layers, or refuses them by the row's rule."""
    from quantmatrix import kernels
    from quantmatrix.tables import identify

    row = TABLES.checkpoints[claim.checkpoint]
    scheme = families.load(claim.family).SCHEMES[row.scheme]
    machine = identify.from_row(TABLES.hardware[claim.hardware])
    shape = (256, 256)
    if claim.claim == "refused":
        with pytest.raises(kernels.NoKernel) as caught:
            kernels.choose(scheme.op, machine, scheme, shape, claim.backend)
        assert caught.value.rule == claim.rule
    else:
        assert kernels.choose(scheme.op, machine, scheme, shape, claim.backend).op == scheme.op
