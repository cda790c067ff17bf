"""LoRA beside quantized layers: exact, several at once, any scale, and refused where it does not fit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import quantmatrix
from quantmatrix.api import plan
from quantmatrix.errors import CheckpointError, UsageError
from quantmatrix.measure.classes import prove
from quantmatrix.request import Request
from quantmatrix.runtime import lora
from quantmatrix.runtime.generate import generate
from quantmatrix.runtime.load import count_quantized
from quantmatrix.runtime.pipeline import build_pipeline
from quantmatrix.runtime.plan.types import Plan

FLUX = "black-forest-labs/FLUX.1-dev"
FP8 = "BBuf/flux1-dev-modelopt-fp8-sglang-transformer"
Q, OUT = "transformer_blocks.0.attn.to_q", "single_transformer_blocks.1.proj_out"
WIDTHS = {Q: (256, 256), OUT: (1280, 256)}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_adapter(rank: int = 4, seed: int = 0, gain: float = 0.05) -> dict[str, torch.Tensor]:
    """Factors of two layers of the tiny FLUX.1, by diffusers' names."""
    found = {}
    for number, (module, (into, out)) in enumerate(WIDTHS.items()):
        found[f"transformer.{module}.lora_A.weight"] = draw(rank, into, seed=seed + number)
        found[f"transformer.{module}.lora_B.weight"] = gain * draw(
            out, rank, seed=seed + number + 9
        )
    return found


def write(
    folder: Path, tensors: dict[str, torch.Tensor], name: str = "a.safetensors", **meta: str
) -> str:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / name, {"format": "pt", **meta})
    return str(folder / name)


def decide(**fields: Any) -> Plan:
    fields = {"component_paths": {"transformer": FP8}, **fields}
    planned = plan(Request(model_path=FLUX, tiny=True, device="cpu", dtype="float32", **fields))
    assert isinstance(planned, Plan)
    return planned


@pytest.fixture(scope="module")
def pipeline() -> Any:
    """The tiny FLUX.1 of FP8 codes; tests take off what they add."""
    return build_pipeline(decide())


@pytest.fixture(autouse=True)
def without_adapters(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "pipeline" in request.fixturenames:
        request.getfixturevalue("pipeline").unload_lora_weights()


def expected(tensors: dict[str, torch.Tensor], module: str, x: torch.Tensor) -> torch.Tensor:
    """What an adapter adds to a layer, by its definition."""
    down = tensors[f"transformer.{module}.lora_A.weight"]
    return x @ down.T @ tensors[f"transformer.{module}.lora_B.weight"].T


@pytest.mark.parametrize("module", [Q, OUT])
def test_the_branch_is_added_exactly_and_codes_stay(pipeline: Any, module: str) -> None:
    layer, tensors = pipeline.transformer.get_submodule(module), make_adapter()
    x = draw(3, WIDTHS[module][0], seed=5)
    plain, codes = layer(x), {name: t.clone() for name, t in layer.named_buffers()}
    census = count_quantized(pipeline.transformer)
    pipeline.load_lora_weights(tensors, adapter_name="one")
    torch.testing.assert_close(layer(x) - plain, expected(tensors, module, x), rtol=1e-3, atol=1e-3)
    pipeline.set_adapters("one", 0.5)
    torch.testing.assert_close(
        layer(x) - plain, 0.5 * expected(tensors, module, x), rtol=1e-3, atol=1e-3
    )
    assert count_quantized(pipeline.transformer) == census
    kept = dict(layer.named_buffers())
    assert all(torch.equal(kept[name], tensor) for name, tensor in codes.items())
    pipeline.unload_lora_weights()
    assert torch.equal(layer(x), plain)
    assert not lora.list_names(pipeline.transformer)


def test_several_adapters_add_up_and_are_chosen(pipeline: Any) -> None:
    layer, x = pipeline.transformer.get_submodule(Q), draw(3, 256, seed=5)
    plain, one, two = layer(x), make_adapter(seed=1), make_adapter(rank=2, seed=30)
    pipeline.load_lora_weights(one)
    pipeline.load_lora_weights(two, adapter_name="two")
    assert lora.list_names(pipeline.transformer) == ["default_0", "two"]
    both = expected(one, Q, x) + expected(two, Q, x)
    torch.testing.assert_close(layer(x) - plain, both, rtol=1e-3, atol=1e-3)
    pipeline.set_adapters(["two"], [2.0])
    assert pipeline.get_active_adapters() == ["two"]
    torch.testing.assert_close(layer(x) - plain, 2 * expected(two, Q, x), rtol=1e-3, atol=1e-3)
    pipeline.set_adapters([])
    assert torch.equal(layer(x), plain)
    with pytest.raises(UsageError, match="no such adapter: three; loaded are default_0, two"):
        pipeline.set_adapters("three")
    with pytest.raises(UsageError, match="adapter two is loaded already"):
        pipeline.load_lora_weights(two, adapter_name="two")
    with pytest.raises(UsageError, match="2 adapters and 1 weights"):
        pipeline.set_adapters(["default_0", "two"], [1.0])


def test_names_of_another_writer_are_converted_and_alphas_count(
    pipeline: Any, tmp_path: Path
) -> None:
    """kohya's fused q, k and v: diffusers' converter cuts them, alpha / rank is 2."""
    down, up = draw(4, 256, seed=1), 0.05 * draw(768, 4, seed=2)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    file = write(tmp_path, {
        f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(8.0)
    })  # fmt: skip
    layers = [
        pipeline.transformer.get_submodule(f"transformer_blocks.0.attn.to_{n}") for n in "qkv"
    ]
    x = draw(3, 256, seed=5)
    plain = [layer(x) for layer in layers]
    pipeline.load_lora_weights(file)
    for number, layer in enumerate(layers):
        rows = up[256 * number : 256 * (number + 1)]
        torch.testing.assert_close(
            layer(x) - plain[number], 2 * (x @ down.T @ rows.T), rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize("where", ["tensor", "header"])
def test_an_alpha_beside_the_factors_or_in_the_header_counts(
    where: str, pipeline: Any, tmp_path: Path
) -> None:
    tensors, meta = make_adapter(rank=4), {}
    stored = dict(tensors)
    if where == "tensor":
        stored[f"transformer.{Q}.alpha"] = torch.tensor(2.0)
    else:
        meta = {
            "lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 2})
        }
    layer, x = pipeline.transformer.get_submodule(Q), draw(3, 256, seed=5)
    plain = layer(x)
    pipeline.load_lora_weights(write(tmp_path, stored, **meta))
    torch.testing.assert_close(
        layer(x) - plain, 0.5 * expected(tensors, Q, x), rtol=1e-3, atol=1e-3
    )


def test_what_does_not_fit_is_named_and_nothing_is_added(pipeline: Any) -> None:
    good = make_adapter()
    x = {f"transformer.nowhere.{n}.lora_{f}.weight": draw(4, 4) for n in range(6) for f in "AB"}
    cases: list[tuple[dict[str, torch.Tensor], str]] = [
        ({**good, **x}, r"6 of its 8 targets are not linear layers of Flux.*: nowhere\.0, .* and 2 more"),
        ({**good, f"transformer.{Q}.dora_scale": draw(1)}, "is of a DoRA"),
        ({**good, f"transformer.{Q}.lora_A.weight": draw(4, 8)}, rf"{Q} are \[4, 8\].*expected \[rank, 256\]"),
        ({f"transformer.{Q}.lora_A.weight": draw(4, 256)}, "half of a pair of factors"),
        ({**good, "text_encoder.layer.lora_A.weight": draw(4, 4)}, "no low-rank factors of a transformer: text_"),
        ({**good, f"transformer.{Q}.lora_B.weight": draw(256, 4) / 0}, "not finite"),
    ]  # fmt: skip
    for tensors, message in cases:
        with pytest.raises(CheckpointError, match=message):
            pipeline.load_lora_weights(tensors)
    assert not lora.list_names(pipeline.transformer)
    with pytest.raises(UsageError, match="has no transformer_2"):
        pipeline.load_lora_weights(good, load_into_transformer_2=True)


def test_flags_put_adapters_into_a_run(tmp_path: Path) -> None:
    folder = tmp_path / "two"
    write(folder, make_adapter(gain=0.5), "a.safetensors")
    write(folder, make_adapter(seed=50, gain=0.5), "b.safetensors")
    words = ["--tiny", "--model-path", FLUX, "--transformer-path", FP8, "--num-inference-steps", "1",
             "--lora-path", str(folder), "--lora-weight-name", "a.safetensors", "--device", "cpu"]  # fmt: skip

    def run(*more: str) -> torch.Tensor:
        planned = plan(Request.from_words([*words, *more]))
        assert isinstance(planned, Plan)
        return generate(planned.request, plan=planned).latents[-1]

    one, none = run(), run("--lora-scale", "0")
    assert not torch.equal(one, none)
    assert torch.equal(run("--dit-layerwise-offload"), one)
    other = ("--lora-path", str(folder / "b.safetensors"), "--lora-weight-name", "b.safetensors")
    assert torch.equal(run(*other, "--lora-scale", "1", "--lora-scale", "0"), one)
    with pytest.raises(
        CheckpointError, match=r"found a\.safetensors, b\.safetensors; name it with"
    ):
        decide(lora_path=(str(folder),))
    with pytest.raises(UsageError, match="--lora-scale is given 2 times, --lora-path 1"):
        decide(lora_path=(str(folder / "a.safetensors"),), lora_scale=(1.0, 2.0))
    with pytest.raises(CheckpointError, match="no low-rank factors in it"):
        decide(lora_path=(write(tmp_path, {"x.weight": draw(2, 2)}),))


def test_a_transformer_alone_takes_adapters_by_its_pipeline(tmp_path: Path) -> None:
    file = write(tmp_path, make_adapter())
    loaded = quantmatrix.load_transformer(FLUX, transformer_path=FP8, tiny=True, lora_path=(file,))
    assert lora.list_names(loaded) == ["lora_0"]
    assert isinstance(loaded, nn.Module)


@pytest.mark.parametrize(
    "class_name",
    ["FluxTransformer2DModel", "Flux2Transformer2DModel", "WanTransformer3DModel",
     "QwenImageTransformer2DModel", "ZImageTransformer2DModel"],
)  # fmt: skip
def test_quantized_with_an_adapter_is_as_near_as_without(class_name: str) -> None:
    """Both beside BF16 with the same adapter: the error grows by a fifth at most."""
    with prove.open_small(class_name) as small:
        targets = [
            n
            for n, m in small.model.named_modules()
            if isinstance(m, nn.Linear) and n in small.ranges
        ]
        blocks = [name for name in targets if ".0." in name]
        linear = dict(small.model.named_modules())
        tensors = {}
        for number, name in enumerate(blocks):
            layer: Any = linear[name]
            tensors[f"{name}.lora_A.weight"] = draw(4, layer.in_features, seed=number)
            up = draw(layer.out_features, 4, seed=number + 99)
            tensors[f"{name}.lora_B.weight"] = 0.1 * up / layer.in_features**0.5
        loaded = {family: prove.load_form(small, family, scheme) for family, scheme in prove.FORMS}
        errors = {
            family: prove.measure(small.output, model, small) for family, model in loaded.items()
        }
        for model in [small.model, *loaded.values()]:
            lora.add_adapter(model, tensors, "one", 1.0, "transformer", "here")
        base = prove.run(small.model, small.inputs)
        assert (base - small.output).norm() / small.output.norm() > 0.02
        for family, model in loaded.items():
            assert prove.measure(base, model, small) <= 1.2 * errors[family] + 0.005, family
