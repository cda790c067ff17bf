"""Requests, files, schemes, errors and the public functions at their edges, with whole messages."""

from __future__ import annotations

import errno
import os
import re
import time
import warnings
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quantmatrix import api, files, request, scheme
from quantmatrix.errors import (
    CheckpointError,
    MissingPackageError,
    QuantmatrixError,
    RefusedError,
    UnusableError,
    UsageError,
)
from quantmatrix.exit_codes import MEANINGS, blames_environment
from quantmatrix.request import (
    Hub,
    Request,
    blank_generation,
    normalize_flags,
    parse_overrides,
    strip_quantization,
)
from quantmatrix.scheme import Scheme, explain_width, measure_features, name_format


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"dtype": "float8"}, "--dtype float8: expected one of bfloat16, float16, float32"),
        ({"witness": "on"}, "--witness on: expected auto, require, off"),
        ({"nibble_order": "odd"}, "--nibble-order odd: expected low, high"),
        ({"nvfp4_layout": "z"}, "--nvfp4-layout z: expected rows, tiles"),
        ({"height": 0}, "--height 0: expected 1 or more"),
        ({"num_inference_steps": -3}, "--num-inference-steps -3: expected 1 or more"),
        ({"guidance_scale": float("inf")}, "--guidance-scale inf: expected a number"),
        ({"prompt": ()}, "--prompt: none given, expected one or more"),
        ({"seed": ()}, "--seed: none given, expected one or more"),
        ({"seed": (1, 2**64)}, f"--seed {2**64}: expected a number of 64 bits"),
        (
            {"compile": True, "dit_cpu_offload": True},
            "--compile needs the transformer on its device: leave out the offload",
        ),
        (
            {"cuda_graph": True, "dit_layerwise_offload": True},
            "--cuda-graph needs the transformer on its device: leave out the offload",
        ),
        (
            {
                "component_paths": {"text_encoder": "a/w.GGUF"},
                "weights_paths": {"text_encoder": "b.bin"},
            },
            "--text-encoder-path a/w.GGUF names a weight file, and --text-encoder-weights-path b.bin "
            "names another: give one",
        ),
    ],
)
def test_requests_that_are_none(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=f"^{re.escape(said)}$"):
        Request(**given)


def test_what_a_request_takes() -> None:
    one = Request(
        image_path="a.png",  # type: ignore[arg-type]
        component_paths={"a": "x.ckpt", "b": "some/repo", "c": "w.pt"},
        weights_paths={"a": "x.ckpt"},
        guidance_scale=-2.5,
        nibble_order="high",
        nvfp4_layout="tiles",
        witness="require",
    )
    assert one.image_path == ("a.png",)
    assert one.component_paths == {"b": "some/repo"}
    assert one.weights_paths == {"a": "x.ckpt", "c": "w.pt"}
    assert Request(image_path=()).image_path == ()
    assert Request(dit_cpu_offload=True).compile is False
    assert (one.dtype, one.nproc_per_node, one.shard_weights) == ("bfloat16", 1, False)
    assert (one.prompt, one.seed, one.hub) == (("",), (0,), Hub(None, offline=False))


@pytest.mark.parametrize(
    "name", [f"w{ending}" for ending in (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt")]
)
def test_names_of_weight_files(name: str) -> None:
    assert Request(component_paths={"x": name}).weights_paths == {"x": name}
    assert Request(component_paths={"x": f"{name}.d"}).weights_paths == {}


@pytest.mark.parametrize(
    ("words", "normal"),
    [
        (["--a_b", "c_d"], ["--a-b", "c_d"]),
        (["--a_b=c_d"], ["--a-b=c_d"]),
        (["--component_paths.text_encoder", "x"], ["--component-paths.text_encoder", "x"]),
        (["--component_paths.text_encoder=x_y"], ["--component-paths.text_encoder=x_y"]),
        (["-a_b", "a_b", "--"], ["-a_b", "a_b", "--"]),
    ],
)
def test_names_of_flags(words: list[str], normal: list[str]) -> None:
    assert normalize_flags(words) == normal


@pytest.mark.parametrize(
    ("words", "components", "weights"),
    [
        ([], {}, {}),
        (["--vae-path", "x", "--vae-path", "x"], {"vae": "x"}, {}),
        (["--vae-path=", "--a-b-path=c=d"], {"vae": "", "a_b": "c=d"}, {}),
        (["--a-weights-path", "x", "--a-path", "y"], {"a": "y"}, {"a": "x"}),
        (["--component-paths.text-encoder", "x"], {"text_encoder": "x"}, {}),
        (["--a2-path", "-x"], {"a2": "-x"}, {}),
    ],
)
def test_paths_of_components(words: list[str], components: Any, weights: Any) -> None:
    assert parse_overrides(words) == (components, weights)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--x", "1", "--vae-path", "y", "z"], "unrecognized arguments: --x 1 z"),
        (["--vae-path"], "--vae-path: expected a file, a folder or a hub id after it"),
        (["--vae-path", "--x"], "--vae-path: expected a file, a folder or a hub id after it"),
        (["--vae-path", "a", "--vae-path", "b"], "--vae-path is given twice: a and b"),
        (
            ["--a-weights-path=x", "--a-weights-path", "w"],
            "--a-weights-path is given twice: x and w",
        ),
        (["--2a-path", "x"], "unrecognized arguments: --2a-path x"),
    ],
)
def test_paths_that_are_none(words: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=f"^{re.escape(said)}$"):
        parse_overrides(words)


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (["--lora-scale", "0.5", "--lora-scale", "-2"], {"lora_scale": (0.5, -2.0)}),
        (["--lora-path", "a", "--lora-path", "b"], {"lora_path": ("a", "b")}),
        (["--enable-svdquant"], {"enable_svdquant": True}),
        (["--enable-svdquant", "FALSE"], {"enable_svdquant": False}),
        (["--dit-cpu-offload=true", "--tiny"], {"dit_cpu_offload": True, "tiny": True}),
        (
            ["--nproc-per-node", "3", "--shard-weights"],
            {"nproc_per_node": 3, "shard_weights": True},
        ),
        (["--image-path", "a", "b"], {"image_path": ("a", "b")}),
        (["--quantization-ignored-layers", "a", "b"], {"quantization_ignored_layers": ("a", "b")}),
        (["--quantization_rank", "16"], {"quantization_rank": 16}),
        ([], {"enable_svdquant": None, "tiny": False, "compile": False, "seed": (0,)}),
    ],
)
def test_words_become_fields(words: list[str], values: dict[str, Any]) -> None:
    found = Request.from_words(["--model-path", "m", *words])
    assert {name: getattr(found, name) for name in values} == values
    assert found.model_path == "m"


def test_a_request_without_its_quantization() -> None:
    every: dict[str, Any] = {
        "model_path": "q", "model_id": "FLUX", "enable_svdquant": True,
        "quantization_precision": "int4", "quantization_rank": 16, "quantization": "fp8",
        "quantization_ignored_layers": ("a",), "witness": "off", "nibble_order": "low",
        "nvfp4_layout": "rows", "nproc_per_node": 2, "shard_weights": True, "backend": "torch",
        "fp4_gemm_backend": "cudnn", "dtype": "float16", "prompt": ("x",), "seed": (3,),
        "lora_path": ("l",), "tiny": True, "height": 64,
        "component_paths": {"transformer_2": "a", "vae": "b"},
        "weights_paths": {"transformer": "c", "text_encoder": "d"},
    }  # fmt: skip
    bare, usual = strip_quantization(Request(**every), "base"), Request()
    gone = {
        *("model_id", "enable_svdquant", "quantization_precision", "quantization_rank"),
        *("quantization", "quantization_ignored_layers", "witness", "nibble_order"),
        *("nvfp4_layout", "nproc_per_node", "shard_weights", "backend", "fp4_gemm_backend"),
    }
    assert bare.model_path == "base"
    assert bare.component_paths == {"vae": "b"}
    assert bare.weights_paths == {"text_encoder": "d"}
    for field in fields(Request):
        if field.name in gone:
            assert getattr(bare, field.name) == getattr(usual, field.name), field.name
        elif field.name not in ("model_path", "component_paths", "weights_paths"):
            expected = every.get(field.name, getattr(usual, field.name))
            assert getattr(bare, field.name) == expected, field.name


def test_a_request_that_says_nothing_of_what_to_make() -> None:
    assert blank_generation() == {
        "prompt": ("",), "negative_prompt": None, "height": None, "width": None,
        "num_frames": None, "num_inference_steps": None, "guidance_scale": None, "seed": (0,),
        "image_path": (), "mask_path": None,
    }  # fmt: skip
    assert request.DTYPES == {"bfloat16": 2, "float16": 2, "float32": 4}


SCHEME = Scheme("linear.fp8", "FP8", "e4m3", "tensor", "none")


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({}, "e4m3"),
        ({"activation": "group-power"}, "mx-e4m3"),
        ({"activation": "group-dual", "weight": "e2m1"}, "mx-e2m1"),
        ({"activation": "group-dynamic"}, "e4m3"),
        ({"weight": "int8"}, "int8-tensor"),
        ({"weight": "int4", "scale": "channel"}, "int4"),
        ({"weight": "int8", "activation": "group-power"}, "mx-int8"),
    ],
)
def test_names_of_formats(given: dict[str, Any], name: str) -> None:
    assert name_format(Scheme(**{**vars(SCHEME), **given})) == name


@pytest.mark.parametrize(
    ("given", "columns", "why"),
    [
        (
            {"scale": "group", "group_size": 32},
            48,
            "FP8 has one scale per 32 columns, the layer has 48",
        ),
        ({"scale": "group", "group_size": 32}, 96, ""),
        ({"scale": "group", "group_size": 0}, 48, ""),
        ({"scale": "block", "group_size": 32}, 48, ""),
    ],
)
def test_widths(given: dict[str, Any], columns: int, why: str) -> None:
    assert explain_width(Scheme(**{**vars(SCHEME), **given}), columns) == why


@pytest.mark.parametrize(
    ("op", "features"),
    [
        ("linear.fp8", (3, 5)), ("linear.nvfp4", (3, 10)), ("linear.mxfp4", (3, 10)),
        ("linear.svdq", (3, 10)), ("linear.w4a16", (12, 10)), ("linear.int8", (3, 5)),
    ],
)  # fmt: skip
def test_features_of_codes(op: str, features: tuple[int, int]) -> None:
    assert measure_features(Scheme(**{**vars(SCHEME), "op": op}), (3, 5)) == features


def test_what_a_scheme_does_not_say() -> None:
    assert (SCHEME.block, SCHEME.group_size, SCHEME.rank) == ((0, 0), 0, 0)
    flags = (SCHEME.unsigned, SCHEME.swap_nibbles, SCHEME.tiled_scales, SCHEME.smoothed)
    assert flags == (False,) * 4
    assert scheme.TensorSpec(("U8",), ((1,),)).optional is False


def chain(*found: BaseException) -> BaseException:
    """Errors, each caused by the next."""
    for error, cause in pairwise(found):
        error.__cause__ = cause
    return found[0]


@pytest.mark.parametrize(
    ("error", "blamed"),
    [
        (OSError(errno.ENOSPC, "full"), True),
        (OSError(errno.EDQUOT, "full"), True),
        (OSError(errno.EROFS, "read"), True),
        (OSError(errno.EIO, "broken"), True),
        (OSError(errno.EFBIG, "large"), True),
        (OSError(errno.ENOENT, "none"), False),
        (OSError("text"), False),
        (ModuleNotFoundError("x", name="torchao.x"), True),
        (ModuleNotFoundError("x", name="quantmatrix.x"), False),
        (ModuleNotFoundError("x"), True),
        (UnusableError("x"), True),
        (MissingPackageError("x"), True),
        (CheckpointError("x"), False),
        (chain(CheckpointError("x"), ValueError("y"), OSError(errno.ENOSPC, "full")), True),
        (chain(CheckpointError("x"), ValueError("y")), False),
    ],
)
def test_what_the_environment_is_blamed_for(error: BaseException, blamed: bool) -> None:
    assert blames_environment(error) is blamed


def test_codes() -> None:
    assert MEANINGS == {
        10: "gate loosened",
        11: "claim violated",
        12: "row not executed",
        13: "nothing collected",
        14: "environment unusable",
    }
    error = RefusedError("a-rule", "why")
    assert (error.rule, error.message, str(error)) == ("a-rule", "why", "why")
    assert isinstance(error, QuantmatrixError)


def test_places_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.touch()
    said = (
        f"--flag {file / 'a' / 'b'}: {file} is not a folder, and the path leads through it; choose "
        "another path"
    )
    with pytest.raises(UsageError, match=f"^{re.escape(said)}$"):
        files.check_writable(file / "a" / "b", "--flag")
    files.check_writable(tmp_path / "a" / "b" / "c")
    files.check_writable(file)
    asked: list[tuple[Path, int]] = []

    def access(path: Path, mode: int) -> bool:
        asked.append((path, mode))
        return False

    monkeypatch.setattr(os, "access", access)
    said = f"--output-path {tmp_path / 'x'}: you may not write in {tmp_path}; choose another path"
    with pytest.raises(UsageError, match=f"^{re.escape(said)}$"):
        files.check_writable(tmp_path / "x")
    assert asked == [(tmp_path, os.W_OK | os.X_OK)]


@pytest.mark.parametrize(
    ("given", "filename"),
    [
        ((errno.ENOSPC, "full"), "asked"),
        (("only text",), None),
        ((errno.ENOENT, "none", "elsewhere"), "elsewhere"),
        ((errno.ENOENT, "none", "hidden/x"), "asked"),
        ((errno.ENOENT, "none", "hidden"), "hidden"),
        ((errno.ENOENT, "none", "hiddenx/y"), "hiddenx/y"),
        ((errno.ENOENT, "none", "hidden/x", None, "to"), "hidden/x"),
    ],
)
def test_files_that_errors_name(given: tuple[Any, ...], filename: str | None) -> None:
    with pytest.raises(OSError) as caught, files.naming(Path("asked"), hidden=Path("hidden")):  # noqa: PT011
        raise OSError(*given)
    assert caught.value.filename == filename


def test_files_that_share_their_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = tmp_path / "real"
    real.write_text("x")
    (tmp_path / "link").symlink_to(real)
    files.share_file(tmp_path / "link", tmp_path / "second")
    assert (tmp_path / "second").samefile(real)
    assert not (tmp_path / "second").is_symlink()

    def fail(*_: object) -> None:
        raise OSError(errno.EXDEV, "another disk")

    monkeypatch.setattr(os, "link", fail)
    files.share_file(tmp_path / "link", tmp_path / "third")
    assert (tmp_path / "third").read_text() == "x"
    assert not (tmp_path / "third").samefile(real)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 20])
def test_several_files_are_settled_before_they_are_moved(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settled: list[str] = []
    monkeypatch.setattr(files, "settle_one", lambda path: settled.append(path.name))
    contents = {f"f{n}": str(n).encode() for n in range(count)}
    folder = tmp_path / "deep" / "folder"
    files.write_several(folder, contents)
    assert sorted(settled) == sorted(contents)
    assert folder.exists() == bool(count)
    files.write_several(folder, contents)
    for name, data in contents.items():
        assert (folder / name).read_bytes() == data
    if count:
        assert [path.name for path in folder.parent.iterdir()] == ["folder"]


def test_names_of_what_is_half_made(tmp_path: Path) -> None:
    with files.staging(tmp_path / ("n" * 40)) as place:
        assert re.fullmatch(rf"\.{'n' * 32}\.\w{{8}}\.tmp", place.name)
        assert place.parent == tmp_path
    assert list(tmp_path.iterdir()) == []


def test_leftovers_by_their_age(tmp_path: Path) -> None:
    now = time.time()
    ages = {".old.tmp": 3700, ".young.tmp": 3500, "old.tmp": 9000, ".old.txt": 9000}
    for name, age in ages.items():
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (now - age, now - age))
    (tmp_path / ".folder.tmp").mkdir()
    (tmp_path / ".folder.tmp" / "x").touch()
    os.utime(tmp_path / ".folder.tmp", (now - 3700, now - 3700))
    target = tmp_path / "kept"
    target.mkdir()
    (tmp_path / ".link.tmp").symlink_to(target)
    os.utime(tmp_path / ".link.tmp", (now - 3700, now - 3700), follow_symlinks=False)
    files.remove_leftovers(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [".old.txt", ".young.tmp", "kept", "old.tmp"]
    files.remove_leftovers(tmp_path, "*.txt", older_than=10)
    assert (tmp_path / ".old.txt").exists() is False


def test_a_move_that_fails_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, built, aside = tmp_path / "place", tmp_path / "built", tmp_path / "aside"
    for folder in (place, built, aside):
        folder.mkdir()
    (place / "old").touch()
    real = os.replace

    def fail(source: Path, target: Path) -> None:
        if source == built:
            raise OSError(errno.EIO, "broken")
        real(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="broken"):
        files.put(built, place, aside)
    assert (place / "old").exists()
    monkeypatch.undo()
    files.put(built, place, aside)
    assert list(place.iterdir()) == []
    assert (aside / "place.old" / "old").exists()


class Plan(SimpleNamespace):
    """A plan of two transformers."""


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Plans and loads that are only noted."""
    seen: dict[str, Any] = {}

    def plan(given: Request, machine: Any) -> Any:
        seen["request"], seen["machine"] = given, machine
        components = {"transformer": "first", "transformer_2": "second"}
        return Plan(warnings=["slow"], components=components, request=given, pipeline_class="P")

    def load(component: Any, given: Request, *, device: str) -> Any:
        seen["loaded"] = (component, device)
        return f"model of {component}"

    monkeypatch.setattr(api.decide, "plan_transformers", plan)
    monkeypatch.setattr(api, "require", lambda found: found)
    monkeypatch.setattr(api, "load_component", load)
    monkeypatch.setattr(
        api, "load_requested", lambda models, name, given: seen.update(adapted=(models, name))
    )
    return seen


def test_a_transformer_is_loaded_as_asked(planned: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match=r"^slow$") as caught:
        model: Any = api.load_transformer(
            "some/model", component="transformer_2", transformer_path="a/b", dtype=torch.float16,
            quantized_model_path="w.gguf", num_frames=3,
        )  # fmt: skip
    assert Path(caught[0].filename).name == "test_top_level_edges.py"
    assert model == "model of second"
    given = planned["request"]
    assert given.component_paths == {"transformer_2": "a/b"}
    assert given.weights_paths == {"transformer_2": "w.gguf"}
    assert (given.dtype, given.device, given.num_frames) == ("float16", "cpu", 3)
    assert planned["loaded"] == ("second", "cpu")
    assert planned["adapted"] == ({"transformer_2": "model of second"}, "P")


@pytest.mark.parametrize(
    ("names", "path"),
    [
        ({}, None),
        ({"transformer_weights_path": "a"}, "a"),
        ({"transformer_weights_path": "a", "quantized_model_path": "c"}, "a"),
        ({"transformer_quantized_path": "b", "quantized_model_path": "c"}, "b"),
        ({"transformer_quantized_path": "", "quantized_model_path": "c"}, "c"),
    ],
)
def test_names_of_weights(names: dict[str, str], path: str | None, planned: dict[str, Any]) -> None:
    given = {name: value for name, value in names.items() if value}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        api.load_transformer("some/model", **given)  # type: ignore[arg-type]
    assert planned["request"].weights_paths == ({"transformer": path} if path else {})
    assert planned["request"].component_paths == {}
    assert planned["request"].dtype == "bfloat16"


def test_a_component_that_a_model_lacks(planned: dict[str, Any]) -> None:
    said = "m has no transformer component 'vae'; it has transformer, transformer_2"
    with pytest.warns(UserWarning, match="slow"), pytest.raises(UsageError, match=f"^{said}$"):
        api.load_transformer("m", component="vae")


def test_the_machine_of_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api.probe, "probe", lambda device: f"probed {device}")
    assert api.find_machine(Request(device="cuda:1")) == "probed cuda:1"
    rows = {"a": "row a", "b": "row b"}
    monkeypatch.setattr(api.read, "read", lambda: SimpleNamespace(hardware=rows))
    monkeypatch.setattr(api.identify, "from_row", lambda row: f"machine of {row}")
    assert api.find_machine(Request(hardware="b")) == "machine of row b"
    with pytest.raises(UsageError, match=r"^--hardware c: no such row; known: a, b$"):
        api.find_machine(Request(hardware="c"))
