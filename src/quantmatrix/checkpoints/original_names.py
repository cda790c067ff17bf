"""Original names: in which of several models' first names a file is written.

Files of one laboratory look alike: `double_blocks.0.img_attn.qkv` is in FLUX.1, FLUX.2, Chroma and
HunyuanVideo. Names that one of them alone has tell which it is:

| names | model |
| ----- | ----- |
| `double_blocks.N.img_attn_qkv`, `txt_in.individual_token_refiner` | HunyuanVideo |
| `double_blocks.N.img_mod.lin`, `single_blocks.N.modulation.lin`, `vector_in` | FLUX.1 |
| `distilled_guidance_layer`, and the blocks of FLUX.1 without modulation | Chroma |
| `double_stream_modulation_img.lin`, or the blocks alone | FLUX.2 |
| `layers.N.adaLN_modulation.1` | Lumina 2 |
| `layers.N.attention.qkv` | Z-Image |
| `blocks.N.self_attn.q`, `blocks.N.cross_attn.q` | Wan |
| `joint_blocks.N.x_block` | Stable Diffusion 3 |
| `audio_patchify_proj` | LTX-2 |
| `patchify_proj` | LTX-Video |

Here a file is only known by them; `runtime.plan.learned_names` reads them. Source: the names by which
diffusers' single-file loaders tell checkpoints apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class OriginalNames:
    """Names of a model's first release."""

    model: str
    """Id of the model here, or its name where it is none of them."""
    title: str
    transformer: str
    """The class of diffusers."""
    marker: re.Pattern[str]
    """Matches some names of the model, and none of those below it in the list."""


def _space(model: str, title: str, transformer: str, *patterns: str) -> OriginalNames:
    return OriginalNames(model, title, transformer, re.compile("|".join(patterns)))


ORIGINAL_NAMES = (
    _space(
        "hunyuan-video",
        "HunyuanVideo",
        "HunyuanVideoTransformer3DModel",
        r"^double_blocks\.\d+\.(img|txt)_attn_qkv\.",
        r"^txt_in\.individual_token_refiner\.",
    ),
    _space(
        "flux-1",
        "FLUX.1",
        "FluxTransformer2DModel",
        r"^double_blocks\.\d+\.(img|txt)_mod\.lin\.",
        r"^single_blocks\.\d+\.modulation\.lin\.",
        r"^vector_in\.(in|out)_layer\.",
    ),
    _space("chroma", "Chroma", "ChromaTransformer2DModel", r"^distilled_guidance_layer\.in_proj\."),
    _space(
        "flux-2",
        "FLUX.2",
        "Flux2Transformer2DModel",
        r"^double_stream_modulation_(img|txt)\.lin\.",
        r"^(double_blocks|single_blocks)\.\d+\.",
    ),
    _space(
        "lumina-2", "Lumina 2", "Lumina2Transformer2DModel", r"^layers\.\d+\.adaLN_modulation\.1\."
    ),
    _space(
        "z-image",
        "Z-Image",
        "ZImageTransformer2DModel",
        r"^(layers|noise_refiner|context_refiner)\.\d+\.attention\.qkv\.",
    ),
    _space("wan-2-2", "Wan", "WanTransformer3DModel", r"^blocks\.\d+\.(self|cross)_attn\.[qkvo]\."),
    _space("sd3", "Stable Diffusion 3", "SD3Transformer2DModel", r"^joint_blocks\.\d+\.x_block\."),
    _space("ltx-2", "LTX-2", "LTX2VideoTransformer3DModel", r"^audio_patchify_proj\."),
    _space("ltx-video", "LTX-Video", "LTXVideoTransformer3DModel", r"^patchify_proj\."),
)
"""Spaces of names, those that have more of their own first."""


def find_original(names: Iterable[str]) -> OriginalNames | None:
    """Whose first names these are; None: nobody's that is known here."""
    listed = list(names)
    for known in ORIGINAL_NAMES:
        if any(known.marker.search(name) for name in listed):
            return known
    return None


def is_original(names: Iterable[str], class_name: str) -> bool:
    """Whether these are the first names of the models of a diffusers class."""
    found = find_original(names)
    return found is not None and found.transformer == class_name


def explain_original(names: Iterable[str], class_name: str = "") -> str | None:
    """What to do about a file of which a model of this class lacks some tensors.

    None: it is in nobody's first names, or in those of this class.
    """
    found = find_original(names)
    if found is None or found.transformer == class_name:
        return None
    return (
        f"These are {found.title}'s original names: the file belongs to a {found.transformer}, not "
        f"to a {class_name}; name a base model of that class"
    )
