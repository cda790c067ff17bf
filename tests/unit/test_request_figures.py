"""What a request says reaches the pipeline: width is not height, first is not last, one is not two."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from quantmatrix import models
from quantmatrix.errors import UsageError
from quantmatrix.models import Defaults
from quantmatrix.request import Request
from quantmatrix.runtime.generate import generate_all
from quantmatrix.runtime.plan.kernel_choice import count_rows

ODD = Defaults(height=48, width=80, steps=3, guidance=2.5, frames=5, negative_prompt="dull", fps=7)
GUIDANCE = {"qwen-image": "true_cfg_scale"}
"""The pipeline's own word for --guidance-scale, where it is another."""


def call(model: str, **fields: Any) -> dict[str, Any]:
    return models.load(model).call_arguments(Request(model_path="x", **fields))


@pytest.mark.parametrize("model", models.IDS)
@pytest.mark.parametrize("tiny", [False, True])
def test_size_steps_and_guidance_by_flags(model: str, tiny: bool) -> None:
    found = call(model, tiny=tiny, height=32, width=96, num_inference_steps=7, guidance_scale=1.5)
    assert (found["height"], found["width"], found["num_inference_steps"]) == (32, 96, 7)
    assert found[GUIDANCE.get(model, "guidance_scale")] == 1.5
    assert call(model, guidance_scale=0.0)[GUIDANCE.get(model, "guidance_scale")] == 0.0


@pytest.mark.parametrize("model", models.IDS)
@pytest.mark.parametrize("tiny", [False, True])
def test_size_steps_and_guidance_by_default(
    model: str, tiny: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The models' own sizes are mostly square, which hides an exchange; these are not."""
    module = models.load(model)
    monkeypatch.setattr(module, "TINY_DEFAULTS" if tiny else "DEFAULTS", ODD)
    found = call(model, tiny=tiny)
    assert (found["height"], found["width"], found["num_inference_steps"]) == (48, 80, 3)
    assert found[GUIDANCE.get(model, "guidance_scale")] == 2.5
    assert found.get("num_frames") == (5 if model == "wan-2-2" else None)
    assert found.get("max_sequence_length") == (32 if tiny else None)
    # a size that is given alone leaves the other as it was
    assert call(model, tiny=tiny, width=112)["height"] == 48
    assert call(model, tiny=tiny, height=112)["width"] == 80


def test_negative_prompts_by_model() -> None:
    """Given, left out, and empty, which is not left out."""
    for model in ("qwen-image", "wan-2-2"):
        module = models.load(model)
        assert call(model)["negative_prompt"] == module.DEFAULTS.negative_prompt
        assert call(model, tiny=True)["negative_prompt"] == module.TINY_DEFAULTS.negative_prompt
        assert call(model, negative_prompt="")["negative_prompt"] == ""
        assert call(model, negative_prompt="dull")["negative_prompt"] == "dull"
    for model in ("flux-1", "z-image"):
        assert "negative_prompt" not in call(model)
        assert call(model, negative_prompt="dull")["negative_prompt"] == "dull"
    assert call("flux-1", negative_prompt="", guidance_scale=6.0)["true_cfg_scale"] == 6.0
    assert "true_cfg_scale" not in call("flux-1", guidance_scale=6.0)
    with pytest.raises(UsageError, match=r"--negative-prompt: FLUX\.2"):
        call("flux-2", negative_prompt="dull")


@pytest.mark.parametrize("model", models.IDS)
def test_frames_are_for_clips(model: str) -> None:
    if model == "wan-2-2":
        assert call(model, num_frames=9)["num_frames"] == 9
        return
    assert "num_frames" not in call(model)
    with pytest.raises(UsageError, match="--num-frames"):
        call(model, num_frames=1)


@pytest.mark.parametrize(
    ("size", "patches"),
    [
        ({"height": 32, "width": 96}, 2 * 6),
        ({"height": 96, "width": 32}, 6 * 2),
        ({"height": 31, "width": 96}, 1 * 6),
        ({"height": 32, "width": 95}, 2 * 5),
        ({"height": 32, "width": 96, "num_frames": 4}, 2 * 6),
        ({"height": 32, "width": 96, "num_frames": 5}, 2 * 6 * 2),
        ({"height": 32, "width": 96, "num_frames": 9}, 2 * 6 * 3),
        ({"height": 16, "width": 16}, 1),
    ],
)
def test_rows_are_patches_of_the_latents_and_text(size: dict[str, int], patches: int) -> None:
    """One per 16 x 16 pixels and four frames after the first, and 512 of text."""
    size = {"num_frames": 1, **size}
    assert count_rows("wan-2-2", Request(model_path="x", **size)) == patches + 512


def test_rows_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.load("wan-2-2"), "DEFAULTS", ODD)
    assert count_rows("wan-2-2", Request(model_path="x")) == 3 * 5 * 2 + 512
    assert count_rows("wan-2-2", Request(model_path="x", width=160)) == 3 * 10 * 2 + 512
    assert count_rows("wan-2-2", Request(model_path="x", height=160)) == 10 * 5 * 2 + 512


# --- numbers of the command line at their edges ----------------------------------------------


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("height", 1, 0), ("width", 1, 0), ("num_frames", 1, 0), ("num_inference_steps", 1, 0),
        ("guidance_scale", 0.0, math.inf), ("guidance_scale", -1e300, -math.inf),
        ("seed", (2**64 - 1,), (2**64,)), ("seed", (-(2**63),), (-(2**63) - 1,)),
        ("seed", (0,), ()), ("prompt", ("",), ()),
        ("dtype", "float16", "float8"),
    ],
)  # fmt: skip
def test_the_last_that_is_taken_and_the_first_that_is_not(name: str, good: Any, bad: Any) -> None:
    assert getattr(Request(model_path="x", **{name: good}), name) == good
    flag = f"--{name.replace('_', '-')}"
    with pytest.raises(UsageError, match=flag):
        Request(model_path="x", **{name: bad})
    if name == "seed" and bad:
        with pytest.raises(UsageError, match=flag):
            Request(model_path="x", seed=(*good, *bad))


@pytest.mark.parametrize("fast", ["compile", "cuda_graph"])
@pytest.mark.parametrize("offload", ["dit_layerwise_offload", "dit_cpu_offload"])
def test_what_goes_with_an_offload(fast: str, offload: str) -> None:
    flag = f"--{fast.replace('_', '-')} needs"
    with pytest.raises(UsageError, match=flag):
        Request(model_path="x", **{fast: True, offload: True})
    for fields in ({fast: True}, {offload: True}, {fast: True, offload: False}):
        assert Request(model_path="x", **fields)  # type: ignore[arg-type]


def test_every_prompt_with_every_seed_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading is the first run's; each run is saved when it is there, before the next begins."""
    plan: Any = SimpleNamespace(processes=1, model="flux-1", request=Request(model_path="x"))
    events: list[tuple[str, str, int]] = []

    def one(request: Any, made: Any, pipeline: Any, prompt: str, seed: int) -> Any:
        events.append(("run", prompt, seed))
        return SimpleNamespace(prompt=prompt, seed=seed, seconds={"generate": 1.0})

    monkeypatch.setattr("quantmatrix.runtime.generate.generate_one", one)
    monkeypatch.setattr(
        "quantmatrix.runtime.generate.build_pipeline", lambda made, progress: "pipeline"
    )
    request = Request(model_path="x", prompt=("a", "b"), seed=(1, 2))
    runs = generate_all(
        request, plan=plan, save=lambda run: events.append(("save", run.prompt, run.seed))
    )
    order = [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
    assert [(run.prompt, run.seed) for run in runs] == order
    assert events == [(what, *pair) for pair in order for what in ("run", "save")]
    assert ["load" in run.seconds for run in runs] == [True, False, False, False]
