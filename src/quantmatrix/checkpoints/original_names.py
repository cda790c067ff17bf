"""Original names: in which of several models' first names a file is written, where none reads them.

Files of one laboratory look alike: `double_blocks.0.img_attn.qkv` is in FLUX.1, FLUX.2, Chroma and
HunyuanVideo. Names that one of them alone has tell which it is:

| names | model | read |
| ----- | ----- | ---- |
| `double_blocks.N.img_mod.lin`, `single_blocks.N.modulation.lin`, `vector_in` | FLUX.1 | no |
| `distilled_guidance_layer`, and the blocks of FLUX.1 without modulation | Chroma | no |
| `double_blocks.N.img_attn_qkv`, `txt_in.individual_token_refiner` | HunyuanVideo | no |
| `layers.N.attention.qkv` | Z-Image | no |
| `double_stream_modulation_img`, or blocks alone | FLUX.2 | its dialect `bfl` |
| `blocks.N.self_attn.q` | Wan2.2 | its dialect `wan-original` |

Source: the names by which diffusers' single-file loaders tell checkpoints apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class OriginalNames:
    """Names of a model's first release that no dialect reads."""

    model: str
    """Id of the model here, or its name where it is none of them."""
    title: str
    marker: re.Pattern[str]
    """Matches some names of the model, and none of another one."""
    advice: str


def _convert(class_name: str) -> str:
    return (
        "Name a file in diffusers' names; weights in full precision are converted by diffusers "
        f"({class_name}.from_single_file, then save_pretrained)"
    )


_OTHER = "It is none of the base models here"
ORIGINAL_NAMES = (
    OriginalNames(
        "flux-1",
        "FLUX.1",
        re.compile(
            r"^(double_blocks\.\d+\.(img|txt)_mod\.lin|single_blocks\.\d+\.modulation\.lin|"
            r"vector_in\.(in|out)_layer)\."
        ),
        _convert("FluxTransformer2DModel"),
    ),
    OriginalNames("chroma", "Chroma", re.compile(r"^distilled_guidance_layer\."), _OTHER),
    OriginalNames(
        "hunyuan-video",
        "HunyuanVideo",
        re.compile(r"^(double_blocks\.\d+\.(img|txt)_attn_qkv|txt_in\.individual_token_refiner)\."),
        _OTHER,
    ),
    OriginalNames(
        "z-image",
        "Z-Image",
        re.compile(r"^(layers|noise_refiner|context_refiner)\.\d+\.attention\.qkv\."),
        _convert("ZImageTransformer2DModel"),
    ),
)


def find_original(names: Iterable[str]) -> OriginalNames | None:
    """Whose first names these are, where none of the dialects reads them; None: nobody's."""
    listed = list(names)
    for known in ORIGINAL_NAMES:
        if any(known.marker.search(name) for name in listed):
            return known
    return None


def explain_original(names: Iterable[str]) -> str | None:
    """What to do about a file in names that are not read; None: it is in no such names."""
    found = find_original(names)
    if found is None:
        return None
    return f"These are {found.title}'s original names, which are not read here. {found.advice}"
