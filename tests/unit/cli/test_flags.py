"""Flags: which are needed, what stands where nobody says anything, and how many values each takes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from quantmatrix.cli.main import build_parser, main

MODEL = ["--model-path", "m"]


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    return build_parser()


@pytest.mark.parametrize(
    ("words", "missing"),
    [
        ("generate", "--model-path"),
        ("plan", "--model-path"),
        ("dequantize", "--model-path"),
        ("validate", "--model-path"),
        ("fallback", "--model-path"),
        ("quantize", "--model-path, --family, --output-path"),
        ("inspect", "checkpoint"),
        ("compare", "A, B"),
        ("compile", "--hardware"),
        ("completion", "shell"),
        ("evidence", "ACTION"),
        ("evidence merge", "FOLDER, --output-path"),
        ("evidence check", "FOLDER_OR_JUNIT_XML, --planned"),
        ("evidence carry", "REVISION"),
        ("explain", "--hardware"),
        ("fleet", "ACTION"),
        ("fleet run", "--evidence-dir"),
        ("fleet status", "--evidence-dir"),
        ("init", "DIR"),
        ("matrix", "ACTION"),
        ("matrix show", "id"),
        ("matrix diff", "A..B"),
        ("matrix history", "id"),
        ("matrix dry-run", "--hardware"),
        ("packet", "ACTION"),
        ("packet make", "cell, --output-path"),
        ("packet check", "DIR"),
        ("recommend", "--hardware"),
        ("run-column", "--runtime, --hardware"),
        ("speed", "--model-id, --family"),
        ("summary", "EVIDENCE"),
        ("true-size", "cell"),
    ],
)
def test_what_a_command_needs(words: str, missing: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.split()) == 2
    assert capsys.readouterr().err == (
        f"quantmatrix: the following arguments are required: {missing}; "
        f"see `quantmatrix {words} --help`\n"
    )


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (
            ["agreement"],
            {"today": None, "max_age_days": None, "fail_under": None, "all": False},
        ),
        (
            ["bench"],
            {"model_path": None, "row": None, "synthetic": None, "family": None, "scheme": None,
             "compare": None, "repeats": 20, "baseline": None, "tolerance": None,
             "output_path": None, "json": False, "takes_overrides": True},
        ),
        (
            ["compare", "a", "b"],
            {"model_path": None, "min_psnr": None, "max_rel_l2": None, "min_cosine": None,
             "min_image_psnr": None, "min_ssim": None, "takes_overrides": True},
        ),
        (["compile", "--hardware", "h100"], {"row": None, "no_cache": False}),
        (
            ["dequantize", *MODEL],
            {"component": "transformer", "output_path": None, "takes_overrides": True},
        ),
        (["evidence", "check", "a", "--planned", "cpu"], {"check": [], "sources": [Path("a")]}),
        (
            ["evidence", "merge", "a", "b", "--output-path", "c"],
            {"check": [], "planned": [], "folders": [Path("a"), Path("b")],
             "output_path": Path("c")},
        ),
        (["explain", "--hardware", "cpu"], {"checkpoint": None, "model": None}),
        (
            ["fallback", *MODEL],
            {"target_psnr": 30.0, "by": "layer", "output_path": None, "takes_overrides": True},
        ),
        (
            ["fleet", "run", "--evidence-dir", "a"],
            {"address": None, "family": [], "model": [], "hardware": [], "check": [],
             "backend": [], "rows": None, "full_size": False, "timeout": None, "suites": [],
             "evidence_dir": Path("a")},
        ),
        (
            ["generate", *MODEL],
            {"save_latents": None, "save_output": True, "output_path": "outputs",
             "takes_overrides": True, "compile": None, "cuda_graph": None, "tiny": None},
        ),
        (
            ["inspect", "a"],
            {"tiny": False, "layers": False, "against": None, "component": None},
        ),
        (["matrix", "jobs"], {"hardware": [], "parts": None, "minutes": 30.0}),
        (
            ["matrix", "list"],
            {"family": [], "model": [], "hardware": [], "claim": [], "state": [], "scope": []},
        ),
        (
            ["mutate"],
            {"rows": [], "faults": [], "gates": [], "reports": Path("reports"), "write": False},
        ),
        (["packet", "make", "a", "--output-path", "b"], {"tiny": False}),
        (["plan", *MODEL], {"hardware": None, "takes_overrides": True}),
        (
            ["quantize", *MODEL, "--family", "fp8", "--output-path", "a"],
            {"scheme": None, "component": None, "precision": None, "rank": None, "keep": None,
             "calibration_prompts": None, "overwrite": False},
        ),
        (
            ["recommend", "--hardware", "cpu"],
            {"model": None, "memory_gib": None, "prefer": "quality"},
        ),
        (
            ["report"],
            {"check": False, "into": None, "table": [], "format": None, "columns": []},
        ),
        (
            ["run-column", "--runtime", "a", "--hardware", "b"],
            {"checkpoint": [], "tiny": False, "output_path": None, "record_dir": None,
             "timeout": 600.0, "memory": 0.0, "workers": None},
        ),
        (
            ["speed", "--model-id", "a", "--family", "b"],
            {"synthetic": "full", "scheme": None, "backend": None, "device": None,
             "compile": False, "cuda_graph": False, "repeats": 10},
        ),
        (
            ["summary", "a", "b"],
            {"since": None, "output_path": None, "folders": [Path("a"), Path("b")]},
        ),
        (
            ["thresholds"],
            {"diff": None, "measure_spread": False, "reports": None},
        ),
        (["tiny-hub"], {"folder": None}),
        (["trace"], {"model_path": None, "hardware": None, "row": [], "takes_overrides": True}),
        (
            ["validate", *MODEL],
            {"prompts": None, "output_path": None, "takes_overrides": True},
        ),
    ],
)  # fmt: skip
def test_what_stands_where_nobody_says_anything(
    words: list[str], values: dict[str, Any], parser: argparse.ArgumentParser
) -> None:
    found = vars(parser.parse_args(words))
    assert {name: found[name] for name in values} == values
    assert {type(found[name]) for name in values} == {type(value) for value in values.values()}
    assert found["json"] is False


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (["bench", "--compare", "a", "b"], {"compare": ["a", "b"]}),
        (["bench", "--row", "a", "b", "c"], {"row": ["a", "b", "c"]}),
        (["bench", "--tolerance", "1.25", "--repeats", "7"], {"tolerance": 1.25, "repeats": 7}),
        (["compare", "a", "b", "--min-psnr", "20.5"], {"reference": "a", "min_psnr": 20.5}),
        (["trace", "--row", "a", "b", "--row", "c"], {"row": ["a", "b", "c"]}),
        (["fleet", "run", "--evidence-dir", "a", "--checks", "load"], {"check": ["load"]}),
        (["summary", "a", "--since", "b"], {"since": Path("b")}),
        (["mutate", "a", "b", "--reports", "c"], {"rows": ["a", "b"], "reports": Path("c")}),
        (["generate", *MODEL, "--no-save-output"], {"save_output": False}),
        (["generate", *MODEL, "--shard-weights"], {"shard_weights": True}),
    ],
)
def test_values_of_flags(
    words: list[str], values: dict[str, Any], parser: argparse.ArgumentParser
) -> None:
    found = vars(parser.parse_args(words))
    assert {name: found[name] for name in values} == values


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("bench --compare a", "argument --compare: expected 2 arguments"),
        ("bench --synthetic huge", "argument --synthetic: invalid choice: 'huge'"),
        ("bench --tolerance nan", "argument --tolerance: expected a number, not 'nan'"),
        ("fallback --model-path m --by model", "argument --by: invalid choice: 'model'"),
        ("fallback --model-path m --target-psnr inf", "argument --target-psnr: expected a number"),
        ("recommend --hardware cpu --prefer looks", "argument --prefer: invalid choice: 'looks'"),
        ("speed --model-id a --family b --synthetic x", "argument --synthetic: invalid choice"),
        ("completion fish", "argument shell: invalid choice: 'fish'"),
        ("report --table rows", "argument --table: invalid choice: 'rows'"),
        ("report --format pdf", "argument --format: invalid choice: 'pdf'"),
        ("agreement --fail-under much", "argument --fail-under: expected a number, not 'much'"),
        ("matrix jobs --minutes inf", "argument --minutes: expected a number, not 'inf'"),
        ("matrix list --famil x", "unrecognized arguments: --famil x"),
        ("dequantize --model-path m --prompt x", "unrecognized arguments: --prompt x"),
        ("dequantize --model-path m --device cpu", "unrecognized arguments: --device cpu"),
        ("dequantize --model-path m --backend torch", "unrecognized arguments: --backend torch"),
        ("doctor --compile", "unrecognized arguments: --compile"),
        ("abacus", "argument COMMAND: invalid choice: 'abacus'"),
    ],
)
def test_words_that_a_parser_refuses(
    words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*words.split(), "--output-path", "x"] if "dequantize" in words else words.split()
    assert main(given) == 2
    assert capsys.readouterr().err.startswith(f"quantmatrix: {said}")


QUANTIZED = {
    *("enable_svdquant", "quantization_precision", "quantization_rank", "quantization"),
    *("quantization_ignored_layers", "witness", "nvfp4_layout", "nibble_order"),
}
GENERATION = {
    *("prompt", "negative_prompt", "height", "width", "num_frames", "num_inference_steps"),
    *("guidance_scale", "seed"),
}
FAST = {"compile", "cuda_graph"}
OFFLOAD = {"dit_layerwise_offload", "dit_cpu_offload"}
ADAPTERS = {"lora_path", "lora_weight_name", "lora_scale"}


def list_flags(parser: argparse.ArgumentParser, name: str) -> dict[str, str | None]:
    """Help of the flags of a command by the names of their values."""
    [commands] = [
        action for action in parser._actions if isinstance(action, argparse._SubParsersAction)
    ]
    return {action.dest: action.help for action in commands.choices[name]._actions}


@pytest.mark.parametrize(
    ("name", "lacks"),
    [
        (
            "dequantize",
            GENERATION | FAST | OFFLOAD | ADAPTERS | {"save_output", "device", "backend"},
        ),
        ("quantize", QUANTIZED | FAST | {"prompt", "seed", "backend"}),
        ("validate", {"save_output"}),
        ("generate", set()),
        ("plan", set()),
    ],
)
def test_flags_that_a_command_has_no_use_for(
    name: str, lacks: set[str], parser: argparse.ArgumentParser
) -> None:
    every = GENERATION | FAST | OFFLOAD | ADAPTERS | QUANTIZED
    every |= {"save_output", "device", "backend", "dtype", "revision", "tiny", "model_path"}
    if name == "quantize":
        lacks = lacks | {"save_output"}
    assert every - set(list_flags(parser, name)) == lacks


def test_flags_of_generate_that_a_plan_hides(parser: argparse.ArgumentParser) -> None:
    found = list_flags(parser, "plan")
    hidden = {name for name, text in found.items() if text == argparse.SUPPRESS}
    assert hidden == {
        *("prompt", "negative_prompt", "guidance_scale", "seed", "cuda_graph", "output_path"),
        "save_output",
    }


@pytest.mark.parametrize(
    ("name", "flag", "text"),
    [
        ("generate", "num_frames", "frames of a clip (default: the model's)"),
        ("generate", "negative_prompt", "what the output should not show"),
        ("speed", "json", "print the result as JSON"),
        ("generate", "height", "pixels"),
        ("bench", "repeats", "rounds of each comparison"),
    ],
)
def test_every_flag_says_what_it_does(
    name: str, flag: str, text: str, parser: argparse.ArgumentParser
) -> None:
    assert list_flags(parser, name)[flag] == text


def test_removed_flags_leave_their_group() -> None:
    from quantmatrix.cli.flags import remove_flags

    parser = argparse.ArgumentParser()
    group = parser.add_argument_group("some")
    group.add_argument("--one", "--uno")
    group.add_argument("--two")
    remove_flags(parser, "one", "three")
    assert [action.dest for action in group._group_actions] == ["two"]
    assert "--uno" not in parser.format_help()
    assert parser.parse_known_args(["--uno", "1", "--two", "2"])[1] == ["--uno", "1"]
