"""The tiny hub: offline, the same bytes every time, and weights that show quantization error."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from quantmatrix import models
from quantmatrix.api import load_transformer
from quantmatrix.errors import CheckpointError
from quantmatrix.families.protocol import Calibration
from quantmatrix.request import Request
from quantmatrix.runtime.library_logs import quiet
from quantmatrix.runtime.load import count_quantized
from quantmatrix.tables.read import read
from quantmatrix.tables.rows import CheckpointRow, Matrix
from quantmatrix.tiny import checkpoints, hub, pipelines, weights

PROMPTS = ("a curious pikachu", "a fox walking through neon rain")
WEIGHTS = "diffusion_pytorch_model.safetensors"
RAW = "black-forest-labs/FLUX.2-dev-NVFP4"


@pytest.fixture(scope="module")
def tables() -> Matrix:
    return read()


@pytest.fixture(scope="module")
def folder() -> Path:
    """The user's own, whose name changes with the code: what other tests made is not made again."""
    return hub.default_folder()


def find(reference: str, folder: Path, tables: Matrix) -> Path:
    hub.ensure(reference, folder, tables)
    return hub.find_snapshot(hub.repository_of(reference), folder)


def open_pipeline(model: str, folder: Path, dtype: torch.dtype) -> Any:
    """By hub id, as users do, and without a network."""
    import diffusers

    with quiet():
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            models.load(model).REPO, cache_dir=folder, local_files_only=True, dtype=dtype
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: Any, model: str, prompt: str = PROMPTS[0]) -> torch.Tensor:
    """Final latents."""
    seen = []

    def keep(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(tensors["latents"].float().clone())
        return tensors

    arguments = models.load(model).call_arguments(Request(model_path="x", tiny=True))
    noise = torch.Generator("cpu").manual_seed(0)
    with torch.inference_mode():
        pipeline(
            prompt=prompt,
            generator=noise,
            callback_on_step_end=keep,
            output_type="latent",
            **arguments,
        )
    return seen[-1]


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.cosine_similarity(a.flatten(), b.flatten(), 0).item()


def psnr(found: torch.Tensor, expected: torch.Tensor) -> float:
    peak = expected.max() - expected.min()
    return float(20 * torch.log10(peak / (found - expected).pow(2).mean().sqrt()))


def block_layers(pipeline: Any, model: str) -> Iterator[torch.nn.Linear]:
    """What quantizers take: linear layers of the blocks, modulation left out."""
    module = models.load(model)
    for component in module.COMPONENTS:
        for name, layer in getattr(pipeline, component).named_modules():
            outside = name.split(".")[0] not in module.BLOCKS
            modulation = any(word in name for word in ("norm", "mod", "adaLN"))
            if isinstance(layer, torch.nn.Linear) and not outside and not modulation:
                yield layer


def code_int4(weight: torch.Tensor) -> torch.Tensor:
    groups = weight.unflatten(1, (-1, 64))
    scale = groups.abs().amax(-1, keepdim=True) / 7
    return ((groups / scale).round() * scale).flatten(1)


def code_fp8(weight: torch.Tensor) -> torch.Tensor:
    scale = weight.abs().max() / 448
    return (weight / scale).to(torch.float8_e4m3fn).float() * scale


@pytest.mark.parametrize("model", models.IDS)
def test_blocks_prompts_and_number_formats_show_in_the_latents(
    model: str, folder: Path, tables: Matrix
) -> None:
    hub.ensure(models.load(model).REPO, folder, tables)
    pipeline = open_pipeline(model, folder, torch.float32)
    calls = dict.fromkeys(models.load(model).COMPONENTS, 0)

    def count(name: str) -> Any:
        return lambda *_: calls.update({name: calls[name] + 1})

    for name in calls:
        getattr(pipeline, name).register_forward_hook(count(name))
    expected = draw(pipeline, model)
    assert all(calls.values()), "an expert was not used"
    assert 0.5 < expected.std() < 4
    assert cosine(draw(pipeline, model, PROMPTS[1]), expected) < 0.998
    assert psnr(draw(open_pipeline(model, folder, torch.bfloat16), model), expected) > 45

    layers = list(block_layers(pipeline, model))
    stored = [layer.weight.data.clone() for layer in layers]
    runs = {}
    for name, code in (("none", torch.zeros_like), ("fp8", code_fp8), ("int4", code_int4)):
        for layer, weight in zip(layers, stored, strict=True):
            layer.weight.data.copy_(code(weight))
        runs[name] = draw(pipeline, model)
    assert cosine(runs["none"], expected) < 0.95
    assert psnr(runs["fp8"], expected) > psnr(runs["int4"], expected) + 12
    assert psnr(runs["int4"], expected) < 38


def test_all_base_models_are_small(folder: Path, tables: Matrix) -> None:
    places = [find(models.load(model).REPO, folder, tables) for model in models.IDS]
    assert sum(p.stat().st_size for place in places for p in place.rglob("*") if p.is_file()) < 80e6


SAMPLES = ("fp8-wan-2-2-single-file", "msmodelslim-w8a8", "svdq-qwen-image-int4-r32")
"""A header with several entries, a folder of many files, singular values."""


def list_hashes(folder: Path) -> dict[str, str]:
    return {
        place.relative_to(folder).as_posix(): hashlib.sha256(place.read_bytes()).hexdigest()
        for place in sorted(folder.rglob("*"))
        if place.is_file()
    }


def test_every_build_gives_the_same_bytes_in_another_process_on_two_threads(
    folder: Path, tmp_path: Path, tables: Matrix
) -> None:
    references = [tables.checkpoints[name].reference for name in SAMPLES]
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from quantmatrix.tiny import hub\n"
        "for name in sys.argv[2:]: hub.ensure(name, Path(sys.argv[1]))"
    )
    for reference in references:
        hub.ensure(reference, folder, tables)
    words = [sys.executable, "-c", script, str(tmp_path), *references]
    threads = {**os.environ, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}
    made = subprocess.run(
        words, check=True, timeout=300, capture_output=True, text=True, env=threads
    )
    assert "Loading" not in made.stderr, "bars of the libraries are shown"
    second = list_hashes(tmp_path)
    assert len([name for name in second if name.endswith(".safetensors")]) > 10
    assert {
        name: digest for name, digest in list_hashes(folder).items() if name in second
    } == second
    assert not list(tmp_path.glob(".making-*"))


def test_a_slower_process_keeps_what_the_quicker_one_made(
    tmp_path: Path, tables: Matrix, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both found nothing and built; the second rename meets the finished stand-in."""
    for reference in ("quantmatrix/wan-2-2-fp8-single-file", "/path/to/base-model"):
        hub.ensure(reference, tmp_path, tables)
        before = list_hashes(tmp_path)
        place = hub.path_of(reference, tmp_path)
        asked: list[Path] = []

        def exists(path: Path, *, place: Path = place, asked: list[Path] = asked) -> bool:
            if path == place and not asked:
                asked.append(path)
                return False
            return os.path.exists(path)

        monkeypatch.setattr(Path, "exists", exists)
        hub.ensure(reference, tmp_path, tables)
        monkeypatch.undo()
        assert asked, "the stand-in was not built again"
        assert list_hashes(tmp_path) == before


def test_a_build_that_fails_leaves_nothing_and_had_one_thread(
    tmp_path: Path, tables: Matrix, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []

    def fail(*_: object) -> None:
        counts.append(torch.get_num_threads())
        raise OSError("No space left on device")

    monkeypatch.setattr(pipelines, "write_pipeline", fail)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(OSError, match="No space"):
            hub.ensure("black-forest-labs/FLUX.1-dev", tmp_path, tables)
        assert [*counts, torch.get_num_threads()] == [1, 2]
    finally:
        torch.set_num_threads(before)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_reference_is_named(tmp_path: Path, tables: Matrix) -> None:
    with pytest.raises(CheckpointError, match="someone/else: there is no tiny stand-in"):
        hub.ensure("someone/else", tmp_path, tables)
    with pytest.raises(CheckpointError, match="no tiny stand-in"):
        hub.ensure("/path/to/nothing", tmp_path, tables)


def test_local_paths_need_no_stand_in(tmp_path: Path, tables: Matrix) -> None:
    (tmp_path / "mine").mkdir()
    hub.ensure(str(tmp_path / "mine"), tmp_path / "hub", tables)
    assert not (tmp_path / "hub").exists()


def test_raw_files_are_as_the_official_ones(folder: Path, tables: Matrix) -> None:
    place = find(RAW, folder, tables)
    assert sorted(p.name for p in place.iterdir()) == [
        "flux2-dev-nvfp4-mixed.safetensors",
        "flux2-dev-nvfp4.safetensors",
    ]
    with safe_open(place / "flux2-dev-nvfp4.safetensors", "pt") as file:
        plain = set(file.keys())
        assert file.metadata() == {"format": "pt"}
    with safe_open(place / "flux2-dev-nvfp4-mixed.safetensors", "pt") as file:
        mixed = set(file.keys())
    assert "double_blocks.0.img_attn.qkv.weight_scale_2" in plain & mixed
    assert "double_blocks.0.img_attn.qkv.input_scale" in plain
    assert "double_blocks.0.txt_attn.qkv.weight_scale" not in plain
    assert "double_blocks.0.txt_mlp.0.weight_scale" in plain - mixed
    assert not any(name.endswith(".input_scale") for name in mixed)
    base = find(models.load("flux-2").REPO, folder, tables) / "transformer"
    for name in ("flux2-dev-nvfp4.safetensors", "flux2-dev-nvfp4-mixed.safetensors"):
        load_transformer(str(base), transformer_weights_path=str(place / name))


@pytest.mark.parametrize(
    "name",
    [
        "fp8-wan-2-2-single-file",
        "modelopt-nvfp4-flux-2-file",
        "msmodelslim-w8a8",
        "svdq-flux-1-int4-r32",
        "svdq-qwen-image-int4-r32",
        "svdq-z-image-int4-r32",
    ],
)
def test_every_layer_of_a_checkpoint_acts_like_the_one_it_was_made_from(
    name: str, folder: Path, tables: Matrix
) -> None:
    """Rows or columns of another layer, or in another order, would be off by more than 1."""
    row = tables.checkpoints[name]
    base = tables.models[row.model].repo
    for reference in (base, row.reference):
        hub.ensure(reference, folder, tables)
    pipeline = row.form == "pipeline"
    made = load_transformer(
        row.reference if pipeline else base,
        transformer_weights_path=None if pipeline else row.reference,
        backend="decode",
        dtype=torch.float32,
        hub=hub.hub(folder),
    )
    plain = load_transformer(base, dtype=torch.float32, hub=hub.hub(folder))
    noise = torch.Generator().manual_seed(0)
    names = count_quantized(made)
    assert len(names) >= 20
    for module in names:
        layer = plain.get_submodule(module)
        x = torch.randn(16, layer.in_features, generator=noise)
        with torch.inference_mode():
            expected = layer(x)
            error = (made.get_submodule(module)(x) - expected).norm() / expected.norm()
        assert 0 < error < 0.3, module


def test_forms(folder: Path, tables: Matrix) -> None:
    shards = find("quantmatrix/flux-1-fp8-sharded", folder, tables)
    assert len(list(shards.glob("*-of-00003.safetensors"))) == 3
    assert (shards / f"{WEIGHTS}.index.json").exists()
    assert not (shards / "config.json").exists()
    single = find("quantmatrix/wan-2-2-fp8-single-file", folder, tables)
    with safe_open(single / "wan-2-2-fp8.safetensors", "pt") as file:
        assert {"config", "quantization_config", "format"} <= file.metadata().keys()
    hub.ensure("/path/to/quantized-transformer", folder, tables)
    assert (folder / "local/path/to/quantized-transformer/config.json").exists()


def test_static_scales_are_powers_of_two_by_448(folder: Path, tables: Matrix) -> None:
    place = find("BBuf/wan22-t2v-a14b-modelopt-fp8-sglang-transformer", folder, tables)
    tensors = load_file(place / WEIGHTS)
    scales = [float(t) * 448 for name, t in tensors.items() if name.endswith("input_scale")]
    assert len(scales) == 20
    assert all(abs(np.log2(s) - round(np.log2(s))) < 1e-6 for s in scales)
    assert len({round(np.log2(s)) for s in scales}) > 1


def test_what_a_row_quantizes(folder: Path, tables: Matrix) -> None:
    row = tables.checkpoints["modelopt-fp8-flux-1"]
    base = find(row.base, folder, tables) / "transformer"
    model = load_transformer(
        str(base), transformer_path=str(find(row.reference, folder, tables)), backend="decode"
    )
    found = count_quantized(model)
    kept = checkpoints.find_kept(row)
    inside = [
        name
        for name, module in load_transformer(str(base)).named_modules()
        if isinstance(module, torch.nn.Linear)
        and name.split(".")[0] in models.load("flux-1").BLOCKS
    ]
    assert set(found) == {name for name in inside if not kept(name)}
    assert any(kept(name) for name in inside)


def test_ranges_are_widened_to_powers_of_two() -> None:
    seen = Calibration(torch.tensor([-3.0, -4.0, 0.0, 0.3]), torch.tensor([5.0, 8.0, 0.0, 0.5]))
    wide = checkpoints.round_up(seen)
    assert wide.low.tolist() == [-4.0, -4.0, 0.0, 0.5]
    assert wide.high.tolist() == [8.0, 8.0, 0.0, 0.5]


def test_ranges_cover_the_inputs_of_every_quantized_layer(folder: Path, tables: Matrix) -> None:
    for model in ("flux-1", "wan-2-2"):
        base = find(models.load(model).REPO, folder, tables)
        ranges = checkpoints.calibrate(model, str(base))
        assert set(ranges) == set(models.load(model).COMPONENTS)
        for component in ranges.values():
            assert all((seen.low <= seen.high).all() for seen in component.values())
            assert len(component) > 20


def test_weights_have_gain_one_structure_and_depend_on_the_name_alone() -> None:
    plain = weights.draw_weight("a", (256, 256))
    assert plain.std().item() == pytest.approx(1 / 16, rel=0.02)
    assert torch.equal(plain, weights.draw_weight("a", (256, 256)))
    assert not torch.equal(plain, weights.draw_weight("b", (256, 256)))
    structured = weights.draw_weight("a", (256, 256), structured=True)
    assert structured.std().item() == pytest.approx(2**0.5 / 16, rel=0.1)
    share = torch.linalg.svdvals(structured).square()
    assert share[:8].sum() > 0.4 * share.sum()
    columns = structured.std(0)
    assert int((columns > 3 * columns.median()).sum()) == 4


def test_fast_sinusoids_are_damped() -> None:
    damped = weights.damp_frequencies(torch.ones(4, 256))
    assert damped[0, 0] < damped[0, 127] / 5
    assert torch.equal(damped[:, :128], damped[:, 128:])
    assert damped.square().mean().item() == pytest.approx(1)


def test_a_row_of_an_unknown_set_is_an_error(tables: Matrix) -> None:
    from dataclasses import replace

    row: CheckpointRow = replace(tables.checkpoints["modelopt-fp8-flux-1"], kept="flux9")
    with pytest.raises(KeyError, match="flux9"):
        checkpoints.find_kept(row)


def test_caches_of_other_definitions_go_when_nobody_uses_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches = tmp_path / ".cache" / "quantmatrix"
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    name = hub.default_folder.__wrapped__().name
    used, unused, programs = caches / name, caches / "tiny-old", caches / "programs"
    recent = caches / "tiny-recent"
    for folder, days in ((used, 15), (unused, 15), (programs, 15), (recent, 13)):
        (folder / "models--a--b").mkdir(parents=True)
        past = time.time() - days * 24 * 3600
        os.utime(folder, (past, past))
    [kept] = caches.glob("writers-*")
    (caches / "writers-old").touch()
    os.utime(caches / "writers-old", (past - 2 * 24 * 3600, past - 2 * 24 * 3600))
    assert hub.default_folder.__wrapped__() == used
    assert sorted(path.name for path in caches.iterdir()) == sorted(
        ["programs", name, "tiny-recent", kept.name]
    )


def test_the_code_is_followed_once_for_each_content_of_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, cache = tmp_path / "package", tmp_path / "cache"
    (package / "deep").mkdir(parents=True)
    (package / "deep" / "one.py").write_text("A = 1\n")
    given = [f"sha256:{letter * 64}" for letter in "abcde"]

    class Code:
        def digest_stand_ins(self) -> str:
            return given.pop(0)

    monkeypatch.setattr(hub, "own_code", Code)
    first = hub.find_writers(cache, package)
    assert first == hub.find_writers(cache, package) == f"sha256:{'a' * 64}"
    (package / "deep" / "one.py").write_text("A = 2\n")  # as many bytes
    assert hub.find_writers(cache, package) == f"sha256:{'b' * 64}"
    (package / "deep" / "one.py").rename(package / "one.py")
    assert hub.find_writers(cache, package) == f"sha256:{'c' * 64}"
    for file in cache.iterdir():
        file.write_text("sha256:torn")
    assert hub.find_writers(cache, package) == f"sha256:{'d' * 64}"
    (tmp_path / "file").touch()  # no cache can be made there
    assert hub.find_writers(tmp_path / "file", package) == f"sha256:{'e' * 64}"
