"""Numbers that cannot be meant: NaN and infinity are found in every plain tensor and bias."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quantmatrix.api import load_transformer
from quantmatrix.errors import CheckpointError
from quantmatrix.kernels.number_formats import is_finite
from quantmatrix.request import Request
from quantmatrix.tiny import hub
from quantmatrix.tools.dequantize import dequantize

FLUX, QWEN, WAN = (
    "black-forest-labs/FLUX.1-dev",
    "Qwen/Qwen-Image",
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
)
CASES = [
    (FLUX, "quantmatrix/flux-1-fp8-single-file/flux-1-fp8.safetensors", "proj_out.weight"),
    (FLUX, "quantmatrix/flux-1-fp8-single-file/flux-1-fp8.safetensors", "norm_q.weight"),
    (FLUX, "quantmatrix/flux-1-fp8-single-file/flux-1-fp8.safetensors", "to_q.bias"),
    (FLUX, "BBuf/flux1-dev-modelopt-fp8-sglang-transformer", "to_out.0.bias"),
    (FLUX, "BBuf/flux1-dev-modelopt-nvfp4-sglang-transformer", "x_embedder.bias"),
    (FLUX, "quantmatrix/flux-1-modelopt-nvfp4-svd", "to_q.svdquant_lora_b"),
    (QWEN, "nunchaku-tech/nunchaku-qwen-image/svdq-int4_r128-qwen-image.safetensors", "txt_norm.weight"),
    (QWEN, "nunchaku-tech/nunchaku-qwen-image/svdq-int4_r128-qwen-image.safetensors", "to_qkv.bias"),
    (WAN, "Eco-Tech/Wan2.2-T2V-A14B-Diffusers-w8a8", "scale_shift_table"),
    (WAN, "Eco-Tech/Wan2.2-T2V-A14B-Diffusers-w8a8", "attn1.to_q.bias"),
    (FLUX, FLUX, "norm_out.linear.bias"),
]  # fmt: skip


def find(reference: str) -> Path:
    """The weights of a stand-in: its file, or that of its transformer."""
    folder = hub.default_folder()
    hub.ensure(reference, folder)
    snapshot = hub.find_snapshot(hub.repository_of(reference), folder)
    if reference.endswith(".safetensors"):
        return snapshot / reference.rpartition("/")[2]
    inner = snapshot / "transformer"
    return next(iter(sorted((inner if inner.is_dir() else snapshot).glob("*.safetensors"))))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("base", "reference", "ending"), CASES)
def test_the_tensor_is_named(
    base: str, reference: str, ending: str, value: float, tmp_path: Path
) -> None:
    source = find(reference)
    for beside in source.parent.glob("*.json"):
        (tmp_path / beside.name).write_text(beside.read_text())
    with safe_open(source, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(source)
    name = next(n for n in sorted(tensors) if n.endswith(ending))
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[-1] = value
    save_file(tensors, tmp_path / source.name, metadata=metadata)
    path = str(tmp_path / source.name)
    folder = str(find(base).parent.parent)
    message = rf"{source.name}: tensor {name} holds NaN or infinite numbers: expected finite"
    with pytest.raises(CheckpointError, match=message):
        load_transformer(folder, transformer_weights_path=path, backend="reference")
    request = Request(model_path=folder, weights_paths={"transformer": path})
    with pytest.raises(CheckpointError, match=message):
        dequantize(request, str(tmp_path / "plain"))
    assert not (tmp_path / "plain").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (7, 333)])
def test_finite(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    largest = torch.finfo(dtype).max
    for value in (0.0, 1.0, largest, -largest):
        assert is_finite(torch.full(shape, value, dtype=dtype))  # sums that overflow, too
    for value in (torch.nan, torch.inf, -torch.inf):
        numbers = torch.ones(shape, dtype=dtype)
        numbers.view(-1)[-1] = value
        assert not is_finite(numbers)


def test_both_infinities_and_nothing() -> None:
    assert not is_finite(torch.tensor([torch.inf, -torch.inf]))
    assert is_finite(torch.empty(0, 4))
