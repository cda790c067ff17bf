"""Generation: files, names, repeatability, both experts, and a disk that is full."""

from __future__ import annotations

import errno
import json
import math
import operator
import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from quantmatrix import api
from quantmatrix.api import plan
from quantmatrix.cli.main import main
from quantmatrix.errors import UsageError, WitnessError
from quantmatrix.exit_codes import ENVIRONMENT_UNUSABLE, EXIT_PROBLEM
from quantmatrix.request import Request
from quantmatrix.runtime import peer_memory
from quantmatrix.runtime.generate import generate, read_peak, reset_peak
from quantmatrix.runtime.media import name_output, save_media
from quantmatrix.runtime.pipeline import build_pipeline, enable_layerwise
from quantmatrix.runtime.plan.types import Plan
from quantmatrix.runtime.run import Run
from quantmatrix.tables import read

FLUX = ["--tiny", "--model-path", "black-forest-labs/FLUX.1-dev", "--transformer-path"]
FLUX += ["BBuf/flux1-dev-modelopt-fp8-sglang-transformer", "--num-inference-steps", "2"]
WAN = ["--tiny", "--model-path", "Wan-AI/Wan2.2-T2V-A14B-Diffusers"]


@pytest.fixture(scope="module")
def run() -> Run:
    return api.generate(Request.from_words([*FLUX, "--prompt", "a curious pikachu"]))


def test_what_a_run_keeps(run: Run) -> None:
    dump = run.to_json()
    assert len(run.latents) == 2
    assert {"load", "encode", "denoise", "decode", "generate"} <= dump["seconds"].keys()
    parts = dump["seconds"]
    assert parts["encode"] + parts["denoise"] + parts["decode"] == pytest.approx(parts["generate"])
    assert dump["peak_memory_bytes"] > 0
    planned = dump["plan"]["components"]["transformer"]["quantized_layers"]
    assert dump["quantized_layers"] == {"transformer": planned}
    assert dump["transformer_calls"] == {"transformer": 2}


def test_same_seed_same_bits_other_seed_other_picture() -> None:
    request = Request.from_words([*FLUX, "--prompt", "a fox", "--seed", "3", "3", "4"])
    first, again, other = api.generate_all(request)
    assert all(a.equal(b) for a, b in zip(first.latents, again.latents, strict=True))
    assert first.media[0].tobytes() == again.media[0].tobytes()
    assert not first.latents[-1].equal(other.latents[-1])


@pytest.mark.parametrize("family", ["fp8", "nvfp4"])
def test_latents_show_which_wan_expert_is_quantized(family: str) -> None:
    """The primary expert takes the first steps, the second the others, each from its own place."""
    quantized = f"BBuf/wan22-t2v-a14b-modelopt-{family}-sglang-transformer"
    first, second = ["--transformer-path", quantized], ["--transformer-2-path", quantized]
    with pytest.raises(
        WitnessError, match=r"agrees with transformer of .*--transformer-weights-path"
    ):
        api.generate(Request.from_words([*WAN, *second]))

    def run(*words: str) -> Run:
        words = ("--prompt", "a fox walking", "--witness", "off", *words)
        return api.generate(Request.from_words([*WAN, *words]))

    base, one, two, both = run(), run(*first), run(*second), run(*first, *second)
    switch = base.calls["transformer"] // 2  # each step has a pass with and one without the prompt
    steps = len(base.latents)
    assert 0 < switch < steps
    assert base.calls["transformer_2"] == 2 * (steps - switch)

    def differ(a: Run, b: Run) -> list[bool]:
        return [not x.equal(y) for x, y in zip(a.latents, b.latents, strict=True)]

    assert differ(one, base) == [True] * steps
    assert differ(two, base) == [False] * switch + [True] * (steps - switch)
    assert differ(both, one) == [False] * switch + [True] * (steps - switch)


def test_both_wan_experts_run_and_a_video_is_written(tmp_path: Path) -> None:
    import imageio

    run = api.generate(Request.from_words([*WAN, "--prompt", "a fox walking"]))
    assert set(run.calls) == {"transformer", "transformer_2"}
    assert all(run.calls.values())
    path = save_media(run, str(tmp_path))
    assert path.name == "a-fox-walking-0.mp4"
    with imageio.get_reader(path) as reader:
        assert reader.count_frames() == 5


@pytest.mark.parametrize(
    ("path", "several", "expected"),
    [
        ("out", False, "out/a-curious-pikachu-0.png"),
        ("out/x.png", False, "out/x.png"),
        ("out/x.png", True, "out/x-a-curious-pikachu-0.png"),
    ],
)
def test_names_of_files(run: Run, path: str, several: bool, expected: str) -> None:
    assert str(name_output(run, Path(path), several)) == expected


def test_wrong_ending(run: Run) -> None:
    with pytest.raises(UsageError, match="makes a picture"):
        name_output(run, Path("x.mp4"), False)


def test_a_full_disk_leaves_nothing_behind(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(self: Image.Image, path: Path, *_: object, **__: object) -> None:
        Path(path).write_bytes(b"half a picture")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fill)
    with pytest.raises(UsageError, match="No space left on device"):
        save_media(run, str(tmp_path / "x.png"))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_video_writer_is_said_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "quantmatrix.runtime.media.find_spec",
        lambda name: None if name == "imageio_ffmpeg" else find_spec(name),
    )
    words = ["generate", "--model-path", "Wan-AI/Wan2.2-T2V-A14B-Diffusers", "--tiny", "--json"]
    monkeypatch.setattr(
        "quantmatrix.runtime.pipeline.build_pipeline", lambda *_, **__: pytest.fail("loaded")
    )
    assert main([*words, "--output-path", str(tmp_path)]) == ENVIRONMENT_UNUSABLE
    said = json.loads(capsys.readouterr().out)["error"]
    assert said["type"] == "MissingPackageError"
    assert said["message"].startswith("imageio-ffmpeg: not installed")
    assert "pip install imageio-ffmpeg" in said["message"]


def test_guidance_and_size_reach_the_pipeline() -> None:
    run = api.generate(
        Request.from_words([*FLUX, "--height", "32", "--width", "48", "--guidance-scale", "2"])
    )
    assert run.media[0].size == (48, 32)


LOOKING = {row.id for row in read.read().models.values() if row.notes.startswith("picture")}
MODELOPT = [
    row.id
    for row in read.read().checkpoints.values()
    if row.family.startswith("modelopt") and row.model not in LOOKING
]


@pytest.mark.parametrize("checkpoint", MODELOPT)
def test_layerwise_offload_of_every_modelopt_checkpoint(checkpoint: str) -> None:
    """Blocks that come and go give the same bits, and keep the strides of their weights."""
    row = read.read().checkpoints[checkpoint]
    words = ["--tiny", "--model-path", row.base, "--num-inference-steps", "2"]
    if row.selector != "--model-path":
        words += [row.selector, row.reference]
    else:
        words[2] = row.reference
    planned = plan(Request.from_words([*words, "--dit-layerwise-offload"]))
    assert isinstance(planned, Plan)
    assert planned.layerwise_offload
    pipeline = build_pipeline(replace(planned, layerwise_offload=False))
    resident = generate(planned.request, plan=planned, pipeline=pipeline)
    assert any(resident.to_json()["quantized_layers"].values())
    strides = read_strides(pipeline, planned)
    enable_layerwise(pipeline, planned, "cpu")
    streamed = generate(planned.request, plan=planned, pipeline=pipeline)
    assert read_strides(pipeline, planned) == strides
    assert all(a.equal(b) for a, b in zip(streamed.latents, resident.latents, strict=True))


def read_strides(pipeline: Any, planned: Plan) -> dict[str, tuple[int, ...]]:
    """Strides of everything that the transformers keep."""
    return {
        f"{component}.{name}": tensor.stride()
        for component in planned.components
        for name, tensor in getattr(pipeline, component).state_dict().items()
    }


@pytest.mark.parametrize("flag", ["--dit-layerwise-offload", "--dit-cpu-offload"])
def test_offload_gives_the_same_latents(run: Run, flag: str) -> None:
    words = [*FLUX, "--prompt", "a curious pikachu", flag]
    other = api.generate(Request.from_words(words))
    assert other.latents[-1].equal(run.latents[-1])


def test_no_save_output_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["generate", *FLUX, "--prompt", "x", "--no-save-output"]) == 0
    assert list(tmp_path.iterdir()) == []


def test_peak_memory_is_that_of_the_runs_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", asked.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: len(device))
    reset_peak("cuda:3")
    assert asked == ["cuda:3"]
    assert read_peak("cuda:3") == len("cuda:3")
    monkeypatch.setattr(peer_memory, "count_bytes", lambda: 100)  # which no allocator counts
    assert read_peak("cuda:3") == 106


def test_a_run_beyond_numbers_is_an_error_and_saves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Such latents became a black picture and exit code 0."""
    broken = break_pipeline(monkeypatch, "transformer", math.nan)
    words = ["generate", *FLUX, "--prompt", "a fox", "--device", "cpu", "--json"]
    target = ["--output-path", str(tmp_path), "--save-latents", str(tmp_path / "x.safetensors")]
    assert main([*words, *target]) == EXIT_PROBLEM
    out, err = capfd.readouterr()
    assert json.loads(out)["error"]["type"] == "BrokenRunError"
    assert re.search(r"step 1 of 2 gave (\d+) of \1 latents that are NaN or infinite", err)
    assert "'a fox', seed 0" in err
    assert "--backend decode" in err
    assert broken
    assert list(tmp_path.iterdir()) == []


def test_a_picture_of_one_colour_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", *FLUX, "--prompt", "a fox", "--device", "cpu", "--json"]
    words += ["--output-path", str(tmp_path)]
    assert main(words) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["runs"][0]["degenerate"] is None
    assert "warning" not in err
    break_pipeline(monkeypatch, "vae.decoder", 1.0)
    assert main(words) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["runs"][0]["degenerate"].startswith("it is constant")
    assert "warning: the output shows nothing: it is constant" in err


def break_pipeline(monkeypatch: pytest.MonkeyPatch, part: str, value: float) -> list[Any]:
    """Let a part of the next pipelines give one value everywhere; the calls of the part."""
    calls = []

    def fill(module: Any, given: Any, output: Any) -> Any:
        calls.append(module)
        if isinstance(output, torch.Tensor):
            return torch.full_like(output, value)
        return tuple(torch.full_like(tensor, value) for tensor in output)

    def build(*words: Any, **options: Any) -> Any:
        pipeline = build_pipeline(*words, **options)
        operator.attrgetter(part)(pipeline).register_forward_hook(fill)
        return pipeline

    monkeypatch.setattr("quantmatrix.runtime.generate.build_pipeline", build)
    return calls
