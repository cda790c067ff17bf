"""What adapters print and hand over, whole: commands, settings, versions, sizes and times."""

from __future__ import annotations

import json
import sys
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from quantmatrix import models, peers
from quantmatrix.errors import UsageError
from quantmatrix.peers import (
    cache_dit,
    comfyui,
    common,
    diffusers,
    nunchaku,
    protocol,
    sglang,
    vllm_omni,
    worker,
    xdit,
)
from quantmatrix.peers import quantmatrix as ours
from quantmatrix.peers.protocol import DONE, FAILED, LOADED, Answer, Found, RuntimeFailure, Task
from quantmatrix.tables import read

TABLES = read.read()
FOLDER = replace(
    TABLES.checkpoints["modelopt-fp8-flux-2"], components=("transformer",), form="component-folder"
)
PIPELINE = replace(FOLDER, form="pipeline", selector="--model-path", reference="own/pipeline")
FILE = replace(FOLDER, form="single-file", selector="--transformer-weights-path")
ONLINE = replace(FOLDER, form="online", selector="--quantization", reference="fp8")
OTHER_ONLINE = replace(ONLINE, reference="gguf")  # sorts behind fp8
EARLY_ONLINE = replace(ONLINE, reference="bf8")  # sorts before it
DTYPE = ", torch_dtype=torch.bfloat16)"


def make(row: Any, weights: str = "", **more: Any) -> Task:
    return Task(row, "own/base", weights, **more)


@pytest.mark.parametrize(
    ("row", "weights", "more", "expected"),
    [
        (PIPELINE, "own/w", {}, f"Flux2Pipeline.from_pretrained('own/w'{DTYPE}"),
        (PIPELINE, "", {}, f"Flux2Pipeline.from_pretrained('own/base'{DTYPE}"),
        (FOLDER, "", {"baseline": True}, f"Flux2Pipeline.from_pretrained('own/base'{DTYPE}"),
        (
            FOLDER,
            "own/w",
            {"way": "from_pretrained"},
            f"Flux2Transformer2DModel.from_pretrained('own/w'{DTYPE}",
        ),
        (
            ONLINE,
            "",
            {"way": "TorchAoConfig"},
            "Flux2Transformer2DModel.from_pretrained('own/base', subfolder='transformer', "
            f"quantization_config=TorchAoConfig(Float8WeightOnlyConfig()){DTYPE}",
        ),
        (
            ONLINE,
            "",
            {"way": "from_single_file"},
            f"Flux2Transformer2DModel.from_pretrained('own/base', subfolder='transformer'{DTYPE}",
        ),
        (
            FILE,
            "own/w/a/b.gguf",
            {"way": "GGUFQuantizationConfig"},
            "Flux2Transformer2DModel.from_single_file("
            "'https://huggingface.co/own/w/blob/main/a/b.gguf', config='own/base', "
            "subfolder='transformer', quantization_config=GGUFQuantizationConfig("
            f"compute_dtype=torch.bfloat16){DTYPE}",
        ),
        (
            FILE,
            "own/w/b.safetensors",
            {"way": "from_single_file"},
            "Flux2Transformer2DModel.from_single_file("
            "'https://huggingface.co/own/w/blob/main/b.safetensors', config='own/base', "
            f"subfolder='transformer'{DTYPE}",
        ),
        (
            FILE,
            "own/w/b.safetensors",
            {"way": "BFLQuantizationConfig"},
            "Flux2Transformer2DModel.from_single_file("
            "'https://huggingface.co/own/w/blob/main/b.safetensors', config='own/base', "
            "subfolder='transformer', quantization_config=BFLQuantizationConfig("
            f"compute_dtype=torch.bfloat16){DTYPE}",
        ),
    ],
)
def test_commands_of_diffusers(row: Any, weights: str, more: Any, expected: str) -> None:
    assert diffusers.command(make(row, weights, **more)) == expected


@pytest.mark.parametrize(
    ("row", "weights", "baseline", "expected"),
    [
        (PIPELINE, "x.gguf", False, ("from_pretrained",)),
        (FILE, "x.gguf", True, ("from_pretrained",)),
        (ONLINE, "", True, ("from_pretrained",)),
        (ONLINE, "", False, ("TorchAoConfig",)),
        (OTHER_ONLINE, "", False, ()),
        (EARLY_ONLINE, "", False, ()),
        (FILE, "x.gguf", False, ("GGUFQuantizationConfig",)),
        (FILE, "x.safetensors", False, ("from_single_file", "BFLQuantizationConfig")),
        (FOLDER, "x", False, ("from_pretrained",)),
    ],
)
def test_ways_of_diffusers_by_form(
    row: Any, weights: str, baseline: bool, expected: tuple[str, ...]
) -> None:
    assert diffusers.ways(make(row, weights, baseline=baseline)) == expected


class Loaded(SimpleNamespace):
    """A class of a stub of diffusers: it says by which of its methods it was made, and of what."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Loaded:
        return cls(by="from_pretrained", args=args, kwargs=kwargs)

    @classmethod
    def from_single_file(cls, *args: Any, **kwargs: Any) -> Loaded:
        return cls(by="from_single_file", args=args, kwargs=kwargs)


def put(monkeypatch: pytest.MonkeyPatch, name: str, **values: Any) -> None:
    module = ModuleType(name)
    vars(module).update(values)
    monkeypatch.setitem(sys.modules, name, module)


def put_diffusers(monkeypatch: pytest.MonkeyPatch) -> type[Loaded]:
    transformer = type("Transformer", (Loaded,), {})
    configs = {
        name: lambda name=name, **given: (name, given)
        for name in ("BFLQuantizationConfig", "GGUFQuantizationConfig")
    }
    put(
        monkeypatch,
        "diffusers",
        Flux2Pipeline=Loaded,
        Flux2Transformer2DModel=transformer,
        TorchAoConfig=lambda what: ("TorchAoConfig", what),
        **configs,
    )
    put(monkeypatch, "torchao")
    put(monkeypatch, "torchao.quantization", Float8WeightOnlyConfig=lambda: "fp8 weights")
    return transformer


BF16 = {"torch_dtype": torch.bfloat16}
COMPUTE = {"compute_dtype": torch.bfloat16}
WHERE = {"config": "own/base", "subfolder": "transformer"}


@pytest.mark.parametrize(
    ("row", "weights", "way", "by", "args", "kwargs"),
    [
        (FOLDER, "own/w", "from_pretrained", "from_pretrained", ("own/w",), {}),
        (
            ONLINE,
            "",
            "TorchAoConfig",
            "from_pretrained",
            ("own/base",),
            {
                "subfolder": "transformer",
                "quantization_config": ("TorchAoConfig", "fp8 weights"),
            },
        ),
        (
            FILE,
            "own/w/x.gguf",
            "GGUFQuantizationConfig",
            "from_single_file",
            ("https://huggingface.co/own/w/blob/main/x.gguf",),
            {**WHERE, "quantization_config": ("GGUFQuantizationConfig", COMPUTE)},
        ),
        (
            FILE,
            "own/w/x.safetensors",
            "BFLQuantizationConfig",
            "from_single_file",
            ("https://huggingface.co/own/w/blob/main/x.safetensors",),
            {**WHERE, "quantization_config": ("BFLQuantizationConfig", COMPUTE)},
        ),
        (
            FILE,
            "own/w/x.safetensors",
            "from_single_file",
            "from_single_file",
            ("https://huggingface.co/own/w/blob/main/x.safetensors",),
            WHERE,
        ),
    ],
)
def test_what_diffusers_is_called_with(
    row: Any,
    weights: str,
    way: str,
    by: str,
    args: tuple[str, ...],
    kwargs: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    transformer = put_diffusers(monkeypatch)
    found = diffusers.load_pipeline(make(row, weights, way=way), models.load("flux-2"))
    part = found.kwargs["transformer"]
    assert isinstance(part, transformer)
    assert (part.by, part.args, part.kwargs) == (by, args, {**kwargs, **BF16})
    assert found.args == ("own/base",)
    assert found.kwargs == {"transformer": part, **BF16}


def test_pipelines_are_loaded_whole_by_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    put_diffusers(monkeypatch)
    own = models.load("flux-2")
    base = diffusers.load_pipeline(make(FILE, "own/w", baseline=True), own)
    assert (base.args, base.kwargs) == (("own/base",), BF16)
    whole = diffusers.load_pipeline(make(PIPELINE, "own/w"), own)
    assert (whole.args, whole.kwargs) == (("own/w",), BF16)


def test_what_a_processor_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = tmp_path / "model_index.json"
    asked: list[str] = []

    def look(name: str, why: str = "no") -> Found:
        asked.append(name)
        return Found(why=why)

    monkeypatch.setattr(common, "find_package", look)
    assert diffusers.explain_processor(str(tmp_path)) == ""
    index.write_text(
        json.dumps({"_class_name": "Qwen2VLProcessor", "x": ["transformers", "Other"]})
    )
    assert diffusers.explain_processor(str(tmp_path)) == ""
    assert asked == []
    index.write_text(json.dumps({"processor": ["transformers", "Qwen2VLProcessor"]}))
    assert diffusers.explain_processor(str(tmp_path)) == (
        "Qwen2VLProcessor of transformers needs the package torchvision, which is not installed"
    )
    assert asked == ["torchvision"]
    monkeypatch.setattr(common, "find_package", lambda name: Found(version="1"))
    assert diffusers.explain_processor(str(tmp_path)) == ""


@pytest.mark.parametrize(
    ("row", "weights", "way", "ways", "command"),
    [
        (
            ONLINE,
            "",
            "quantize",
            ("quantize",),
            "cache_dit.quantize(pipe.transformer, quant_type='float8_weight_only'); "
            "cache_dit.enable_cache(pipe)",
        ),
        (
            FOLDER,
            "own/w",
            "from_pretrained",
            ("from_pretrained",),
            f"Flux2Transformer2DModel.from_pretrained('own/w'{DTYPE}; cache_dit.enable_cache(pipe)",
        ),
        (
            FILE,
            "o/w/x.safetensors",
            "from_single_file",
            ("from_single_file", "BFLQuantizationConfig"),
            "Flux2Transformer2DModel.from_single_file('https://huggingface.co/o/w/blob/main/"
            f"x.safetensors', config='own/base', subfolder='transformer'{DTYPE}; "
            "cache_dit.enable_cache(pipe)",
        ),
    ],
)
def test_commands_of_cache_dit(
    row: Any, weights: str, way: str, ways: tuple[str, ...], command: str
) -> None:
    task = make(row, weights, way=way)
    assert (cache_dit.ways(task), cache_dit.command(task)) == (ways, command)
    assert cache_dit.ways(make(EARLY_ONLINE)) == cache_dit.ways(make(OTHER_ONLINE)) == ()


@pytest.mark.parametrize(
    ("model", "weights", "baseline", "ways", "command"),
    [
        (
            "z-image",
            "a/x.safetensors",
            False,
            ("from_pretrained",),
            "nunchaku.NunchakuZImageTransformer2DModel.from_pretrained('a/x.safetensors'" + DTYPE,
        ),
        ("z-image", "a/x.gguf", False, (), None),
        ("flux-2", "a/x.safetensors", False, (), None),
        (
            "flux-1",
            "a/x.safetensors",
            False,
            ("from_pretrained",),
            "nunchaku.NunchakuFluxTransformer2dModel.from_pretrained('a/x.safetensors'" + DTYPE,
        ),
        (
            "qwen-image",
            "a/x.safetensors",
            False,
            ("from_pretrained",),
            "nunchaku.NunchakuQwenImageTransformer2DModel.from_pretrained('a/x.safetensors'"
            + DTYPE,
        ),
        (
            "z-image",
            "",
            True,
            ("from_pretrained",),
            f"ZImagePipeline.from_pretrained('own/base'{DTYPE}",
        ),
    ],
)
def test_commands_of_nunchaku(
    model: str, weights: str, baseline: bool, ways: tuple[str, ...], command: str | None
) -> None:
    task = make(replace(FILE, model=model), weights, baseline=baseline)
    assert nunchaku.ways(task) == ways
    if command is not None:
        assert nunchaku.command(task) == command


@pytest.mark.parametrize(
    ("inspected", "versions", "expected"),
    [
        (("engine", "the engine"), {"nunchaku": "1.2"}, Found(version="1.2")),
        (("engine", "the engine"), {}, Found(version="unknown")),
        (("look-alike", "a package of statistics"), {"nunchaku": "9"}, Found(why="a package of statistics")),
        ((None, "not there"), {}, Found(why="not there")),
        (("a", "sorts before"), {"nunchaku": "9"}, Found(why="sorts before")),
    ],
)  # fmt: skip
def test_the_engine_is_told_from_its_namesake(
    inspected: tuple[Any, str],
    versions: dict[str, str],
    expected: Found,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nunchaku, "inspect_nunchaku", lambda: inspected)
    monkeypatch.setattr(nunchaku, "read_versions", lambda names: versions)
    assert nunchaku.probe() == expected


@pytest.mark.parametrize(
    ("row", "more", "ways", "command"),
    [
        (PIPELINE, {"way": "model"}, ("model",), "Omni(model='own/w')"),
        (PIPELINE, {"way": "model", "baseline": True}, ("model",), "Omni(model='own/base')"),
        (FOLDER, {"way": "model", "baseline": True}, ("model",), "Omni(model='own/base')"),
        (
            FOLDER,
            {"way": "folder with the transformer"},
            ("folder with the transformer",),
            "Omni(model=<own/base with own/w as its transformer>)",
        ),
        (
            replace(FOLDER, form="sharded"),
            {"way": "folder with the transformer"},
            ("folder with the transformer",),
            "Omni(model=<own/base with own/w as its transformer>)",
        ),
        (
            ONLINE,
            {"way": "quantization_config"},
            ("quantization_config",),
            "Omni(model='own/base', quantization_config='fp8')",
        ),
        (EARLY_ONLINE, {"way": "another"}, (), "Omni(model='own/base')"),
        (OTHER_ONLINE, {"way": "the next"}, (), "Omni(model='own/base')"),
        (FILE, {"way": "z"}, (), "Omni(model='own/base')"),
    ],
)
def test_commands_of_vllm_omni(
    row: Any, more: dict[str, Any], ways: tuple[str, ...], command: str
) -> None:
    task = make(row, "own/w", **more)
    assert (vllm_omni.ways(task), vllm_omni.command(task)) == (ways, command)


@pytest.mark.parametrize(
    ("row", "more", "settings"),
    [
        (PIPELINE, {"way": "model"}, {"model": "own/w"}),
        (PIPELINE, {"way": "model", "baseline": True}, {"model": "own/base"}),
        (FOLDER, {"way": "model", "baseline": True}, {"model": "own/base"}),
        (
            ONLINE,
            {"way": "quantization_config"},
            {"model": "own/base", "quantization_config": "fp8"},
        ),
        (ONLINE, {"way": "r"}, {"model": "own/base"}),
        (ONLINE, {"way": "p"}, {"model": "own/base"}),
    ],
)
def test_settings_of_vllm_omni(
    row: Any, more: dict[str, Any], settings: dict[str, str], tmp_path: Path
) -> None:
    assert vllm_omni.list_settings(make(row, "own/w", **more), tmp_path) == settings


def test_a_stand_in_of_vllm_omni_has_its_size_in_the_prompt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        models.load("flux-2"), "TINY_DEFAULTS", SimpleNamespace(height=48, width=80, steps=3)
    )
    flags = ("--prompt", "a fox", "--seed", "7")
    assert vllm_omni.list_prompt(make(FOLDER, flags=flags)) == {"prompt": "a fox", "seed": 7}
    assert vllm_omni.list_prompt(make(FOLDER, flags=flags, tiny=True)) == {
        "prompt": "a fox",
        "seed": 7,
        "height": 48,
        "width": 80,
        "num_inference_steps": 3,
    }


def test_the_folder_of_vllm_omni_is_one_of_links(tmp_path: Path) -> None:
    base, weights = tmp_path / "base", tmp_path / "weights"
    for folder in (base / "transformer", base / "transformer_2", base / "vae", weights):
        folder.mkdir(parents=True)
    row = replace(FOLDER, components=("transformer_2", "transformer"))
    task = Task(row, str(base), str(weights))
    found = vllm_omni.assemble(task, tmp_path / "made")
    assert {path.name: path.resolve() for path in found.iterdir()} == {
        "transformer": (base / "transformer").resolve(),
        "vae": (base / "vae").resolve(),
        "transformer_2": weights.resolve(),
    }


@pytest.mark.parametrize(
    ("row", "more", "ways", "command"),
    [
        (PIPELINE, {}, ("--model",), "xdit --model own/w{rest}"),
        (PIPELINE, {"baseline": True}, ("--model",), "xdit --model own/base{rest}"),
        (FOLDER, {"baseline": True}, ("--model",), "xdit --model own/base{rest}"),
        (FOLDER, {"way": "-"}, (), "xdit --model own/base{rest}"),
        (replace(FOLDER, form="sharded"), {"way": "~"}, (), "xdit --model own/base{rest}"),
        (
            ONLINE,
            {"way": "--use_fp8_gemms"},
            ("--use_fp8_gemms",),
            "xdit --model own/base{rest} --use_fp8_gemms",
        ),
        (EARLY_ONLINE, {}, (), "xdit --model own/base{rest}"),
        (OTHER_ONLINE, {}, (), "xdit --model own/base{rest}"),
    ],
)
def test_commands_of_xdit(
    row: Any, more: dict[str, Any], ways: tuple[str, ...], command: str
) -> None:
    task = make(row, "own/w", flags=("--prompt", "a red fox"), **more)
    rest = " --prompt 'a red fox' --seed 0 --output_directory pictures"
    assert (xdit.ways(task), xdit.command(task)) == (ways, command.format(rest=rest))


def test_a_stand_in_has_its_size_in_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    size = SimpleNamespace(height=48, width=80, steps=3, frames=1)
    monkeypatch.setattr(models.load("flux-2"), "TINY_DEFAULTS", size)
    task = make(FOLDER, "own/w", flags=("--prompt", "fox"), tiny=True)
    assert xdit.command(task) == (
        "xdit --model own/base --prompt fox --seed 0 --output_directory pictures --height 48 "
        "--width 80 --num_inference_steps 3"
    )
    start = "sglang generate --model-path own/base --transformer-path own/w --prompt fox "
    end = "--seed 0 --output-path pictures --save-output --perf-dump-path perf.json"
    assert sglang.command(task) == f"{start}--height 48 --width 80 --num-inference-steps 3 {end}"
    steps = replace(task, flags=("--num-inference-steps", "9", "--prompt", "fox"))
    start = start.replace("--prompt", "--num-inference-steps 9 --prompt")
    assert sglang.command(steps) == f"{start}--height 48 --width 80 {end}"
    size.frames = 2
    assert sglang.command(steps) == f"{start}--height 48 --width 80 --num-frames 2 {end}"
    size.frames = 0
    assert "--num-frames" not in sglang.command(steps)


@pytest.mark.parametrize(
    ("row", "more", "start"),
    [
        (PIPELINE, {}, "sglang generate --model-path own/w --prompt 'a curious pikachu'"),
        (
            PIPELINE,
            {"baseline": True},
            "sglang generate --model-path own/base --prompt 'a curious pikachu'",
        ),
        (
            FOLDER,
            {"flags": ("A_B=c;d", "--enable-svdquant", "--quantization-rank", "32", "--save-output")},
            "A_B='c;d' sglang generate --model-path own/base --transformer-path own/w "
            "--enable-svdquant --quantization-rank 32 --prompt 'a curious pikachu'",
        ),
        (
            FOLDER,
            {
                "flags": ("--quantization-rank", "32", "--width", "48", "--enable-svdquant"),
                "baseline": True,
            },
            "sglang generate --model-path own/base --width 48 --prompt 'a curious pikachu'",
        ),
        (
            FOLDER,
            {"flags": ("--prompt", "fox", "--quantization-precision", "int4"), "baseline": True},
            "sglang generate --model-path own/base --prompt fox",
        ),
    ],
)  # fmt: skip
def test_commands_of_sglang(row: Any, more: dict[str, Any], start: str) -> None:
    task = make(row, "own/w", **more)
    assert sglang.ways(task) == ("sglang generate",)
    assert sglang.command(task) == (
        f"{start} --seed 0 --output-path pictures --save-output --perf-dump-path perf.json"
    )


def test_sglang_names_the_reference_where_nothing_lies_here() -> None:
    assert sglang.list_arguments(make(ONLINE))[4:6] == ["--quantization", "fp8"]


@pytest.mark.parametrize(
    ("dump", "seconds", "peak"),
    [
        ({"total_duration_ms": 1234.5678}, 1.235, 777),
        ({"peak_reserved_mb": 3.5, "total_duration_ms": 20}, 0.02, 3670016),
        ({"after": {"peak_mb": 5, "peak_gb": 9, "low_mb": 8}, "peak_mb": 3}, 0.0, 5 << 20),
        ({"peak_mb": "12", "a": [{"peak_mb": 4}]}, 0.0, 777),
        ({"peak_mb": 7, "after": {"peak_mb": 6}}, 0.0, 7 << 20),
    ],
)
def test_what_sglang_dumps(
    dump: dict[str, Any],
    seconds: float,
    peak: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def call(argv: list[str], folder: Path, environment: dict[str, str]) -> SimpleNamespace:
        assert (argv[:2], environment) == (["sglang", "generate"], {"A": "b"})
        (folder / "pictures").mkdir()
        (folder / "pictures" / "x.PNG").touch()
        (folder / "perf.json").write_text(json.dumps(dump))
        return SimpleNamespace(stdout="text")

    monkeypatch.setattr(common, "call", call)
    monkeypatch.setattr(common, "read_peak", lambda: 777)
    found = sglang.run(make(FOLDER, "w", flags=("A=b",)), tmp_path)
    assert found == Answer(
        DONE,
        loaded=True,
        media="pictures/x.PNG",
        weights={},
        seconds={"total": seconds},
        peak_bytes=peak,
    )
    assert (tmp_path / LOADED).exists()


def test_a_dump_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "perf.json"
    assert sglang.read_dump(path) == {}
    for text in ("[1]", "{", "7"):
        path.write_text(text)
        assert sglang.read_dump(path) == {}
    path.write_text('{"weights": {"int8": 3}}')
    assert sglang.read_dump(path) == {"weights": {"int8": 3}}


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (sglang, "its words\nno picture below --output-path"),
        (xdit, "its words\nno picture in --output_directory"),
    ],
)
def test_a_program_that_leaves_no_picture(
    adapter: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "call", lambda *_: SimpleNamespace(stdout="its words"))
    with pytest.raises(RuntimeFailure) as caught:
        adapter.run(make(FOLDER, "w"), tmp_path)
    assert (str(caught.value), caught.value.kind, caught.value.loaded) == (
        message,
        "no output",
        False,
    )


def test_the_answer_of_xdit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def call(argv: list[str], folder: Path) -> SimpleNamespace:
        (folder / "pictures" / "deep").mkdir()
        (folder / "pictures" / "deep" / "z.webp").touch()
        (folder / "pictures" / "notes.txt").touch()
        return SimpleNamespace(stdout="")

    monkeypatch.setattr(common, "call", call)
    monkeypatch.setattr(common, "read_peak", lambda: 321)
    assert xdit.run(make(FOLDER, "w"), tmp_path) == Answer(
        DONE, loaded=True, media="pictures/deep/z.webp", peak_bytes=321
    )


@pytest.mark.parametrize(
    ("row", "weights", "more", "expected"),
    [
        (
            PIPELINE,
            "own/w",
            {"tiny": True},
            "quantmatrix generate --model-path own/base --prompt fox --model-path own/w "
            "--backend decode --tiny",
        ),
        (
            FOLDER,
            "own/w",
            {},
            "quantmatrix generate --model-path own/base --prompt fox --transformer-path own/w "
            "--backend decode",
        ),
        (
            ONLINE,
            "",
            {},
            "quantmatrix generate --model-path own/base --prompt fox --quantization fp8 "
            "--backend decode",
        ),
    ],
)
def test_our_own_command(row: Any, weights: str, more: dict[str, Any], expected: str) -> None:
    task = make(row, weights, flags=("--prompt", "fox"), **more)
    assert (ours.ways(task), ours.command(task)) == (("decode",), expected)


def test_our_own_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from quantmatrix import api

    asked: list[Any] = []
    saved: list[str] = []

    def generate(request: Any) -> SimpleNamespace:
        asked.append(request)
        media = [
            SimpleNamespace(save=lambda path, n=n: saved.append(f"{n} {path.name}"))
            for n in ("first", "second")
        ]
        return SimpleNamespace(
            media=media,
            latents=[torch.ones(2, 3)],
            seconds={"load": 2.5},
            peak_bytes=4321,
        )

    monkeypatch.setattr(api, "generate", generate)
    task = make(ONLINE, tiny=True, device="meta", flags=("--seed", "9"))
    found = ours.run(task, tmp_path)
    assert found == Answer(
        DONE, loaded=True, media="media.png", latents=True, seconds={"load": 2.5}, peak_bytes=4321
    )
    [request] = asked
    assert (request.tiny, request.device, request.backend) == (True, "meta", "decode")
    assert (request.seed, request.quantization) == ((9,), "fp8")
    assert saved == ["first media.png"]
    assert (tmp_path / LOADED).exists()


@pytest.mark.parametrize(
    ("model", "weights", "baseline", "expected"),
    [
        ("flux-2", "a/x.safetensors", False, ("UNETLoader",)),
        ("flux-2", "a/x.gguf", False, ()),
        ("flux-2", "a/x.gguf", True, ("UNETLoader",)),
        ("wan-2-2", "a/x.safetensors", True, ("none",)),
        ("wan-2-2", "a/x.safetensors", False, ()),
    ],
)
def test_ways_of_comfyui(
    model: str, weights: str, baseline: bool, expected: tuple[str, ...]
) -> None:
    assert comfyui.ways(make(replace(FILE, model=model), weights, baseline=baseline)) == expected


def test_a_graph_of_comfyui_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    size = SimpleNamespace(height=48, width=80, steps=3)
    monkeypatch.setattr(models.load("flux-1"), "TINY_DEFAULTS", size)
    task = make(replace(FILE, model="flux-1"), "a/x.safetensors", tiny=True)
    task = replace(task, flags=("--prompt", "fox", "--seed", "11"))
    assert comfyui.name_file(task) == "quantmatrix/x.safetensors"
    assert comfyui.name_file(replace(task, baseline=True)) == "flux1-dev.safetensors"
    graph = {
        "1": ("UNETLoader", {"unet_name": "f", "weight_dtype": "default"}),
        "2": (
            "DualCLIPLoader",
            {
                "clip_name1": "t5xxl_fp16.safetensors",
                "clip_name2": "clip_l.safetensors",
                "type": "flux",
            },
        ),
        "3": ("VAELoader", {"vae_name": "ae.safetensors"}),
        "4": ("CLIPTextEncode", {"clip": ["2", 0], "text": "fox"}),
        "5": ("CLIPTextEncode", {"clip": ["2", 0], "text": ""}),
        "6": ("EmptySD3LatentImage", {"width": 80, "height": 48, "batch_size": 1}),
        "7": (
            "KSampler",
            {
                "model": ["1", 0],
                "positive": ["4", 0],
                "negative": ["5", 0],
                "latent_image": ["6", 0],
                "seed": 11,
                "steps": 3,
                "cfg": 1.0,
                "sampler_name": "euler",
                "scheduler": "simple",
                "denoise": 1.0,
            },
        ),
        "8": ("VAEDecode", {"samples": ["7", 0], "vae": ["3", 0]}),
        "9": ("SaveImage", {"images": ["8", 0], "filename_prefix": "quantmatrix"}),
    }
    expected = {n: {"class_type": kind, "inputs": own} for n, (kind, own) in graph.items()}
    assert comfyui.render(task, "f") == expected
    flags = ("--height", "32", "--num-inference-steps", "5")
    asked = comfyui.render(replace(task, tiny=False, flags=flags), "f")
    usual = models.load("flux-1").DEFAULTS
    assert asked["6"]["inputs"] == {"width": usual.width, "height": 32, "batch_size": 1}
    assert asked["7"]["inputs"]["steps"] == 5
    one = comfyui.render(replace(task, checkpoint=replace(FILE, model="flux-2")), "f")
    assert one["2"] == {
        "class_type": "CLIPLoader",
        "inputs": {"clip_name": "mistral_3_small_flux2_bf16.safetensors", "type": "flux2"},
    }
    assert one["6"]["class_type"] == "EmptyFlux2LatentImage"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("plain", "plain"),
        ('{"error": {"message": "m", "details": "d"}}', "m d"),
        ('{"error": {"message": "m"}, "node_errors": null}', "m"),
        (
            '{"error": {"message": "m"}, "node_errors": {"1": {"errors": [{"message": "n", '
            '"details": "o"}, {"message": "p"}]}, "2": {}}}',
            "m; n o; p",
        ),
        ("[]", "[]"),
        ('{"error": "text"}', '{"error": "text"}'),
        ('{"node_errors": {}}', '{"node_errors": {}}'),
    ],
)
def test_the_words_of_an_error_of_comfyui(text: str, message: str) -> None:
    assert comfyui.read_message(text) == message


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([], ("[]", "error", False)),
        ([["execution_start", {}]], ('[["execution_start", {}]]', "error", False)),
        ([["x", {}], ["execution_error", {}]], ("", "error", False)),
        (
            [
                [
                    "execution_error",
                    {
                        "exception_type": "a.b.C",
                        "exception_message": "m",
                        "node_type": "UNETLoader",
                    },
                ]
            ],
            ("m", "C", True),
        ),
        (
            [["execution_error", {"exception_type": "D", "node_type": "VAELoader"}]],
            ("", "D", False),
        ),
    ],
)
def test_a_failure_of_comfyui(messages: list[Any], expected: tuple[str, str, bool]) -> None:
    assert comfyui.read_failure(messages) == expected


def test_the_picture_of_comfyui() -> None:
    one = {"filename": "a", "subfolder": "b", "type": "c", "more": 1}
    outputs = {"3": {}, "5": {"images": []}, "7": {"images": [one, {}]}, "9": {"images": [{}]}}
    assert comfyui.find_picture(outputs) == {"filename": "a", "subfolder": "b", "type": "c"}
    with pytest.raises(RuntimeFailure, match=r"^the graph gave no picture$") as caught:
        comfyui.find_picture({"3": {}})
    assert (caught.value.kind, caught.value.loaded) == ("no output", True)


@pytest.mark.parametrize(
    ("url", "told", "found"),
    [
        ("http://h:1/", {"system": {"comfyui_version": "7"}}, Found(version="7")),
        ("http://h:1/", {"system": {}}, Found(version="unknown")),
        ("http://h:1/", {}, Found(version="unknown")),
        ("https://h:1", [], Found(version="unknown")),
        (
            "ftp://h",
            {},
            Found(
                why="ftp://h (COMFYUI_URL) does not answer: COMFYUI_URL=ftp://h: expected "
                "http://host:port"
            ),
        ),
    ],
)
def test_the_version_of_comfyui(
    url: str, told: Any, found: Found, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMFYUI_URL", url)

    def call(path: str) -> Any:
        assert path == "/system_stats"
        comfyui.read_url()
        return told

    monkeypatch.setattr(comfyui, "call", call)
    assert comfyui.probe() == found
    monkeypatch.delenv("COMFYUI_URL")
    assert comfyui.read_url() == "http://127.0.0.1:8188"


@pytest.mark.parametrize(
    ("said", "code", "expected"),
    [
        (("x\nsglang 0.5.6\n", "err 9"), 0, Found(version="0.5.6")),
        (("", "tool 7\n"), 0, Found(version="7")),
        (("", ""), 0, Found(why="tool --version ended with 0 and no version")),
        (("1.2", ""), 3, Found(why="tool --version ended with 3 and no version")),
        (("1.2", ""), -9, Found(why="tool --version ended with -9 and no version")),
    ],
)
def test_the_version_that_a_command_prints(
    said: tuple[str, str], code: int, expected: Found, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(argv: list[str], **given: Any) -> CompletedProcess[str]:
        assert (argv, given["timeout"]) == (["tool", "--version"], 120)
        return CompletedProcess(argv, code, *said)

    monkeypatch.setattr(common.subprocess, "run", run)
    assert common.ask_version("tool") == expected


def test_a_command_that_hangs_or_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(argv: list[str], **given: Any) -> None:
        raise TimeoutExpired(argv, given["timeout"])

    monkeypatch.setattr(common.subprocess, "run", hang)
    assert common.ask_version("tool") == Found(
        why="tool --version: Command '['tool', '--version']' timed out after 120 seconds"
    )
    assert common.find_command("no-such-command", "torch") == Found(
        why="there is no command no-such-command on the path"
    )
    assert common.find_command("env", "torch").version.startswith(torch.__version__.split("+")[0])
    monkeypatch.setattr(common, "ask_version", lambda command: Found(version=f"of {command}"))
    assert common.find_command("env", "no-such-package") == Found(version="of env")
    assert common.find_package("no-such-package") == Found(
        why="the package no-such-package is not installed"
    )


@pytest.mark.parametrize(
    ("script", "kind", "loaded"),
    [("echo said; exit 5", "exit code 5", False), ("echo said; kill -15 $$", "signal 15", True)],
)
def test_a_program_that_fails(
    script: str, kind: str, loaded: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RuntimeFailure) as caught:
        common.call(["sh", "-c", script], tmp_path)
    assert (str(caught.value), caught.value.kind, caught.value.loaded) == ("said\n", kind, loaded)
    assert capsys.readouterr().out == "said\n\n"


def test_a_program_has_its_environment_and_folder(tmp_path: Path) -> None:
    script = 'echo "$MARK"; pwd; echo more >&2'
    found = common.call(["sh", "-c", script], tmp_path, {"MARK": "a b"})
    assert found.stdout == f"a b\n{tmp_path.resolve()}\nmore\n"


def test_the_first_picture_of_a_folder(tmp_path: Path) -> None:
    assert common.find_media(tmp_path) == ""
    (tmp_path / "b").mkdir()
    (tmp_path / "a.png").mkdir()
    for name in ("b/d.mp4", "b/e.JPG", "z.png", "a.txt"):
        (tmp_path / name).touch()
    assert common.find_media(tmp_path) == "b/d.mp4"


def test_latents_keep_their_order(tmp_path: Path) -> None:
    assert not common.save_latents([], tmp_path)
    assert not (tmp_path / "latents.safetensors").exists()
    steps = [torch.full((2, 3), float(n)).t() for n in range(12)]
    assert common.save_latents(steps, tmp_path)
    found = common.read_latents(tmp_path)
    assert [float(step[0, 0]) for step in found] == [float(n) for n in range(12)]
    assert found[3].shape == (3, 2)


def test_bytes_by_dtype() -> None:
    one = torch.nn.Linear(5, 3, dtype=torch.bfloat16)
    one.register_buffer("codes", torch.zeros(7, dtype=torch.int8))
    other = torch.nn.Linear(2, 4, bias=False)
    found = common.count_bytes([one, other, one])
    assert found == {"bfloat16": 2 * 2 * (15 + 3), "float32": 4 * 8, "int8": 14}
    assert list(found) == ["bfloat16", "float32", "int8"]


def test_the_peak_of_processes_is_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    used = {common.resource.RUSAGE_SELF: 300, common.resource.RUSAGE_CHILDREN: 500}
    monkeypatch.setattr(
        common.resource, "getrusage", lambda kind: SimpleNamespace(ru_maxrss=used[kind])
    )
    assert common.read_peak() == common.read_peak("cpu") == 512_000
    used[common.resource.RUSAGE_SELF] = 700
    assert common.read_peak() == 716_800
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 9)
    assert common.read_peak("cuda:1") == 9


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("signal 11", "a.b.TypeError: x\nKeyboardInterrupt\nend", "signal 11: KeyboardInterrupt"),
        ("exit code 1", "MyException: one: two\nErrors: no", "exit code 1: MyException: one: two"),
        ("exit code 1", "", "exit code 1"),
        ("ValueError", "\n  padded  \nmore", "ValueError: padded"),
        ("HTTP 400", "a\nb.KeyError: c", "HTTP 400: a"),
    ],
)
def test_the_line_of_a_failure(kind: str, error: str, message: str) -> None:
    assert common.pick_message(Answer(FAILED, kind=kind, error=error)) == message


@pytest.mark.parametrize(
    ("runtime", "message"),
    [
        ("no-such", "--runtime no-such: there is no adapter quantmatrix.peers.no_such"),
        ("common", "--runtime common: quantmatrix.peers.common is not an adapter of it"),
        ("cache_dit", "--runtime cache_dit: quantmatrix.peers.cache_dit is not an adapter of it"),
    ],
)
def test_a_runtime_without_an_adapter(runtime: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        peers.load(runtime)
    assert str(caught.value) == message


def test_defaults_of_a_task_and_an_answer() -> None:
    task = Task(FOLDER, "b", "w")
    assert (task.flags, task.baseline, task.way, task.device) == ((), False, "", "cpu")
    assert (task.tiny, task.seconds, task.online) == (False, 600.0, "")
    assert task.argv == ["--model-path", "b", "--prompt", "a curious pikachu"]
    assert replace(task, flags=("A=1", "--prompt", "x")).argv == [
        "--model-path", "b", "--prompt", "x",
    ]  # fmt: skip
    assert replace(task, checkpoint=ONLINE).online == "fp8"
    assert replace(task, checkpoint=ONLINE, baseline=True).online == ""
    assert Answer(DONE) == Answer(
        DONE, "", "", False, True, "", False, {}, {}, 0
    )  # fmt: skip
    failure = RuntimeFailure("text")
    assert (failure.kind, failure.loaded) == ("exit", False)
    for value, name in ((task, "way"), (Answer(DONE), "kind"), (Found(), "why")):
        with pytest.raises(FrozenInstanceError):
            setattr(value, name, "x")


def test_an_answer_carries_the_end_of_a_long_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(worker, "LONGEST", 7)
    monkeypatch.setattr(worker, "read_peak", lambda: 55)

    def fail(error: BaseException) -> Any:
        def run(task: Task, folder: Path) -> Answer:
            raise error

        return SimpleNamespace(run=run)

    task = make(FOLDER, "w")
    found = worker.answer(fail(ValueError("  0123456789 ")), task, tmp_path)
    assert found == Answer(
        FAILED, kind="ValueError", error="3456789", loaded=False, meant=True, peak_bytes=55
    )
    assert "ValueError:   0123456789" in capsys.readouterr().err
    (tmp_path / LOADED).touch()
    assert worker.answer(fail(ImportError("x")), task, tmp_path).kind == "missing ImportError"
    assert worker.answer(fail(protocol.Missing("x")), task, tmp_path).kind == "missing Missing"
    assert worker.answer(fail(ValueError("x")), task, tmp_path).loaded
    ended = worker.answer(
        fail(RuntimeFailure("0123456789", kind="exit code 4", loaded=False)), task, tmp_path
    )
    assert (ended.kind, ended.error, ended.loaded) == ("exit code 4", "3456789", False)
    with pytest.raises(SystemExit):
        worker.answer(fail(SystemExit(3)), task, tmp_path)
    monkeypatch.undo()
    long = worker.answer(fail(ValueError("a" + "b" * 20_000)), task, tmp_path)
    assert long.error == "b" * 20_000
