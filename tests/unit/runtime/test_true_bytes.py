"""True bytes: what a model needs at its own size, told from the plan of its stand-in."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from quantmatrix import models
from quantmatrix.api import plan
from quantmatrix.cli.main import main
from quantmatrix.request import Request
from quantmatrix.runtime import true_bytes
from quantmatrix.runtime.plan.types import Plan
from quantmatrix.runtime.true_bytes import Size
from quantmatrix.tables import read

FLUX = ["--tiny", "--model-path", "black-forest-labs/FLUX.1-dev"]
WAN = ["--tiny", "--model-path", "Wan-AI/Wan2.2-T2V-A14B-Diffusers"]
FP8 = ["--transformer-path", "BBuf/flux1-dev-modelopt-fp8-sglang-transformer"]
GIB = 2**30


def make_plan(*words: str, hardware: str | None = None, memory: float = 0, **changes: Any) -> Plan:
    planned = plan(Request.from_words([*words], hardware=hardware))
    assert isinstance(planned, Plan)
    machine = replace(planned.machine, memory_bytes=int(memory * GIB))
    return replace(planned, machine=machine, **changes)


def count_linear(model: str) -> int:
    """Parameters of a model's transformer, from diffusers itself."""
    return sum(math.prod(shape) for _, shape in true_bytes.list_parameters(model))


@pytest.mark.parametrize("model", models.IDS)
def test_full_precision_is_two_bytes_a_parameter(model: str) -> None:
    base = read.read().models[model].repo
    sizes = true_bytes.measure_all(make_plan("--tiny", "--model-path", base))
    assert {size.whole for size in sizes.values()} == {2 * count_linear(model)}
    assert all(len(size.blocks) > 20 for size in sizes.values())


def test_a_kernel_that_keeps_codes_needs_half() -> None:
    [kept] = true_bytes.measure_all(make_plan(*FLUX, *FP8, hardware="h200")).values()
    [decoded] = true_bytes.measure_all(make_plan(*FLUX, *FP8, "--backend", "decode")).values()
    whole = 2 * count_linear("flux-1")
    assert decoded.whole == pytest.approx(whole, rel=0.01)
    assert 0.5 < kept.whole / whole < 0.8  # modulations stay in BF16
    assert kept.layerwise < kept.whole / 5


def test_what_fits_is_no_warning() -> None:
    planned = make_plan(*FLUX, *FP8, hardware="h200", memory=141)
    assert true_bytes.explain_fit(true_bytes.measure_all(planned), planned) is None


@pytest.mark.parametrize(
    ("words", "memory", "offload", "advice"),
    [
        (FLUX, 0, {}, None),
        (FLUX, 24, {}, None),
        (FLUX, 16, {}, "--dit-layerwise-offload makes it fit"),
        (FLUX, 16, {"layerwise_offload": True}, None),
        (FLUX, 16, {"cpu_offload": True}, "--dit-layerwise-offload makes it fit"),
        (FLUX, 0.5, {}, "no offload makes it fit"),
        (FLUX, 0.5, {"layerwise_offload": True}, "no offload makes it fit"),
        (WAN, 80, {}, None),
        (WAN, 32, {}, "--dit-cpu-offload makes it fit, with 26.6 GiB at one time"),
        (WAN, 32, {"cpu_offload": True}, None),
        (WAN, 20, {}, "--dit-layerwise-offload makes it fit"),
    ],
)
def test_the_gentlest_offload_is_named(
    words: list[str], memory: float, offload: dict[str, bool], advice: str | None
) -> None:
    planned = make_plan(*words, memory=memory, **offload)
    said = true_bytes.explain_fit(true_bytes.measure_all(planned), planned)
    assert (said is None) == (advice is None)
    if advice and said:
        assert advice in said
        assert f"has {memory:.1f} GiB" in said


def test_a_layer_of_no_block_is_never_offloaded() -> None:
    size = Size(5, (1, 2, 3))
    assert (size.whole, size.layerwise) == (11, 10)
    assert true_bytes.generalize("blocks.12.ffn.net.0.proj") == "blocks.#.ffn.net.0.proj"


def test_plan_and_dry_run_say_it(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", *FLUX, "--hardware", "rtx-3090"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["true_bytes"] == {"transformer": 2 * count_linear("flux-1")}
    assert main(["plan", *WAN, "--hardware", "rtx-3090"]) == 0
    text = capsys.readouterr().out
    assert "MiB of weights in the stand-in; at true size 26.6 GiB" in text
    assert "warning: the transformer weights of wan-2-2 need 53.2 GiB at true size" in text
    assert "--dit-layerwise-offload makes it fit" in text
    assert main(["matrix", "dry-run", "--hardware", "rtx-4090", "--json"]) in (0, 13)
    cells = json.loads(capsys.readouterr().out)["cells"]
    for cell in cells:
        fits = cell["memory_bytes"] <= 24 * GIB or "offload" in cell["cell"]
        assert fits != any("at true size" in warning for warning in cell["warnings"]), cell
