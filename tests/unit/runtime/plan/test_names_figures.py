"""Names and sources: stand-ins of rows, targets, texts of dialects and of contradictions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from refusals import refusal
from torch import nn

from quantmatrix.checkpoints.checkpoint import Checkpoint
from quantmatrix.checkpoints.header import TensorHeader
from quantmatrix.errors import CheckpointError, UsageError
from quantmatrix.models.dialect import Target
from quantmatrix.request import Hub, Request
from quantmatrix.runtime import empty_model
from quantmatrix.runtime.empty_model import ModelShapes
from quantmatrix.runtime.plan import dialects, encoders, sources
from quantmatrix.runtime.plan.learned_names import (
    LOST,
    LearningError,
    Rows,
    Run,
    StateDict,
    describe,
    name_targets,
    name_whole,
)
from quantmatrix.scheme import Scheme

FP8 = Scheme("linear.fp8", "FP8", "e4m3", "tensor", "tensor-static")


def make(stored: Mapping[str, tuple[str, tuple[int, ...]]], **more: Any) -> Checkpoint:
    tensors = {n: TensorHeader(n, dtype, shape, "f.st") for n, (dtype, shape) in stored.items()}
    return Checkpoint("here", more.pop("files", ("f.st",)), tensors, **more)


# --- stand-ins of rows -----------------------------------------------------------------------


def rows(*shape: int, name: str = "w") -> Rows:
    return Rows((Run(name),), shape)


def test_rows_are_cut() -> None:
    w: Any = rows(12, 5)
    assert [(p.runs[0].index, p.runs[0].count, p.shape) for p in torch.chunk(w, 3, dim=0)] == [
        (0, 3, (4, 5)), (1, 3, (4, 5)), (2, 3, (4, 5)),
    ]  # fmt: skip
    parts = torch.split(w, [3, 7, 2])
    assert [(p.runs[0].index, p.runs[0].sizes, p.shape) for p in parts] == [
        (0, (3, 7, 2), (3, 5)), (1, (3, 7, 2), (7, 5)), (2, (3, 7, 2), (2, 5)),
    ]  # fmt: skip
    assert [p.shape for p in w.split(5)] == [(4, 5)] * 3
    assert [p.shape for p in rows(14, 5).chunk(4)] == [(3, 5)] * 4
    assert [p.shape for p in w.split(4)] == [(4, 5)] * 3
    joined: Any = torch.cat([parts[1], parts[0]])
    assert ([run.index for run in joined.runs], joined.shape) == ([1, 0], (10, 5))
    assert (w.size(), w.size(0), w.size(1)) == ((12, 5), 12, 5)
    assert w.contiguous() is w
    assert w.clone() is w
    for act, text in (
        (lambda: w.chunk(2, dim=1), "w is cut twice, or not by rows"),
        (lambda: torch.chunk(w, 2)[0].chunk(2), "w is cut twice, or not by rows"),
        (lambda: torch.chunk(w, 2, dim=1), "w is cut twice, or not by rows"),
        (lambda: torch.split(w, 2, dim=1), "w is cut twice, or not by rows"),
        (lambda: torch.cat([w, w], dim=1), "w is joined, and not by rows"),
        (lambda: torch.cat([w, w], 1), "w is joined, and not by rows"),
        (lambda: w.reshape(60).chunk(2), "w is cut twice, or not by rows"),
        (lambda: torch.abs(w), "abs is applied to w"),
        (lambda: w[::2], "rows slice(None, None, 2) of w"),
        (lambda: w[3:3], "rows slice(3, 3, None) of w"),
        (lambda: w[0], "[0] of w"),
        (lambda: w[:, 1], "[(slice(None, None, None), 1)] of w"),
    ):
        assert refusal(LearningError, act) == text


@pytest.mark.parametrize(
    ("start", "stop", "index", "sizes"),
    [
        (0, 5, 0, (5, 7)),
        (5, 12, 1, (5, 7)),
        (3, 5, 1, (3, 2, 7)),
        (0, 12, 0, (12,)),
        (1, 12, 1, (1, 11)),
    ],
)
def test_rows_are_taken(start: int, stop: int, index: int, sizes: tuple[int, ...]) -> None:
    [run] = rows(12, 5)[start:stop].runs
    assert (run.index, run.count, run.sizes) == (index, len(sizes), sizes)
    assert rows(12, 5)[start:stop].shape == (stop - start, 5)


def test_rows_in_other_shapes() -> None:
    w = rows(1, 12, 1, 5)
    for key, shape in (
        ((0,), (12, 1, 5)),
        ((0, slice(None), 0), (12, 5)),
        ((slice(None), slice(None), 0), (1, 12, 5)),
    ):
        found = w[key]
        assert (found.shape, found.reshaped) == (shape, True)
    assert rows(12, 5).reshape(6, -1).shape == (6, 10)
    assert rows(12, 5).view((-1, 4)).shape == (15, 4)
    assert rows(12, 5).reshape(3, 20).shape == (3, 20)
    assert not rows(12, 5).reshaped


def test_tensors_that_a_file_lacks() -> None:
    state = StateDict({"a": 1})
    assert state.pop("a") == 1
    assert state.pop("b") is LOST
    assert state.pop("b", 5) == 5
    assert state["c"] is LOST
    assert LOST.chunk(3) == [LOST] * 3
    assert [part.runs[0].source for part in LOST.split([2, 4])] == ["", ""]
    assert describe(rows(2)) == "w"
    assert describe(3) == "int"


def piece(index: int, count: int, sizes: tuple[int, ...] = (), source: str = "w") -> Rows:
    return Rows((Run(source, index, count, sizes),), (1, 1))


def test_targets_of_pieces() -> None:
    equal = {"k": piece(1, 3), "q": piece(0, 3), "v": piece(2, 3)}
    assert name_targets(equal, {}) == (
        Target("q", rows=(0, 1, 3)), Target("k", rows=(1, 2, 3)), Target("v", rows=(2, 3, 3)),
    )  # fmt: skip
    sizes = (4, 8, 12)
    uneven = {"q": piece(0, 3, sizes), "k": piece(1, 3, sizes), "v": piece(2, 3, sizes)}
    assert [t.rows for t in name_targets(uneven, {})] == [(0, 1, 6), (1, 3, 6), (3, 6, 6)]
    own = {"q": (6, 5), "k": (9, 5), "v": ()}
    assert [t.rows for t in name_targets(uneven, own)] == [(0, 2, 9), (2, 5, 9), (5, 9, 9)]
    assert name_targets({"a": rows(3, 2), "b": rows(3, 2)}, {}) == (Target("a"), Target("b"))
    for bad in ({"q": piece(0, 3), "k": piece(1, 3)}, {"q": piece(0, 2), "k": piece(0, 2)}):
        assert refusal(LearningError, name_targets, bad, {}) == (
            "w is cut into pieces, of which some go nowhere or twice"
        )


def join(*runs: tuple[int, int], sizes: tuple[int, ...] = (), other: str = "w") -> Rows:
    found = [Run("w", index, count, sizes) for index, count in runs]
    return Rows((*found[:-1], replace(found[-1], source=other)), (4, 2))


def test_targets_of_whole_tensors() -> None:
    assert name_whole("p", rows(4, 2)) == Target("p")
    assert name_whole("p", rows(4, 2).reshape(8)) == Target("p", reshaped=True)
    assert name_whole("p", join((1, 2), (0, 2))) == Target("p", swap_halves=True)
    assert name_whole("p", join((0, 2), (1, 2))) == Target("p")
    assert name_whole("p", join((0, 3), (1, 3), (2, 3))) == Target("p")
    assert name_whole("p", join((0, 2), (1, 2), sizes=(1, 3))) == Target("p")
    order = "p has the rows of w in another order"
    several = "p is made of several tensors, or of a part of w"
    for made, text in (
        (join((1, 2), (0, 2), sizes=(1, 3)), order), (join((2, 3), (1, 3), (0, 3)), order),
        (join((1, 3), (0, 3), (2, 3)), order), (join((0, 3), (1, 3)), several),
        (join((0, 2), (0, 2)), several), (join((0, 2), (1, 2), other="x"), several),
    ):  # fmt: skip
        assert refusal(LearningError, name_whole, "p", made) == text


# --- dialects --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "target", "shifted", "text"),
    [
        ("a", Target("a"), True, ""),
        ("a", Target("m", interleave=3), False,
         "and this layout has the layer as AWQ codes only: whether its rows are interleaved and 1 is added "
         "to its scale cannot be known. Quantize it, too"),
        ("a", Target("m", interleave=1), False, ""),
        ("a", Target("m", unsigned=True), False, ""), ("m", Target("m", unsigned=True), True, ""),
        ("z", Target("m", unsigned=True), True,
         "so that its bias may not be whole: converters that shift inputs for int4 leave 0.171875 times the "
         "sum of each row of this weight out of its bias. Add that if yours does, and write the layer as m"),
        ("a", Target("m", unsigned=True), True,
         "so that its bias may not be whole: converters that shift inputs for int4 leave 0.171875 times the "
         "sum of each row of this weight out of its bias. Add that if yours does, and write the layer as m"),
        ("a", Target("m", columns=(0, 1, 2)), False,
         "and is a part of the columns of m only: expected codes in every part, or none. Quantize them all, "
         "or join them (biases are added) as m.weight"),
        ("a", Target("m", columns=(0, 1, 2), unsigned=True), True,
         "and is a part of the columns of m only: expected codes in every part, or none. Quantize them all, "
         "or join them (biases are added) as m.weight; converters that shift inputs for int4 leave 0.171875 "
         "times the sum of each row of this weight out of its bias. Add that if yours does"),
    ],
)  # fmt: skip
def test_plain_layers_in_words(layer: str, target: Target, shifted: bool, text: str) -> None:
    assert dialects.explain_plain(layer, target, shifted) == text


def test_layers_without_codes() -> None:
    checkpoint = make({"a.scale": ("F32", ()), "b.weight": ("I8", (2, 3))})
    assert dialects.find_code(checkpoint, "b", "fp8").name == "b.weight"
    assert refusal(CheckpointError, dialects.find_code, checkpoint, "a", "fp8") == (
        "here: layer a has scales but no weight"
    )


# --- empty models ----------------------------------------------------------------------------


def test_shapes_of_a_model() -> None:
    model = nn.Sequential(nn.Linear(3, 5, bias=False, device="meta"), nn.BatchNorm1d(5))
    model.register_buffer("table", torch.ones(2), persistent=False)
    found = empty_model.list_shapes(model)
    assert found.tensors == {
        "0.weight": (5, 3), "1.weight": (5,), "1.bias": (5,), "1.running_mean": (5,),
        "1.running_var": (5,), "1.num_batches_tracked": (),
    }  # fmt: skip
    assert found.required == {"0.weight"}
    assert found.linears == {"0": empty_model.Linear(5, 3, False)}
    assert found.modules == {"": "Sequential", "0": "Linear", "1": "BatchNorm1d"}
    assert found.repeated == ()


@pytest.mark.parametrize(
    ("modules", "repeated", "found"),
    [
        ({"a": "ModuleList", "a.0": "X", "b": "ModuleList", "b.0": "Y"}, ("Y",), ("b",)),
        ({"a": "ModuleList", "a.0": "X", "b": "ModuleList", "b.0": "Y"}, (), ("a", "b")),
        ({"a": "ModuleList", "a.0": "X", "c.d": "ModuleList", "c.d.0": "X"}, ("X",), ("a",)),
        ({"a": "Linear", "z": "Sequential"}, ("X",), ()),
    ],
)
def test_blocks_of_a_model_without_a_file(
    modules: dict[str, str],
    repeated: tuple[str, ...],
    found: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(empty_model.models, "load", lambda model: SimpleNamespace(BLOCKS=()))
    linears = {f"{name}.0.q": empty_model.Linear(2, 2, True) for name in ("a", "b", "x")}
    shapes = ModelShapes({}, frozenset(), linears, modules, repeated)
    assert empty_model.find_blocks("o/r", shapes) == found
    assert empty_model.list_block_layers("o/r", shapes) == {
        f"{name}.0.q" for name in found if name in ("a", "b")
    }


@pytest.mark.parametrize("size", ["full ", "small", "a", "z", ""])
def test_sizes_that_are_unknown(size: str) -> None:
    assert refusal(UsageError, empty_model.build_plain, "flux-1", size) == (
        f"synthetic size {size!r}: expected full, blocks or tiny"
    )


@pytest.mark.parametrize("name", ["Linear", "FluxTransformer9DModel", "AutoTokenizer"])
def test_classes_that_are_no_models(name: str) -> None:
    import diffusers

    assert empty_model.find_model_class(name) is None
    assert refusal(CheckpointError, empty_model.build_empty, name, {}, "c.json") == (
        f"c.json: _class_name '{name}' is not a diffusers model: expected the class of a transformer that "
        f"diffusers {diffusers.__version__} has"
    )


# --- sources ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "here", "same"),
    [
        ("num_layers", 3, 3, True), ("num_layers", 3, 4, False), ("num_layers", 4, 3, False),
        ("num_layers", None, 3, True), ("num_layers", 3, None, True), ("_version", 3, 4, True),
        ("axes_lens", 3, 4, True), ("rope_max_seq_len", 3, 4, True), ("dtype", 3, 4, True),
        ("torch_dtype", 3, 4, True), ("quantization_config", 3, 4, True), ("name", "a", "b", False),
    ],
)  # fmt: skip
def test_two_configurations(key: str, value: Any, here: Any, same: bool) -> None:
    import json

    checkpoint = make({}, metadata={"config": json.dumps({key: value, "_class_name": "A"})})
    given = ("A", {key: here}, "c.json", checkpoint)
    if same:
        sources.check_stated_config(*given)
        return
    assert refusal(CheckpointError, sources.check_stated_config, *given) == (
        f"f.st: the header's config says {key} {json.dumps(value)}, c.json says {json.dumps(here)}: these "
        "are weights of another model, or of another size; name the base model that they were made from"
    )


@pytest.mark.parametrize("named", ["A", "Z"])
def test_classes_of_two_configurations(named: str) -> None:
    pair = ("/m/transformer_blocks.safetensors", "/m/unquantized_layers.safetensors")
    for more, source in (
        ({"metadata": {"config": f'{{"_class_name": "{named}"}}'}}, "f.st: the header's config"),
        ({"files": pair, "config": {"_class_name": named}, "config_file": "/m/config.json"},
         "/m/config.json: this config"),
    ):  # fmt: skip
        given = ("M", {}, "c.json", make({}, **more))
        assert refusal(CheckpointError, sources.check_stated_config, *given) == (
            f"{source} says these are weights of {named}, c.json says M: wrong model for the checkpoint"
        )
    sources.check_stated_config("M", {}, "c.json", make({}, config={"_class_name": named}))


def pipeline(**components: tuple[str, str]) -> Any:
    return SimpleNamespace(components=components, reference="o/r", class_name="P")


@pytest.mark.parametrize("stated", ["A", "Z", ""])
def test_classes_of_components(stated: str) -> None:
    base = pipeline(transformer=("diffusers", "M"))
    own = stated or "component without _class_name"
    assert refusal(
        CheckpointError, sources.check_class, "transformer", stated, "c", base, make({})
    ) == (f"c: this is a {own}, transformer of o/r is a M: wrong model for the checkpoint")
    sources.check_class("transformer", "M", "c", base, make({}))
    sources.check_class("transformer", stated, "c", pipeline(), make({}))


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ({"component_paths": {"vae": "x"}}, ""), ({"component_paths": {"transformer": "x"}}, ""),
        ({"component_paths": {"image_encoder": "x"}},
         "--image-encoder-path: o/r has no component image_encoder; it has text_encoder, transformer, vae"),
        ({"weights_paths": {"image_encoder": "x"}},
         "--image-encoder-weights-path: o/r has no component image_encoder; it has text_encoder, "
         "transformer, vae"),
        ({"weights_paths": {"text_encoder": "x"}}, ""),
        ({"weights_paths": {"vae": "x"}},
         "--vae-weights-path: only transformers and text encoders take a weights override (text_encoder, "
         "transformer)"),
    ],
)  # fmt: skip
def test_components_that_are_overridden(words: Any, text: str) -> None:
    base = pipeline(vae=("d", "A"), text_encoder=("t", "B"), transformer=("d", "C"))
    given = (Request(model_path="m", **words), base, ["transformer"])
    if text:
        assert refusal(UsageError, sources.check_overrides, *given) == text
    else:
        sources.check_overrides(*given)


def test_components_of_a_pipeline() -> None:
    both = pipeline(transformer_2=("d", "A"), transformer=("d", "A"), vae=("d", "B"))
    assert sources.component_names("wan-2-2", both) == ["transformer", "transformer_2"]
    assert sources.component_names("wan-2-2", pipeline()) == ["transformer"]
    assert sources.component_names("flux-1", both) == ["transformer"]
    text = refusal(CheckpointError, sources.component_names, "flux-1", pipeline(vae=("d", "B")))
    assert text.startswith(
        "o/r: model_index.json names no transformer, only vae: expected the transformer"
    )
    assert (sources.subfolder_of("vae", both), sources.subfolder_of("vae", pipeline())) == (
        "vae",
        "",
    )


def test_a_model_path_is_needed() -> None:
    assert refusal(UsageError, sources.find_base, Request(model_path="")) == (
        "--model-path is missing: name the base model, a folder or a hub id"
    )
    request = Request(model_path="x/FLUX.2-dev-NVFP4", hub=Hub())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "is_whole", lambda path, hub: False)
        base = "black-forest-labs/FLUX.2-dev"
        assert sources.find_base(request) == (base, {"transformer": "compat:x/FLUX.2-dev-NVFP4"})
        other = replace(request, component_paths={"transformer": "y"})
        assert sources.find_base(other) == (base, {})
        named = replace(request, weights_paths={"transformer": "z"})
        assert sources.find_base(named) == (base, {"transformer": "z"})
        patch.setattr(sources, "is_whole", lambda path, hub: True)
        assert sources.find_base(request) == ("x/FLUX.2-dev-NVFP4", {})
    assert sources.find_base(Request(model_path="o/r")) == ("o/r", {})


# --- text encoders ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype", "coded"),
    [
        ("a.weight", "BF16", False), ("a.weight", "F64", False), ("a.weight", "F8_E4M3", True),
        ("a.weight", "I8", True), ("a.weight", "A", True), ("a.qweight", "F32", True),
        ("a.comfy_quant", "F32", True), ("a.bias", "I8", False), ("a.weight_scale", "I8", False),
    ],
)  # fmt: skip
def test_tensors_that_are_codes(name: str, dtype: str, coded: bool) -> None:
    assert encoders.is_code(name, dtype) is coded


def test_layers_that_are_no_linear_ones() -> None:
    targets = {
        "embed": (Target("x"),),
        "q": (Target("m.q"),),
        "fused": (Target("y"), Target("m.k")),
    }
    names: Any = SimpleNamespace(layer_targets=lambda layer: targets[layer])
    cast = replace(FP8, name="fp8-cast", activation="none")
    given = dict.fromkeys(targets, cast)
    linears = ["m.q", "m.k"]
    assert list(encoders.drop_embeddings(given, "fp8", names, linears)) == ["q", "fused"]
    scaled = dict.fromkeys(targets, FP8)
    assert encoders.drop_embeddings(scaled, "fp8", names, linears) == scaled
    assert encoders.drop_embeddings(given, None, names, linears) == given


@pytest.mark.parametrize(
    ("stated", "good"), [("t5", True), ("a", False), ("umt5", False), (None, False), ("t6", False)]
)
def test_kinds_of_text_encoders(stated: str | None, good: bool) -> None:
    given = ("T5EncoderModel", {"model_type": stated}, "c.json")
    if good:
        encoders.check_kind(*given)
        return
    assert refusal(CheckpointError, encoders.check_kind, *given) == (
        f"c.json: model_type is {stated}, a T5EncoderModel is a t5: expected the configuration of the text "
        "encoder that the base model names"
    )
