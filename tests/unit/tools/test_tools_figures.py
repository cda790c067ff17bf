"""Tools by value: packing at its edges, shards, scales, and every refusal with its whole text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantmatrix.checkpoints.checkpoint import Checkpoint
from quantmatrix.checkpoints.header import TensorHeader
from quantmatrix.errors import CheckpointError, UsageError
from quantmatrix.families.protocol import Calibration, Declaration
from quantmatrix.models.dialect import Dialect, Rule, Target
from quantmatrix.tools import build_modelopt_fp8_transformer as fp8
from quantmatrix.tools import build_modelopt_nvfp4_transformer as nvfp4
from quantmatrix.tools import (
    dequantize,
    packing,
    quantize,
    quantize_encoder,
    recipe,
    transformer_folder,
    wan_repack,
)
from quantmatrix.tools.transformer_folder import TransformerFolder


def refuse(error: type[Exception], call: Any, *given: Any, **named: Any) -> str:
    """The whole text with which a call is refused."""
    with pytest.raises(error) as caught:
        call(*given, **named)
    return str(caught.value)


# --- packing ------------------------------------------------------------------------------------


def numbers(rows: int, columns: int) -> torch.Tensor:
    return torch.arange(float(rows * columns)).view(rows, columns)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ((0, 1, 2), [[0, 1, 2], [6, 7, 8]]),
        ((0, 1, 3), [[0, 1], [6, 7]]),
        ((1, 3, 3), [[2, 3, 4, 5], [8, 9, 10, 11]]),
        ((0, 1, 1), None),
    ],
)
def test_columns_of_a_split_layer(columns: tuple[int, int, int], expected: Any) -> None:
    target = Target("m", columns=columns)
    weight, bias = numbers(2, 6), torch.tensor([3.0, 4.0])
    found = packing.pack_part(target, "weight", weight)
    assert found.tolist() == (weight.tolist() if expected is None else expected)
    last = columns[1] == columns[2]
    assert packing.pack_part(target, "bias", bias).tolist() == (bias.tolist() if last else [0, 0])
    assert packing.pack_part(target, "scale", weight).tolist() == weight.tolist()


def test_rows_of_a_layer_that_is_stored_otherwise() -> None:
    swapped = Target("m", swap_halves=True)
    assert packing.pack_part(swapped, "weight", numbers(4, 1)).flatten().tolist() == [2, 3, 0, 1]
    woven = Target("m", interleave=3, plus_one=(1, 2))
    bias = torch.arange(6.0)
    assert packing.pack_part(woven, "bias", bias).tolist() == [0, 3, 5, 1, 4, 6]
    assert bias.tolist() == [0, 1, 2, 3, 4, 5]
    weight = packing.pack_part(woven, "weight", numbers(6, 1))
    assert weight.flatten().tolist() == [0, 2, 4, 1, 3, 5]
    plain = Target("m", interleave=1, plus_one=(0,))
    assert packing.pack_part(plain, "bias", bias).tolist() == bias.tolist()
    assert packing.pack_part(swapped, "weight", numbers(4, 1)).is_contiguous()


def test_parts_of_a_fused_layer_are_stacked() -> None:
    qkv = tuple(Target(f"a.{x}", rows=(n, n + 1, 3)) for n, x in enumerate("qkv"))
    dialect = Dialect(
        "d", "x", layers=(Rule("a.qkv", qkv),), tensors=(Rule("old", (Target("new"),)),)
    )
    plain = {f"a.{x}.weight": torch.full((1, 2), float(n)) for n, x in enumerate("vkq")}
    plain |= {"new": torch.tensor([7.0]), "single": torch.tensor([8.0]), "b.c.bias": torch.ones(1)}
    found = packing.pack_tensors(plain, dialect)
    assert {name: one.tolist() for name, one in found.items()} == {
        "old": [7.0],
        "single": [8.0],
        "a.qkv.weight": [[2.0, 2.0], [1.0, 1.0], [0.0, 0.0]],
        "b.c.bias": [1.0],
    }


@pytest.mark.parametrize(
    ("given", "coded"),
    [
        ({"columns": (0, 1, 2)}, True),
        ({"columns": (0, 1, 1)}, False),
        ({"unsigned": True}, True),
        ({"interleave": 3}, False),
        ({"swap_halves": True}, False),
    ],
)
def test_forms_of_quantized_layers_alone(given: dict[str, Any], coded: bool) -> None:
    rule = Rule("x", (Target("m"), Target("n", **given)))
    assert packing.is_coded_form(rule) is coded
    assert packing.is_coded_form(replace(rule, quantized_only=True))
    dialect = Dialect("d", "x", layers=(rule,))
    assert packing.list_layers(dialect, ["n"]) == ["x"]
    assert packing.list_layers(dialect, ["n"], lambda name: True) == (["n"] if coded else ["x"])


def test_the_layer_of_a_tensor() -> None:
    assert packing.split("a.b.weight") == ("a.b", "weight")
    assert packing.split("scale") == ("", "scale")
    assert packing.keep_none("anything") is False


# --- recipe -------------------------------------------------------------------------------------


def test_ranges_grow_with_every_pass() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
    found = recipe.watch_inputs(model)
    model[0](torch.tensor([[[1.0, -2.0], [3.0, 5.0]]]))
    model[0](torch.tensor([[2.0, -7.0]]))
    assert list(found) == ["0"]
    assert (found["0"].low.tolist(), found["0"].high.tolist()) == ([1.0, -7.0], [3.0, 5.0])


def test_ranges_are_widened_to_powers_of_two() -> None:
    seen = Calibration(torch.tensor([-3.0, -4.0, 0.0, -0.3]), torch.tensor([1.0, 5.0, 0.0, 0.125]))
    found = recipe.round_up(seen)
    assert found.low.tolist() == [-4.0, -4.0, 0.0, -0.5]
    assert found.high.tolist() == [1.0, 8.0, 0.0, 0.125]


def test_the_range_of_a_part_of_the_columns() -> None:
    rules = (
        Rule("left", (Target("m", columns=(0, 1, 3)),)),
        Rule("right", (Target("m", columns=(1, 3, 3)),)),
    )
    dialect = Dialect("d", "x", layers=rules)
    ranges = {"m": Calibration(torch.arange(6.0), torch.arange(10.0, 16.0))}
    for layer, low, high in (
        ("left", [0, 1], [10, 11]),
        ("right", [2, 3, 4, 5], [12, 13, 14, 15]),
        ("m", [0, 1, 2, 3, 4, 5], [10, 11, 12, 13, 14, 15]),
    ):
        found = recipe.find_range(ranges, layer, dialect)
        assert found is not None
        assert (found.low.tolist(), found.high.tolist()) == (low, high)
    assert recipe.find_range(ranges, "other", dialect) is None


def declaration(**given: Any) -> Declaration:
    usual: dict[str, Any] = {"config": None, "metadata": {}, "description": None, "blocks": None}
    return Declaration(**{**usual, **given})


def make_tensors(count: int) -> dict[str, torch.Tensor]:
    return {f"t{n}": torch.full((n + 1,), float(n)) for n in range(count)}


def test_a_folder_of_several_shards(tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    (base / "config.json").write_text('{"b": 1}')
    tensors = make_tensors(5)
    recipe.write_folder(
        tensors,
        declaration(config={"method": "x"}, metadata={"k": "v"}, description=("d.json", {"l": 2})),
        out,
        base,
        with_config=True,
        shards=3,
    )
    files = {p.name: sorted(load_file(p)) for p in out.glob("*.safetensors")}
    start = "diffusion_pytorch_model-0000"
    assert files == {
        f"{start}1-of-00003.safetensors": ["t0"],
        f"{start}2-of-00003.safetensors": ["t1", "t2"],
        f"{start}3-of-00003.safetensors": ["t3", "t4"],
    }
    index = json.loads((out / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 4 * (1 + 2 + 3 + 4 + 5)}
    assert index["weight_map"] == {n: file for file, names in files.items() for n in names}
    assert (out / "config.json").read_text() == (
        '{\n  "b": 1,\n  "quantization_config": {\n    "method": "x"\n  }\n}\n'
    )
    assert json.loads((out / "d.json").read_text()) == {"l": 2}


@pytest.mark.parametrize("with_config", [True, False])
def test_a_folder_says_what_it_is_in_one_place(tmp_path: Path, with_config: bool) -> None:
    from safetensors import safe_open

    (tmp_path / "config.json").write_text('{"b": 1}')
    own = declaration(config={"b": 2, "a": 1}, metadata={"k": "v"})
    recipe.write_folder(make_tensors(2), own, tmp_path / "x", tmp_path, with_config=with_config)
    path = tmp_path / "x" / "diffusion_pytorch_model.safetensors"
    with safe_open(path, "pt") as file:
        told = file.metadata()
    stored = {} if with_config else {"quantization_config": '{"a": 1, "b": 2}'}
    assert told == {"format": "pt", "k": "v", **stored}
    assert (tmp_path / "x" / "config.json").exists() is with_config


@pytest.mark.parametrize(
    ("name", "raw"),
    [("double_blocks.0.a", True), ("x.double_blocks.0", False), ("single_blocks.0", False)],
)
def test_a_single_file_declares_itself(tmp_path: Path, name: str, raw: bool) -> None:
    from safetensors import safe_open

    (tmp_path / "config.json").write_text('{"b": 1}')
    own = declaration(config={"m": 1}, metadata={"k": "v"})
    path = tmp_path / "deep" / "x.safetensors"
    recipe.write_file({name: torch.ones(1)}, own, path, tmp_path)
    with safe_open(path, "pt") as file:
        told = file.metadata()
    assert told == {
        "format": "pt",
        **({} if raw else {"k": "v"}),
        "quantization_config": '{"m": 1}',
        "config": '{"b": 1}',
    }
    recipe.write_file({name: torch.ones(1)}, declaration(), path, tmp_path)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_model_without_a_name_in_gguf(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "Odd"}')
    text = refuse(UsageError, recipe.write_gguf, {}, {}, tmp_path / "x.gguf", tmp_path)
    known = ", ".join(recipe.ARCHITECTURES)
    assert text == f"{tmp_path}: Odd has no name in GGUF files; known: {known}"


# --- transformer folders --------------------------------------------------------------------------


def header(dtype: str, *shape: int, name: str = "x", file: str = "f") -> TensorHeader:
    return TensorHeader(name, dtype, shape, file)


def folder_of(
    root: Path, tensors: Mapping[str, TensorHeader], config: Mapping[str, Any] | None = None
) -> TransformerFolder:
    named = {name: replace(one, name=name) for name, one in tensors.items()}
    return TransformerFolder(
        root, config or {}, ("s",), "i", Checkpoint(str(root), ("s",), named), {"s": {}}
    )


def test_shards_that_cannot_be_told(tmp_path: Path) -> None:
    find = transformer_folder.find_shards
    end = "no index: expected an index, or exactly one file; found"
    assert refuse(CheckpointError, find, tmp_path) == (
        f"{tmp_path}: 0 .safetensors files and {end} none"
    )
    for name in ("b.safetensors", "a.safetensors"):
        (tmp_path / name).touch()
    assert refuse(CheckpointError, find, tmp_path) == (
        f"{tmp_path}: 2 .safetensors files and {end} a.safetensors, b.safetensors"
    )
    index = tmp_path / "x.safetensors.index.json"
    index.write_text(
        '{"weight_map": {"t": "b.safetensors", "u": "c.safetensors", "v": "a.safetensors"}}'
    )
    assert refuse(CheckpointError, find, tmp_path) == (
        f"{index}: 1 of the 3 shards that it lists are missing: c.safetensors"
    )
    index.write_text('{"weight_map": {"t": "d.safetensors", "u": "c.safetensors"}}')
    assert refuse(CheckpointError, find, tmp_path) == (
        f"{index}: 2 of the 2 shards that it lists are missing: c.safetensors, d.safetensors; an "
        "index left behind? Remove it to take a.safetensors, b.safetensors"
    )
    index.write_text("{}")
    assert refuse(CheckpointError, find, tmp_path) == (
        f"{index}: 0 of the 0 shards that it lists are missing: it lists none; an index left behind? "
        "Remove it to take a.safetensors, b.safetensors"
    )
    index.write_text('{"weight_map": {"t": "b.safetensors", "u": "a.safetensors"}}')
    assert find(tmp_path) == (("a.safetensors", "b.safetensors"), index.name)
    index.rename(tmp_path / "diffusion_pytorch_model.safetensors.index.json")
    (tmp_path / "a.safetensors.index.json").write_text("{}")
    assert find(tmp_path)[1] == "diffusion_pytorch_model.safetensors.index.json"
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"t": "b.safetensors"}}')
    assert find(tmp_path) == (("b.safetensors",), "model.safetensors.index.json")


def test_a_single_file_has_the_index_that_it_would_have(tmp_path: Path) -> None:
    (tmp_path / "only.safetensors").touch()
    assert transformer_folder.find_shards(tmp_path) == (
        ("only.safetensors",),
        "only.safetensors.index.json",
    )
    assert refuse(UsageError, transformer_folder.open_transformer, tmp_path, "--x") == (
        f"--x {tmp_path}: no config.json in it or in its transformer/: expected a transformer "
        "folder in Diffusers' layout"
    )


@pytest.mark.parametrize(
    ("block", "found"),
    [
        (None, "None"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "zeta"}, "zeta"),
        ({}, "None"),
        ("text", "text"),
    ],
)
def test_a_folder_that_modelopt_did_not_export(block: Any, found: str) -> None:
    own = folder_of(Path("r"), {}, {"quantization_config": block})
    assert refuse(CheckpointError, transformer_folder.read_block, own) == (
        "r/config.json: expected a quantization_config with quant_method modelopt, found "
        f"{found}: is this the folder that ModelOpt exported?"
    )
    whole = folder_of(Path("r"), {}, {"quantization_config": {"quant_method": "modelopt", "a": 1}})
    assert transformer_folder.read_block(whole) == {"quant_method": "modelopt", "a": 1}


def test_outputs_that_would_be_written_over(tmp_path: Path) -> None:
    check, source = transformer_folder.check_output, tmp_path / "a" / "b"
    source.mkdir(parents=True)
    for output in (source, source / "c", source.parent):
        text = refuse(UsageError, check, output, True, [tmp_path / "z", source])
        assert text == f"--output-dir {output} overlaps {source}, which is read"
    check(tmp_path / "a" / "c", False, [source])
    assert refuse(UsageError, check, source, False, []) == (
        f"--output-dir {source} exists already: choose another, or --overwrite"
    )


def test_the_index_of_shards() -> None:
    items = [
        SimpleNamespace(name=name, nbytes=size) for name, size in (("z", 3), ("a", 40), ("m", 5))
    ]
    found = transformer_folder.make_index({"s2": items[:1], "s1": items[1:]})  # type: ignore[dict-item]
    assert found == {
        "metadata": {"total_size": 48},
        "weight_map": {"a": "s1", "m": "s1", "z": "s2"},
    }
    assert list(found["weight_map"]) == ["a", "m", "z"]


def test_what_a_folder_holds() -> None:
    tensors = {
        "b.weight": header("BF16", 2, file="r/s"),
        "a.weight": header("BF16", 2, file="r/t"),
        "a.bias": header("BF16", 2, file="r/s"),
    }
    own = folder_of(Path("r"), tensors, {"_class_name": "C"})
    assert own.modules() == ["a", "b"]
    assert list(own.tensors_of("s")) == ["b.weight", "a.bias"]
    assert (own.class_name, folder_of(Path("r"), {}).class_name) == ("C", "")
    with pytest.raises(FrozenInstanceError):
        own.index = "x"  # type: ignore[misc]


# --- builders -----------------------------------------------------------------------------------


def save_state(path: Path, state: Mapping[str, Any]) -> Path:
    torch.save({"model_state_dict": dict(state)}, path)
    return path


def test_scales_of_a_saved_model(tmp_path: Path) -> None:
    weight, given = ".weight_quantizer._amax", ".input_quantizer._amax"
    state = {
        f"a{weight}": torch.tensor([[6.0]], dtype=torch.bfloat16),
        f"a{given}": torch.tensor(3.0),
        f"b{weight}": torch.tensor(1.0),
        f"c{given}": torch.tensor(1.0),
        "a.weight": torch.ones(2),
    }
    path = save_state(tmp_path / "backbone.pt", state)
    for place in (path, tmp_path):
        found = fp8.read_scales(place, 24.0)
        assert {n: {k: s.tolist() for k, s in own.items()} for n, own in found.items()} == {
            "a": {"weight_scale": [0.25], "input_scale": [0.125]}
        }
    save_state(path, {**state, f"a{given}": torch.ones(2)})
    assert refuse(CheckpointError, fp8.read_scales, path, 1.0) == (
        f"{path}: a{given} has 2 elements: only one scale per tensor can be written; quantize with "
        "FP8_DEFAULT_CFG"
    )
    save_state(path, {f"b{weight}": torch.tensor(1.0)})
    assert refuse(CheckpointError, fp8.read_scales, path, 1.0) == (
        f"{path}: no module has both a weight and an input amax: expected "
        "`<module>.weight_quantizer._amax` and `<module>.input_quantizer._amax` in its "
        "model_state_dict; was the model calibrated?"
    )
    torch.save({"other": 1}, path)
    assert refuse(CheckpointError, fp8.read_scales, path, 1.0) == (
        f"{path}: expected a dictionary with the key model_state_dict"
    )
    assert refuse(UsageError, fp8.read_scales, tmp_path / "no", 1.0) == (
        f"--modelopt-backbone-ckpt {tmp_path}/no: no such file"
    )


def build_of(
    stored: TensorHeader,
    *,
    base: TensorHeader | None = None,
    kept: tuple[str, ...] = (),
    ignored: tuple[str, ...] = (),
    scale: float = 1.0,
) -> fp8.Build:
    source = folder_of(Path("src"), {"a.weight": stored})
    other = None if base is None else folder_of(Path("base"), {"a.weight": base})
    scales = {"a": {"weight_scale": torch.tensor([scale])}}
    return fp8.Build(source, other, scales, frozenset(kept), frozenset(ignored), "C")


@pytest.mark.parametrize(
    ("build", "algorithm", "text"),
    [
        (build_of(header("BF16", 2, 3)), "FP8", ""),
        (build_of(header("F8_E4M3", 2, 3)), "fp8", ""),
        (build_of(header("BF16", 2, 3)), None, ""),
        (
            build_of(header("BF16", 2, 3)),
            "NVFP4",
            "src/config.json: quant_algo is NVFP4: expected FP8, one scale per tensor; quantize with "
            "FP8_DEFAULT_CFG",
        ),
        (
            build_of(header("BF16", 2, 3)),
            "A",
            "src/config.json: quant_algo is A: expected FP8, one scale per tensor; quantize with "
            "FP8_DEFAULT_CFG",
        ),
        (build_of(header("BF16", 2, 3), ignored=("a",)), "FP8", ""),
        (build_of(header("F64", 2, 3), ignored=("a",)), "FP8", ""),
        (
            build_of(header("F8_E4M3", 2, 3), ignored=("a",)),
            "FP8",
            "f: a.weight is FP8, but the backbone checkpoint has no amax pair for it, or `ignore` "
            "lists it: are the two of one export?",
        ),
        (
            build_of(header("U8", 2, 3)),
            "FP8",
            "f: a.weight is U8: expected FP8 codes or plain numbers; this is not an FP8 export",
        ),
        (
            build_of(header("BF16", 2, 3), scale=0.0),
            "FP8",
            "f: a has the weight_scale 0 in the backbone checkpoint: expected a positive number. "
            "Calibrate with inputs that reach it, or keep it in BF16: --keep-bf16-pattern",
        ),
        (
            build_of(header("BF16", 2, 3), scale=float("inf")),
            "FP8",
            "f: a has the weight_scale inf in the backbone checkpoint: expected a positive number. "
            "Calibrate with inputs that reach it, or keep it in BF16: --keep-bf16-pattern",
        ),
        (build_of(header("U8", 2, 3), base=header("BF16", 2, 3), kept=("a",)), "FP8", ""),
        (
            build_of(header("BF16", 2, 3), kept=("a",)),
            "FP8",
            "no base: a.weight is to be kept in BF16 ([2, 3]), but the base has no such tensor",
        ),
        (
            build_of(header("BF16", 2, 3), base=header("BF16", 3, 2), kept=("a",)),
            "FP8",
            "base: a.weight is to be kept in BF16 ([2, 3]), but the base has BF16 [3, 2]",
        ),
        (
            build_of(header("BF16", 2, 3), base=header("I8", 2, 3), kept=("a",)),
            "FP8",
            "base: a.weight is to be kept in BF16 ([2, 3]), but the base has I8 [2, 3]",
        ),
    ],
)
def test_what_would_be_written_wrongly(build: fp8.Build, algorithm: str | None, text: str) -> None:
    block = {} if algorithm is None else {"quant_algo": algorithm}
    if text:
        assert refuse(CheckpointError, fp8.check_plan, build, block) == text
    else:
        fp8.check_plan(build, block)


class Reader:
    """Tensors by their names."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        self.tensors = tensors

    def read(self, name: str) -> Any:
        return self.tensors[name]


@pytest.mark.parametrize(
    ("largest", "fine"),
    [(448.0, True), (112.0, True), (111.0, False), (1792.0, True), (1793.0, False), (0.0, True)],
)
def test_a_weight_reaches_what_its_scale_is_for(largest: float, fine: bool) -> None:
    weight = torch.zeros(3, 2)
    weight[1, 1] = -largest * 0.5
    own = header("BF16", 3, 2, name="x")
    read: Any = Reader(x=weight)
    given = read, own, torch.tensor([0.5])
    if fine:
        found = fp8.read_fp8(*given)
        assert (found.dtype, found.shape) == (torch.float8_e4m3fn, (3, 2))
        assert float(found[1, 1]) == -min(largest, 448.0)
    else:
        assert refuse(CheckpointError, fp8.read_fp8, *given) == (
            f"f: x reaches {largest:.4g} times the scale that the backbone checkpoint gives it: "
            "expected about 448; the two are not of one model"
        )


@pytest.mark.parametrize(("stored", "fine"), [(2.0, True), (2.001, True), (2.01, False)])
def test_codes_have_been_divided_by_the_same_scale(stored: float, fine: bool) -> None:
    tensors = {"a.weight": header("F8_E4M3", 2, 3), "a.weight_scale": header("F32", 1)}
    tensors |= {
        "Z.weight": header("BF16", 2, 3),
        "Z.weight_scale": header("F32", 1),
    }  # not codes yet
    source = folder_of(Path("src"), tensors)
    scales = {name: {"weight_scale": torch.tensor([2.0])} for name in ("a", "Y", "Z")}
    build = fp8.Build(source, None, scales, frozenset(), frozenset(), "C")
    read: Any = Reader(**{"a.weight_scale": torch.tensor(stored)})
    if fine:
        fp8.check_scales(build, read)
        return
    assert refuse(CheckpointError, fp8.check_scales, build, read) == (
        f"f: a.weight_scale is {stored:g}, but the backbone checkpoint gives 2: the two are not of "
        "one export, or --maxbound is not the export's"
    )


def test_patterns_of_the_fp8_builder() -> None:
    tensors = {f"{name}.weight": header("BF16", 2, 3) for name in ("a.b", "a.bc", "d")}
    source = folder_of(Path("src"), tensors)
    assert fp8.find_kept(source, (r"a\.b",), (), "C") == {"a.b"}
    assert fp8.find_kept(source, (), ("b",), "C") == {"a.b", "a.bc"}
    assert refuse(CheckpointError, fp8.find_kept, source, ("a",), (), "C") == (
        "src: BF16 pattern 'a' matches none of its 3 modules, by the file's names or by SGLang's: a "
        "module is named like a.b. Choose another --model-type (or none), or correct the pattern"
    )
    assert refuse(UsageError, fp8.find_kept, source, (), ("(",), "C") == (
        "--keep-bf16-pattern: '(': missing ), unterminated subpattern at position 0"
    )
    scales = {"a.b": 1, "d": 1}
    assert fp8.find_ignored(source, {}, scales, "C") == {"a.bc"}
    assert fp8.find_ignored(source, {"ignore": ["d"]}, scales, "C") == {"a.bc", "d"}
    assert fp8.find_ignored(source, {"ignore": ["a.*"]}, scales, "C") == {"a.b", "a.bc"}
    assert fp8.find_ignored(source, {"ignore": ["a"]}, scales, "C") == {"a.bc"}
    flat = folder_of(Path("src"), {"d.weight": header("BF16", 2, 3, 1, 1)})
    assert fp8.find_ignored(flat, {}, scales, "C") == {"d"}


def test_what_the_fp8_builder_says_of_its_output() -> None:
    build = replace(build_of(header("BF16", 2, 3), ignored=("a",)), kept=frozenset({"z"}))
    block = {"ignore": ["m", 3], "extra": 1}
    assert fp8.describe(build, block)["quantization_config"] == {
        "ignore": ["3", "a", "m", "z"],
        "extra": 1,
        "quant_algo": "FP8",
        "quant_type": "FP8",
    }
    again = fp8.describe(build, {"quant_algo": "fp8", "quant_type": "own"})["quantization_config"]
    assert (again["quant_algo"], again["quant_type"]) == ("fp8", "own")


def test_patterns_of_the_nvfp4_builder() -> None:
    tensors = {
        "a.b.weight": header("U8", 4, 3),
        "a.c.weight": header("BF16", 4, 3),
        "d.weight": header("U8", 4, 3),
    }
    source = folder_of(Path("src"), tensors)
    base = folder_of(
        Path("base"), {"a.b.weight": header("BF16", 4, 6), "a.c.weight": header("F32", 4, 3)}
    )
    assert nvfp4.find_kept(source, base, ["a.*"]) == {"a.b", "a.c"}
    assert nvfp4.find_kept(source, base, []) == frozenset()
    assert refuse(CheckpointError, nvfp4.find_kept, source, base, ["b"]) == (
        "src: BF16 pattern 'b' matches none of its 3 modules: choose another --pattern-preset, or "
        "correct the pattern"
    )
    assert refuse(CheckpointError, nvfp4.find_kept, source, base, ["d"]) == (
        "base: d.weight is to be kept in BF16 (expected [4, 6]), but the base has no such tensor: it "
        "would stay quantized; is this the transformer that was exported?"
    )
    for found in (header("BF16", 4, 3), header("U8", 4, 6)):
        wrong = folder_of(Path("base"), {"d.weight": found})
        assert refuse(CheckpointError, nvfp4.check_replaceable, "d", source, wrong) == (
            "base: d.weight is to be kept in BF16 (expected [4, 6]), but the base has "
            f"{found.dtype} {list(found.shape)}: it would stay quantized; is this the transformer "
            "that was exported?"
        )


@pytest.mark.parametrize(
    ("tensor", "module"),
    [
        ("a.weight_scale_2", "a"),
        ("a.svdquant_lora_b", "a"),
        ("a.pre_quant_scale", "a"),
        ("a.bias", "a"),
        ("a.weight.x", "a.weight.x"),
        ("aweight", "aweight"),
    ],
)
def test_the_module_of_a_tensor(tensor: str, module: str) -> None:
    assert nvfp4.name_module(tensor) == module


def test_layers_that_an_export_lists_are_dropped() -> None:
    block = {
        "quantized_layers": {"a": 1, "b": 2},
        "config_groups": {"g": {"targets": ["b", "a"], "x": 3}, "h": {}},
        "other": 4,
    }
    assert nvfp4.drop_layers(block, frozenset({"a"})) == {
        "quantized_layers": {"b": 2},
        "config_groups": {"g": {"targets": ["b"], "x": 3}, "h": {"targets": []}},
        "other": 4,
    }
    plain = {"config_groups": {"g": {"targets": ["a"]}}}
    assert nvfp4.drop_layers(plain, frozenset({"a"})) == plain


def test_what_the_nvfp4_builder_counts_and_says() -> None:
    tensors = {
        "a.weight": header("U8", 4, 3),
        "a.weight_scale": header("F8_E4M3", 4, 1),
        "a.input_scale": header("F32", 1),
        "a.input_quantizer._amax": header("F32", 1),
        "b.weight": header("U8", 4, 3),
    }
    base = folder_of(Path("base"), {"a.weight": header("BF16", 4, 6)})
    counts = {"replaced": 0, "removed": 0}
    reader: Any = Reader()
    items = nvfp4.list_items(tensors, base, frozenset({"a"}), reader, reader, counts)
    assert [(one.name, one.dtype, one.shape) for one in items] == [
        ("a.weight", "BF16", (4, 6)),
        ("b.weight", "U8", (4, 3)),
    ]
    assert counts == {"replaced": 1, "removed": 2}
    block = {"quant_method": "modelopt", "quant_algo": "nvfp4", "ignore": ["m"]}
    block["quant_algo"] = "NVFP4_x"
    source = folder_of(Path("src"), tensors, {"quantization_config": block, "own": 1})
    found = nvfp4.describe(source, ["p*", "m"], frozenset({"a"}), True)
    assert found["own"] == 1
    assert found["quantization_config"] == {
        **block,
        "quant_type": "NVFP4_X",
        "ignore": ["m", "p*"],
        "swap_weight_nibbles": True,
    }
    other = folder_of(
        Path("src"), {}, {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}
    )
    assert refuse(CheckpointError, nvfp4.describe, other, [], frozenset(), False) == (
        "src/config.json: quant_algo is FP8: expected NVFP4; for FP8 exports there is "
        "build_modelopt_fp8_transformer"
    )


# --- dequantize, quantize, repacking --------------------------------------------------------------


def test_names_of_shards(tmp_path: Path) -> None:
    def make(count: int) -> list[Path]:
        files = [tmp_path / f"shard-{n}" for n in range(count)]
        for path in files:
            path.touch()
        return files

    assert dequantize.name_shards(make(1)) == ["diffusion_pytorch_model.safetensors"]
    found = dequantize.name_shards(make(2))
    assert found == [
        "diffusion_pytorch_model-00001-of-00002.safetensors",
        "diffusion_pytorch_model-00002-of-00002.safetensors",
    ]
    assert {path.name for path in tmp_path.iterdir()} == {
        *found,
        "diffusion_pytorch_model.safetensors",
    }


@pytest.mark.parametrize(
    ("limit", "shards"),
    [(10_000, 1), (40, 2), (39, 3), (60, 1), (59, 2), (1, 4)],
)
def test_shards_are_filled_up_to_their_size(
    limit: int, shards: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 12, 8, 20 and 20 bytes."""
    path = tmp_path / "in.safetensors"
    save_file({"x": torch.ones(1)}, path)
    sizes = {"d": 3, "c": 2, "b": 5, "a": 5}
    made = [
        (name, lambda reader, n=n: torch.ones(n, dtype=torch.float64), torch.Size([n]))
        for name, n in sizes.items()
    ]
    monkeypatch.setattr(dequantize, "SHARD_BYTES", limit)
    monkeypatch.setattr(dequantize, "list_tensors", lambda component: made)
    checkpoint = Checkpoint("r", (str(path),), {"x": header("F32", 1, file=str(path))})
    monkeypatch.setattr(dequantize, "fetch", lambda *_: checkpoint)
    config = {"b": 1, "a": 2, "quantization_config": {}, "compression_config": 3}
    component: Any = SimpleNamespace(
        checkpoint=checkpoint, config=config, class_name="C", config_from="there"
    )
    request: Any = SimpleNamespace(hub=None)
    out = tmp_path / "out"
    out.mkdir()
    found = dequantize.write_folder(component, request, out, torch.float32)
    assert (found["tensors"], found["bytes"], len(found["files"])) == (4, 60, shards)
    assert (out / "config.json").read_text() == '{\n  "a": 2,\n  "b": 1\n}\n'
    stored = {name: load_file(out / name) for name in found["files"]}
    assert {n for own in stored.values() for n in own} == set(sizes)
    assert all(t.dtype == torch.float32 for own in stored.values() for t in own.values())
    index = out / "diffusion_pytorch_model.safetensors.index.json"
    assert index.exists() is (shards > 1)
    if shards > 1:
        told = json.loads(index.read_text())
        assert told["metadata"] == {"total_size": 60}
        assert told["weight_map"] == {n: file for file, own in stored.items() for n in own}
        assert list(told["weight_map"]) == sorted(sizes)
    made[0] = ("d", lambda reader: torch.ones(4), torch.Size([3]))
    assert (
        refuse(CheckpointError, dequantize.write_folder, component, request, out, torch.float32)
        == "r: d is [4], C (there) expects [3]: is it of another model?"
    )


def test_weight_and_bias_are_decoded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []

    def decode(*_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        decoded.append(1)
        return torch.ones(2, 3), torch.tensor([0.0, 5.0])

    monkeypatch.setattr(dequantize, "decode_pieces", decode)
    component: Any = SimpleNamespace(
        checkpoint=SimpleNamespace(reference="r"), class_name="C", config_from="there"
    )
    pieces: Any = (SimpleNamespace(layer="a.b"),)
    reader: Any = None
    parts = dequantize.Parts(component, pieces)
    assert parts.take(1, reader).tolist() == [0.0, 5.0]
    assert parts.take(0, reader).shape == (2, 3)
    assert len(decoded) == 1
    assert parts.kept == {}
    assert refuse(CheckpointError, dequantize.decode_bare, component, pieces, reader) == (
        "r: layer a.b has a bias, C of there expects none: is it of another model?"
    )


def test_pieces_are_put_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    def piece(columns: int, bias: list[float] | None, plus_one: tuple[int, ...] = ()) -> Any:
        target = SimpleNamespace(plus_one=plus_one, interleave=2)
        stored = None if bias is None else torch.tensor(bias)
        decoded = (torch.full((4, columns), float(columns)), stored)
        return SimpleNamespace(scheme=decoded, target=target, out_features=4)

    monkeypatch.setattr(dequantize, "read_piece", lambda *_: None)
    monkeypatch.setattr(dequantize.kernels, "decode", lambda scheme, _: scheme)
    pieces = (piece(2, [1.0, 2.0, 3.0, 4.0], (1,)), piece(3, None), piece(1, [10.0] * 4))
    weight, bias = dequantize.decode_pieces(None, pieces, None)  # type: ignore[arg-type]
    assert weight.tolist() == [[2.0, 2.0, 3.0, 3.0, 3.0, 1.0]] * 4
    assert bias.tolist() == [11.0, 12.0, 12.0, 13.0]
    assert pieces[0].scheme[1].tolist() == [1.0, 2.0, 3.0, 4.0]


def test_layers_that_calibration_missed() -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(5)), torch.nn.ReLU())
    seen = dict.fromkeys("0123")
    quantize.check_coverage("t", model, {**seen, "4": 1})
    seen.pop("1")
    assert refuse(UsageError, quantize.check_coverage, "t", model, seen) == (
        "calibration called 3 of the 5 linear layers of t; 1 was never reached: give more "
        "--num-inference-steps (a second expert takes only some of them)"
    )


def test_layers_that_were_left_alone_are_counted() -> None:
    packed = {
        "a.weight": torch.ones(2, 2),
        "b.weight": torch.ones(2, 2),
        "c.weight": torch.ones(2, 2),
        "n.weight": torch.ones(2),
        "v.weight": torch.ones(2, 2, 1, 1),
        "a.bias": torch.ones(2, 2),
    }
    assert quantize.count_kept(packed, {"a": None}) == 2  # type: ignore[dict-item]


def plan_of(**given: Any) -> Any:
    usual = {
        "components": {"t": SimpleNamespace(family=None, why="")},
        "pipeline_class": "P",
        "model": "flux-1",
        "base": "a/base",
    }
    return SimpleNamespace(**{**usual, **given})


@pytest.mark.parametrize(
    ("given", "family", "target", "text"),
    [
        (
            {"components": {"t": SimpleNamespace(family="fp8", why="it says so")}},
            "fp8",
            "x",
            "a/base: t is quantized already (it says so): name the model that it was made from",
        ),
        (
            {"pipeline_class": None},
            "fp8",
            "x",
            "a/base is one component: calibration needs the whole pipeline",
        ),
        (
            {},
            "fp8",
            "x.gguf",
            "--output-path x.gguf: a single file of fp8 ends in .safetensors: call it "
            "x.safetensors, or name a folder",
        ),
        (
            {},
            "gguf",
            "x.safetensors",
            "--output-path x.safetensors: a single file of gguf ends in .gguf: call it x.gguf, or "
            "name a folder",
        ),
        (
            {"components": dict.fromkeys("tu", SimpleNamespace(family=None))},
            "fp8",
            "x.safetensors",
            "--output-path x.safetensors: several components need a folder",
        ),
        (
            {},
            "msmodelslim",
            "x",
            "msmodelslim describes Wan2.2-T2V-A14B only, the model is flux-1",
        ),
    ],
)
def test_bases_and_outputs_that_do_not_fit(
    given: dict[str, Any], family: str, target: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantmatrix import families

    monkeypatch.setattr(quantize, "list_sources", lambda plan: [])
    scheme = next(iter(families.load(family).SCHEMES.values()))
    asked = plan_of(**given), family, Path(target), scheme, False
    assert refuse(UsageError, quantize.check_base, *asked) == text


def test_an_output_that_is_read_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "a" / "b"
    source.mkdir(parents=True)
    monkeypatch.setattr(quantize, "list_sources", lambda plan: [source])
    for target in (source, source.parent, source / "c"):
        assert refuse(UsageError, quantize.check_target, plan_of(), target, True) == (
            f"--output-path {target}: the model is read from {source}, which would be written over: "
            "choose another path"
        )
    quantize.check_target(plan_of(), tmp_path / "a" / "c", False)
    assert refuse(UsageError, quantize.check_target, plan_of(), source, False) == (
        f"--output-path {source} exists already: choose another, or --overwrite"
    )


def test_patterns_that_are_none() -> None:
    assert refuse(UsageError, quantize.compile_patterns, "--x", ["a", "("]) == (
        "--x (: no regular expression: missing ), unterminated subpattern at position 0"
    )
    keeper = quantize.Keeper(quantize.compile_patterns("--x", ["a.*", "b"]))
    assert [keeper(name) for name in ("a", "abc", "b", "bc", "xa")] == [
        True,
        True,
        True,
        False,
        False,
    ]
    assert not quantize.Keeper([])("a")
    part = SimpleNamespace(
        checkpoint=SimpleNamespace(tensors=dict.fromkeys(("a.weight", "a.bias", "b.weight")))
    )
    own: Any = SimpleNamespace(kept=quantize.Keeper(quantize.compile_patterns("--x", ["a", "c"])))
    assert refuse(UsageError, quantize.check_names, plan_of(components={"t": part}), own) == (
        "--keep c: matches none of the 2 modules of a/base; `quantmatrix inspect --layers` lists them"
    )
    assert refuse(UsageError, quantize.calibrate, plan_of(), [], None) == (
        "calibration needs at least one prompt"
    )
    assert refuse(UsageError, quantize_encoder.calibrate, plan_of(), "t", [], None) == (
        "calibration needs at least one prompt"
    )


@pytest.mark.parametrize(
    ("path", "single"),
    [("a.safetensors", True), ("a", False), ("a.bin", False), ("a.zip", False)],
)
def test_outputs_of_an_encoder(path: str, single: bool) -> None:
    assert quantize_encoder.is_file(Path(path)) is single


@pytest.mark.parametrize("count", [1, 8, 9, 11])
def test_tensors_that_are_missing_or_unknown(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {f"e{n:02}": (2, 3) for n in range(12)}
    monkeypatch.setattr(wan_repack, "list_tensors", lambda config: expected)
    whole = {name: header("BF16", 2, 3, name=f"old.{name}") for name in expected}
    source = Checkpoint("r", (), {})
    wan_repack.verify(source, whole, {}, {})
    names = [f"e{n:02}" for n in range(count)]
    shown = ", ".join(names[:8]) + (f" and {count - 8} more" if count > 8 else "")
    end = ": expected the 12 tensors of diffusers' WanTransformer3DModel; nothing was written"
    lacking = {name: one for name, one in whole.items() if name not in names}
    assert refuse(CheckpointError, wan_repack.verify, source, lacking, {}, {}) == (
        f"r lacks {shown}{end}"
    )
    more = whole | {f"x.{n}": header("BF16", 1, name=n) for n in names}
    assert refuse(CheckpointError, wan_repack.verify, source, more, {}, {}) == (
        f"r has, but the model does not know, {shown}{end}"
    )
    wan_repack.verify(source, more, {"x.weight": "W8A8"}, {})
    assert "does not know" in refuse(
        CheckpointError, wan_repack.verify, source, more, {"x.weight": "FLOAT"}, {}
    )


def test_tensors_of_another_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wan_repack, "list_tensors", lambda config: {"e": (2, 3)})
    source = Checkpoint("r", (), {})
    fine = {"e": header("U8", 9), "a_rot": header("F32", 1), "b.mul_scale": header("F32", 1)}
    wan_repack.verify(source, fine, {}, {})
    for dtype in ("BF16", "Z"):
        wrong = {"e": header(dtype, 3, 2, name="old")}
        assert refuse(CheckpointError, wan_repack.verify, source, wrong, {}, {}) == (
            "f: tensor old has shape [3, 2], diffusers expects [2, 3] for e: is this model of another "
            "size?"
        )


def test_names_that_meet_and_factors_that_are_missing() -> None:
    tensors = {"a": header("BF16", 1, name="a"), "b": header("BF16", 1, name="b")}
    source = Checkpoint("r", (), tensors)
    text = refuse(CheckpointError, wan_repack.rename_headers, source, {"a": "n", "b": "n"})
    assert text == "r: b and a both become n"
    smooth = Checkpoint("r", (), {"x.linear.weight": header("I8", 1)})
    assert refuse(CheckpointError, wan_repack.check_smoothing, smooth) == (
        "f: tensor x.linear.weight belongs to a smoothed layer, but tensor x.div.mul_scale is "
        "missing: was the folder written completely?"
    )
    wan_repack.check_smoothing(
        Checkpoint("r", (), {**smooth.tensors, "x.div.mul_scale": header("F32", 1)})
    )
    for name in ("AModel", "ZModel"):
        odd = Checkpoint("r", (), {}, config={"_class_name": name})
        assert wan_repack.read_config(odd, None) is None
    own = {"_class_name": "WanTransformer3DModel", "x": 1}
    assert wan_repack.read_config(Checkpoint("r", (), {}, config=own), None) == own


def test_a_configuration_of_another_class(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    source = Checkpoint("r", (), {})
    for name in ("AModel", "ZModel"):
        path.write_text(json.dumps({"_class_name": name}))
        assert refuse(CheckpointError, wan_repack.read_config, source, path) == (
            f'{path}: _class_name is "{name}", expected WanTransformer3DModel: is the original '
            "another model?"
        )


def test_experts_that_are_missing(tmp_path: Path) -> None:
    find = wan_repack.find_experts
    assert refuse(UsageError, find, tmp_path / "no", None) == (
        f"{tmp_path}/no is not a folder: expected what msmodelslim wrote to --save_path"
    )
    (tmp_path / "low_noise_model").mkdir()
    for model_type in (None, "Wan2.2-T2V-A14B"):
        assert refuse(CheckpointError, find, tmp_path, model_type) == (
            f"{tmp_path}/high_noise_model is missing: transformer is made from it"
        )
    out = tmp_path / "low_noise_model"
    assert refuse(UsageError, wan_repack.repack_pipeline, "x", tmp_path, tmp_path, out) == (
        f"{out} exists already: choose a new --output-path"
    )
    assert refuse(UsageError, wan_repack.repack_pipeline, "x", tmp_path, tmp_path, out / "a") == (
        f"{tmp_path}: no model_index.json in it: --original-model-path takes a folder in Diffusers' "
        "layout; `hf download Wan-AI/Wan2.2-T2V-A14B-Diffusers` makes one"
    )


def test_a_component_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = SimpleNamespace(components={"t": 1, "u": 2}, base="a/base", model="m")
    monkeypatch.setattr(dequantize, "find_sources", lambda request: sources)
    asked: list[Any] = []
    monkeypatch.setattr(dequantize, "plan_component", lambda *given: asked.append(given) or "plan")
    text = refuse(UsageError, dequantize.plan_decode, "request", "v")
    assert text == "a/base has no transformer component v; it has t, u"
    assert dequantize.plan_decode("request", "u") == "plan"  # type: ignore[arg-type, comparison-overlap]
    [(name, source, model, request, machine, notes)] = asked
    assert (name, source, model, request, notes) == ("u", 2, "m", "request", [])
    assert (machine.name, machine.vendor, machine.arch, machine.memory_bytes) == (
        "cpu", "cpu", "cpu", 0,
    )  # fmt: skip

    def fail(*_: Any) -> None:
        raise dequantize.kernels.NoKernel("a-rule", "no kernel")

    monkeypatch.setattr(dequantize, "plan_component", fail)
    with pytest.raises(dequantize.RefusedError) as caught:
        dequantize.plan_decode("request", "u")  # type: ignore[arg-type]
    assert (caught.value.rule, caught.value.message) == ("a-rule", "no kernel")


@pytest.mark.parametrize("witness", [None, "found"])
def test_what_is_told_of_plain_weights(
    witness: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = SimpleNamespace(family="fp8")
    report = None if witness is None else SimpleNamespace(to_json=lambda: witness)
    monkeypatch.setattr(dequantize, "plan_decode", lambda *_: plan)
    monkeypatch.setattr(dequantize.verdict, "confirm", lambda *_: report)
    asked: list[Any] = []

    def write(component: Any, request: Any, folder: Path, dtype: torch.dtype) -> dict[str, int]:
        asked.append(dtype)
        (folder / "x").touch()
        return {"tensors": 3}

    monkeypatch.setattr(dequantize, "write_folder", write)
    target = tmp_path / "out"
    request: Any = None
    assert dequantize.dequantize(request, str(target)) == {
        "output": str(target),
        "dtype": "float32",
        "family": "fp8",
        "witness": witness,
        "tensors": 3,
    }
    assert (target / "x").exists()
    assert refuse(UsageError, dequantize.dequantize, request, str(target)) == (
        f"{target} exists already: choose a new --output-path"
    )
    dequantize.dequantize(request, str(tmp_path / "b"), dtype="bfloat16")
    assert asked == [torch.float32, torch.bfloat16]

    def full(*_: Any) -> None:
        raise OSError(28, "No space left")

    monkeypatch.setattr(dequantize, "write_folder", full)
    assert refuse(UsageError, dequantize.dequantize, request, str(tmp_path / "c")) == (
        f"cannot write {tmp_path}/c: No space left; nothing was left behind"
    )


def test_layers_of_an_encoder_that_are_quantized() -> None:
    names: Any = SimpleNamespace(layer_targets=lambda layer: [SimpleNamespace(module=f"m.{layer}")])
    tensors = {
        f"{name}.weight": torch.ones(2, 64)
        for name in ("b.0.q", "b.0.kept", "b.1.uncalled", "head", "b.1.odd")
    }
    tensors["b.1.odd.weight"] = torch.ones(2, 63)
    tensors |= {"b.0.norm.weight": torch.ones(2), "b.0.q.bias": torch.ones(2, 64)}
    called = [f"m.{name}" for name in ("b.0.q", "b.0.kept", "head", "b.1.odd", "b.0.norm")]
    ranges: Any = dict.fromkeys([*called, "m.b.0.q.bias"])
    from quantmatrix.families import modelopt_nvfp4

    keeps = quantize.compile_patterns("--keep", [r"m\.b\.0\.kept", r"b\.0\.q"])
    scheme = modelopt_nvfp4.NVFP4
    found = quantize_encoder.choose_layers(tensors, names, ranges, scheme, keeps)
    assert found == {"b.0.q": scheme}


@pytest.mark.parametrize("single", [True, False])
def test_a_text_encoder_declares_itself(single: bool, tmp_path: Path) -> None:
    from safetensors import safe_open

    (tmp_path / "config.json").write_text('{"b": 1}')
    own = declaration(config={"m": 1, "a": 2}, metadata={"k": "v"})
    path = tmp_path / "deep" / ("x.safetensors" if single else "x")
    quantize_encoder.write({"t": torch.ones(1)}, own, path, tmp_path, single=single)
    file = path if single else path / "model.safetensors"
    with safe_open(file, "pt") as opened:
        told = opened.metadata()
    more = {"quantization_config": '{"a": 2, "m": 1}'} if single else {}
    assert told == {"format": "pt", "k": "v", **more}
    if not single:
        assert json.loads((path / "config.json").read_text()) == {
            "b": 1,
            "quantization_config": {"m": 1, "a": 2},
        }


@pytest.mark.parametrize(
    ("component", "named", "encoders", "text"),
    [
        (
            "vae",
            {},
            {},
            "--component vae: a/base has the text encoders text_encoder, text_encoder_2; without the "
            "flag its transformers are quantized",
        ),
        (
            "text_encoder_3",
            {},
            {},
            "--component text_encoder_3: a/base has the text encoders text_encoder, text_encoder_2; "
            "without the flag its transformers are quantized",
        ),
        (
            "text_encoder_2",
            {"text_encoder_2": "x"},
            {},
            "--text-encoder-2-path: the base model's own text_encoder_2 is quantized; leave it out",
        ),
        (
            "text_encoder",
            {},
            {"text_encoder": SimpleNamespace(why="it says so")},
            "a/base: text_encoder is quantized already (it says so): name the model that it was made "
            "from",
        ),
    ],
)
def test_encoders_that_cannot_be_opened(
    component: str,
    named: dict[str, str],
    encoders: dict[str, Any],
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    index = {"vae": ["diffusers", "V"], "text_encoder_3": [None, None]}
    index |= {name: ["transformers", "E"] for name in ("text_encoder", "text_encoder_2")}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    monkeypatch.setattr(quantize_encoder, "fetch_pipeline", lambda *_, without: tmp_path)
    for paths in ("component_paths", "weights_paths"):
        request = SimpleNamespace(hub=None, component_paths={}, weights_paths={})
        setattr(request, paths, named)
        plan = plan_of(request=request, encoders=encoders)
        assert refuse(UsageError, quantize_encoder.open_encoder, plan, component) == text


class Opened:
    """In place of a reader: it opens nothing."""

    def __init__(self, *_: Any) -> None: ...

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None: ...

    def read(self, name: str) -> torch.Tensor:
        return torch.tensor([2.0])


def test_weight_and_bias_by_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        dequantize, "find_biases", lambda checkpoint, layer, family: layer.startswith("with")
    )
    monkeypatch.setattr(
        dequantize, "decode_pieces", lambda *_: (torch.full((2, 2), 7.0), torch.zeros(2) + 5)
    )
    monkeypatch.setattr(dequantize, "decode_bare", lambda *_: "bare")
    monkeypatch.setattr(dequantize, "read_plain", lambda component, plain, _: plain.name)
    pieces = {
        "a": (SimpleNamespace(layer="none"), SimpleNamespace(layer="with a bias")),
        "b": (SimpleNamespace(layer="none"),),
        "c": (SimpleNamespace(layer="with one"),),
    }
    component: Any = SimpleNamespace(
        layers=pieces,
        family="fp8",
        checkpoint=None,
        plain=[SimpleNamespace(parameter="n.weight", name="stored")],
    )
    made = {
        name: make(None)  # type: ignore[arg-type]
        for name, make in dequantize.decode_tensors(component, {"a.bias", "b.bias"})
    }
    assert {n: t if isinstance(t, str) else float(t.max()) for n, t in made.items()} == {
        "a.weight": 7.0,
        "a.bias": 5.0,
        "b.weight": "bare",
        "c.weight": "bare",
        "n.weight": "stored",
    }


BLOCK = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["z"]}


def test_what_the_builders_write_into_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sorted, so that two builds give the same bytes whatever order the export has."""
    tensors = {
        "b.weight": header("BF16", 2, 3, file="src/s"),
        "a.weight": header("BF16", 2, 3, file="src/s"),
        "a.x_quantizer.y": header("F32", 1, file="src/s"),
    }
    config = {"zeta": 1, "_class_name": "C", "quantization_config": BLOCK, "alpha": 2}
    source = folder_of(Path("src"), tensors, config)
    base = folder_of(Path("base"), {"b.weight": header("F32", 2, 3)})
    asked: list[Any] = []
    for module in (fp8, nvfp4):
        monkeypatch.setattr(
            module, "open_transformer", lambda path, flag: base if path == Path("base") else source
        )
        monkeypatch.setattr(module, "check_output", lambda *given: asked.append(given))
        monkeypatch.setattr(module, "TensorReader", Opened)
        monkeypatch.setattr(module, "write_transformer", lambda *given: asked.append(given))
    scale = torch.tensor([0.5])
    monkeypatch.setattr(
        fp8,
        "read_scales",
        lambda path, maxbound: {"a": {"weight_scale": scale, "input_scale": scale}},
    )
    out = Path("out")
    assert fp8.build(
        Path("src"), Path("b.pt"), out, base_transformer_dir=Path("base"),
        model_type="none", keep_bf16_patterns=("^b$",),
    ) == {
        "quantized_weights": 1,
        "bf16_fallback_weights": 1,
        "preserved_ignored_weights": 0,
        "added_scale_tensors": 2,
        "output_shards": 1,
    }  # fmt: skip
    assert asked[0] == (out, False, [Path("src"), Path("base")])
    target, written, shards, made, metadata = asked[1]
    assert (target, written) == (out, source)
    assert [(one.name, one.dtype, one.shape) for one in shards["s"]] == [
        ("b.weight", "F32", (2, 3)),
        ("a.weight", "F8_E4M3", (2, 3)),
        ("a.weight_scale", "F32", (1,)),
        ("a.input_scale", "F32", (1,)),
    ]
    quantization = '{"ignore": ["b", "z"], "quant_algo": "FP8", "quant_method": "modelopt", "quant_type": "FP8"}'
    assert metadata == {
        "_class_name": "C",
        "config": f'{{"_class_name": "C", "alpha": 2, "quantization_config": {quantization}, '
        '"zeta": 1}',
        "quantization_config": quantization,
        "_quantization_metadata": quantization,
    }
    assert made["quantization_config"]["ignore"] == ["b", "z"]
    assert refuse(
        UsageError, fp8.build, Path("src"), Path("b"), out, keep_bf16_patterns=("b",)
    ) == ("--base-transformer-dir is missing: layers kept in BF16 are taken from it")
    asked.clear()
    config["quantization_config"] = {**BLOCK, "quant_algo": "NVFP4"}
    monkeypatch.setattr(nvfp4, "warn_of_tiles", lambda source: None)
    assert nvfp4.build(
        Path("base"), Path("src"), out, keep_bf16_patterns=("b",), overwrite=True,
    ) == {
        "fallback_modules": 1,
        "replaced_tensors": 1,
        "removed_aux_tensors": 0,
        "output_shards": 1,
        "swap_weight_nibbles": False,
    }  # fmt: skip
    assert asked[0] == (out, True, [Path("src"), Path("base")])
    quantization = (
        '{"ignore": ["z", "b"], "quant_algo": "NVFP4", "quant_method": "modelopt", "quant_type": '
        '"NVFP4", "swap_weight_nibbles": false}'
    )
    assert asked[1][4] == {
        "quantization_config": quantization,
        "_quantization_metadata": quantization,
    }


def test_doubts_of_an_export_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def doubts(checkpoint: Checkpoint, _: Any) -> list[str]:
        asked.append((checkpoint.files, checkpoint.metadata, checkpoint.quantization))
        return ["one doubt", "another"] if checkpoint.metadata else []

    own = folder_of(Path("src"), {}, {"quantization_config": BLOCK})
    own = replace(own, metadata={"s": {}, "t": {"k": "v"}, "u": {"k": "w"}})
    monkeypatch.setattr(nvfp4.families, "load", lambda name: SimpleNamespace(doubts=doubts))
    with pytest.warns(UserWarning, match="doubt|another") as caught:
        nvfp4.warn_of_tiles(own)
    assert [str(one.message) for one in caught] == ["one doubt", "another"]
    assert asked == [(("src/s",), {}, BLOCK), (("src/t",), {"k": "v"}, BLOCK)]
