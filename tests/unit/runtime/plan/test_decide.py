"""Planning: precedence, hardware rows, offload rules, contradictions; no tensor is opened."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

import pytest

from quantmatrix import api
from quantmatrix.api import plan
from quantmatrix.checkpoints import folders
from quantmatrix.checkpoints.opening import fetch_pipeline
from quantmatrix.errors import RefusedError, UsageError
from quantmatrix.request import Hub, Request
from quantmatrix.runtime.plan.inspect import inspect
from quantmatrix.runtime.plan.types import Plan, Refusal, require
from quantmatrix.tiny.hub import open_tiny_hub, use_tiny

FLUX = ["--tiny", "--model-path", "black-forest-labs/FLUX.1-dev"]
FP8 = ["--transformer-path", "BBuf/flux1-dev-modelopt-fp8-sglang-transformer"]


def decide(*words: str, **extra: str) -> Plan | Refusal:
    return plan(Request.from_words([*FLUX, *words], **extra))


def test_json_has_the_promised_keys() -> None:
    made = decide(*FP8).to_json()
    part = made["components"]["transformer"]
    assert made["ok"] is True
    assert made["refusal"] is None
    assert part["family"] == "modelopt-fp8"
    assert part["config_from"].endswith("config.json")
    assert 0 < part["quantized_layers"] < part["total_layers"]
    assert part["backends"] == {"decode": part["quantized_layers"]}
    assert part["bytes"] > 0
    assert {"files", "precision", "rank"} <= part.keys()
    json.dumps(made, allow_nan=False)


def test_planning_opens_no_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    decide(*FP8)
    import safetensors

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a tensor was opened")

    monkeypatch.setattr(safetensors, "safe_open", fail)
    assert decide(*FP8).ok


@pytest.mark.parametrize(
    ("hardware", "backend"),
    [("cpu", "decode"), ("a100", "decode"), ("rtx-4090", "torch"), ("h200", "torch"), ("b200", "torch"),
     ("mi300x", "decode"), ("ascend-910b", "decode")],
)  # fmt: skip
def test_kernel_of_each_hardware(hardware: str, backend: str) -> None:
    planned = decide(*FP8, hardware=hardware)
    assert isinstance(planned, Plan)
    assert set(planned.components["transformer"].backends) == {backend}


@pytest.mark.parametrize("hardware", ["cpu", "a100", "rtx-3090", "mi300x", "ascend-910b"])
def test_refusal_names_rule_hardware_and_what_works(hardware: str) -> None:
    planned = decide(*FP8, "--backend", "torch", hardware=hardware)
    assert isinstance(planned, Refusal)
    assert planned.rule == "fp8-torch-sm89"
    assert "--backend reference | decode" in planned.message
    assert planned.to_json()["ok"] is False


def test_unknown_hardware() -> None:
    with pytest.raises(UsageError, match="no such row"):
        decide(*FP8, hardware="abacus")


def test_weights_override_beats_component_override() -> None:
    planned = decide(
        *FP8,
        "--transformer-weights-path",
        "quantmatrix/flux-1-fp8-single-file/flux-1-fp8.safetensors",
    )
    assert isinstance(planned, Plan)
    assert planned.components["transformer"].family == "fp8"
    assert "modelopt-fp8" in planned.components["transformer"].config_from


BASE_2, RAW = "black-forest-labs/FLUX.2-dev", "black-forest-labs/FLUX.2-dev-NVFP4"
FLUX_2_FP8 = "BBuf/flux2-dev-modelopt-fp8-sglang-transformer"


@pytest.mark.parametrize(
    ("words", "file", "family"),
    [
        ([], "flux2-dev-nvfp4-mixed.safetensors", "modelopt-nvfp4"),
        (
            ["--transformer-weights-path", f"{RAW}/flux2-dev-nvfp4.safetensors"],
            "flux2-dev-nvfp4.safetensors",
            "modelopt-nvfp4",
        ),
        (["--transformer-path", FLUX_2_FP8], "diffusion_pytorch_model.safetensors", "modelopt-fp8"),
    ],
)
def test_the_compatibility_use_of_model_path_gives_way_to_a_flag(
    words: list[str], file: str, family: str
) -> None:
    planned = plan(Request.from_words(["--tiny", "--model-path", RAW, *words]))
    assert isinstance(planned, Plan)
    assert planned.base == "black-forest-labs/FLUX.2-dev"
    found = planned.components["transformer"]
    assert [PurePath(path).name for path in found.checkpoint.files] == [file]
    assert found.family == family


def test_a_whole_model_of_a_compatible_name_is_itself(tmp_path: Path) -> None:
    """A saved pipeline in a folder that is called like the weights-only repository."""
    hub = open_tiny_hub([BASE_2, FLUX_2_FP8])
    folder = tmp_path / "FLUX.2-dev-NVFP4"
    shutil.copytree(fetch_pipeline(BASE_2, hub), folder)
    planned = plan(Request(model_path=str(folder), device="cpu", hub=hub))
    assert isinstance(planned, Plan)
    assert planned.base == str(folder)
    assert planned.components["transformer"].family is None
    assert inspect(str(folder), hub)["components"]["transformer"]["family"] is None


def test_an_unknown_fp4_backend_is_told_with_the_known_values() -> None:
    words = ["--transformer-path", "BBuf/flux1-dev-modelopt-nvfp4-sglang-transformer"]
    planned = decide(*words, hardware="b200", fp4_gemm_backend="packed")
    assert isinstance(planned, Plan)
    assert set(planned.components["transformer"].backends) == {"flashinfer-trtllm"}
    (said,) = planned.warnings
    assert "FP4_GEMM_BACKEND=packed is not used: no such FP4 GEMM backend" in said
    assert "known: cudnn, flashinfer_cudnn, cutlass, flashinfer_cutlass, trtllm" in said


def test_unknown_model_id_is_a_warning() -> None:
    made = decide(*FP8, "--model-id", "no-such-model")
    assert isinstance(made, Plan)
    assert any("no-such-model" in warning for warning in made.warnings)
    assert decide(*FP8, "--model-id", "flux.1-DEV").warnings == ()


@pytest.mark.parametrize(
    ("words", "layerwise", "cpu", "warning"),
    [
        ((), False, False, ""),
        (("--dit-layerwise-offload",), True, False, ""),
        (("--dit-cpu-offload",), False, False, "stays disabled"),
        (("--dit-cpu-offload", "true", "--dit-layerwise-offload"), True, False, "stays disabled"),
        (("--dit-layerwise-offload", "false"), False, False, ""),
    ],
)
def test_offload_rules_of_modelopt_fp8(
    words: tuple[str, ...], layerwise: bool, cpu: bool, warning: str
) -> None:
    planned = decide(*FP8, *words)
    assert isinstance(planned, Plan)
    assert (planned.layerwise_offload, planned.cpu_offload) == (layerwise, cpu)
    assert bool(planned.warnings) is bool(warning)
    assert warning in " ".join(planned.warnings)


def test_layerwise_wins_over_cpu_offload() -> None:
    planned = decide("--quantization", "fp8", "--dit-cpu-offload", "--dit-layerwise-offload")
    assert isinstance(planned, Plan)
    assert (planned.layerwise_offload, planned.cpu_offload) == (True, False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--enable-svdquant"], "--enable-svdquant needs --transformer-weights-path"),
        (["--quantization-precision", "fp4"], "written nvfp4"),
        (["--quantization-precision", "int8"], "expected int4 or nvfp4"),
        (["--quantization-rank", "0"], "greater than 0"),
        (["--quantization-rank", "-1"], "greater than 0"),
        (["--quantization", "int3"], "only fp8"),
        (
            ["--transformer-2-path", "BBuf/flux1-dev-modelopt-fp8-sglang-transformer"],
            "no component",
        ),
        (
            ["--vae-weights-path", "BBuf/flux1-dev-modelopt-fp8-sglang-transformer"],
            "only transformer",
        ),
    ],
)
def test_contradictions(words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        decide(*words)


def test_memory_that_does_not_suffice_is_a_warning() -> None:
    from quantmatrix.hardware.machine import Machine
    from quantmatrix.runtime.plan.decide import check_memory

    planned = decide(*FP8)
    assert isinstance(planned, Plan)
    warnings: list[str] = []
    small = Machine("small", "nvidia", "sm90", 1000)
    check_memory(planned.components, planned.request, small, warnings)
    assert "--dit-layerwise-offload" in warnings[0]


def test_a_model_id_of_another_model_is_refused() -> None:
    """It made FLUX.1's defaults those of a Wan folder, silently."""
    words = ["--tiny", "--model-path", "Wan-AI/Wan2.2-T2V-A14B-Diffusers", "--model-id"]
    with pytest.raises(UsageError, match=r"FLUX\.1-dev, but .* is a WanPipeline: expected Wan2\.2"):
        plan(Request.from_words([*words, "FLUX.1-dev"]))
    planned = plan(Request.from_words([*words, "wan2.2-t2v-a14b-diffusers"]))
    assert isinstance(planned, Plan)


def test_a_stand_in_that_nobody_opened_is_named() -> None:
    """Below the edge a `--tiny` request without its hub would lead to the real repository."""
    from quantmatrix.hardware import probe
    from quantmatrix.runtime.plan import decide as below

    request = Request.from_words([*FLUX, *FP8])
    assert request.tiny
    for function in (below.plan, below.plan_transformers):
        with pytest.raises(UsageError, match=r"stand-in of black-forest-labs.* was not opened"):
            function(request, probe.probe("cpu"))


def test_what_is_asked_of_the_edge_reaches_the_plan() -> None:
    """The hub of the stand-ins and the machine of `--hardware`; or the one we stand on."""
    request = Request.from_words([*FLUX, *FP8], hardware="h200")
    resolved, machine = api.resolve(request)
    decided = api.require_plan(request)
    assert (decided.request, decided.machine) == (resolved, machine)
    assert resolved.hub.local_root
    assert machine.arch == "sm90"
    assert api.find_machine(replace(request, hardware=None, device="cpu")).vendor == "cpu"


def test_a_refusal_is_raised_with_its_rule() -> None:
    refusal = Refusal("some-rule", "nothing here runs it")
    with pytest.raises(RefusedError, match="nothing here runs it") as raised:
        require(refusal)
    assert raised.value.rule == "some-rule"
    decided = decide(*FP8)
    assert require(decided) is decided


ONCE = {
    "two experts, their base elsewhere": "--model-path quantmatrix/wan-2-2-w8a8-dynamic",
    "one expert": "--model-path Wan-AI/Wan2.2-T2V-A14B-Diffusers "
    "--transformer-path quantmatrix/wan-2-2-w8a8-dynamic",
    "weights alone": "--model-path black-forest-labs/FLUX.2-dev-NVFP4",
}


@pytest.mark.parametrize("case", ONCE)
def test_a_plan_opens_each_folder_once(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once as the request says, and once offline for the witness, which downloads nothing."""
    request = use_tiny(
        Request.from_words([*ONCE[case].split(), "--tiny", "--prompt", "x"], device="cpu")
    )
    opened: Counter[tuple[str, bool]] = Counter()
    look_up = folders.look_up

    def count(reference: str, hub: Hub) -> Any:
        opened[reference, hub.offline] += 1
        return look_up(reference, hub)

    monkeypatch.setattr(folders, "look_up", count)
    assert isinstance(api.plan(request), Plan)
    assert opened
    assert set(opened.values()) == {1}
    api.plan(request)
    assert set(opened.values()) == {2}, "files may change between two requests"
