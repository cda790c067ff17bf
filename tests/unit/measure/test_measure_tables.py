"""Inputs of classes, tables of plans, pictures on pages and what a profile holds, by value."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import FrozenInstanceError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from quantmatrix.errors import UsageError
from quantmatrix.measure import (
    contact_sheet,
    networks,
    pictures,
    plans,
    rounding_bounds,
    spread,
    trace_census,
    trace_events,
    true_launches,
    validation_page,
    workbench,
)
from quantmatrix.measure.classes import __main__ as classes_main
from quantmatrix.measure.classes import inputs, options
from quantmatrix.measure.latents import ShapeError
from quantmatrix.measure.layers import LayerErrors
from quantmatrix.measure.trace_events import Event
from quantmatrix.proof.plans import PlanLine
from quantmatrix.proof.transformer_classes import ClassLine
from quantmatrix.request import Hub, Request
from quantmatrix.runtime.plan.types import Refusal
from quantmatrix.scheme import Scheme
from quantmatrix.tables import read

# --- inputs of classes --------------------------------------------------------------------------


def make_draw(dtype: torch.dtype = torch.bfloat16) -> inputs.Draw:
    return inputs.Draw(torch.Generator().manual_seed(0), dtype)


CONFIG = SimpleNamespace(in_channels=5, joint_attention_dim=3, axes_dims=(1, 2, 3))


@pytest.mark.parametrize(
    ("name", "parameters", "shape"),
    [
        ("Own2DModel", ("img_ids",), (1, 16, 5)),
        ("Own2DModel", ("img_shapes",), (1, 16, 5)),
        ("Own3DModel", ("height",), (1, 16, 5)),
        ("Own1DModel", (), (1, 16, 5)),
        ("Own3DModel", ("width",), (1, 5, 2, 8, 8)),
        ("Own2DModel", ("txt_ids",), (1, 5, 8, 8)),
    ],
)
def test_latents_of_a_class(name: str, parameters: tuple[str, ...], shape: Any) -> None:
    found = inputs.make_latents(name, dict.fromkeys(parameters), CONFIG, make_draw())
    assert (tuple(found.shape), found.dtype) == (shape, torch.bfloat16)


@pytest.mark.parametrize(
    ("maker", "shape", "dtype"),
    [
        (inputs.make_text, (1, 8, 3), torch.bfloat16),
        (inputs.text_rows(2, 7), (1, 2, 7, 3), torch.bfloat16),
        (inputs.numbers(4, 9), (4, 9), torch.bfloat16),
        (inputs.zeros(4, 9), (4, 9), torch.int64),
        (inputs.indices(3, 9), (6,), torch.int64),
        (inputs.time, (1,), torch.bfloat16),
        (inputs.frames_first, (1, 2, 5, 8, 8), torch.bfloat16),
        (inputs.channels_last(lambda c: 11), (1, 2, 8, 8, 11), torch.bfloat16),
        (inputs.sequence, (1, 16, 5), torch.bfloat16),
        (inputs.signal, (1, 5, 16), torch.bfloat16),
        (inputs.joint_positions(24), (24, 3), torch.float32),
        (inputs.MAKERS["txt_ids"], (8, 3), torch.float32),
        (inputs.MAKERS["img_ids"], (16, 3), torch.float32),
        (inputs.MAKERS["encoder_attention_mask"], (1, 8), torch.bool),
        (inputs.MAKERS["encoder_hidden_states_mask"], (1, 8), torch.bool),
        (inputs.MAKERS["crop_coords"], (1, 2), torch.bfloat16),
        (inputs.MAKERS["timestep"], (1,), torch.bfloat16),
    ],
)
def test_shapes_of_arguments(maker: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    found = maker(CONFIG, make_draw())
    assert (tuple(found.shape), found.dtype) == (shape, dtype)


def test_values_of_arguments() -> None:
    draw = make_draw(torch.float32)
    assert inputs.time(CONFIG, draw).tolist() == [0.25]
    assert inputs.MAKERS["timestep"](CONFIG, draw).tolist() == [0.5]
    assert inputs.MAKERS["img_shapes"](CONFIG, draw) == [[(1, 4, 4)]]
    assert [inputs.MAKERS[name](CONFIG, draw) for name in ("num_frames", "height", "width")] == [
        1, 4, 4,
    ]  # fmt: skip
    for name in ("original_size", "target_size"):
        assert inputs.MAKERS[name](CONFIG, draw).tolist() == [[64.0, 64.0]]
    assert inputs.indices(3, 6)(CONFIG, draw).tolist() == [3, 4, 5]
    assert draw.ones(2, 3).tolist() == [[1.0] * 3] * 2
    cosines, sines = inputs.rotary(3, 4)(CONFIG, draw)  # type: ignore[misc]
    assert cosines.shape == sines.shape == (3, 4)
    assert float(cosines[2, 1]) == pytest.approx(math.cos(9 / 4))
    assert float(sines[1, 3]) == pytest.approx(math.sin(7 / 4))
    places = inputs.make_positions(4)
    assert places[:, :2].abs().sum() == 0
    assert places[6].tolist() == [0.0, 0.0, 1.0, 2.0]
    assert places[15].tolist() == [0.0, 0.0, 3.0, 3.0]
    joint = inputs.joint_positions(18)(CONFIG, draw)
    assert joint[:2].tolist() == [[0.0] * 3] * 2
    assert joint[2:].tolist() == inputs.make_positions(3).tolist()


def test_options_that_say_a_width() -> None:
    own = SimpleNamespace(a=None, b=(3,), c=0, d=7, e=9)
    assert inputs.read(own, ("x", "a", "b", "c", "d", "e")) == 7
    with pytest.raises(KeyError, match="none of a, c in the configuration"):
        inputs.read(own, ("a", "c"))
    assert inputs.count_axes(SimpleNamespace(axes_dims_rope=None, axes_dims=(1, 2))) == 2
    assert inputs.has_pooled(SimpleNamespace(pooled_projection_dim=None, in_text_dim2=3))
    assert inputs.has_pooled(SimpleNamespace(pooled_projection_dim=3))
    assert not inputs.has_pooled(SimpleNamespace(pooled_projection_dim=0))


class Model(torch.nn.Module):
    """A forward with arguments of every kind."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(in_channels=5, joint_attention_dim=3, **config)

    def forward(
        self,
        hidden_states: Any,
        timestep: Any,
        pooled_projections: Any,
        guidance: Any = None,
        other: Any = 3,
    ) -> None: ...


def test_arguments_of_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    found = inputs.make_inputs("Own2D", Model(), torch.bfloat16)
    assert list(found) == ["hidden_states", "timestep"]
    full = Model(guidance_embeds=True, pooled_projection_dim=6)
    found = inputs.make_inputs("Own2D", full, torch.bfloat16)
    assert list(found) == ["hidden_states", "timestep", "pooled_projections", "guidance"]
    assert (found["guidance"].tolist(), found["guidance"].dtype) == ([4.0], torch.bfloat16)
    assert found["pooled_projections"].shape == (1, 6)
    again = inputs.make_inputs("Own2D", full, torch.bfloat16)
    assert torch.equal(found["hidden_states"], again["hidden_states"])
    own = {"Own2D": {"timestep": None, "other": lambda c, d: 8}}
    monkeypatch.setattr(inputs, "ARGUMENTS", own)
    assert list(inputs.make_inputs("Own2D", Model(), torch.float32)) == ["hidden_states", "other"]
    monkeypatch.setattr(inputs, "MAKERS", {})
    with pytest.raises(KeyError, match="Own: nothing is known of the argument timestep"):
        inputs.make_inputs("Own", Model(), torch.float32)
    with pytest.raises(FrozenInstanceError):
        make_draw().dtype = torch.float32  # type: ignore[misc]


@pytest.mark.parametrize(
    ("count", "columns"), [(1, (32,)), (2, (16, 16)), (3, (12, 10, 10)), (4, (8, 8, 8, 8)), (5, (8, 6, 6, 6, 6))]
)  # fmt: skip
def test_columns_of_a_head_by_axis(count: int, columns: tuple[int, ...]) -> None:
    assert options.cut_axes(count) == columns


def test_options_are_shrunk_by_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    class Own:
        def __init__(
            self,
            num_layers: int = 19,
            num_refiner_blocks: int = 1,
            num_attention_heads: int = 24,
            attention_head_dim: int = 128,
            ffn_dim: int = 130,
            ff_dim: int = 128,
            joint_attention_dim: int = 4096,
            sample_size: int = 128,
            axes_dims_rope: tuple[int, ...] = (16, 56, 56),
            rope_dim: int = 44,
            guidance_embeds: bool = True,
            in_channels: int = 64,
            hidden_size: int = 32,
            theta: float = 1e4,
        ) -> None: ...

    monkeypatch.setattr(diffusers, "Own", Own, raising=False)
    assert options.shrink("Own") == {
        "num_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "ffn_dim": 128,
        "joint_attention_dim": 64,
        "sample_size": 8,
        "axes_dims_rope": (12, 10, 10),
    }
    monkeypatch.setattr(options, "OPTIONS", {"Own": {"num_layers": 3, "more": 4}})
    found = options.shrink("Own")
    assert (found["num_layers"], found["more"]) == (3, 4)


def test_the_lines_of_the_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = {
        "A": [
            ClassLine("A", "1", "fp8", "t", 3, 2, 0.12345, "agrees"),
            ClassLine("A", "1", "int8", "t", 3, 2, 0.5, "agrees"),
        ],
        "B": [ClassLine("B", "1", reason="no forward")],
    }
    monkeypatch.setattr(classes_main, "list_classes", lambda: ["A", "B"])
    monkeypatch.setattr(classes_main, "prove_class", lines.__getitem__)
    classes_main.main([str(tmp_path / "x.csv")])
    assert capsys.readouterr().out == "A: fp8 0.123, int8 0.500\nB: no forward\n"
    assert len((tmp_path / "x.csv").read_text().splitlines()) == 4
    monkeypatch.setattr(classes_main, "find_folder", lambda given: tmp_path)
    classes_main.main([])
    assert (tmp_path / classes_main.FILE).read_bytes() == (tmp_path / "x.csv").read_bytes()


# --- plans --------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [239, 240, 241])
def test_the_message_of_a_refusal_is_cut(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    message = "a  b\nc" + "d" * (length - 5)
    monkeypatch.setattr(plans, "plan", lambda request: Refusal("rule", message))
    bench: Any = SimpleNamespace(planned_request=lambda cell: None)
    cell: Any = SimpleNamespace(checkpoint="c", hardware="h", backend="b")
    line = plans.plan_cell(bench, cell)
    whole = "a b c" + "d" * (length - 5)
    shown = whole if length <= 240 else f"{whole[:236]} ..."
    assert line == PlanLine("c", ("h",), "b", rule="rule", message=shown)
    assert len(line.message) == min(length, 240)


@pytest.mark.parametrize(
    ("families", "movable"),
    [(("fp8", None), True), (("fp8", "nunchaku-svdq"), False), (("nunchaku-svdq",), False)],
)
def test_the_bytes_of_a_plan(
    families: tuple[str | None, ...], movable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {
        "t": SimpleNamespace(whole=7 * 2**20 + 700_000, layerwise=3 * 2**20 + 500_000),
        "u": SimpleNamespace(whole=5 * 2**20 + 600_000, layerwise=4 * 2**20 + 600_000),
    }
    monkeypatch.setattr(plans.true_bytes, "measure_all", lambda found: sizes)
    pieces = [("a", "x"), ("b", "y"), ("b", "y"), ("a", "z")]

    def part(family: str | None) -> Any:
        made = [SimpleNamespace(backend=b, numerics=n) for b, n in pieces]
        return SimpleNamespace(family=family, pieces=lambda: made)

    plan: Any = SimpleNamespace(components={str(n): part(f) for n, f in enumerate(families)})
    line = plans.describe_plan(PlanLine("c", ("h",), ""), plan)
    assert line.kernels == ("b:y", "a:x", "a:z")
    assert (line.whole_mib, line.largest_mib, line.layerwise_mib) == (13, 8, 5)
    expected = all(plans.families.load(f).CPU_OFFLOAD for f in families if f)
    assert line.movable is expected
    if movable:
        assert line.movable


# --- pages --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        ("plain", "plain"),
        ("a/b-c.d_1", "a/b-c.d_1"),
        ("1a", '"1a"'),
        ("Yes", '"Yes"'),
        ("n", '"n"'),
        ("null", '"null"'),
        ("a b", '"a b"'),
        ("", '""'),
        ("yesterday", "yesterday"),
    ],
)
def test_scalars_of_yaml(text: str, quoted: str) -> None:
    assert validation_page.quote(text) == quoted


@pytest.mark.parametrize(
    ("precision", "names"),
    [("FP8 + INT8", ["fp8", "int8"]), ("FP8", ["fp8"]), (None, []), ("", [])],
)
def test_names_of_a_precision(precision: str | None, names: list[str]) -> None:
    assert validation_page.split_precision(precision) == names


def test_the_front_of_a_card() -> None:
    report = {
        "base_id": "o/n",
        "pipeline_tag": "text-to-image",
        "census": {
            "t": {"family": "fp8", "precision": "FP8 + INT8"},
            "u": {"family": "8bit", "precision": None},
        },
    }
    assert validation_page.write_front_matter(report) == (
        "---\nbase_model: o/n\nbase_model_relation: quantized\nlibrary_name: diffusers\n"
        'pipeline_tag: text-to-image\ntags:\n- quantized\n- "8bit"\n- fp8\n- int8\n---'
    )


def test_the_caption_of_a_run() -> None:
    run = {
        "prompt": "a fox",
        "seed": 7,
        "media": {"psnr_db": 30.12345, "ssim": 0.912345},
        "quality": {"ms_ssim": None, "flip": 0.05, "lpips": 0.25},
    }
    assert validation_page.write_caption(run) == (
        "a fox, seed 7: PSNR 30.12 dB, SSIM 0.9123, FLIP 0.05, LPIPS 0.25"
    )


def test_what_a_card_says_of_scope_and_witness() -> None:
    assert validation_page.describe_scope("local files") == (
        "local files: weights that are in no repository yet"
    )
    assert validation_page.describe_scope("stand-in").startswith("stand-in: ")
    assert "no repository" not in validation_page.describe_scope("stand-in")
    kinds = [{"cosine": 0.99999}, {"cosine": 0.98765}]
    witness = {
        "t": {"kinds": kinds, "verdict": "agrees", "layers": 5},
        "u": {"kinds": [], "verdict": "unknown", "layers": 0},
    }
    assert validation_page.describe_witness(witness) == [
        "t: agrees (cosine at least 0.9877 in 5 decoded layers)",
        "u: unknown (0 decoded layers)",
    ]


def test_an_output_that_is_there(tmp_path: Path) -> None:
    validation_page.check_output(tmp_path / "new")
    empty = tmp_path / "empty"
    empty.mkdir()
    validation_page.check_output(empty)
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(UsageError) as caught:
            validation_page.check_output(path)
        assert str(caught.value) == f"--output-path {path} exists and is not an empty folder"


@pytest.mark.parametrize(("length", "text"), [(110, "x" * 110), (111, "x" * 106 + " ...")])
def test_a_caption_is_cut(length: int, text: str) -> None:
    assert contact_sheet.write_ascii("x" * length) == text
    assert contact_sheet.write_ascii("a中b") == "a?b"


@pytest.mark.parametrize(
    ("size", "runs", "sheet", "row"),
    [
        ((200, 100), 2, (800, 364), (256, 128)),
        ((100, 400), 1, (640, 328), (64, 256)),
        ((2, 1000), 1, (640, 328), (1, 256)),
    ],
)
def test_the_size_of_a_sheet(
    size: tuple[int, int],
    runs: int,
    sheet: tuple[int, int],
    row: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from quantmatrix.measure import quality

    monkeypatch.setattr(quality, "has_flip", lambda: False)
    width, height = size
    one: Any = SimpleNamespace(media=[Image.new("RGB", (width, height), (10, 20, 64))])
    other: Any = SimpleNamespace(media=[Image.new("RGB", (width, height), (15, 20, 0))])
    shown = contact_sheet.draw_row(one, other)
    assert [picture.size for picture in shown] == [row] * 3
    assert shown[2].getpixel((0, 0)) == (20, 0, 255)  # 256 is too much for a pixel
    found = contact_sheet.draw_sheet([(one, other)] * runs, ["a"] * runs, "scope")
    assert found.size == sheet
    assert found.getpixel((0, 0)) == (255, 255, 255)
    for column, colour in enumerate(((10, 20, 64), (15, 20, 0), (20, 0, 255))):
        left = 8 + column * (row[0] + 8)
        assert found.getpixel((left, 42)) == colour
        assert found.getpixel((left + row[0] - 1, 42 + row[1] - 1)) == colour
        assert found.getpixel((left - 1, 42)) == (255, 255, 255)
        assert found.getpixel((left, 42 + row[1])) == (255, 255, 255)


def test_pictures_that_are_no_pictures() -> None:
    one = torch.zeros(11, 12, 3, dtype=torch.uint8)
    assert pictures.compute_ssim(one, one) == 1.0
    with pytest.raises(ShapeError) as caught:
        pictures.compute_ssim(one[:10], one[:10])
    assert str(caught.value) == "a picture of [10, 12] pixels: SSIM needs 11 x 11"
    for wrong in (one[:, :, 0], one[None]):
        with pytest.raises(ShapeError) as caught:
            pictures.compute_ssim(wrong, wrong)
        shape = list(wrong.shape)
        assert str(caught.value) == (
            f"pictures of {shape} and {shape} elements: expected two of one [height, width, channels]"
        )


@pytest.mark.parametrize(("frames", "listed"), [(1, False), (2, True), (3, True)])
def test_a_clip_lists_its_frames(
    frames: int, listed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = iter([0.123456789, 0.5, 0.25])
    monkeypatch.setattr(pictures, "compute_ssim", lambda *_: next(values))
    clip = torch.zeros(frames, 12, 12, 3, dtype=torch.uint8)
    found = pictures.measure_frames(clip, clip)
    per_frame = [0.123457, 0.5, 0.25][:frames]
    assert found["ssim"] == float(f"{sum(per_frame) / frames:.6g}")
    assert found.get("ssim_per_frame") == (per_frame if listed else None)


# --- networks -----------------------------------------------------------------------------------


def test_why_a_network_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise KeyError("odd")

    linear = tmp_path / "alex.pth"
    monkeypatch.setattr(networks, "find_linear", lambda: linear)
    monkeypatch.setattr(networks, "find_clip", lambda cache: None)
    backbone = tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth"
    clip = "openai/clip-vit-large-patch14"
    found = networks.find_networks(None, tmp_path)
    assert found.missing == {
        "lpips": f"optional; AlexNet is not at {backbone}: put "
        "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth there",
        "clip": f"optional; {clip} is not in the cache of huggingface_hub (HF_HUB_CACHE): hf download "
        f"{clip}",
    }
    backbone.parent.mkdir()
    backbone.touch()
    monkeypatch.setattr(networks, "load_lpips", fail)
    monkeypatch.setattr(networks, "load_clip", fail)
    monkeypatch.setattr(networks, "find_clip", lambda cache: tmp_path / "clip")
    assert networks.find_networks(None, tmp_path).missing == {
        "lpips": f"{backbone} or {linear} is damaged, or of another network (KeyError: 'odd'): put the "
        "files there again",
        "clip": f"{tmp_path}/clip is damaged, or of another network (KeyError: 'odd'): hf download "
        f"{clip}",
    }
    monkeypatch.setattr(networks, "find_linear", lambda: None)
    monkeypatch.setattr(networks, "load_clip", lambda folder: "a score")
    found = networks.find_networks(tmp_path, tmp_path)
    assert (found.lpips, found.clip) == (None, "a score")
    assert found.missing == {
        "lpips": "optional; the package lpips, which has its linear weights, is not installed: pip "
        "install --no-deps lpips"
    }


# --- bounds, layers at true size, spread ------------------------------------------------------------


def scheme(weight: str, scale: str, activation: str = "none", **more: Any) -> Scheme:
    return Scheme(
        name="x", op="linear.fp8", weight=weight, scale=scale, activation=activation, **more
    )


@pytest.mark.parametrize(
    ("weight", "scale", "activation", "bound"),
    [
        ("e4m3", "tensor", "none", 1 / 16),
        ("e5m2", "tensor", "none", 1 / 8),
        ("e4m3", "tensor", "e4m3", 1 / 28),
        ("e4m3", "channel", "none", 1 / 28),
        ("int8", "channel", "int8", 1 / 254),
        ("int4", "group", "none", 1 / 14),
    ],
)
def test_how_far_rounding_may_move(weight: str, scale: str, activation: str, bound: float) -> None:
    assert rounding_bounds.find_bound(scheme(weight, scale, activation)) == pytest.approx(bound)


def test_bounds_of_formats_with_their_own_scales() -> None:
    assert rounding_bounds.BOUNDS["e2m1"] == pytest.approx(1 / 6 + 1 / 16)
    assert rounding_bounds.BOUNDS["mx-e4m3"] == 1 / 8
    assert rounding_bounds.BOUNDS["mx-e2m1"] == 1 / 4
    assert rounding_bounds.find_bound(scheme("uint4", "group")) is None


def test_errors_are_relative_to_their_group() -> None:
    own = scheme("int8", "channel", "int8")
    base = torch.tensor([[1.0, -4.0], [0.5, 0.25], [0.0, 0.0]])
    decoded = torch.tensor([[1.5, -4.0], [0.5, 0.0], [0.0, 0.0]])
    assert rounding_bounds.measure_error(base, decoded, own) == 0.5
    decoded[0, 1] = math.nan
    assert rounding_bounds.measure_error(base, decoded, own) == math.inf
    tensors = {"weight_scale": torch.tensor([[2.0], [0.5]]), "smooth": torch.tensor([3.0, 1.0])}
    base, decoded = torch.zeros(2, 2), torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    found = rounding_bounds.measure_residual(base, decoded, tensors, own)
    assert found == pytest.approx(1.0 / (0.5 * 127))
    tensors["weight_scale_2"] = torch.tensor([4.0])
    tensors["pre_quant_scale"] = torch.tensor([1.0, 0.25])
    found = rounding_bounds.measure_residual(base, decoded, tensors, own)
    assert found == pytest.approx(4.0 / (0.5 * 4 * 127))
    decoded[1, 1] = math.inf
    assert rounding_bounds.measure_residual(base, decoded, tensors, own) == math.inf


def test_layers_at_their_true_size() -> None:
    layer = true_launches.TrueLayer(7, 96, True, frozenset({(2, 3, 96), (5, 96), (1, 96)}))
    assert layer.rows == 6
    for columns, shape in (((0, 1, 1), (7, 96)), ((1, 3, 4), (7, 48)), ((0, 1, 3), (7, 32))):
        piece: Any = SimpleNamespace(target=SimpleNamespace(columns=columns))
        assert true_launches.find_shape(piece, layer) == shape

    def kernel(*names: str) -> Any:
        first, *further = (SimpleNamespace(package=name) for name in names)
        first.further = tuple(further)
        return SimpleNamespace(needs=first)

    for names, ours in (
        (("",), True),
        (("triton", ""), True),
        (("triton", "flashinfer"), False),
        (("nunchaku",), False),
    ):
        assert true_launches.is_ours(kernel(*names)) is ours
    with pytest.raises(FrozenInstanceError):
        layer.bias = False  # type: ignore[misc]


def test_the_spread_of_two_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spread.records, "find_commit", lambda: "c")
    monkeypatch.setattr(spread.records, "tell_time", lambda: "then")
    monkeypatch.setattr(spread.probe, "fingerprint", lambda: {"processor": "p"})

    def run(*values: float) -> Any:
        frames = [np.zeros((4, 6, 3), dtype=np.uint8)] * 2
        return SimpleNamespace(latents=[torch.tensor([1.0, v]) for v in values], media=frames)

    errors = LayerErrors({"t": {"a": 0.1, "b": 0.7123456789}, "u": {"c": 0.2}})
    found = spread.describe("m", run(3.0, 1.0, 2.0), run(4.0, 1.0, 2.0), errors)
    assert (found.layer, found.layer_error, found.layers) == ("t.b", 0.712346, 3)
    assert (found.steps, found.size, found.processor) == (3, "2x4x6", "p")
    assert found.relative_l2 == pytest.approx(1 / math.sqrt(10), abs=1e-6)
    assert (found.model, found.commit, found.made) == ("m", "c", "then")


# --- profiles -----------------------------------------------------------------------------------


class Kineto:
    """An event as a profile holds it."""

    def __init__(self, name: str, start: int, end: int, **given: Any) -> None:
        self.own = {"name": name, "start_ns": start, "end_ns": end, **given}

    def __getattr__(self, name: str) -> Any:
        usual = {
            "start_thread_id": 1,
            "end_thread_id": 1,
            "is_async": False,
            "is_hidden_event": False,
            "shapes": [],
        }
        value = {**usual, **self.own}[name]
        return lambda: value


def test_events_lie_in_those_that_span_them() -> None:
    found = trace_events.read_events(
        [
            Kineto("first", 1000, 2000),
            Kineto("stage|x", 3000, 90_000),
            Kineto("layer|a", 4000, 20_000),
            Kineto("mm", 5000, 20_000, shapes=[[2, 3]]),
            Kineto("inner", 6000, 7000),
            Kineto("crossing", 15_000, 21_000),
            Kineto("hidden", 8000, 9000, is_hidden_event=True),
            Kineto("async", 8000, 9000, is_async=True),
            Kineto("thread", 8000, 9000, end_thread_id=2),
            Kineto("[memory]", 8000, 9000),
            Kineto("elsewhere", 8000, 9000, start_thread_id=3, end_thread_id=3),
            Kineto("after", 20_000, 20_500),
            Kineto("layer|b", 30_000, 31_000),
        ],
        "stage|",
        "layer|",
    )
    assert [(event.name, event.start, event.end) for event in found] == [
        ("stage|x", 2.0, 89.0),
        ("layer|a", 3.0, 19.0),
        ("layer|b", 29.0, 30.0),
    ]
    layer = found[1]
    [child] = layer.cpu_children
    assert (child.name, child.input_shapes) == ("mm", [[2, 3]])
    assert [one.name for one in child.cpu_children] == ["inner"]
    assert (layer.elapsed_us(), layer.cpu_time_total) == (16.0, 16.0)
    assert found[0].cpu_children == []


def test_only_children_of_one_name_are_joined() -> None:
    def event(name: str, *children: Event) -> Event:
        return Event(name, 0.0, 1.0, cpu_children=list(children))

    deep = event("a", event("a", event("a", event("b"), event("c", event("c", event("d"))))))
    trace_events.join_namesakes(deep)
    assert [one.name for one in deep.cpu_children] == ["b", "c"]
    assert [one.name for one in deep.cpu_children[1].cpu_children] == ["d"]
    two = event("a", event("a"), event("a"))
    trace_events.join_namesakes(two)
    assert len(two.cpu_children) == 2


class Profiled:
    """An event of torch's."""

    def __init__(
        self, name: str, start: float, end: float, number: int = 0, device: str = "CPU", **more: Any
    ) -> None:
        self.name, self.id = name, number
        self.time_range = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
        self.device_type = SimpleNamespace(name=device)
        self.cpu_time_total = end - start
        self.cpu_children = more.get("children", [])
        self.input_shapes = more.get("shapes")


def test_kernels_belong_to_the_range_that_launched_them() -> None:
    events = [
        Profiled("cudaLaunchKernel", 10, 11, 1),
        Profiled("hipLaunchKernel", 20, 21, 2),
        Profiled("cudaLaunchKernel", 30, 31, 3),
        Profiled("aten::mm", 15, 16, 2),
        Profiled("one", 100, 103.5, 1, "CUDA"),
        Profiled("two", 200, 207, 2, "CUDA"),
        Profiled("three", 300, 311, 3, "CUDA"),
        Profiled(f"{trace_census.LAYER}x", 0, 1, 1, "CUDA"),
    ]
    timeline = trace_census.Timeline(events)
    for start, end, names in (
        (10, 20, ["one", "two"]),
        (10.5, 30, ["two", "three"]),
        (11, 19, []),
        (0, 10, ["one"]),
    ):
        spanned = Profiled("range", start, end)
        assert [kernel.name for kernel in timeline.within(spanned)] == names
    assert timeline.measure(Profiled("range", 10, 20)) == pytest.approx(10.5e-6)
    assert timeline.measure(Profiled("range", 11, 19)) == pytest.approx(8e-6)


def test_what_ran_inside_one_call() -> None:
    inner = Profiled("aten::mm", 3, 5, shapes=[[9, 64], [64, 32]])
    outer = Profiled("aten::linear", 2, 6, children=[inner], shapes=[[9, 64], [32, 64], [32]])
    own = Profiled("own::mm", 7, 10, children=[Profiled("aten::mm", 8, 9, shapes=[[1, 2], [2, 3]])])
    short = Profiled("aten::addmm", 11, 12, shapes=[[3], [4]])
    call = Profiled("range", 0, 20, children=[outer, own, short])
    layer = trace_census.LayerTrace("x")
    trace_census.read_call(call, layer, ("own::mm",), trace_census.Timeline([]))
    assert layer.calls == 1
    assert layer.seconds == pytest.approx(20e-6)
    assert layer.matmuls == Counter({"aten::linear": 1, "own::mm": 1, "aten::addmm": 1})
    assert layer.matmul_seconds == pytest.approx((4 + 3 + 1) * 1e-6)
    assert layer.operations == Counter(
        {"aten::mm": 2, "aten::linear": 1, "own::mm": 1, "aten::addmm": 1}
    )
    assert layer.plain == {(32, 64), (64, 32)}


# --- workbench ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("home", "cache", "more"),
    [("/", "", {}), ("/h", "", {"/h": "$HOME"}), ("/", "/c", {"/c": "$HUB"})],
)
def test_folders_that_a_record_must_not_name(
    home: str, cache: str, more: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantmatrix.tables import read as tables_read
    from quantmatrix.tiny import hub

    bench = workbench.Workbench(read.read())
    monkeypatch.setattr(hub, "default_folder", lambda: Path("/hub"))
    monkeypatch.setattr(tables_read, "tables_folder", lambda: Path("/project/matrix"))
    monkeypatch.setattr(workbench.Path, "home", lambda: Path(home))
    found = bench.folders(Request(hub=Hub(cache_dir=cache or None)))
    assert found == {"/hub": "$HUB", "/project": "$PROJECT", **more}
