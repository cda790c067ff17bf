"""Name prefixes: levels that writers put before every tensor name of a transformer, taken off.

| prefix | whose |
| ------ | ----- |
| `model.diffusion_model.`, `diffusion_model.` | ComfyUI and original single files |
| `transformer.` | a pipeline's component, as some trainers save it |
| `model.`, `module.` | a wrapper of a trainer's, torch's DataParallel |
| `_orig_mod.` | `torch.compile` |
| `base_model.model.` | peft |

A prefix is taken off where all tensors of the transformer have it, as often as one is there; a
marker of the whole file (`scaled_fp8`) may stand without it. What config.json, headers and
descriptions say by layer may be written with or without it. A whole checkpoint holds the VAE and
the text encoders, too: they are left aside by their own prefixes, which a warning names.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantmatrix.checkpoints.header import TensorHeader

PREFIXES = (
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "base_model.model.",
    "model.",
    "module.",
    "_orig_mod.",
)
"""Known prefixes, a longer one before its beginning."""
OTHER_PARTS = (
    "first_stage_model.",
    "cond_stage_model.",
    "conditioner.",
    "vae.",
    "audio_vae.",
    "vocoder.",
    "text_encoders.",
    "text_encoder.",
    "text_encoder_2.",
    "text_encoder_3.",
    "text_encoder_4.",
    "text_embedding_projection.",
    "image_encoder.",
    "model_ema.",
)
"""Prefixes of what a whole checkpoint holds beside the transformer."""
MARKERS = ("scaled_fp8",)
"""Names of tensors that speak of the whole file, and may lack its prefix."""
LISTS = ("layers", "quantized_layers")
"""Keys of a quantization block that hold an object with an entry per layer."""
NAMES = ("ignore", "ignored_layers", "modules_to_not_convert", "exclude_modules")
"""Keys of a quantization block that hold a list of layer names."""


def strip_prefix(name: str, prefixes: Collection[str] = PREFIXES) -> str:
    """A name without those of the known prefixes that it begins with."""
    for prefix in prefixes:
        if name.startswith(prefix):
            return strip_prefix(name.removeprefix(prefix), prefixes)
    return name


def list_foreign(names: Iterable[str]) -> tuple[str, ...]:
    """The known prefixes that no tensor's own name begins with.

    A text encoder has a level `model.` of its own, beside `visual.` or `lm_head`.
    """
    own = {prefix for name in names for prefix in PREFIXES if name.startswith(prefix)}
    return tuple(prefix for prefix in PREFIXES if prefix not in own)


def strip_tensors(
    tensors: Mapping[str, TensorHeader],
) -> tuple[dict[str, TensorHeader], str, dict[str, int]]:
    """(tensors by their names in the transformer, the prefix taken off, tensors left aside by part).

    Names stay as they are unless every one has the same prefix, markers and other parts of a whole
    checkpoint not counted. A file of such parts alone stays as it is.
    """
    own = {n: header for n, header in tensors.items() if not n.startswith(OTHER_PARTS)}
    prefix = find_prefix([name for name in own if name not in MARKERS])
    if not own or (not prefix and len(own) == len(tensors)):
        return dict(tensors), "", {}
    aside: dict[str, int] = {}
    for name in tensors.keys() - own.keys():
        part = next(part for part in OTHER_PARTS if name.startswith(part))
        aside[part] = aside.get(part, 0) + 1
    stripped = {
        name.removeprefix(prefix): replace(
            header, name=name.removeprefix(prefix), stored_name=header.on_disk
        )
        for name, header in own.items()
    }
    return stripped, prefix, dict(sorted(aside.items()))


def find_prefix(names: Collection[str]) -> str:
    """The known prefixes, one after another, that all names begin with; '' when there is none."""
    for prefix in PREFIXES:
        if names and all(name.startswith(prefix) for name in names):
            return prefix + find_prefix([name.removeprefix(prefix) for name in names])
    return ""


def strip_block(
    block: Mapping[str, Any] | None, prefixes: Collection[str] = PREFIXES
) -> dict[str, Any] | None:
    """A quantization block whose layers are named without these prefixes."""
    if block is None:
        return None
    found = dict(block)
    for key in LISTS:
        if isinstance(found.get(key), Mapping):
            found[key] = strip_keys(found[key], prefixes)
    for key in NAMES:
        if isinstance(found.get(key), list):
            found[key] = [
                strip_prefix(e, prefixes) if isinstance(e, str) else e for e in found[key]
            ]
    if isinstance(found.get("quantization"), Mapping):
        found["quantization"] = strip_block(found["quantization"], prefixes)
    return found


def strip_keys(entries: Mapping[str, Any], prefixes: Collection[str] = PREFIXES) -> dict[str, Any]:
    """Entries by name, without these prefixes; two that become one stay as they are."""
    stripped = {strip_prefix(name, prefixes): value for name, value in entries.items()}
    return stripped if len(stripped) == len(entries) else dict(entries)


def find_common_prefix(names: Iterable[str], is_known: Callable[[str], bool]) -> str:
    """The levels that the first name has before a known one; '' when there are none."""
    name = next(iter(names), "")
    levels = name.split(".")
    for count in range(1, len(levels)):
        if is_known(".".join(levels[count:])):
            return ".".join(levels[:count]) + "."
    return ""
