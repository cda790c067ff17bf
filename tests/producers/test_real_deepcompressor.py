"""FLUX.1 files of the real converter of SVDQuant: `deepcompressor.backend.nunchaku`.

The codes, scales, smoothing and factors are drawn here, so that what each layer means is known in
plain numbers; packing, fused rows, names and folded biases are the converter's own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("deepcompressor")

import modelopt_exports as exports
from deepcompressor.backend.nunchaku import convert
from safetensors.torch import save_file

from quantmatrix.api import load_transformer
from quantmatrix.runtime.load import count_quantized

MODEL = "flux-1"
SHIFT = 0.171875
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
DOUBLE: dict[str, tuple[str, ...]] = {
    "attn.to_q": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attn.add_k_proj": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "attn.to_out.0": ("attn.to_out.0",),
    "attn.to_add_out": ("attn.to_add_out",),
    "ff.net.0.proj": ("ff.net.0.proj",),
    "ff.net.2.linear": ("ff.net.2",),
    "ff_context.net.0.proj": ("ff_context.net.0.proj",),
    "ff_context.net.2.linear": ("ff_context.net.2",),
}
"""Name of a layer in the converter's input, with the modules of diffusers whose rows it has."""
SINGLE = {
    "attn.to_q": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "proj_mlp": ("proj_mlp",),
    "proj_out.linears.0": ("proj_out",),
    "proj_out.linears.1.linear": ("proj_out",),
}
SMOOTHED_AS = {"attn.to_add_out": "attn.to_out.0", "proj_mlp": "attn.to_q"}
"""Layers that share the smoothing of another."""
FUSED = ("attn.to_out.0", "attn.to_add_out", "proj_out.linears.0")
"""Layers whose smoothing lies in the values before them, unless the converter is told otherwise."""


@dataclass
class Source:
    """What the converter gets, and the plain model that its file stands for."""

    int4: bool
    rank: int
    fuse: bool
    state: dict[str, torch.Tensor] = field(default_factory=dict)
    scales: dict[str, torch.Tensor] = field(default_factory=dict)
    smooth: dict[str, Any] = field(default_factory=dict)
    branch: dict[str, Any] = field(default_factory=dict)
    plain: dict[str, torch.Tensor] = field(default_factory=dict)
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(5))

    def draw(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def code(self, name: str, rows: int, columns: int) -> torch.Tensor:
        """Weights of one module: into the converter's input as it wants them, and back exact."""
        if self.int4:
            scale = (self.draw(rows, columns // 64).abs() + 0.5).mul(0.01).bfloat16()
            codes = self.draw(rows, columns).mul(2.5).round().clamp(-8, 7)
            exact = codes * scale.float().repeat_interleave(64, dim=1)
            self.scales[f"{name}.weight.scale.0"] = scale.view(rows, 1, -1, 1)
        else:
            whole = torch.tensor([0.0021]).bfloat16()
            fine = (self.draw(rows, columns // 16).abs() + 0.5).mul(8).to(torch.float8_e4m3fn)
            picked = torch.randint(0, 16, (rows, columns), generator=self.generator)
            exact = E2M1[picked] * fine.float().repeat_interleave(16, dim=1) * whole.float()
            self.scales[f"{name}.weight.scale.0"] = whole.view(1, 1, 1, 1)
            self.scales[f"{name}.weight.scale.1"] = fine.bfloat16().view(rows, 1, -1, 1)
        self.state[f"{name}.weight"] = exact.bfloat16()
        return exact


def make_source(*, int4: bool, rank: int, fuse: bool) -> Source:
    """A tiny FLUX.1 in the converter's terms."""
    made = Source(int4, rank, fuse)
    if not fuse:
        made.smooth["proj.fuse_when_possible"] = False
    base = exports.make_transformer(MODEL, torch.bfloat16).state_dict()
    made.plain = {name: tensor.float() for name, tensor in base.items()}
    blocks = sorted({".".join(name.split(".")[:2]) for name in base if "transformer_bl" in name})
    for block in blocks:
        groups = SINGLE if block.startswith("single") else DOUBLE
        for name, modules in groups.items():
            add_group(made, block, name, modules)
        for norm in ("norm.linear", "norm1.linear", "norm1_context.linear"):
            if f"{block}.{norm}.weight" in base:
                add_modulation(made, f"{block}.{norm}")
    for name, tensor in base.items():
        if ".norm_" in name or not any(name.startswith(f"{block}.") for block in blocks):
            made.state[name] = tensor
    return made


def add_group(made: Source, block: str, name: str, modules: Sequence[str]) -> None:
    """One layer of the file, of one module, of three, or of some columns of one."""
    part = {"proj_out.linears.0": 0, "proj_out.linears.1.linear": 1}.get(name)
    whole = made.plain[f"{block}.{modules[0]}.weight"]
    rows, columns = whole.shape
    start = 0
    if part is not None:
        start, columns = (0, rows) if part == 0 else (rows, columns - rows)
    smooth_name = f"{block}.{SMOOTHED_AS.get(name, name)}"
    fused = made.fuse and name in FUSED
    smooth = made.smooth.get(smooth_name)
    if smooth is None:
        smooth = (made.draw(columns).abs() + 0.5).bfloat16()
        made.smooth[smooth_name] = smooth
    down = made.draw(made.rank, columns).mul(0.02).bfloat16()
    up = made.draw(rows * len(modules), made.rank).mul(0.02).bfloat16()
    made.branch[f"{block}.{name}"] = {"a.weight": down, "b.weight": up}
    raw_down = down if fused else (down.double() / smooth.double()).bfloat16()
    low = up.float() @ raw_down.float()
    divisor = torch.ones(columns) if fused else smooth.float()
    shifted = name.endswith(".linear") and made.int4
    for index, module in enumerate(modules):
        inner = f"{block}.{module}" if len(modules) > 1 else f"{block}.{name}"
        exact = made.code(inner, rows, columns) / divisor
        branch = low[index * rows : (index + 1) * rows]
        made.plain[f"{block}.{module}.weight"][:, start : start + columns] = exact + branch
        bias_name = f"{block}.{module}.bias"
        if bias_name not in made.plain or part == 0:
            continue
        bias = made.plain[bias_name].double()
        if shifted:
            # The module adds the shift to its inputs and takes its share out of its bias; the
            # converter puts back what the low-rank branch, which reads plain inputs, had of it.
            shift = torch.full((columns,), SHIFT, dtype=torch.float64)
            bias = (bias - (exact + branch).double() @ shift).bfloat16().double()
            put_back = up.double() @ (down.double() / smooth.double()) @ shift
            made.plain[bias_name] = ((bias + put_back).bfloat16() + exact.double() @ shift).float()
            made.state[f"{inner.removesuffix('.linear')}.shift"] = torch.tensor([SHIFT])
        made.state[f"{inner}.bias"] = bias.bfloat16()


def add_modulation(made: Source, name: str) -> None:
    """A modulation layer of 4-bit weights with 16-bit inputs."""
    rows, columns = made.plain[f"{name}.weight"].shape
    scale = (made.draw(rows, columns // 64).abs() + 0.5).mul(0.01).bfloat16()
    codes = torch.randint(0, 16, (rows, columns), generator=made.generator).float()
    spread = scale.float().repeat_interleave(64, dim=1)
    zeros = (-7 * scale.float()).bfloat16().float().repeat_interleave(64, dim=1)
    made.scales[f"{name}.weight.scale.0"] = scale.view(rows, 1, -1, 1)
    made.state[f"{name}.weight"] = ((codes - 7) * spread).bfloat16()
    made.plain[f"{name}.weight"] = codes * spread + zeros
    bias = made.plain[f"{name}.bias"].bfloat16()
    made.state[f"{name}.bias"] = bias.clone()
    chunks = 3 if name.startswith("single") else 6
    plain = bias.view(chunks, -1).float()
    for chunk in {1, chunks - 2}:
        plain[chunk] = (bias.view(chunks, -1)[chunk] + 1).float() - 1
    made.plain[f"{name}.bias"] = plain.flatten()


def convert_all(made: Source) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The two files of the real converter, as dictionaries."""
    copy = {name: tensor.clone() for name, tensor in made.state.items()}
    return convert.convert_to_nunchaku_flux_state_dicts(
        copy, made.scales, made.smooth, made.branch, float_point=not made.int4
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the model in BF16."""
    folder = tmp_path_factory.mktemp("base")
    exports.make_transformer(MODEL, torch.bfloat16).save_pretrained(folder)
    return folder


def write_folder(made: Source, folder: Path, base: Path) -> Path:
    """The converter's two files and a config.json, as FLUX.1 was first published."""
    folder.mkdir()
    for name, tensors in zip(
        ("transformer_blocks", "unquantized_layers"), convert_all(made), strict=True
    ):
        save_file(tensors, folder / f"{name}.safetensors")
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    return folder


def write_file(made: Source, path: Path, base: Path) -> Path:
    """Both in one file, with the metadata that the engine's own merging adds."""
    blocks, others = convert_all(made)
    kinds = (
        ("int4", None, 64, None)
        if made.int4
        else ("fp4_e2m1_all", [None, "fp8_e4m3_nan"], 16, "fp8_e4m3_nan")
    )
    weight = {"dtype": kinds[0], "scale_dtype": kinds[1], "group_size": kinds[2]}
    activation = {"dtype": kinds[0], "scale_dtype": kinds[3], "group_size": kinds[2]}
    quantization = {"method": "svdquant", "weight": weight, "activation": activation}
    metadata = {
        "config": (base / "config.json").read_text(),
        "model_class": "NunchakuFluxTransformer2dModel",
        "quantization_config": json.dumps({**quantization, "rank": made.rank}),
    }
    save_file({**blocks, **others}, path, metadata=metadata)
    return path


def check(model: str, base: Path, path: Path, plain: dict[str, torch.Tensor]) -> None:
    """The loaded file computes what diffusers computes with plain weights."""
    found = load_transformer(
        str(base),
        transformer_weights_path=str(path),
        backend="decode",
        device="cpu",
        dtype=torch.float32,
        witness="off",  # the codes are drawn, not quantized from this base
    )
    assert set(count_quantized(found).values()) == {"decode"}
    expected = exports.make_transformer(model)
    expected.load_state_dict(plain)
    inputs = exports.make_inputs(model, 7)
    ours, theirs = exports.run_model(found, inputs), exports.run_model(expected.eval(), inputs)
    assert ((ours - theirs).norm() / theirs.norm()).item() < 1e-5


@pytest.mark.parametrize("single", [False, True], ids=["folder", "file"])
@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "kept"])
@pytest.mark.parametrize("rank", [16, 32])
@pytest.mark.parametrize("int4", [True, False], ids=["int4", "nvfp4"])
def test_a_converted_flux_is_the_model_that_went_in(
    tmp_path: Path, base: Path, int4: bool, rank: int, fuse: bool, single: bool
) -> None:
    made = make_source(int4=int4, rank=rank, fuse=fuse)
    write = write_file if single else write_folder
    path = write(
        made, tmp_path / f"svdq-{'int4' if int4 else 'fp4'}_r{rank}-flux.safetensors", base
    )
    check(MODEL, base, path, made.plain)
