"""Files of eight-bit floats that people have, made by the rule of each form, for every model.

Tensors are drawn in the shapes of a stand-in and quantized here by plain torch; every decoded tensor is
compared with the number that its codes stand for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from drawn_files import (
    MODELS,
    Made,
    Tensors,
    compare,
    decode,
    draw,
    list_linears,
    mark,
    plan_folder,
    write,
)
from safetensors.torch import save_file

from quantmatrix.cli.main import main
from quantmatrix.errors import CheckpointError
from quantmatrix.kernels.scale_layouts import untile_scales
from quantmatrix.tiny import fp8_forms

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}


def encode(exact: torch.Tensor, scale: torch.Tensor, codes: torch.dtype = E4M3) -> torch.Tensor:
    most = LARGEST[codes]
    return (exact.float() / scale.float()).clamp(-most, most).to(codes)


def scale_layers(
    state: Tensors,
    scale: Callable[[int, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    suffix: str = "weight_scale",
    codes: torch.dtype = E4M3,
) -> Made:
    """Linear layers in codes; `scale` gives (as stored, as it multiplies) of a layer's number."""
    made = Made(dict(state), {name: tensor.float() for name, tensor in state.items()})
    for index, name in enumerate(list_linears(state)):
        stored, spread = scale(index, state[name].float())
        made.tensors[name] = encode(state[name], spread, codes)
        made.tensors[f"{name.removesuffix('weight')}{suffix}"] = stored
        made.expected[name] = made.tensors[name].float() * spread.float()
    return made


def per_tensor(index: int, exact: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = exact.abs().amax() / 448
    return scale, scale


def per_row(index: int, exact: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = exact.abs().amax(1, keepdim=True) / 448
    return (scale.flatten() if index % 2 else scale), scale


def per_block(
    index: int, exact: torch.Tensor, *, high: int = 128, wide: int = 128
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = exact.shape
    spread = torch.empty_like(exact)
    scales = torch.empty(-(-rows // high), -(-columns // wide))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * high, (i + 1) * high), slice(j * wide, (j + 1) * wide))
            scales[i, j] = spread[part] = exact[part].abs().amax() / 448
    return scales, spread


def small_scale(index: int, exact: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One number in each of the dtypes and shapes that writers have used."""
    dtype = (torch.bfloat16, torch.float16, torch.float32)[index % 3]
    scale = (exact.abs().amax() / 448).to(dtype)
    return scale.reshape(((), (1,), (1, 1))[index // 3 % 3]), scale.float()


def squeezed(index: int, exact: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of 512, so that some layers have one row of blocks, and some a single block."""
    scales, spread = per_block(index, exact, high=512)
    return scales.squeeze(), spread


def declare(made: Made, block: dict[str, Any]) -> Made:
    made.block = block
    return made


def cast(state: Tensors, codes: torch.dtype = E4M3, *, every: bool = True) -> Made:
    """Every tensor, or the layers of the blocks alone, as a plain cast gives it."""
    names = state if every else list_linears(state)
    tensors = {n: t.to(codes) if n in names else t for n, t in state.items()}
    return Made(tensors, {name: tensor.float() for name, tensor in tensors.items()})


def scale_old(state: Tensors, codes: torch.dtype = E4M3, *, inputs: bool = False) -> Made:
    """ComfyUI's first form: a marker, and scales under its names; the rest in F16."""
    half = {name: tensor.half() for name, tensor in state.items()}
    made = scale_layers(half, per_tensor, "scale_weight", codes)
    made.tensors["scaled_fp8"] = torch.zeros(0, dtype=codes)
    for index, name in enumerate(list_linears(state) if inputs else ()):
        scale = torch.tensor(1.0 if index % 2 else 0.5)
        made.tensors[name.replace(".weight", ".scale_input")] = scale
    return made


def compress(state: Tensors, strategy: str) -> Made:
    """Groups of compressed-tensors, ignoring what is not in the blocks."""
    number = {"num_bits": 8, "type": "float", "symmetric": True, "group_size": None}
    scale, inputs = {
        "tensor": (per_tensor, {**number, "strategy": "tensor", "dynamic": True}),
        "channel": (per_row, {**number, "strategy": "token", "dynamic": True}),
        "block": (per_block, {**number, "strategy": "group", "dynamic": True, "group_size": 128}),
    }[strategy]
    weights = {**number, "strategy": strategy, "dynamic": False}
    weights |= {"block_structure": [128, 128]} if strategy == "block" else {}
    linears = list_linears(state)
    kept = [n.removesuffix(".weight") for n, t in state.items() if t.ndim == 2 and n not in linears]
    return declare(
        scale_layers(state, scale),
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "quantization_status": "compressed",
            "config_groups": {
                "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
            },
            "ignore": sorted(kept),
        },
    )


def fp8r(state: Tensors) -> Made:
    made = scale_layers(state, per_row)
    made.header["quantization"] = "fp8r"
    return made


def microscale(state: Tensors) -> Made:
    """MXFP8 of ComfyUI: exponents of 32 columns, in tiles of 128 x 4, some as bytes."""
    made = Made(dict(state), {name: tensor.float() for name, tensor in state.items()})
    for index, name in enumerate(list_linears(state)):
        groups = state[name].float().unflatten(1, (-1, 32))
        exponents = torch.ceil(torch.log2(groups.abs().amax(-1) / 448))
        spread = torch.exp2(exponents)[..., None]
        made.tensors[name] = (groups / spread).flatten(1).to(E4M3)
        made.expected[name] = (made.tensors[name].float().unflatten(1, (-1, 32)) * spread).flatten(
            1
        )
        rows, columns = exponents.shape
        tiles = torch.zeros(-(-rows // 128) * 128, -(-columns // 4) * 4, dtype=torch.uint8)
        row, column = torch.arange(rows)[:, None], torch.arange(columns)[None]
        place = (row // 128 * (tiles.shape[1] // 4) + column // 4) * 512
        place = place + row % 32 * 16 + row // 32 % 4 * 4 + column % 4
        tiles.view(-1)[place.flatten()] = (exponents + 127).to(torch.uint8).flatten()
        scale = tiles if index % 2 else tiles.view(torch.float8_e8m0fnu)
        made.tensors[f"{name}_scale"] = scale
    return mark(made, "mxfp8", group_size=32)


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
BLOCKS = {**FP8, "weight_block_size": [128, 128]}
# form: (how a file is made, activations, what is said of the family)
FORMS: dict[str, tuple[Callable[[Tensors], Made], str, str]] = {
    "plain cast": (cast, "none", "a plain cast to F8_E4M3"),
    "plain cast of the blocks": (lambda s: cast(s, every=False), "none", "scale 1, weights only"),
    "plain cast to e5m2": (lambda s: cast(s, E5M2), "none", "a plain cast to F8_E5M2"),
    "scaled": (scale_old, "none", "tensor scaled_fp8"),
    "scaled, with inputs": (lambda s: scale_old(s, inputs=True), "tensor-static none", "scaled_fp8"),
    "scaled e5m2": (lambda s: scale_old(s, E5M2), "none", "layers of format float8_e5m2"),
    "one number": (
        lambda s: mark(scale_layers(s, small_scale), "float8_e4m3fn"), "tensor-dynamic", "float8_e4m3fn",
    ),
    "mxfp8": (microscale, "group-power", "layers of format mxfp8"),
    "fp8r": (fp8r, "token-dynamic", "quantization fp8r"),
    "compressed, tensor": (lambda s: compress(s, "tensor"), "tensor-dynamic", "compressed-tensors"),
    "compressed, channel": (lambda s: compress(s, "channel"), "token-dynamic", "float-quantized"),
    "compressed, block": (lambda s: compress(s, "block"), "group-dynamic", "compressed-tensors"),
    "squeezed": (
        lambda s: declare(scale_layers(s, squeezed, "weight_scale_inv"), {**BLOCKS, "weight_block_size": [512, 128]}),
        "group-dynamic", "quant_method fp8",
    ),
    "the other name": (lambda s: declare(scale_layers(s, per_block), BLOCKS), "group-dynamic", "fp8"),
    "no size": (
        lambda s: declare(scale_layers(s, per_block, "weight_scale_inv"), FP8), "group-dynamic tensor-dynamic", "fp8",
    ),
    "e5m2": (lambda s: declare(scale_layers(s, per_tensor, codes=E5M2), FP8), "none", "quant_method fp8"),
}  # fmt: skip


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("form", FORMS)
def test_every_tensor_of_a_form(
    tmp_path: Path, form: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make, activations, said = FORMS[form]
    made = make(draw(model))
    folder = write(tmp_path / "it", made, model)
    assert main(["inspect", str(folder)]) == 0
    line, *more = capsys.readouterr().out.splitlines()
    assert line.startswith("transformer: fp8 (")
    assert said in line  # what the file is, and what it was taken for, in the first line
    [schemes] = [other for other in more if other.startswith("  schemes ")]
    assert "fp8" in schemes
    planned = plan_folder(folder, model)
    assert planned.family == "fp8"
    assert said in planned.why
    assert {piece.scheme.activation for piece in planned.pieces()} <= set(activations.split())
    compare(decode(planned), made.expected)


def split(folder: Path, model: str) -> tuple[Made, dict[str, Tensors]]:
    """A folder of two shards, each layer's tensors in one."""
    made = declare(scale_layers(draw(model), per_tensor), FP8)
    write(folder, made, model)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    names = sorted(made.tensors)
    shards = {
        f"diffusion_pytorch_model-0000{i}-of-00002.safetensors": {
            name: made.tensors[name].contiguous() for name in names[i - 1 :: 2]
        }
        for i in (1, 2)
    }
    for shard, tensors in shards.items():
        save_file(tensors, folder / shard, {"format": "pt"})
    return made, shards


def write_index(path: Path, weight_map: Mapping[str, str]) -> None:
    path.write_text(json.dumps({"metadata": {}, "weight_map": dict(weight_map)}))


@pytest.mark.parametrize("model", MODELS)
def test_an_old_index_beside_the_new_one(tmp_path: Path, model: str) -> None:
    """A converter copies what lies beside the weights: the index of what they were, too."""
    made, shards = split(tmp_path, model)
    new = {name: shard for shard, tensors in shards.items() for name in tensors}
    old = {name: shard for name, shard in new.items() if not name.endswith("_scale")}
    write_index(tmp_path / "diffusion_pytorch_model.safetensors.index.json", old)
    write_index(tmp_path / "model.safetensors.index.json", new)
    compare(decode(plan_folder(tmp_path, model)), made.expected)


STALE = {
    "shards that are gone": lambda new: {n: f"old-{shard}" for n, shard in new.items()},
    "names that are gone": lambda new: {f"old.{n}": shard for n, shard in new.items()},
}


@pytest.mark.parametrize("stale", STALE)
def test_the_index_counts_whose_shards_and_names_are_there(tmp_path: Path, stale: str) -> None:
    made, shards = split(tmp_path, "qwen-image")
    new = {name: shard for shard, tensors in shards.items() for name in tensors}
    write_index(tmp_path / "a.safetensors.index.json", STALE[stale](new))
    write_index(tmp_path / "z.safetensors.index.json", new)
    compare(decode(plan_folder(tmp_path, "qwen-image")), made.expected)
    write_index(tmp_path / "z.safetensors.index.json", STALE[stale](new))
    with pytest.raises(CheckpointError, match="2 indexes; name one of them"):
        plan_folder(tmp_path, "qwen-image")


def test_a_cast_with_the_largest_code_needs_a_scale(tmp_path: Path) -> None:
    """Codes that were divided by a scale reach 448; weights do not."""
    state = draw("qwen-image")
    made = cast(state)
    name = list_linears(state)[0]
    made.tensors[name] = encode(state[name], state[name].float().abs().amax() / 448)
    planned = plan_folder(write(tmp_path / "it", made, "qwen-image"), "qwen-image")
    with pytest.raises(CheckpointError, match=rf"{name} holds the largest number of e4m3"):
        decode(planned)


@pytest.mark.parametrize("codes", [E4M3, E5M2])
def test_codes_that_are_no_numbers_are_named(tmp_path: Path, codes: torch.dtype) -> None:
    state = draw("qwen-image")
    made = cast(state, codes)
    name = list_linears(state)[0]
    made.tensors[name][0, 0] = torch.nan
    planned = plan_folder(write(tmp_path / "it", made, "qwen-image"), "qwen-image")
    with pytest.raises(CheckpointError, match=rf"{name} holds NaN codes"):
        decode(planned)


@pytest.mark.parametrize("power", [-9, 0, 3])
@pytest.mark.parametrize(("largest", "more"), [(448.0, 0), (449.0, 1), (225.0, 0), (224.0, -1)])
def test_the_exponent_of_a_block_is_the_least_that_holds_it(
    power: int, largest: float, more: int
) -> None:
    """Of 448 itself it is none: the largest code holds it."""
    weight = torch.zeros(1, 64)
    weight[0, 5], weight[0, 40] = largest * 2.0**power, 1.0
    stored = fp8_forms.scale_blocks(weight)
    exponents = untile_scales(stored["weight_scale"], 1, 2)[0].int() - 127
    assert exponents.tolist() == [power + more, -8]
    decoded = stored["weight"].float() * torch.exp2(exponents.float()).repeat_interleave(32)
    assert decoded[0, 40] == 1
    assert decoded[0, 5] == pytest.approx(weight[0, 5].item(), rel=1 / 28)
