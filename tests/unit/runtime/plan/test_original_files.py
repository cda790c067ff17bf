"""Files in original names: what every family stores comes to the modules, split after decoding."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from original_files import (
    SIZES,
    Tensors,
    ask,
    find_base,
    learn_names,
    pack,
    read_base,
    read_numbers,
)

from quantmatrix import families, models
from quantmatrix.api import plan
from quantmatrix.errors import CheckpointError
from quantmatrix.families.protocol import Calibration, Declaration
from quantmatrix.request import Request
from quantmatrix.runtime.plan.learned_names import LearnedDialect
from quantmatrix.runtime.plan.placement import select_rows
from quantmatrix.runtime.plan.types import Plan
from quantmatrix.tools.dequantize import plan_decode
from quantmatrix.tools.recipe import save

FORMS = [
    ("flux-1", "fp8", "tensor-dynamic"),
    ("flux-1", "fp8", "channel-dynamic"),
    ("flux-1", "fp8", "block-dynamic"),
    ("flux-1", "modelopt-fp8", "FP8"),
    ("flux-1", "modelopt-nvfp4", "NVFP4"),
    ("z-image", "fp8", "tensor-dynamic"),
    ("z-image", "fp8", "channel-dynamic"),
    ("z-image", "modelopt-fp8", "FP8"),
    ("z-image", "modelopt-nvfp4", "NVFP4"),
    ("flux-2", "fp8", "channel-dynamic"),
    ("wan-2-2", "fp8", "channel-dynamic"),
    ("wan-2-2", "modelopt-nvfp4", "NVFP4"),
]


def unpack(dialect: LearnedDialect, packed: Mapping[str, torch.Tensor]) -> Tensors:
    found: Tensors = {}
    for name, tensor in packed.items():
        for target in dialect.table[name]:
            rows = select_rows(target, tensor.shape[0] if tensor.ndim else 0)
            found[target.module] = tensor if rows is None else tensor[rows]
    return found


def write(path: Path, tensors: Tensors, said: Declaration = Declaration(), prefix: str = "") -> str:  # noqa: B008
    """A single file with what declares its quantization in the header."""
    import json

    metadata = {"format": "pt", **said.metadata}
    if said.config is not None:
        metadata["quantization_config"] = json.dumps(said.config)
    renamed = {prefix + name: tensor.contiguous() for name, tensor in tensors.items()}
    save(renamed, sorted(renamed), path, metadata)
    return str(path)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("model", SIZES)
def test_full_precision(model: str, prefix: str, tmp_path: Path) -> None:
    plain = read_base(model)
    packed = pack(learn_names(model, plain), plain)
    assert set(packed) - set(plain)
    got = read_numbers(ask(model, write(tmp_path / "w.safetensors", packed, prefix=prefix)))
    assert set(got) == set(plain)
    assert [name for name in plain if not torch.equal(got[name], plain[name])] == []


@pytest.mark.parametrize(("model", "family", "scheme"), FORMS)
def test_quantized(model: str, family: str, scheme: str, tmp_path: Path) -> None:
    """Fused layers get one set of scales; what each module gets is its share of the decoded rows."""
    plain = read_base(model)
    dialect = learn_names(model, plain)
    packed = pack(dialect, plain)
    module, kind = families.load(family), families.load(family).SCHEMES[scheme]
    blocks = models.load(model).BLOCKS
    chosen = {
        name.removesuffix(".weight"): kind
        for name, tensor in packed.items()
        if name.endswith(".weight") and tensor.ndim == 2 and not tensor.shape[1] % 128
        and (dialect.table[name][0].module.split(".")[0] in blocks or dialect.table[name][0].swap_halves)
    }  # fmt: skip
    assert any(len(dialect.layer_targets(layer)) > 1 for layer in chosen) or model == "wan-2-2"
    stored, expected = dict(packed), dict(packed)
    for layer, own in chosen.items():
        weight = stored.pop(f"{layer}.weight")
        seen = torch.ones(weight.shape[1])
        made = module.quantize(weight, own, calibration=Calibration(-seen, seen))
        stored |= {f"{layer}.{suffix}": tensor for suffix, tensor in made.items()}
        expected[f"{layer}.weight"] = module.dequantize(made, own)
    kept = [n.removesuffix(".weight") for n in packed if n.endswith(".weight")]
    said = module.declare(chosen, [n for n in kept if n not in chosen], sorted(stored))
    request = ask(model, write(tmp_path / "w.safetensors", stored, said))
    planned = plan(request)
    assert isinstance(planned, Plan)
    part = planned.components["transformer"]
    assert (part.family, len({p.layer for p in part.pieces()})) == (family, len(chosen))
    got, wanted = read_numbers(request), unpack(dialect, expected)
    assert set(got) == set(plain)
    assert [
        name for name in got if not torch.equal(got[name], wanted[name].to(got[name].dtype))
    ] == []


@pytest.mark.parametrize(
    ("model", "form"),
    [("flux-1", "fp8"), ("z-image", "fp8"), ("wan-2-2", "mxfp4")],
)
def test_quantized_while_loading(model: str, form: str, tmp_path: Path) -> None:
    """Layers are chosen by the modules that they lead to, and every fused one serves several.

    Their widths are those on disk, in whichever form they will be packed.
    """
    plain = read_base(model)
    path = write(tmp_path / "w.safetensors", pack(learn_names(model, plain), plain))
    planned = plan(
        Request(
            model_path=str(find_base(model)),
            weights_paths={"transformer": path},
            quantization=form,
            device="cpu",
        )
    )
    assert isinstance(planned, Plan)
    part = planned.components["transformer"]
    inside = {
        name.removesuffix(".weight")
        for name, tensor in plain.items()
        if name.endswith(".weight") and tensor.ndim == 2
        if name.split(".")[0] in models.load(model).BLOCKS
    }
    assert set(part.layers) == inside
    assert len({piece.layer for piece in part.pieces()}) < len(inside) or model == "wan-2-2"
    features = {(p.out_features, p.in_features) for p in part.layers[min(inside)]}
    assert features == {tuple(plain[f"{min(inside)}.weight"].shape)}


def test_what_diffusers_leaves_out_is_ignored_by_name(tmp_path: Path) -> None:
    plain = read_base("z-image")
    packed = pack(learn_names("z-image", plain), plain) | {"norm_final.weight": torch.ones(384)}
    part = plan_decode(ask("z-image", write(tmp_path / "w.safetensors", packed)), "transformer")
    [(name, why)] = part.ignored.items()
    assert name == "norm_final.weight"
    assert "diffusers leaves it out of a ZImageTransformer2DModel" in why


@pytest.mark.parametrize("model", ["flux-1", "z-image"])
def test_missing_and_unknown_tensors_are_named(model: str, tmp_path: Path) -> None:
    plain = read_base(model)
    packed = pack(learn_names(model, plain), plain)
    lost = next(name for name in packed if name.endswith("qkv.weight"))
    less = {name: tensor for name, tensor in packed.items() if name != lost}
    with pytest.raises(CheckpointError, match=r"3 tensors of .* are not in .*to_k\.weight"):
        plan(ask(model, write(tmp_path / "less.safetensors", less)))
    more = {**packed, "one_more.weight": torch.ones(2, 2)}
    with pytest.raises(CheckpointError, match=r"1 tensors are unknown to .*: one_more\.weight"):
        plan(ask(model, write(tmp_path / "more.safetensors", more)))


def test_original_names_that_cannot_be_converted(tmp_path: Path) -> None:
    """Without a double block diffusers cannot count them."""
    plain = read_base("flux-1")
    packed = pack(learn_names("flux-1", plain), plain)
    half = {name: tensor for name, tensor in packed.items() if "double_blocks" not in name}
    with pytest.raises(CheckpointError, match="original names of a FluxTransformer2DModel, which"):
        plan(ask("flux-1", write(tmp_path / "w.safetensors", half)))
