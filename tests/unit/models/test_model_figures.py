"""What a model's run is given where the request is silent, and what its stand-in is made of."""

from __future__ import annotations

import inspect
import re
from types import SimpleNamespace
from typing import Any

import pytest

from quantmatrix import models
from quantmatrix.errors import UsageError
from quantmatrix.models import Defaults, generic
from quantmatrix.models.dialect import Dialect, Rule, Target, cut_rows, find_sources
from quantmatrix.models.forward import Step
from quantmatrix.models.stand_in import Ramp
from quantmatrix.request import Request
from quantmatrix.runtime.empty_model import build_plain

NEGATIVE = "blurry, static, low quality, watermark"
SILENT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "flux-1": (
        {"height": 1024, "width": 1024, "num_inference_steps": 50, "guidance_scale": 3.5},
        {"height": 64, "width": 64, "num_inference_steps": 4, "guidance_scale": 4.0,
         "max_sequence_length": 32},
    ),
    "flux-2": (
        {"height": 1024, "width": 1024, "num_inference_steps": 50, "guidance_scale": 4.0},
        {"height": 64, "width": 64, "num_inference_steps": 4, "guidance_scale": 4.0,
         "max_sequence_length": 32},
    ),
    "wan-2-2": (
        {"height": 480, "width": 832, "num_frames": 81, "num_inference_steps": 40,
         "guidance_scale": 4.0, "negative_prompt": NEGATIVE},
        {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 4,
         "guidance_scale": 4.0, "negative_prompt": NEGATIVE, "max_sequence_length": 32},
    ),
    "qwen-image": (
        {"height": 1328, "width": 1328, "num_inference_steps": 50, "true_cfg_scale": 4.0,
         "negative_prompt": " "},
        {"height": 64, "width": 64, "num_inference_steps": 4, "true_cfg_scale": 4.0,
         "negative_prompt": " ", "max_sequence_length": 32},
    ),
    "z-image": (
        {"height": 1024, "width": 1024, "num_inference_steps": 9, "guidance_scale": 0.0},
        {"height": 64, "width": 64, "num_inference_steps": 4, "guidance_scale": 4.0,
         "max_sequence_length": 32},
    ),
}  # fmt: skip
"""Arguments of a call where the request says nothing: of the published size, and of a stand-in."""


@pytest.mark.parametrize("model", models.IDS)
def test_a_call_of_which_the_request_says_nothing(model: str) -> None:
    module = models.load(model)
    for tiny in (False, True):
        assert module.call_arguments(Request(model_path="x", tiny=tiny)) == SILENT[model][tiny]


@pytest.mark.parametrize("model", models.IDS)
@pytest.mark.parametrize("tiny", [True, False])
def test_what_the_request_says_goes_before(model: str, tiny: bool) -> None:
    words: dict[str, Any] = {"height": 96, "width": 160, "num_inference_steps": 7}
    guidance = "true_cfg_scale" if model == "qwen-image" else "guidance_scale"
    expected = {**SILENT[model][tiny], **words, guidance: 0.0}
    if model == "wan-2-2":
        words["num_frames"] = expected["num_frames"] = 9
    if model != "flux-2":
        words["negative_prompt"] = expected["negative_prompt"] = ""
    if model == "flux-1":
        expected["true_cfg_scale"] = 0.0
    asked = Request(model_path="x", tiny=tiny, guidance_scale=0.0, **words)
    assert models.load(model).call_arguments(asked) == expected


@pytest.mark.parametrize(
    ("model", "fields", "words"),
    [
        ("flux-1", {"num_frames": 5}, "--num-frames: FLUX.1-dev takes none; leave the flag out"),
        ("flux-2", {"negative_prompt": ""},
         "--negative-prompt: FLUX.2-dev takes none; leave the flag out"),
        ("z-image", {"num_frames": 1}, "--num-frames: Z-Image-Turbo takes none; leave the flag out"),
    ],
)  # fmt: skip
def test_flags_without_use_in_words(model: str, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=f"^{re.escape(words)}$"):
        models.load(model).call_arguments(Request(model_path="x", **fields))


class Drawn:
    """Names what is drawn instead of drawing it."""

    def normal(self, *shape: int) -> Any:
        return shape

    def number(self, value: float) -> Any:
        return value

    def whole_number(self, value: int) -> Any:
        return ("int", value)

    def side(self, *, tiny: bool) -> int:
        return 5 if tiny else 7

    def text(self, *, tiny: bool) -> int:
        return 11 if tiny else 13

    def packed(self, config: Any, *, tiny: bool) -> dict[str, Any]:
        return {"packed": tiny}

    def positions(self, config: Any, *, tiny: bool) -> dict[str, Any]:
        return {"positions": tiny}


CONFIG = SimpleNamespace(pooled_projection_dim=17, in_channels=19, text_dim=23, cap_feat_dim=29)


@pytest.mark.parametrize(
    ("model", "tiny", "found"),
    [
        ("flux-1", True, {"packed": True, "positions": True, "guidance": 4.0,
                          "pooled_projections": (1, 17)}),
        ("flux-2", False, {"packed": False, "positions": False, "guidance": 4.0}),
        ("wan-2-2", True, {"hidden_states": (1, 19, 2, 4, 4), "timestep": ("int", 500),
                           "encoder_hidden_states": (1, 11, 23), "return_dict": False}),
        ("wan-2-2", False, {"hidden_states": (1, 19, 21, 60, 104), "timestep": ("int", 500),
                            "encoder_hidden_states": (1, 13, 23), "return_dict": False}),
        ("qwen-image", True, {"packed": True, "img_shapes": [[(1, 5, 5)]]}),
        ("qwen-image", False, {"packed": False, "img_shapes": [[(1, 7, 7)]]}),
        ("z-image", True, {"x": [(16, 1, 10, 10)], "t": 0.5, "cap_feats": [(16, 29)],
                           "return_dict": False}),
        ("z-image", False, {"x": [(16, 1, 14, 14)], "t": 0.5, "cap_feats": [(128, 29)],
                            "return_dict": False}),
    ],
)  # fmt: skip
def test_arguments_of_one_forward(model: str, tiny: bool, found: dict[str, Any]) -> None:
    assert models.load(model).forward_inputs(CONFIG, Drawn(), tiny=tiny) == found


@pytest.mark.parametrize("model", models.IDS)
def test_one_block_of_each_kind(model: str) -> None:
    made = build_plain(model, "blocks")
    lists = [made.get_submodule(name) for name in models.load(model).BLOCKS]
    assert [len(list(one.children())) for one in lists] == [1] * len(lists)


SMALL = {
    "flux-1": ((2, 2), 7_266_880),
    "flux-2": ((2, 2), 6_653_440),
    "wan-2-2": ((2,), 2_243_392),
    "qwen-image": ((2,), 5_064_384),
    "z-image": ((1, 1, 2), 8_993_600),
}
"""Blocks of each kind in a stand-in's transformer, and its numbers."""


@pytest.mark.parametrize("model", models.IDS)
def test_how_large_a_stand_in_is(model: str) -> None:
    """A size that changes makes every record of the model's stand-in another one's."""
    made = build_plain(model, "tiny")
    blocks, numbers = SMALL[model]
    lists = [made.get_submodule(name) for name in models.load(model).BLOCKS]
    assert tuple(len(list(one.children())) for one in lists) == blocks
    assert sum(one.numel() for one in made.parameters()) == numbers


@pytest.mark.parametrize(
    ("model", "step"),
    [
        ("flux-1", Step()), ("flux-2", Step()), ("wan-2-2", Step(per=1)), ("qwen-image", Step()),
        ("z-image", Step(time="t", left=True, latents="x", listed=True, sign=-1)),
    ],
)  # fmt: skip
def test_how_a_timestep_is_passed(model: str, step: Step) -> None:
    assert step == models.load(model).STEP
    assert Step() == Step("timestep", 1000, False, "hidden_states", False, 1)


# --- dialects --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "taken", "stored"), [((0, 1, 1), 7, 7), ((1, 2, 3), 7, 21), ((1, 3, 5), 6, 15), ((0, 3, 4), 9, 12)]
)  # fmt: skip
def test_rows_on_disk(rows: tuple[int, int, int], taken: int, stored: int) -> None:
    assert Target("m", rows=rows).count_stored(taken) == stored


def test_targets_of_fused_rows() -> None:
    assert cut_rows("a", "b", "c") == (
        Target("a", rows=(0, 1, 3)), Target("b", rows=(1, 2, 3)), Target("c", rows=(2, 3, 3))
    )  # fmt: skip
    assert cut_rows("a") == (Target("a"),)
    plain = Target("a")
    assert (plain.rows, plain.columns, plain.interleave, plain.plus_one) == (
        (0, 1, 1),
        (0, 1, 1),
        0,
        (),
    )
    assert (plain.swap_halves, plain.unsigned, plain.reshaped) == (False, False, False)


TOY = Dialect(
    "toy", r"^old\.\d",
    layers=(Rule("old.{i}.qkv", cut_rows("new.{i}.q", "new.{i}.k")), Rule("top", (Target("head"),))),
    tensors=(Rule("old.{i}.scale", (Target("new.{i}.norm.weight"),)),),
)  # fmt: skip


def test_names_by_rules() -> None:
    assert TOY.layer_targets("old.12.qkv") == cut_rows("new.12.q", "new.12.k")
    assert TOY.layer_targets("top") == (Target("head"),)
    for other in ("old.x.qkv", "old.1.qkvs", "xold.1.qkv", "old.1.qkv\n", "oldx1.qkv", "tops"):
        assert TOY.layer_targets(other) == (Target(other),)
    assert TOY.tensor_targets("old.3.scale") == (Target("new.3.norm.weight"),)
    assert TOY.tensor_targets("old.3.scales") is None
    assert TOY.matches(["a", "old.1.qkv"])
    assert not TOY.matches(["a", "xold.1", "old.a"])
    assert TOY.dropped() == {}
    assert find_sources(TOY.layers, "new.5.k") == ["old.5.qkv"]
    assert find_sources(TOY.layers, "head") == ["top"]
    assert find_sources(TOY.layers, "new.5.v") == []
    assert not Rule("a", ()).quantized_only


def test_the_dialect_of_names() -> None:
    assert models.dialect_of("flux-2", ["double_blocks.1.x"]).name == "bfl"
    assert models.dialect_of("flux-2", ["transformer_blocks.1.x"]).name == "diffusers"
    assert models.dialect_of("flux-2", iter([])).name == "diffusers"


# --- pipelines without a model file ----------------------------------------------------------------


def parameters_of(call: Any) -> Any:
    return inspect.signature(call).parameters


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda guidance_scale=3.0: 0, "guidance_scale"),
        (lambda guidance_scale=None, true_cfg_scale=4.0: 0, "true_cfg_scale"),
        (lambda guidance_scale=3.0, true_cfg_scale=4.0: 0, "guidance_scale"),
        (lambda true_cfg_scale=4.0: 0, "true_cfg_scale"), (lambda: 0, "guidance_scale"),
        (lambda guidance_scale=None: 0, "guidance_scale"),
    ],
    ids=list("abcdef"),
)  # fmt: skip
def test_the_argument_that_takes_guidance(call: Any, name: str) -> None:
    assert generic.name_guidance(parameters_of(call)) == name


def test_arguments_that_a_call_needs() -> None:
    def call(a: int, *more: int, b: int, c: int = 1, d: Any = None, **rest: int) -> None: ...

    assert list(generic.list_needed(parameters_of(call))) == ["a", "b"]


@pytest.mark.parametrize(
    ("call", "pictures", "words"),
    [
        (lambda prompt, generator, height=1: 0, False, ""),
        (lambda prompt=None, generator=None, num_frames=1: 0, False, ""),
        (lambda prompt, generator, num_images_per_prompt=1: 0, False, ""),
        (lambda generator, height=1: 0, False,
         "P: its call takes no prompt, which every run gives: the transformer alone can be loaded "
         "(quantmatrix.load_transformer)"),
        (lambda height=1: 0, False,
         "P: its call takes no generator, which every run gives: the transformer alone can be loaded "
         "(quantmatrix.load_transformer)"),
        (lambda prompt, generator, width=1: 0, False,
         "P: it makes neither pictures nor clips, and nothing else can be saved or compared: the "
         "transformer alone can be loaded (quantmatrix.load_transformer)"),
        (lambda image, prompt, generator, height=1: 0, True, ""),
        (lambda image, prompt, generator, height=1: 0, False,
         "P: its call needs image: name a picture with --image-path"),
        (lambda image, mask, prompt, generator, height=1: 0, True,
         "P: its call needs image, mask, which no flag gives: the transformer alone can be loaded "
         "(quantmatrix.load_transformer, quantmatrix.load_pipeline)"),
        (lambda mask, prompt, generator, height=1: 0, True,
         "P: its call needs mask, which no flag gives: the transformer alone can be loaded "
         "(quantmatrix.load_transformer, quantmatrix.load_pipeline)"),
    ],
    ids=list("abcdefghij"),
)  # fmt: skip
def test_calls_that_a_run_can_make(call: Any, pictures: bool, words: str) -> None:
    if not words:
        generic.check_call("P", parameters_of(call), pictures=pictures)
        return
    with pytest.raises(UsageError, match=f"^{re.escape(words)}$"):
        generic.check_call("P", parameters_of(call), pictures=pictures)


@pytest.mark.parametrize(
    ("call", "found"),
    [
        (lambda prompt: 0, Defaults(1024, 1024, 1, 1.0)),
        (lambda prompt, num_frames: 0, Defaults(480, 832, 1, 1.0, frames=81)),
        (lambda num_videos_per_prompt=1, num_frames=None, height=96: 0,
         Defaults(96, 832, 1, 1.0, frames=81)),
        (lambda height=None, width=72, num_inference_steps=9, guidance_scale=2.5, frame_rate=30: 0,
         Defaults(1024, 72, 9, 2.5, fps=30)),
        (lambda num_frames=17, fps=8, frame_rate=30: 0,
         Defaults(480, 832, 1, 1.0, frames=17, fps=8)),
    ],
    ids=list("abcde"),
)  # fmt: skip
def test_defaults_of_a_call(call: Any, found: Defaults, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generic, "read_call", lambda _: parameters_of(call))
    assert generic.read_defaults.__wrapped__("P") == found
    assert (Defaults(1, 2, 3, 4).frames, Defaults(1, 2, 3, 4).fps) == (1, 16)


def make_generic(name: str = "P", frames: int = 1) -> generic.Generic:
    return generic.Generic(
        "generic/P", "P", name, ("transformer",), Defaults(480, 832, 30, 7.5, frames=frames, fps=25)
    )


@pytest.mark.parametrize(("frames", "tiny"), [(1, 1), (2, 9), (81, 9)])
def test_a_stand_ins_run_is_small(frames: int, tiny: int) -> None:
    assert (
        Defaults(64, 64, 4, 4.0, frames=tiny, fps=25) == make_generic(frames=frames).TINY_DEFAULTS
    )


def call_of_all(
    prompt: Any, generator: Any, height: Any = 1, width: Any = 1, num_frames: Any = 1,
    num_inference_steps: Any = 1, negative_prompt: Any = None, guidance_scale: Any = 5.0,
    max_sequence_length: Any = 512, max_area: Any = 1, _auto_resize: Any = True,
) -> None: ...  # fmt: skip


@pytest.mark.parametrize(
    ("name", "fields", "found"),
    [
        ("P", {}, {}),
        ("P", {"height": 3, "width": 5}, {"height": 3, "width": 5, "max_area": 15}),
        ("P", {"height": 3}, {"height": 3}),
        ("P", {"guidance_scale": 0.0, "num_frames": 7, "negative_prompt": ""},
         {"guidance_scale": 0.0, "num_frames": 7, "negative_prompt": ""}),
        ("P", {"tiny": True, "width": 96},
         {"height": 64, "width": 96, "num_frames": 9, "num_inference_steps": 4, "guidance_scale": 4.0,
          "max_sequence_length": 32, "_auto_resize": False, "max_area": 64 * 96}),
        ("WanImageToVideoPipeline", {"tiny": True},
         {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 4, "guidance_scale": 4.0,
          "_auto_resize": False, "max_area": 64 * 64}),
    ],
)  # fmt: skip
def test_a_call_by_its_signature(
    name: str, fields: dict[str, Any], found: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generic, "read_call", lambda _: parameters_of(call_of_all))
    made = make_generic(name, frames=81)
    assert made.call_arguments(Request(model_path="x", **fields)) == found


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"negative_prompt": "n"}, {"negative_prompt": "n", "true_cfg_scale": 7.5}),
        ({"negative_prompt": "n", "guidance_scale": 0.0},
         {"negative_prompt": "n", "true_cfg_scale": 0.0}),
        ({"guidance_scale": 2.0}, {"true_cfg_scale": 2.0}),
        ({"num_frames": 5, "height": 6}, "--height: P takes none; leave the flag out"),
    ],
)  # fmt: skip
def test_a_negative_prompt_goes_with_guidance(
    fields: dict[str, Any], found: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(
        prompt: Any, generator: Any, num_images_per_prompt: int = 1, negative_prompt: Any = None,
        guidance_scale: Any = None, true_cfg_scale: float = 4.0,
    ) -> None: ...  # fmt: skip

    monkeypatch.setattr(generic, "read_call", lambda _: parameters_of(call))
    asked = Request(model_path="x", **fields)
    if isinstance(found, dict):
        assert make_generic().call_arguments(asked) == found
        return
    with pytest.raises(UsageError, match=f"^{found}$"):
        make_generic().call_arguments(asked)


def test_words_of_pipelines_without_a_file() -> None:
    assert generic.describe_use("flux-1/K") == (
        "K: its transformer is that of flux-1, whose names and sets are used; its call goes by the "
        "pipeline's own signature and defaults"
    )
    assert generic.describe_use("generic/K") == (
        "K has no model file: it is taken as diffusers has it, names, blocks, call and defaults "
        "alike; no fallback set of it was validated"
    )
    with pytest.raises(UsageError, match=r"^generic/P: no model file says what a forward takes$"):
        make_generic().forward_inputs(CONFIG, Drawn(), tiny=True)
    words = (
        "the model is one transformer alone, which makes no picture: name a whole pipeline with "
        "--model-path, and this folder with --transformer-path"
    )
    with pytest.raises(UsageError, match=f"^{words}$"):
        generic.read_call("FluxTransformer2DModel")
    with pytest.raises(KeyError) as caught:
        models.load_file("flux-9")
    assert caught.value.args == (
        "no such base model: flux-9; known: flux-1, flux-2, wan-2-2, qwen-image, z-image",
    )


@pytest.mark.parametrize(
    ("pipeline", "rows"),
    [
        ("FluxKontextPipeline", 4096), ("QwenImageEditPipeline", 4096), ("Flux2Pipeline", 4096),
        ("QwenImageEditPlusPipeline", 4096), ("FluxPipeline", 0), ("WanImageToVideoPipeline", 0),
    ],
)  # fmt: skip
def test_rows_of_a_picture(pipeline: str, rows: int) -> None:
    assert generic.count_picture_rows(pipeline) == rows


@pytest.mark.parametrize(
    ("class_name", "transformer", "model"),
    [
        ("FluxFillPipeline", "FluxTransformer2DModel", "flux-1/FluxFillPipeline"),
        ("AuraFlowPipeline", "AuraFlowTransformer2DModel", "generic/AuraFlowPipeline"),
        ("AuraFlowTransformer2DModel", "AuraFlowTransformer2DModel",
         "generic/AuraFlowTransformer2DModel"),
        ("Nothing", "FluxTransformer2DModel", None), ("FluxPipeline", "UNet2DConditionModel", None),
        ("FluxPipeline", "Nothing", None),
    ],
)  # fmt: skip
def test_the_id_of_a_pipeline(class_name: str, transformer: str, model: str | None) -> None:
    assert models.by_transformer(class_name, transformer) == model


def test_short_names_in_any_case() -> None:
    assert models.by_short_name("flux.1-DEV") == "flux-1"
    assert models.by_short_name("wan2.2-t2v-a14b-diffusers") == "wan-2-2"
    assert models.by_short_name("Wan2.2-T2V-A14B") == "wan-2-2"
    assert models.by_short_name("z-image") is None
    assert models.by_short_name("zzz") is None
    assert models.by_class("A") is models.by_class("ZZ") is None


def test_buffers_of_the_vae_of_flux_2() -> None:
    assert models.load("flux-2").STAND_IN.vae_buffers == {
        "bn.running_mean": Ramp(-0.1, 0.2), "bn.running_var": Ramp(0.75, 0.5)
    }  # fmt: skip
