"""Witness: decoded layers beside the base model's own, for every family, reading and way out."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quantmatrix import families, kernels, models
from quantmatrix.api import load_transformer, plan
from quantmatrix.checkpoints import row_reader
from quantmatrix.checkpoints.opening import open_weights
from quantmatrix.cli import main
from quantmatrix.errors import CheckpointError, UsageError, WitnessError
from quantmatrix.families import modelopt_nvfp4
from quantmatrix.families.protocol import Calibration
from quantmatrix.kernels.number_formats import swap_nibbles
from quantmatrix.kernels.scale_layouts import tile_scales, untile_scales
from quantmatrix.measure.workbench import Workbench
from quantmatrix.proof import witness_limits
from quantmatrix.request import Hub, Request
from quantmatrix.runtime.plan.types import ComponentPlan, Plan
from quantmatrix.runtime.witness import measure, verdict
from quantmatrix.runtime.witness.base import find_declared
from quantmatrix.scheme import Scheme
from quantmatrix.suites.test_load import examine_beside
from quantmatrix.tables import read
from quantmatrix.tables.rows import Cell
from quantmatrix.tiny import hub
from quantmatrix.tools.dequantize import dequantize, plan_decode

BASES = {
    "flux-1": "black-forest-labs/FLUX.1-dev",
    "flux-2": "black-forest-labs/FLUX.2-dev",
    "wan-2-2": "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
}
RAW = "black-forest-labs/FLUX.2-dev-NVFP4"
WEIGHTS = "diffusion_pytorch_model.safetensors"
WAN_FP8 = "BBuf/wan22-t2v-a14b-modelopt-fp8-sglang-transformer"
LAYOUTS = list(itertools.product(("low", "high"), ("rows", "tiles")))


def find(reference: str) -> Path:
    folder = hub.default_folder()
    hub.ensure(reference, folder)
    return hub.find_snapshot(reference, folder)


def list_cells() -> Iterator[Cell]:
    """A cpu cell per family, model and scheme."""
    tables = read.read()
    seen = set()
    for cell in tables.cells:
        row = tables.checkpoints[cell.checkpoint]
        key = (row.family, row.model, row.scheme)
        judged = cell.hardware == "cpu" and row.form != "online" and cell.claim != "planned"
        if judged and key not in seen:
            seen.add(key)
            yield cell


@pytest.fixture(scope="module")
def bench() -> Workbench:
    return Workbench(read.read())


@pytest.mark.parametrize("one", list(list_cells()), ids=lambda cell: cell.row)
def test_every_stand_in_agrees_with_its_base_and_leaves_room(one: Cell, bench: Workbench) -> None:
    request = bench.request(one)
    planned, row = bench.plan(request), bench.tables.checkpoints[one.checkpoint]
    reports = verdict.examine_plan(planned)
    assert {report.component for report in reports} == set(row.components)
    job: Any = SimpleNamespace(
        cell=one, request=request, plan=planned, quantized=planned.components
    )
    for report in reports:
        if planned.components[report.component].base.reference != row.base:
            report = examine_beside(bench, job, report.component, row.base)
        assert report.verdict == verdict.AGREES, report.problems
        assert not report.problems
        assert report.findings
        layers = {finding.sample.module for finding in report.findings}
        kinds = {measure.name_kind(p) for p in planned.components[report.component].pieces()}
        assert {finding.sample.kind for finding in report.findings} == kinds  # each was looked at
        assert layers <= set(planned.components[report.component].layers)
        for finding in report.findings:
            bounds = finding.bounds
            assert bounds is not None
            assert finding.likeness.cosine - bounds.cosine > 0.05  # room for a finetune
            assert bounds.cosine > 0.75
            assert finding.likeness.scale_error < bounds.scale_error / 2


# ---- readings of NVFP4 ----------------------------------------------------------------------


def relay(stored: dict[str, torch.Tensor], nibbles: str, scales: str) -> dict[str, torch.Tensor]:
    """The raw stand-in (high nibble, tiles) with its layers in another layout."""
    found = {}
    for name, tensor in stored.items():
        layer, _, leaf = name.rpartition(".")
        packed = stored.get(f"{layer}.weight")
        coded = f"{layer}.weight_scale_2" in stored
        if coded and leaf == "weight" and nibbles == "low":
            tensor = swap_nibbles(tensor)
        elif coded and leaf == "weight_scale" and scales == "rows":
            assert packed is not None
            tensor = untile_scales(tensor, packed.shape[0], packed.shape[1] // 8)
        found[name] = tensor.contiguous()
    return found


@pytest.fixture(scope="module")
def raw() -> dict[str, torch.Tensor]:
    return load_file(find(RAW) / "flux2-dev-nvfp4.safetensors")


def write(
    raw: dict[str, torch.Tensor], folder: Path, nibbles: str, scales: str, **metadata: str
) -> Path:
    path = folder / "weights.safetensors"
    save_file(relay(raw, nibbles, scales), path, metadata={"format": "pt", **metadata})
    return path


def ask(path: Path, base: Path | None = None, **fields: str) -> Request:
    base = base or find(BASES["flux-2"])
    return Request(str(base), weights_paths={"transformer": str(path)}, device="cpu", **fields)


def decide(request: Request) -> ComponentPlan:
    planned = plan(request)
    assert isinstance(planned, Plan)
    return planned.components["transformer"]


def read_layout(component: ComponentPlan) -> set[tuple[str, str]]:
    found = {(p.scheme.swap_nibbles, p.scheme.tiled_scales) for p in component.pieces()}
    return {("high" if swap else "low", "tiles" if tiled else "rows") for swap, tiled in found}


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FLUX.2's base model without the weights of its transformer."""
    folder = tmp_path_factory.mktemp("bare") / "base"
    shutil.copytree(find(BASES["flux-2"]), folder)
    (folder / "transformer" / WEIGHTS).unlink()
    return folder


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is in the user's cache of the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))


@pytest.mark.parametrize(("nibbles", "scales"), LAYOUTS)
def test_the_base_weights_decide_what_nothing_declares(
    raw: dict[str, torch.Tensor], tmp_path: Path, nibbles: str, scales: str
) -> None:
    path = write(raw, tmp_path, nibbles, scales)
    component = decide(ask(path))
    assert read_layout(component) == {(nibbles, scales)}
    assert "decided by the weights of" in component.layout
    assert component.to_json()["layout"] == component.layout
    model = load_transformer(
        str(find(BASES["flux-2"])), transformer_weights_path=str(path), backend="decode"
    )
    assert model.witness.verdict == verdict.AGREES


@pytest.mark.parametrize(("nibbles", "scales"), LAYOUTS)
def test_flags_choose_and_the_witness_confirms(
    raw: dict[str, torch.Tensor], tmp_path: Path, bare: Path, nibbles: str, scales: str
) -> None:
    path = write(raw, tmp_path, "low", "rows")
    flags = {"nibble_order": nibbles, "nvfp4_layout": scales}
    component = decide(ask(path, **flags))
    assert read_layout(component) == {(nibbles, scales)}
    assert f"--nvfp4-layout {scales}" in component.layout
    if (nibbles, scales) == ("low", "rows"):
        report = verdict.confirm(component, ask(path))
        assert report is not None
        assert report.verdict == verdict.AGREES
        return
    with pytest.raises(WitnessError, match=r"--nibble-order low --nvfp4-layout rows reads it"):
        verdict.confirm(component, ask(path))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({}, "The base model's weights are not at hand"),
        ({"nibble_order": "low"}, "The base model's weights are not at hand"),
        ({"witness": "off"}, "--witness off leaves it to you"),
        ({"witness": "require"}, "The base model's weights are not at hand"),
    ],
)
@pytest.mark.usefixtures("no_hub")
def test_a_guess_without_a_word_is_impossible(
    raw: dict[str, torch.Tensor], tmp_path: Path, bare: Path, words: dict[str, str], said: str
) -> None:
    """Without the base weights every way in refuses, naming each open reading and its flags."""
    path = write(raw, tmp_path, "high", "tiles")
    request = ask(path, bare, **words)
    ways: list[Callable[[], object]] = [
        lambda: plan(request),
        lambda: dequantize(request, str(tmp_path / "plain")),
        lambda: load_transformer(str(bare), transformer_weights_path=str(path), **words),
    ]
    for way in ways:
        with pytest.raises(
            (WitnessError, CheckpointError), match="layout of its NVFP4 codes is unknown"
        ) as caught:
            way()
        if words.get("witness") != "require":
            assert said in str(caught.value)
        for nibbles, scales in LAYOUTS:
            flags = f"--nibble-order {nibbles} --nvfp4-layout {scales}"
            assert (flags in str(caught.value)) == (words.get("nibble_order", nibbles) == nibbles)
    assert not (tmp_path / "plain").exists()


@pytest.mark.usefixtures("no_hub")
def test_flags_alone_are_enough(raw: dict[str, torch.Tensor], tmp_path: Path, bare: Path) -> None:
    path = write(raw, tmp_path, "low", "tiles")
    chosen = ask(path, bare, nibble_order="low", nvfp4_layout="tiles")
    dequantize(chosen, str(tmp_path / "one"))
    dequantize(ask(path), str(tmp_path / "other"))
    one, other = (load_file(tmp_path / name / WEIGHTS) for name in ("one", "other"))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_two_readings_that_agree_are_refused(tmp_path: Path) -> None:
    """Where all block scales are one, rows and tiles are the same."""
    base = find(BASES["flux-2"])
    weights = load_file(base / "transformer" / WEIGHTS)
    name = "transformer_blocks.0.attn.to_q"
    signs = weights[f"{name}.weight"].float().sign() * 3
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    save_file({**weights, f"{name}.weight": signs.bfloat16()}, folder / "transformer" / WEIGHTS)
    quantized = modelopt_nvfp4.quantize(signs, replace(modelopt_nvfp4.NVFP4, activation="none"))
    stored = {k: v for k, v in weights.items() if k != f"{name}.weight"}
    stored |= {f"{name}.{suffix}": tensor for suffix, tensor in quantized.items()}
    stored[f"{name}.input_scale"] = torch.ones(())
    save_file(stored, tmp_path / "weights.safetensors")
    with pytest.raises(WitnessError, match="more than one reading agrees"):
        plan(ask(tmp_path / "weights.safetensors", folder))


def test_no_reading_agrees_with_another_model(raw: dict[str, torch.Tensor], tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    for name, tensor in raw.items():
        if tensor.dtype == torch.uint8:
            noise = torch.randint(0, 256, tensor.shape, dtype=torch.uint8, generator=generator)
            raw = {**raw, name: noise}
    path = write(raw, tmp_path, "high", "tiles")
    with pytest.raises(WitnessError, match=r"no reading agrees .*cosine"):
        plan(ask(path))


def test_a_declaration_that_is_wrong_is_refused_with_the_reading_that_agrees(
    raw: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = write(raw, tmp_path, "high", "tiles", quantization="nvfp4")
    with pytest.raises(WitnessError, match="--nibble-order high --nvfp4-layout tiles reads it"):
        load_transformer(str(find(BASES["flux-2"])), transformer_weights_path=str(path))
    flags = {"nibble_order": "high", "nvfp4_layout": "tiles"}
    planned = plan(ask(path, **flags))
    assert isinstance(planned, Plan)
    assert any("although the file declares" in text for text in planned.warnings)


def test_a_layout_known_by_name_alone_is_told(
    raw: dict[str, torch.Tensor], tmp_path: Path, bare: Path, no_hub: None
) -> None:
    path = tmp_path / "flux2-dev-nvfp4.safetensors"
    save_file(raw, path)
    planned = plan(ask(path, bare))
    assert isinstance(planned, Plan)
    assert any("taken from a name" in text for text in planned.warnings)
    confirmed = plan(ask(path))
    assert isinstance(confirmed, Plan)
    assert not [text for text in confirmed.warnings if "taken from a name" in text]


# ---- modes ----------------------------------------------------------------------------------


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """Wan2.2's FP8 expert with a scale that is twice what it should be."""
    folder = tmp_path / "quantized"
    shutil.copytree(find(WAN_FP8), folder)
    tensors = load_file(folder / WEIGHTS)
    tensors["blocks.1.ffn.net.2.weight_scale"] *= 2
    save_file(tensors, folder / WEIGHTS)
    return folder


def test_a_wrong_scale_is_refused_and_off_lets_it_pass(broken: Path) -> None:
    base = str(find(BASES["wan-2-2"]))
    with pytest.raises(WitnessError, match=r"blocks\.1\.ffn\.net\.2 decodes.* 2 times as long"):
        load_transformer(base, transformer_path=str(broken))
    model = load_transformer(base, transformer_path=str(broken), witness="off")
    assert model.witness is None
    with pytest.raises(WitnessError, match="1 of 20 layers disagree"):
        dequantize(wan(broken), str(broken / "plain"))
    assert not (broken / "plain").exists()


def test_the_other_expert_is_named() -> None:
    base = str(find(BASES["wan-2-2"]))
    fields = {"component": "transformer_2", "transformer_path": str(find(WAN_FP8))}
    with pytest.raises(WitnessError, match=r"agrees with transformer of .*other expert"):
        load_transformer(base, **fields)


def test_weights_of_another_finetune_pass(tmp_path: Path) -> None:
    """A cosine of 0.93 between the models is a long finetune; another seed is another model."""
    base = find(BASES["wan-2-2"])
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    tensors = load_file(base / "transformer" / WEIGHTS)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            noise = torch.randn(tensor.shape, generator=generator) * tensor.float().std()
            tensors[name] = (tensor.float() + 0.4 * noise).to(tensor.dtype)
    save_file(tensors, folder / "transformer" / WEIGHTS)
    for reference in (WAN_FP8, WAN_FP8.replace("fp8", "nvfp4")):
        request = wan(find(reference), folder)
        [report] = verdict.examine_plan(as_plan(request))
        assert report.verdict == verdict.AGREES, report.problems
        assert min(finding.likeness.cosine for finding in report.findings) < 0.95


def wan(folder: Path, base: Path | None = None, **fields: str) -> Request:
    """Wan2.2 with its first expert from a folder."""
    base = base or find(BASES["wan-2-2"])
    return Request(str(base), component_paths={"transformer": str(folder)}, device="cpu", **fields)


def as_plan(request: Request) -> Plan:
    planned = plan(request)
    assert isinstance(planned, Plan)
    return planned


@pytest.mark.usefixtures("no_hub")
def test_require_asks_for_the_base_weights(tmp_path: Path) -> None:
    bare = tmp_path / "base"
    shutil.copytree(find(BASES["wan-2-2"]), bare)
    (bare / "transformer" / WEIGHTS).unlink()
    fields = {"transformer_path": str(find(WAN_FP8))}
    with pytest.raises(CheckpointError, match="--witness require, but the weights of the base"):
        plan(wan(find(WAN_FP8), bare, witness="require"))
    model = load_transformer(str(bare), **fields)
    assert model.witness.verdict == "no base weights"
    assert model.witness.to_json()["missing"]
    with pytest.raises(UsageError, match="--witness maybe: expected auto, require, off"):
        Request(str(bare), witness="maybe")


def test_a_flag_without_nvfp4_codes_is_told() -> None:
    request = wan(find(WAN_FP8), nibble_order="low")
    assert any("--nibble-order low is not used" in text for text in as_plan(request).warnings)


@pytest.fixture(scope="module")
def whole(bench: Workbench) -> Plan:
    """A whole quantized pipeline, which names no base model in full precision."""
    cell = next(c for c in bench.tables.cells if c.row == "msmodelslim-w8a8-dynamic")
    planned = bench.plan(bench.request(cell))
    assert isinstance(planned, Plan)
    return planned


def beside_another(planned: Plan, folder: Path, *, certain: bool) -> ComponentPlan:
    """The plan's transformer beside a base model none of whose layers is like its own."""
    part = planned.components["transformer"]
    weights = part.base.weights["transformer"]
    plain = load_file(weights.files[0])
    noise = {name: torch.randn(tensor.shape).bfloat16() for name, tensor in plain.items()}
    save_file(noise, folder / "other.safetensors")
    headers = {n: replace(h, file=str(folder / "other.safetensors"))
               for n, h in weights.tensors.items()}  # fmt: skip
    foreign = {"transformer": replace(weights, tensors=headers)}
    return replace(part, base=replace(part.base, weights=foreign, certain=certain))


def test_a_base_model_that_is_a_guess_only_warns(tmp_path: Path, whole: Plan) -> None:
    """A whole quantized pipeline may be of another finetune than the model's own repository."""
    assert not whole.components["transformer"].base.certain
    other = beside_another(whole, tmp_path, certain=False)
    with pytest.warns(UserWarning, match=r"is a guess: .*--witness require makes it an error"):
        report = verdict.confirm(other, whole.request)
    assert report is not None
    assert report.verdict == verdict.DISAGREES
    with pytest.raises(WitnessError, match="decodes to other weights"):
        verdict.confirm(other, replace(whole.request, witness="require"))


def test_a_base_model_that_is_certain_is_an_error(tmp_path: Path, whole: Plan) -> None:
    other = beside_another(whole, tmp_path, certain=True)
    with pytest.raises(WitnessError, match="decodes to other weights") as caught:
        verdict.confirm(other, whole.request)
    assert "guess" not in str(caught.value)


@pytest.mark.parametrize(
    ("stated", "certain"),
    [
        ("black-forest-labs/FLUX.1-dev", True),
        ("/root/hub/models--black-forest-labs--FLUX.1-dev/snapshots/1a2b/transformer", True),
        ("somebody/finetune-that-is-not-here", False),
        ("/data/FLUX.1-dev", False),
    ],
)
def test_the_base_model_that_a_config_names_is_certain(
    tmp_path: Path, whole: Plan, stated: str, certain: bool
) -> None:
    part = whole.components["transformer"]
    repository = models.load(part.model).REPO
    stated = stated.replace("black-forest-labs--FLUX.1-dev", repository.replace("/", "--"))
    stated = stated.replace("black-forest-labs/FLUX.1-dev", repository)
    folder = tmp_path / "whole"
    shutil.copytree(Path(part.checkpoint.files[0]).parents[1], folder)
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "_name_or_path": stated}))
    found = as_plan(replace(whole.request, model_path=str(folder))).components["transformer"].base
    assert (found.reference, found.certain) == (repository, certain)


@pytest.mark.parametrize(
    ("stated", "declared"),
    [
        ("org/name", "org/name"),
        (r"C:\hub\models--org--a.b-c\snapshots\1", "org/a.b-c"),
        ("models--org--name", "org/name"),
        ("../name", ""),
        ("/etc/passwd", ""),
        ("org/name/transformer", ""),
        ("name", ""),
        ("", ""),
        (None, ""),
        (["org/name"], ""),
    ],
)
def test_only_the_name_of_a_repository_declares_a_base_model(
    whole: Plan, stated: object, declared: str
) -> None:
    checkpoint = replace(
        whole.components["transformer"].checkpoint, config={"_name_or_path": stated}
    )
    assert find_declared(checkpoint) == declared


def test_a_folder_that_a_config_names_is_not_a_repository(
    tmp_path: Path, whole: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    part = whole.components["transformer"].checkpoint
    assert find_declared(replace(part, config={"_name_or_path": "org/name"})) == ""


# ---- what is read ---------------------------------------------------------------------------


def test_rows_are_spread_and_aligned() -> None:
    scheme = Scheme("linear.fp8", "", "e4m3", "block", "none", block=(96, 128))
    made = plan_decode(wan(find(WAN_FP8)), "transformer")
    piece = replace(next(made.pieces()), out_features=9216, in_features=4096, scheme=scheme)
    runs = [measure.choose_rows(piece, place) for place in range(3)]
    assert all(start % 96 == start % 128 == 0 for start, _ in runs)
    assert runs[0][0] == 0
    assert runs[0][1] <= runs[1][0] < runs[1][1] <= runs[2][0] < runs[2][1] <= 9216
    small = replace(piece, out_features=100, in_features=64)
    assert measure.choose_rows(small, 2) == (0, 100)


def test_likeness_of_known_numbers() -> None:
    scheme = Scheme("linear.fp8", "", "e4m3", "channel", "none")
    base = torch.tensor([[3.0, 4.0], [0.0, 5.0]])
    same = measure.measure_likeness(base, base, scheme)
    assert (same.relative_l2, same.gain, same.scale_error) == (0, 1, 0)
    assert same.cosine == pytest.approx(1)
    double = measure.measure_likeness(base * 2, base, scheme)
    assert double.cosine == pytest.approx(1)
    assert (double.gain, double.relative_l2) == (2, 1)
    assert double.scale_error == pytest.approx(0, abs=1e-6)
    rows = measure.measure_likeness(base * torch.tensor([[2.0], [1.0]]), base, scheme)
    expected = torch.tensor([2, 1]) / 5**0.5 - torch.tensor([1, 1]) / 2**0.5
    assert rows.scale_error == pytest.approx(float(expected.norm()), rel=1e-5)
    branch = measure.measure_likeness(base, base, scheme, base * 0.1)
    assert branch.coded_cosine == pytest.approx(1)
    lost = measure.measure_likeness(base * float("nan"), base, scheme)
    assert lost.cosine == 0
    assert lost.scale_error == float("inf")
    zero = torch.zeros(2, 2)
    assert measure.measure_likeness(zero, zero, scheme).cosine == 1


def test_bounds_follow_from_the_sample() -> None:
    samples = witness_limits.read()
    nvfp4 = witness_limits.find(samples, modelopt_nvfp4.NVFP4, "flux-2")
    assert nvfp4 is not None
    assert 0.85 < nvfp4.cosine < 0.9
    assert nvfp4.scale_error < 0.3
    borrowed = witness_limits.find(samples, modelopt_nvfp4.NVFP4, "no-such-model")
    assert borrowed is not None
    assert "borrowed from" in borrowed.source
    unknown = replace(modelopt_nvfp4.NVFP4, weight="int3")
    assert witness_limits.find(samples, unknown, "flux-2") is None


def test_a_storage_that_nobody_measured_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(witness_limits, "read", lambda: ())
    [report] = verdict.examine_plan(as_plan(wan(find(WAN_FP8))))
    assert report.verdict == verdict.UNJUDGED


# ---- the command ----------------------------------------------------------------------------


def test_inspect_against_prints_every_open_reading(
    raw: dict[str, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(raw, tmp_path, "low", "rows")
    words = ["inspect", str(path), "--against", str(find(BASES["flux-2"]))]
    assert main.main([*words, "--json"]) == 0
    part = json.loads(capsys.readouterr().out)["components"]["transformer"]
    assert part["verdict"] == "agrees"
    readings = {layer["reading"]: layer["verdict"] for layer in part["layers"]}
    assert readings == {
        "even column in the low nibble, block scales in rows": "agrees",
        "even column in the low nibble, block scales in 128 x 4 tiles": "disagrees",
        "even column in the high nibble, block scales in rows": "disagrees",
        "even column in the high nibble, block scales in 128 x 4 tiles": "disagrees",
    }
    assert main.main(words) == 0
    out = capsys.readouterr().out
    assert "cosine" in out
    assert "disagrees" in out
    assert main.main(["inspect", str(path), "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)["components"]["transformer"]
    [layout] = alone["layouts"]
    assert layout.startswith("unknown: nothing in")


def test_inspect_against_another_model_fails(
    broken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["inspect", str(broken), "--against", str(find(BASES["wan-2-2"]))]
    assert main.main(words) == 1
    assert "2 times as long" in capsys.readouterr().err
    assert main.main([*words, "--component", "transformer_2"]) == 1
    assert "agrees with transformer" in capsys.readouterr().err
    assert main.main(["inspect", str(broken), "--against", str(broken)]) == 1
    assert "is the checkpoint itself" in capsys.readouterr().err


def test_a_run_tells_what_its_witness_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", "--tiny", "--model-path", BASES["flux-1"], "--transformer-path"]
    words += ["BBuf/flux1-dev-modelopt-fp8-sglang-transformer", "--num-inference-steps", "1"]
    assert main.main([*words, "--device", "cpu", "--no-save-output", "--json"]) == 0
    [run] = json.loads(capsys.readouterr().out)["runs"]
    found = run["witness"]["transformer"]
    assert found["verdict"] == "agrees"
    assert all(kind["cosine"] > 0.99 for kind in found["kinds"])


def test_tiles_of_the_oracle_are_those_of_the_stand_in(raw: dict[str, torch.Tensor]) -> None:
    """The files of these tests are right only if un-tiling them and tiling again changes nothing."""
    name = next(n for n in raw if n.endswith("qkv.weight_scale"))
    rows, half = raw[name.replace("_scale", "")].shape
    assert torch.equal(
        tile_scales(untile_scales(raw[name], rows, half // 8)).view(torch.uint8),
        raw[name].view(torch.uint8),
    )
    with safe_open(find(RAW) / "flux2-dev-nvfp4.safetensors", framework="pt") as stream:
        assert "_quantization_metadata" not in stream.metadata()


# ---- rows of a layer on disk ------------------------------------------------------------------


@pytest.mark.parametrize("rows", [slice(3, 9), torch.tensor([5, 6, 7, 2, 9, 0, 1])])
def test_rows_are_read_by_their_place(rows: slice | torch.Tensor, tmp_path: Path) -> None:
    weights = {"a": torch.randn(4, 3), "b": torch.randn(10, 7).bfloat16(), "c": torch.ones(2)}
    save_file(weights, tmp_path / "weights.safetensors", metadata={"format": "pt"})
    checkpoint = open_weights(str(tmp_path / "weights.safetensors"), Hub())
    with row_reader.RowReader(checkpoint) as reader:
        assert torch.equal(reader.read("b", rows), weights["b"][rows])
    assert row_reader.find_runs(torch.tensor([5, 6, 7, 2, 0, 1])) == [(5, 8), (2, 3), (0, 2)]
    with (
        (tmp_path / "weights.safetensors").open("rb") as stream,
        pytest.raises(OSError, match="ends"),
    ):
        row_reader.read_exactly(stream.fileno(), 0, 10**6)


def list_schemes() -> Iterator[tuple[str, Scheme]]:
    """Every scheme of every family, NVFP4's in the raw layout, too."""
    for family in families.IDS:
        for scheme in families.load(family).SCHEMES.values():
            yield family, scheme
            if scheme.op == "linear.nvfp4":
                yield family, replace(scheme, swap_nibbles=True, tiled_scales=True)


@pytest.mark.parametrize(("start", "stop"), [(0, 128), (128, 384), (256, 384)])
@pytest.mark.parametrize(("family", "scheme"), list(list_schemes()))
def test_cut_rows_decode_to_those_rows(family: str, scheme: Scheme, start: int, stop: int) -> None:
    module = families.load(family)
    weight, high = (
        torch.randn(384, 256, generator=torch.Generator().manual_seed(2)),
        torch.ones(256),
    )
    bias = torch.arange(384.0)
    stored = module.quantize(weight, scheme, bias=bias, calibration=Calibration(-high, high * 2))
    cut = module.canonical(module.cut_rows(stored, scheme, start, stop), scheme)
    whole, plain = kernels.decode(scheme, module.canonical(stored, scheme))
    decoded, part = kernels.decode(scheme, cut)
    assert torch.equal(decoded, whole[start:stop])
    assert plain is not None
    assert part is not None
    assert torch.equal(part, plain[start:stop])


def test_rows_that_no_tile_begins_with_are_cut_out_of_whole_tiles() -> None:
    made = plan_decode(wan(find(WAN_FP8)), "transformer")
    piece = replace(next(made.pieces()), out_features=200, in_features=2048)
    piece = replace(piece, target=replace(piece.target, rows=(1, 2, 3)))
    start, stop = measure.choose_rows(piece, 1)
    assert 200 <= start < stop <= 400
    first, end = measure.find_cut(piece, start, stop)
    assert first % 128 == 0
    assert first <= start < stop <= end <= 600


@pytest.mark.parametrize(
    ("count", "chosen"), [(2, [0, 9]), (3, [0, 4, 9]), (4, [0, 3, 6, 9]), (10, [*range(10)])]
)
def test_the_first_and_the_last_layer_are_looked_at(count: int, chosen: list[int]) -> None:
    items: Any = list(range(10))
    assert measure.spread(items, count) == chosen
    assert measure.spread(items[:1], count) == [0]


@pytest.mark.parametrize("above", [0, 10])
def test_runs_of_rows_reach_from_the_first_to_the_last(above: int) -> None:
    """Of a layer that is a part of what lies on disk, `above` parts of ten tiles below its start."""
    tile, ten = measure.TILE, 10 * measure.TILE
    rows = (above * tile, above * tile + ten, 1)
    piece: Any = SimpleNamespace(
        scheme=SimpleNamespace(block=(0, 0)),
        in_features=measure.ELEMENTS // tile,
        out_features=ten,
        target=SimpleNamespace(rows=rows),
    )
    last = measure.LAYERS - 1
    assert measure.choose_rows(piece, 0) == (rows[0], rows[0] + tile)
    assert measure.choose_rows(piece, last) == (rows[1] - tile, rows[1])
    piece.in_features //= 20
    assert measure.choose_rows(piece, last) == rows[:2]


def test_numbers_and_limits_of_a_finding_are_told_to_six_digits() -> None:
    piece: Any = SimpleNamespace(
        layer="a.q", scheme=Scheme("linear.fp8", "", "e4m3", "tensor", "none")
    )
    found = verdict.Finding(
        measure.Sample("a.to_q", piece, "kind", 128, 256, 0),
        measure.Likeness(0.98765432, 0.87654321, 0.12345678, 1.00000049, 0.0123456789, 77),
        witness_limits.Bounds(0.912345678, 0.0765432199, "samples"),
    ).to_json()
    limits = found.pop("limits")
    assert found == {
        "layer": "a.q", "module": "a.to_q", "rows": [128, 256], "reading": "e4m3 per tensor",
        "cosine": 0.987654, "coded_cosine": 0.876543, "relative_l2": 0.123457, "gain": 1.0,
        "scale_error": 0.012346, "verdict": "agrees",
    }  # fmt: skip
    assert limits["cosine"] == {"at_least": 0.912346}
    assert limits["scale_error"] == {"at_most": 0.076543}
    assert limits["relative_l2"]["at_most"] == round(limits["relative_l2"]["at_most"], 6) > 0
    assert limits["source"] == "samples"
