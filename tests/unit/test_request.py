"""The flags: dashes and underscores, booleans, dynamic overrides, contradictions."""

from __future__ import annotations

import argparse
import shlex
from typing import Any

import pytest

from quantmatrix.errors import UsageError
from quantmatrix.request import Request, normalize_flags, parse_bool, parse_overrides

BASE = ["--model-path", "owner/base"]


def test_guide_command_is_read_whole() -> None:
    request = Request.from_words(
        shlex.split(
            "--model-path owner/base "
            "--transformer-weights-path /path/to/custom_nunchaku_checkpoint.safetensors "
            "--enable-svdquant --quantization-precision int4 --quantization-rank 128 "
            '--prompt "a beautiful sunset" --save-output'
        )
    )
    assert request.model_path == "owner/base"
    assert request.weights_paths == {
        "transformer": "/path/to/custom_nunchaku_checkpoint.safetensors"
    }
    assert request.enable_svdquant is True
    assert (request.quantization_precision, request.quantization_rank) == ("int4", 128)
    assert request.prompt == ("a beautiful sunset",)


@pytest.mark.parametrize("dash", ["-", "_"])
def test_dashes_and_underscores_are_the_same(dash: str) -> None:
    flag = "--transformer_2-path".replace("-path", f"{dash}path")
    words = [
        f"--model{dash}path",
        "owner/base",
        flag,
        "owner/two",
        f"--num{dash}inference{dash}steps",
    ]
    request = Request.from_words([*words, "4"])
    assert request.component_paths == {"transformer_2": "owner/two"}
    assert request.num_inference_steps == 4


def test_values_keep_their_underscores() -> None:
    assert normalize_flags(["--prompt=a_b", "c_d", "--model_id"]) == [
        "--prompt=a_b",
        "c_d",
        "--model-id",
    ]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--enable-svdquant"], True),
        (["--enable-svdquant", "true"], True),
        (["--enable-svdquant", "False"], False),
        (["--enable_svdquant=FALSE"], False),
        ([], None),
    ],
)
def test_boolean_flags(words: list[str], expected: bool | None) -> None:
    assert Request.from_words([*BASE, *words]).enable_svdquant is expected


@pytest.mark.parametrize("word", ["yes", "1", ""])
def test_boolean_flags_take_nothing_else(word: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="true or false"):
        parse_bool(word)


@pytest.mark.parametrize(
    ("words", "components", "weights"),
    [
        (["--transformer-path", "a/b"], {"transformer": "a/b"}, {}),
        (["--transformer-2-path=a/b"], {"transformer_2": "a/b"}, {}),
        (["--component-paths.vae", "a/b"], {"vae": "a/b"}, {}),
        (["--component-paths.transformer-2=a/b"], {"transformer_2": "a/b"}, {}),
        (["--transformer-2-weights-path", "a/b"], {}, {"transformer_2": "a/b"}),
        (["--transformer-weights-path=a/b"], {}, {"transformer": "a/b"}),
    ],
)
def test_overrides(words: list[str], components: dict, weights: dict) -> None:
    assert parse_overrides(words) == (components, weights)


@pytest.mark.parametrize(
    "words",
    [
        ["--frobnicate", "1"],
        ["x"],
    ],
)
def test_unknown_words_are_refused(words: list[str]) -> None:
    with pytest.raises(UsageError, match="unrecognized arguments"):
        parse_overrides(words)


@pytest.mark.parametrize(
    "words", [["--transformer-path"], ["--transformer-path", "--vae-path", "x"]]
)
def test_a_known_flag_without_its_value_is_not_unknown(words: list[str]) -> None:
    with pytest.raises(UsageError, match=r"^--transformer-path: expected a file"):
        parse_overrides(words)


def test_one_component_cannot_come_from_two_places() -> None:
    with pytest.raises(UsageError, match="given twice"):
        parse_overrides(["--transformer-path", "a/b", "--component-paths.transformer", "c/d"])


def test_a_component_path_that_names_a_file_is_a_weights_override() -> None:
    request = Request(model_path="b", component_paths={"transformer": "/x/w.safetensors"})
    assert request.component_paths == {}
    assert request.weights_paths == {"transformer": "/x/w.safetensors"}


def test_two_weight_files_for_one_component_contradict() -> None:
    with pytest.raises(UsageError, match="names another: give one"):
        Request(
            model_path="b",
            component_paths={"transformer": "/x/w.safetensors"},
            weights_paths={"transformer": "/y/w.safetensors"},
        )


def test_unknown_dtype() -> None:
    with pytest.raises(UsageError, match="expected one of bfloat16"):
        Request(model_path="b", dtype="int3")


def test_several_prompts_and_seeds_beside_overrides() -> None:
    request = Request.from_words(
        ["--prompt", "one", "two", "--transformer-path", "a/b", *BASE, "--seed", "1", "2"]
    )
    assert request.prompt == ("one", "two")
    assert request.seed == (1, 2)
    assert request.component_paths == {"transformer": "a/b"}


@pytest.mark.parametrize(
    "fields",
    [
        {"height": 0},
        {"width": -16},
        {"num_frames": 0},
        {"num_inference_steps": 0},
        {"guidance_scale": float("nan")},
        {"seed": (2**64,)},
        {"seed": ()},
        {"prompt": ()},
    ],
)
def test_numbers_that_no_generation_can_have(fields: dict[str, Any]) -> None:
    (name,) = fields
    with pytest.raises(UsageError, match=f"--{name.replace('_', '-')}"):
        Request(**fields)


def test_one_prompt_and_one_seed_need_no_tuple() -> None:
    request = Request(prompt="a fox", seed=7)  # type: ignore[arg-type]
    assert request.prompt == ("a fox",)
    assert request.seed == (7,)
