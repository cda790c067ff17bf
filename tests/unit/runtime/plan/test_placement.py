"""Placement: what headers show to be wrong is refused by the plan, as text that name it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quantmatrix.api import plan
from quantmatrix.checkpoints.header import Header, TensorHeader
from quantmatrix.checkpoints.local import LocalFolder
from quantmatrix.errors import CheckpointError
from quantmatrix.models.dialect import Target
from quantmatrix.request import Request
from quantmatrix.runtime.plan.placement import explain_rows, list_names, select_rows
from quantmatrix.runtime.plan.types import Plan
from quantmatrix.tiny import hub

FLUX, FLUX_2, WAN = (
    "black-forest-labs/FLUX.1-dev",
    "black-forest-labs/FLUX.2-dev",
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
)
QWEN = "Qwen/Qwen-Image"
WAN_FP8 = "quantmatrix/wan-2-2-fp8-single-file/wan-2-2-fp8.safetensors"
QWEN_FP8 = "quantmatrix/qwen-image-fp8-single-file/qwen-image-fp8.safetensors"
FLUX_FP8 = "quantmatrix/flux-1-fp8-single-file/flux-1-fp8.safetensors"
RAW = "black-forest-labs/FLUX.2-dev-NVFP4/flux2-dev-nvfp4.safetensors"
QKV = "double_blocks.0.img_attn.qkv"
Tensors = dict[str, TensorHeader]


def find(reference: str) -> Path:
    folder = hub.default_folder()
    hub.ensure(reference, folder)
    snapshot = hub.find_snapshot(hub.repository_of(reference), folder)
    file = reference.rpartition("/")[2]
    return snapshot / file if file.endswith(".safetensors") else snapshot


def shape(tensors: Tensors, name: str, *sizes: int) -> None:
    tensors[name] = replace(tensors[name], shape=sizes)


def grow(tensors: Tensors, old: int, new: int) -> None:
    for name, header in tensors.items():
        shape(tensors, name, *(new if size == old else size for size in header.shape))


def keep(tensors: Tensors, start: str) -> None:
    for name in [name for name in tensors if not name.startswith(start)]:
        del tensors[name]


def copy(tensors: Tensors, name: str, other: str) -> None:
    tensors[other] = replace(tensors[name], name=other)


CASES: dict[str, tuple[str, str, Callable[[Tensors], object], str]] = {
    "sound": (FLUX, FLUX_FP8, lambda t: None, ""),
    "image to video": (
        WAN,
        WAN_FP8,
        lambda t: shape(t, "patch_embedding.weight", 256, 36, 1, 2, 2),
        r"patch_embedding\.weight has shape \[256, 36, 1, 2, 2\], WanTransformer3DModel .* expects "
        r"\[256, 16, 1, 2, 2\]",
    ),
    "blocks only": (
        WAN,
        WAN_FP8,
        lambda t: keep(t, "blocks."),
        r"tensors of WanTransformer3DModel are not in .*wan-2-2-fp8\.safetensors: condition_embedder",
    ),
    "one norm missing": (
        QWEN,
        QWEN_FP8,
        lambda t: t.pop("txt_norm.weight"),
        r"1 tensors of QwenImageTransformer2DModel are not in .*: txt_norm\.weight",
    ),
    "another size": (
        QWEN,
        QWEN_FP8,
        lambda t: grow(t, 256, 512),
        r"is 512 x 512 \(out x in\), .* expects 256 x 256 for transformer_blocks\.0\.",
    ),
    "one block more": (
        FLUX,
        FLUX_FP8,
        lambda t: copy(t, "transformer_blocks.1.attn.norm_q.weight", "transformer_blocks.2.norm.weight"),
        r"1 tensors are unknown to FluxTransformer2DModel .*: transformer_blocks\.2\.norm\.weight",
    ),
    "a quantized layer that is none": (
        FLUX,
        FLUX_FP8,
        lambda t: [
            copy(t, f"transformer_blocks.0.attn.to_q.{leaf}", f"transformer_blocks.0.attn.norm_q.{leaf}")
            for leaf in ("weight", "weight_scale")
        ],
        r"quantized layer transformer_blocks\.0\.attn\.norm_q should be the linear layer .* a RMSNorm",
    ),
    "a bias that is missing": (
        FLUX,
        FLUX_FP8,
        lambda t: t.pop("transformer_blocks.0.attn.to_q.bias"),
        r"layer transformer_blocks\.0\.attn\.to_q has no bias, FluxTransformer2DModel .* expects one",
    ),
    "a bias of another shape": (
        FLUX,
        FLUX_FP8,
        lambda t: shape(t, "transformer_blocks.0.attn.to_q.bias", 128, 2),
        r"to_q\.bias is a bias of shape \[128, 2\]: expected \[256\]",
    ),
    "two names of one tensor": (
        FLUX_2,
        RAW,
        lambda t: copy(t, "final_layer.linear.weight", "proj_out.weight"),
        r"final_layer\.linear\.weight and proj_out\.weight are both proj_out\.weight of Flux2",
    ),
    "a plain twin of a quantized layer": (
        FLUX_2,
        RAW,
        lambda t: copy(t, "img_in.weight", "transformer_blocks.0.attn.to_q.weight"),
        rf"tensors {QKV} and transformer_blocks\.0\.attn\.to_q\.weight are both",
    ),
    "parts that are not equal": (
        FLUX_2,
        RAW,
        lambda t: grow(t, 768, 769),
        rf"{QKV} .*scale.*expected|layer {QKV} holds the rows .* its 769 rows are no 3 equal parts",
    ),
    "codes in a plain tensor": (
        FLUX,
        FLUX_FP8,
        lambda t: t.update({"proj_out.bias": replace(t["proj_out.bias"], dtype="I16")}),
        r"tensor proj_out\.bias holds I16 codes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_headers_are_compared_with_the_model(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base, reference, change, message = CASES[case]
    target, real = find(reference), LocalFolder.header

    def header(folder: LocalFolder, name: str) -> Header:
        tensors, strings = real(folder, name)
        if folder.root / name == target:
            change(tensors)
        return tensors, strings

    monkeypatch.setattr(LocalFolder, "header", header)
    request = Request(
        model_path=str(find(base)), weights_paths={"transformer": str(target)}, device="cpu"
    )
    if not message:
        assert isinstance(plan(request), Plan)
        return
    with pytest.raises(CheckpointError, match=message) as caught:
        plan(request)
    assert str(target) in str(caught.value)


def test_the_plan_says_where_every_tensor_goes() -> None:
    base, target = str(find(FLUX_2)), str(find(RAW))
    planned = plan(Request(model_path=base, weights_paths={"transformer": target}, device="cpu"))
    assert isinstance(planned, Plan)
    part = planned.components["transformer"]
    places = {plain.parameter: (plain.name, plain.target.rows) for plain in part.plain}
    assert places["proj_out.weight"] == ("final_layer.linear.weight", (0, 1, 1))
    assert (
        places["transformer_blocks.0.attn.norm_q.weight"][0]
        == "double_blocks.0.img_attn.norm.query_norm.scale"
    )
    assert places["transformer_blocks.1.attn.add_k_proj.weight"] == (
        "double_blocks.1.txt_attn.qkv.weight",
        (1, 2, 3),
    )
    own = {name.rpartition(".")[0] for name in part.checkpoint.tensors} - {
        p.layer for p in part.pieces()
    }
    assert {plain.name.rpartition(".")[0] for plain in part.plain} == own - set(part.ignored)


@pytest.mark.parametrize(
    ("target", "rows", "expected"),
    [
        (Target("m"), 4, None),
        (Target("m", rows=(1, 2, 2)), 4, [2, 3]),
        (Target("m", swap_halves=True), 4, [2, 3, 0, 1]),
        (Target("m", rows=(1, 2, 2), swap_halves=True), 8, [6, 7, 4, 5]),
        (Target("m", interleave=2), 6, [0, 2, 4, 1, 3, 5]),
    ],
)
def test_rows(target: Target, rows: int, expected: list[int] | None) -> None:
    found = select_rows(target, rows)
    taken = None if found is None else torch.arange(rows)[found].tolist()
    assert taken == expected
    assert explain_rows(target, rows) == ""


@pytest.mark.parametrize(
    ("target", "rows"),
    [
        (Target("m", rows=(0, 1, 3)), 4),
        (Target("m", swap_halves=True), 3),
        (Target("m", rows=(0, 1, 2), swap_halves=True), 6),
        (Target("m", interleave=6), 8),
    ],
)
def test_rows_that_cannot_be_cut(target: Target, rows: int) -> None:
    assert f"its {rows} rows are no" in explain_rows(target, rows)


@pytest.mark.parametrize("scheme", ["W8A8_MXFP8", "W4A4_MXFP4"])
def test_names_of_what_is_quantized_while_loading_have_the_widths_on_disk(scheme: str) -> None:
    """Two columns per byte are counted where bytes are stored, and nothing is packed yet."""
    from quantmatrix.families import msmodelslim

    planned = plan(Request(model_path=str(find(FLUX)), device="cpu"))
    assert isinstance(planned, Plan)
    checkpoint = planned.components["transformer"].checkpoint
    chosen = {"transformer_blocks.0.attn.to_q": msmodelslim.SCHEMES[scheme]}
    found = list_names(checkpoint, chosen, "msmodelslim", online=True)
    assert found == {other: header.shape for other, header in checkpoint.tensors.items()}
