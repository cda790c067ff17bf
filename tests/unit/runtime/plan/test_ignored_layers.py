"""--quantization-ignored-layers: dotted parts of a path, levels above it, patterns, fused names."""

from __future__ import annotations

from functools import cache

import pytest

from quantmatrix import models
from quantmatrix.api import plan
from quantmatrix.errors import UsageError
from quantmatrix.request import Request
from quantmatrix.runtime.plan.schemes import is_part_of_path

PARTS = {
    "flux-1": [
        ("transformer_blocks.0",),
        ("single_transformer_blocks.1.",),
        ("ff.net.0.proj", "attn.to_k"),
        ("proj_out",),
        ("x_embedder", "time_text_embed"),
    ],
    "flux-2": [("attn.to_qkv_mlp_proj",), ("ff_context",), ("single_stream_modulation.linear",)],
    "wan-2-2": [
        ("attn1.to_out",),
        ("blocks.1.ffn",),
        ("patch_embedding", "condition_embedder.time_proj"),
    ],
    "qwen-image": [("img_mlp.net.2",), ("img_mod", "txt_mod"), ("transformer_blocks.0.attn",)],
    "z-image": [("layers.0",), ("feed_forward.w2", "attention.to_out.0")],
}
"""Names as the flag takes them, all of them dotted parts of a path."""


@cache
def find_layers(model: str, ignored: tuple[str, ...]) -> frozenset[str]:
    """Quantized modules of a plan."""
    planned = plan(
        Request(
            model_path=models.load(model).REPO,
            tiny=True,
            quantization="fp8",
            quantization_ignored_layers=ignored,
        )
    )
    assert planned.ok
    return frozenset(next(iter(planned.components.values())).layers)


@pytest.mark.parametrize(
    ("model", "ignored"), [(model, names) for model, sets in PARTS.items() for names in sets]
)
def test_dotted_parts_of_a_path_are_left_alone(model: str, ignored: tuple[str, ...]) -> None:
    parts = tuple(f".{name.rstrip('.')}." for name in ignored)
    every = find_layers(model, ())
    named = {layer for layer in every if any(part in f".{layer}." for part in parts)}
    assert every - find_layers(model, ignored) == named
    outside = ("x_embedder", "patch_embedding", "single_stream_modulation.linear")
    assert bool(named) != (ignored[0] in outside)


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("attn.to_q", "transformer_blocks.0.attn.to_q", True),
        ("attn.to", "transformer_blocks.0.attn.to_q", False),
        ("transformer_blocks.1", "transformer_blocks.11.attn.to_q", False),
        ("transformer_blocks.1", "single_transformer_blocks.1.proj_out", False),
        ("transformer_blocks.*.attn", "transformer_blocks.1.attn.to_q", True),
        ("attn.to_*", "transformer_blocks.1.attn.to_q", True),
        ("*_blocks.0", "single_transformer_blocks.0.proj_out", True),
        ("attn.to_qkv", "transformer_blocks.1.attn.to_v", True),
        ("to_added_qkv", "transformer_blocks.1.attn.add_k_proj", True),
        ("to_added_qkv", "transformer_blocks.1.attn.to_k", False),
        ("feed_forward.w13", "layers.1.feed_forward.w3", True),
        ("feed_forward.w13", "layers.1.feed_forward.w2", False),
        ("", "proj_out", False),
        (".", "proj_out", False),
    ],
)
def test_what_a_name_stands_for(pattern: str, path: str, expected: bool) -> None:
    assert is_part_of_path(pattern, [path]) is expected


@pytest.mark.parametrize("name", ["nowhere", "to_qq", "attn.to", "transformer_blocks.2", ""])
def test_a_name_of_nothing_is_refused_with_an_example(name: str) -> None:
    with pytest.raises(UsageError, match=r"no linear layer .*named like transformer_blocks\.0\."):
        find_layers("qwen-image", ("proj_out", name))
