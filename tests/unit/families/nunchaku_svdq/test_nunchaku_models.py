"""Whole SVDQuant checkpoints against plain diffusers models that are built by other means.

Here the file's tensors are decoded by the oracle's formulas and given to diffusers modules by the
name tables of the format, written out below once more; the package goes through the models'
dialects, its own unpacking and the loader. Both forwards must be the same to float32 rounding.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest
import svdq_oracle as oracle
import torch
from processors import keeps_bits_with_threads
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quantmatrix import plan
from quantmatrix.api import load_transformer
from quantmatrix.errors import CheckpointError
from quantmatrix.runtime.load import count_quantized
from quantmatrix.runtime.plan.types import Plan
from quantmatrix.runtime.quantized_linear import SplitInputLinear
from quantmatrix.tables import read
from quantmatrix.tiny import checkpoints, hub

Tensors = dict[str, torch.Tensor]
BASES = {
    "flux-1": "black-forest-labs/FLUX.1-dev",
    "qwen-image": "Qwen/Qwen-Image",
    "z-image": "Tongyi-MAI/Z-Image-Turbo",
}
FILES = {
    "flux-1 int4": "nunchaku-tech/nunchaku-flux.1-dev/svdq-int4_r32-flux.1-dev.safetensors",
    "flux-1 nvfp4": "nunchaku-tech/nunchaku-flux.1-dev/svdq-fp4_r32-flux.1-dev.safetensors",
    "qwen-image int4": "/path/to/svdq-int4_r32-qwen-image.safetensors",
    "qwen-image nvfp4": "nunchaku-tech/nunchaku-qwen-image/svdq-fp4_r32-qwen-image.safetensors",
    "z-image int4": "nunchaku-tech/nunchaku-z-image-turbo/svdq-int4_r32-z-image-turbo.safetensors",
    "z-image nvfp4": "nunchaku-tech/nunchaku-z-image-turbo/svdq-fp4_r32-z-image-turbo.safetensors",
}
ALIKE = 2e-5
"""Relative distance of two float32 forwards."""


def find(reference: str) -> Path:
    """The stand-in of a hub id, of a file in one, or of a path of the guide."""
    folder = hub.default_folder()
    hub.ensure(reference, folder)
    if reference.startswith("/"):
        return folder / "local" / reference.lstrip("/")
    owner, name, *inner = reference.split("/")
    return hub.find_snapshot(f"{owner}/{name}", folder).joinpath(*inner)


def read_file(path: Path) -> tuple[Tensors, dict[str, str]]:
    with safe_open(path, "pt") as file:
        return load_file(path), file.metadata()


# --- the name tables of the format, once more ------------------------------------------------


class Reader:
    """The layers of one file, decoded; `mistake` names one to be made on the way."""

    def __init__(self, tensors: Tensors, mistake: str = "") -> None:
        self.tensors = tensors
        self.mistake = mistake
        self.out: Tensors = {}

    def own(self, layer: str) -> Tensors:
        prefix = f"{layer}."
        return {n.removeprefix(prefix): t for n, t in self.tensors.items() if n.startswith(prefix)}

    def quantized(self, layer: str, *, gelu: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """(weight, bias) of a W4A4 layer."""
        own = self.own(layer)
        int4 = own["wscales"].dtype != torch.float8_e4m3fn
        unsigned = gelu and (int4 or self.mistake == "shift nvfp4") and self.mistake != "no shift"
        found = oracle.read_layer(own, unsigned=unsigned)
        return found.weight, found.plain_bias

    def put(self, module: str, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.out[f"{module}.weight"] = weight
        if bias is not None:
            self.out[f"{module}.bias"] = bias

    def linear(self, layer: str, module: str, *, gelu: bool = False, biased: bool = True) -> None:
        weight, bias = self.quantized(layer, gelu=gelu)
        self.put(module, weight, bias if biased else None)

    def fused(self, layer: str, modules: list[str], *, biased: bool = True) -> None:
        weight, bias = self.quantized(layer)
        rows = weight.shape[0] // len(modules)
        for index, module in enumerate(modules):
            part = slice(index * rows, (index + 1) * rows)
            self.put(module, weight[part], bias[part] if biased else None)

    def modulation(self, layer: str, module: str, chunks: int) -> None:
        """Row d * S + i of the file is row i * D + d of diffusers; scale chunks hold a 1."""
        own = self.own(layer)
        weight, bias = oracle.take_awq(own), own["bias"].double()
        width = len(bias) // chunks
        order = [d * chunks + i for i in range(chunks) for d in range(width)]
        if self.mistake == "no interleave":
            order = list(range(len(bias)))
        weight, bias = weight[order], bias[order].clone()
        if self.mistake != "one more":
            for index in (1, 4) if chunks == 6 else (1,):
                bias[index * width : (index + 1) * width] -= 1
        self.put(module, weight, bias)

    def rest(self, rename: Callable[[str], str] = lambda name: name) -> Tensors:
        """What is stored plainly, under diffusers' names, beside what was decoded."""
        coded = {n.rpartition(".")[0] for n in self.tensors if n.endswith(".qweight")}
        plain = {n: t for n, t in self.tensors.items() if n.rpartition(".")[0] not in coded}
        return {**self.out, **{rename(n): t.double() for n, t in plain.items()}}


def count(tensors: Tensors, block: str) -> range:
    pattern = re.compile(rf"{block}\.(\d+)\.")
    return range(1 + max((int(m[1]) for n in tensors if (m := pattern.match(n))), default=-1))


def read_flux(tensors: Tensors, mistake: str = "") -> Tensors:
    reader = Reader(tensors, mistake)
    for i in count(tensors, "transformer_blocks"):
        b = f"transformer_blocks.{i}"
        reader.fused(f"{b}.qkv_proj", [f"{b}.attn.to_{x}" for x in "qkv"])
        reader.fused(f"{b}.qkv_proj_context", [f"{b}.attn.add_{x}_proj" for x in "qkv"])
        reader.linear(f"{b}.out_proj", f"{b}.attn.to_out.0")
        reader.linear(f"{b}.out_proj_context", f"{b}.attn.to_add_out")
        for side, module in (("mlp", "ff"), ("mlp_context", "ff_context")):
            reader.linear(f"{b}.{side}_fc1", f"{b}.{module}.net.0.proj")
            reader.linear(f"{b}.{side}_fc2", f"{b}.{module}.net.2", gelu=True)
        for norm in ("norm1", "norm1_context"):
            reader.modulation(f"{b}.{norm}.linear", f"{b}.{norm}.linear", 6)
    for i in count(tensors, "single_transformer_blocks"):
        b = f"single_transformer_blocks.{i}"
        reader.fused(f"{b}.qkv_proj", [f"{b}.attn.to_{x}" for x in "qkv"])
        reader.linear(f"{b}.mlp_fc1", f"{b}.proj_mlp")
        left, right = reader.quantized(f"{b}.out_proj"), reader.quantized(f"{b}.mlp_fc2", gelu=True)
        assert not left[1].any()
        reader.put(f"{b}.proj_out", torch.cat([left[0], right[0]], dim=1), left[1] + right[1])
        reader.modulation(f"{b}.norm.linear", f"{b}.norm.linear", 3)
    return reader.rest(
        lambda n: re.sub(r"^((?:single_)?transformer_blocks\.\d+)\.(norm_\w+)", r"\1.attn.\2", n)
    )


def read_qwen(tensors: Tensors, mistake: str = "") -> Tensors:
    reader = Reader(tensors, mistake)
    for i in count(tensors, "transformer_blocks"):
        b = f"transformer_blocks.{i}"
        reader.fused(f"{b}.attn.to_qkv", [f"{b}.attn.to_{x}" for x in "qkv"])
        reader.fused(f"{b}.attn.add_qkv_proj", [f"{b}.attn.add_{x}_proj" for x in "qkv"])
        for name in (
            "attn.to_out.0",
            "attn.to_add_out",
            "img_mlp.net.0.proj",
            "txt_mlp.net.0.proj",
        ):
            reader.linear(f"{b}.{name}", f"{b}.{name}")
        for side in ("img", "txt"):
            reader.linear(f"{b}.{side}_mlp.net.2", f"{b}.{side}_mlp.net.2", gelu=True)
            reader.modulation(f"{b}.{side}_mod.1", f"{b}.{side}_mod.1", 6)
    return reader.rest()


def read_z_image(tensors: Tensors, mistake: str = "") -> Tensors:
    """Where the refiners are plain, their feed-forward has the fused names all the same."""
    reader = Reader(tensors, mistake)
    gates = ("w1", "w3") if mistake == "swap" else ("w3", "w1")
    plain = dict(tensors)
    for block in ("layers", "noise_refiner", "context_refiner"):
        for i in count(tensors, block):
            b = f"{block}.{i}"
            modules = [f"{b}.feed_forward.{gate}" for gate in gates]
            fused, last = f"{b}.feed_forward.net.0.proj", f"{b}.feed_forward.net.2"
            if f"{fused}.weight" in tensors:
                for module, half in zip(
                    modules, plain.pop(f"{fused}.weight").chunk(2), strict=True
                ):
                    reader.put(module, half.double(), None)
                reader.put(f"{b}.feed_forward.w2", plain.pop(f"{last}.weight").double(), None)
                continue
            attention = [f"{b}.attention.to_{x}" for x in "qkv"]
            reader.fused(f"{b}.attention.to_qkv", attention, biased=False)
            reader.linear(f"{b}.attention.to_out.0", f"{b}.attention.to_out.0", biased=False)
            reader.fused(fused, modules, biased=False)
            reader.linear(last, f"{b}.feed_forward.w2", biased=False)
    reader.tensors = plain
    return reader.rest()


READERS = {"flux-1": read_flux, "qwen-image": read_qwen, "z-image": read_z_image}


# --- forwards --------------------------------------------------------------------------------


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def forward(model_id: str, model: torch.nn.Module) -> torch.Tensor:
    """One forward of a tiny transformer on fixed inputs."""
    dtype = next(model.parameters()).dtype
    make = lambda *words: draw(*words).to(dtype)  # noqa: E731
    with torch.inference_mode():
        if model_id == "flux-1":
            ids = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
            return model(
                hidden_states=make(1, 1, 16, 64),
                encoder_hidden_states=make(2, 1, 8, 128),
                pooled_projections=make(3, 1, 128),
                timestep=torch.tensor([0.7]).to(dtype),
                guidance=torch.tensor([3.5]).to(dtype),
                img_ids=ids,
                txt_ids=torch.zeros(8, 3),
                return_dict=False,
            )[0]
        if model_id == "qwen-image":
            return model(
                hidden_states=make(1, 1, 16, 64),
                encoder_hidden_states=make(2, 1, 8, 128),
                encoder_hidden_states_mask=torch.ones(1, 8, dtype=torch.bool),
                timestep=torch.tensor([0.7]).to(dtype),
                img_shapes=[[(1, 4, 4)]],
                return_dict=False,
            )[0]
        latents, caption = make(1, 16, 1, 8, 8), make(2, 11, 128)
        [found] = model([latents], torch.tensor([0.7]).to(dtype), [caption], return_dict=False)[0]
        return found


def build_plain(model_id: str, tensors: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """diffusers' own model with these weights, float32; every name must be there."""
    import diffusers

    folder = find(BASES[model_id]) / "transformer"
    model_class = {
        "flux-1": diffusers.FluxTransformer2DModel,
        "qwen-image": diffusers.QwenImageTransformer2DModel,
        "z-image": diffusers.ZImageTransformer2DModel,
    }[model_id]
    model = model_class.from_pretrained(folder, dtype=torch.float32)
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return model.eval()


def load(model_id: str, weights: Path | str, **words: object) -> torch.nn.Module:
    words = {"backend": "merged", "dtype": torch.float32, **words}
    return load_transformer(
        str(find(BASES[model_id])), transformer_weights_path=str(weights), **words
    )


@cache
def expect(name: str, mistake: str = "") -> torch.Tensor:
    """Forward of the plain model that a file means, possibly read with a mistake."""
    model_id = name.split()[0]
    tensors, _ = read_file(find(FILES[name]))
    return forward(model_id, build_plain(model_id, READERS[model_id](tensors, mistake)))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("backend", ["merged", "decode"])
def test_forward_is_that_of_the_plain_model(name: str, backend: str) -> None:
    model_id = name.split()[0]
    model = load(model_id, find(FILES[name]), backend=backend)
    found = forward(model_id, model)
    assert oracle.relative_error(found, expect(name)) < ALIKE
    assert set(count_quantized(model).values()) == {backend}
    halves = [m for m in model.modules() if isinstance(m, SplitInputLinear)]
    assert len(halves) == (2 if model_id == "flux-1" else 0)


MISTAKES = [
    ("flux-1 int4", "no shift"),  # 4
    ("qwen-image int4", "no shift"),
    ("flux-1 nvfp4", "shift nvfp4"),  # 5; for Z-Image see test_which_layers_are_unsigned
    ("flux-1 int4", "one more"),  # 6
    ("qwen-image int4", "one more"),
    ("flux-1 int4", "no interleave"),  # 7
    ("qwen-image int4", "no interleave"),
    ("z-image int4", "swap"),  # 8
    ("z-image nvfp4", "swap"),
]


@pytest.mark.parametrize(("name", "mistake"), MISTAKES)
def test_mistakes_would_be_seen(name: str, mistake: str) -> None:
    """The comparison above tells each wrong reading of a checkpoint from the right one."""
    assert oracle.relative_error(expect(name, mistake), expect(name)) > 100 * ALIKE


@pytest.mark.parametrize("name", FILES)
def test_coded_inputs_stay_near_the_plain_model(name: str) -> None:
    model_id = name.split()[0]
    found = forward(model_id, load(model_id, find(FILES[name]), backend="reference"))
    assert 1e-4 < oracle.relative_error(found, expect(name)) < 0.3


@pytest.mark.parametrize("name", FILES)
def test_which_layers_are_unsigned(name: str) -> None:
    model_id, precision = name.split()
    planned = plan(
        model_path=str(find(BASES[model_id])), weights_paths={"transformer": str(find(FILES[name]))}
    )
    assert isinstance(planned, Plan)
    [component] = planned.components.values()
    unsigned = {piece.layer for piece in component.pieces() if piece.scheme.unsigned}
    ends = {"flux-1": (".mlp_fc2", ".mlp_context_fc2"), "qwen-image": ("_mlp.net.2",)}
    expected = {
        piece.layer
        for piece in component.pieces()
        if precision == "int4" and piece.layer.endswith(ends.get(model_id, ("-",)))
    }
    assert unsigned == expected
    assert bool(expected) == (precision == "int4" and model_id != "z-image")
    assert component.rank == 32


def rename_older(name: str) -> str:
    for new, old in (
        ("smooth_factor_orig", "smooth_orig"),
        ("smooth_factor", "smooth"),
        ("proj_down", "lora_down"),
        ("proj_up", "lora_up"),
    ):
        if name.endswith(f".{new}"):
            return name.removesuffix(new) + old
    return name


def test_older_names_in_one_file_or_two(tmp_path: Path) -> None:
    """FLUX.1 files have the older suffixes; the oldest are a folder of two files."""
    tensors, metadata = read_file(find(FILES["flux-1 int4"]))
    older = {rename_older(name): tensor for name, tensor in tensors.items()}
    assert older.keys() != tensors.keys()
    save_file(older, tmp_path / "svdq-int4_r32-flux.1-dev.safetensors", metadata)
    folder = tmp_path / "svdq-int4-flux.1-dev"
    folder.mkdir()
    blocks = {n: t for n, t in older.items() if "transformer_blocks." in n}
    save_file(blocks, folder / "transformer_blocks.safetensors")
    rest = {n: t for n, t in older.items() if n not in blocks}
    save_file(rest, folder / "unquantized_layers.safetensors")
    for path in (tmp_path / "svdq-int4_r32-flux.1-dev.safetensors", folder):
        found = forward("flux-1", load("flux-1", path))
        assert oracle.relative_error(found, expect("flux-1 int4")) < ALIKE


def test_half_precision_file(tmp_path: Path) -> None:
    tensors, metadata = read_file(find(FILES["qwen-image int4"]))
    half = {n: t.half() if t.dtype == torch.bfloat16 else t for n, t in tensors.items()}
    path = tmp_path / "svdq-int4_r32-half.safetensors"
    save_file(half, path, metadata)
    expected = forward("qwen-image", build_plain("qwen-image", read_qwen(half)))
    found = forward("qwen-image", load("qwen-image", path))
    assert oracle.relative_error(found, expected) < ALIKE
    assert forward("qwen-image", load("qwen-image", path, dtype=torch.float16)).isfinite().all()


@pytest.mark.parametrize("word", ["int4_r16", "nvfp4_r32"])
def test_plain_refiners(word: str, tmp_path: Path) -> None:
    """Z-Image with skip_refiners: ordinary attention names, but fused feed-forward names."""
    rows = read.read().checkpoints.values()
    row = next(row for row in rows if row.reference == FILES["z-image int4"])
    row = replace(row, scheme=word, kept="z-image-refiners")
    name = f"svdq-{word.replace('nv', '')}-z-image.safetensors"
    checkpoints.write_checkpoint(row, name, tmp_path, find(BASES["z-image"]))
    tensors, metadata = read_file(tmp_path / name)
    assert '"skip_refiners": true' in metadata["quantization_config"]
    assert "noise_refiner.0.attention.to_q.weight" in tensors
    assert "noise_refiner.0.feed_forward.net.0.proj.weight" in tensors
    assert "layers.0.attention.to_qkv.qweight" in tensors
    expected = forward("z-image", build_plain("z-image", read_z_image(tensors)))
    model = load("z-image", tmp_path / name)
    assert oracle.relative_error(forward("z-image", model), expected) < ALIKE
    assert {n.split(".")[0] for n in count_quantized(model)} == {"layers"}


def test_contradictions_and_flags_reach_the_plan(tmp_path: Path) -> None:
    source = find(FILES["qwen-image int4"])
    wrong = tmp_path / "svdq-fp4_r32-qwen-image.safetensors"
    shutil.copy(source, wrong)
    with pytest.raises(CheckpointError, match="file name says nvfp4, but its tensors are of int4"):
        load("qwen-image", wrong)
    model = load("qwen-image", wrong, quantization_precision="int4")
    assert count_quantized(model)
    lightning = tmp_path / "svdq-int4_r32-qwen-image-lightningv1.0-4steps.safetensors"
    shutil.copy(source, lightning)
    weights = {"transformer": str(lightning)}
    ask = partial(plan, model_path=str(find(BASES["qwen-image"])), weights_paths=weights)
    for steps, warned in ((4, False), (50, True), (None, True)):
        made = ask(num_inference_steps=steps)
        assert isinstance(made, Plan)
        assert any("Lightning" in text for text in made.warnings) == warned


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("flux-1 nvfp4", "reference"),
        ("flux-1 nvfp4", "decode"),
        ("flux-1 nvfp4", "merged"),
        ("qwen-image int4", "merged"),
    ],
)
def test_threads_do_not_change_bits(name: str, backend: str) -> None:
    """Z-Image's int4 with every backend is in test_svdq_gain.py."""
    if backend == "reference" and not keeps_bits_with_threads():
        pytest.skip("torch's own product depends on the number of threads on this processor")
    model_id = name.split()[0]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            model = load(model_id, find(FILES[name]), backend=backend, dtype=torch.bfloat16)
            found.append(forward(model_id, model))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)
