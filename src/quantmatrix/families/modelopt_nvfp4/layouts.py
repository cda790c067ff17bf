"""Which layout an NVFP4 file has: what declares it, and which readings are open where nothing does.

Two choices have equal shapes and decode without an error: which nibble holds the even column, and
whether block scales lie in rows or in tiles of 128 x 4. Who declares them, best first:

| what the file says | even column in | block scales in |
| ------------------ | -------------- | --------------- |
| keys of a ModelOpt block: `swap_weight_nibbles` true or false, | as said | as said |
| `checkpoint_weight_scale_layout` `linear` or `swizzled`, `checkpoint_uses_packed_qkv` | | |
| marker tensors `.comfy_quant`, or a header list of layers of format `nvfp4` that no ModelOpt block | |
| stands beside (`enable_layerwise_quant_metadata` writes one) | high nibble | tiles |
| a ModelOpt block, diffusers' names | low nibble | rows |
| header `quantization: nvfp4` (diffusers' conversion script and its `bfl` quantizer) | low | rows |
| packed names of the original model, in a file named as FLUX.2-dev-NVFP4's are | high | tiles |
| anything else: packed names alone, nothing, two that contradict each other | unknown | unknown |

`checkpoint_uses_packed_qkv: true` alone means high nibble and tiles, as in SGLang. What is unknown
is chosen by the user (`Checkpoint.chosen`), or by the base model's weights
(`quantmatrix.runtime.witness.verdict`); a reading is never assumed. A user's choice counts more
than any declaration: exports whose declaration is wrong exist (ModelOpt's `enable_swizzle_layout`
shows nowhere). Sources: ModelOpt 0.47 exports, comfy-kitchen, diffusers' conversion script, SGLang
0.5.23.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quantmatrix.errors import CheckpointError
from quantmatrix.families.layouts import NIBBLES, Layout, explain_open
from quantmatrix.families.producers.modelopt import read_block, read_method

if TYPE_CHECKING:
    from quantmatrix.checkpoints.checkpoint import Checkpoint

PACKED = re.compile(r"(double_blocks\.\d+\.(img|txt)_attn\.qkv|single_blocks\.\d+\.linear1)\.")
"""Names in which q, k and v (and more) lie in one layer, as in the model's first release."""
MARKER = ".comfy_quant"
OFFICIAL = re.compile(r"FLUX\.2-dev-NVFP4|flux2-dev-nvfp4(-mixed)?\.safetensors$")
"""The repository, and the files in it, whose layout is known by their names."""
SCALE_LAYOUTS = {"linear": "rows", "swizzled": "tiles"}
"""Values of `checkpoint_weight_scale_layout`."""
BITS = {
    "swap_weight_nibbles": "the wrong one gives noise",
    "checkpoint_uses_packed_qkv": "it says how nibbles and scales lie",
}


def find_layout(checkpoint: Checkpoint) -> Layout:
    """The layout of a file, what was chosen for it included; CheckpointError for a wrong value."""
    found = find_declared(checkpoint)
    chosen = checkpoint.chosen
    if not chosen:
        return found
    return Layout(
        chosen.get("nibble_order", found.nibbles), chosen.get("nvfp4_layout", found.scales),
        chosen.get("why", "chosen"),
    )  # fmt: skip


def find_declared(checkpoint: Checkpoint) -> Layout:
    """What the file itself says; see the module's table."""
    block = read_block(checkpoint)
    source = checkpoint.quantization_from or checkpoint.reference
    swap, packed = (read_bit(block, key, source) for key in BITS)
    scales = read_scale_layout(block, source)
    nibbles = None if swap is None else NIBBLES[swap]
    rest = find_rest(checkpoint, block, packed)
    said = [key for key in (*BITS, "checkpoint_weight_scale_layout") if block.get(key) is not None]
    why = f"{', '.join(said)} in {source}" if said else rest.why
    if said and (nibbles is None or scales is None) and rest.why:
        why = f"{why}; {rest.why}"
    return Layout(nibbles or rest.nibbles, scales or rest.scales, why)


def find_rest(checkpoint: Checkpoint, block: Mapping[str, Any], packed: bool | None) -> Layout:
    """What names, lists and keys of a file say, its keys for the layout left out."""
    source = checkpoint.quantization_from or checkpoint.reference
    modelopt = read_method(block)[0].startswith("modelopt")
    names = packed or (packed is None and any(PACKED.search(n) for n in checkpoint.tensors))
    listed = lists_nvfp4(block) and not modelopt  # ModelOpt's own list says nothing of a layout
    listed = listed or any(n.endswith(MARKER) for n in checkpoint.tensors)
    in_header = checkpoint.metadata.get("quantization", "").lower() == "nvfp4"
    comfy = Layout("high", "tiles", f"layers of format nvfp4 in {source}")
    plain = Layout("low", "rows", f"quantization: nvfp4 in the header of {checkpoint.files[0]}")
    if packed and not listed and not in_header:
        return Layout("high", "tiles", "")
    claims = [comfy] if listed else []
    claims += [plain] if in_header else []
    if modelopt and not names:
        claims.append(Layout("low", "rows", f"quant_method modelopt in {source}"))
    if len({(claim.nibbles, claim.scales) for claim in claims}) == 1:
        return claims[0]
    if claims:
        return Layout(None, None, " and ".join(c.why for c in claims) + " contradict each other")
    official = [r for r in (checkpoint.reference, *checkpoint.files) if OFFICIAL.search(r)]
    if names and official and not modelopt:
        return Layout("high", "tiles", f"packed names in a file of FLUX.2-dev-NVFP4: {official[0]}")
    return Layout(None, None, f"nothing in {' or '.join(checkpoint.files[:2])} declares it")


def lists_nvfp4(block: Mapping[str, Any]) -> bool:
    """Whether a list of layers, as ComfyUI's writers have it, names the format nvfp4."""
    layers = block.get("layers")
    entries = layers.values() if isinstance(layers, Mapping) else ()
    return any((e.get("format") if isinstance(e, Mapping) else e) == "nvfp4" for e in entries)


def read_bit(block: Mapping[str, Any], key: str, source: str) -> bool | None:
    """A key that is true or false; None when it is not there.

    Raises CheckpointError for anything else.
    """
    value = block.get(key)
    if value is None or isinstance(value, bool):
        return value
    raise CheckpointError(
        f"{source}: {key} is {json.dumps(value)}: expected true or false; {BITS[key]}"
    )


def read_scale_layout(block: Mapping[str, Any], source: str) -> str | None:
    """`checkpoint_weight_scale_layout` as we name layouts; None when it is not there.

    Raises CheckpointError for an unknown one.
    """
    value = block.get("checkpoint_weight_scale_layout")
    if value is not None and value not in SCALE_LAYOUTS:
        raise CheckpointError(
            f"{source}: checkpoint_weight_scale_layout is {json.dumps(value)[:120]}: expected "
            f"{' or '.join(SCALE_LAYOUTS)}; the wrong one gives noise"
        )
    return None if value is None else SCALE_LAYOUTS[value]


def require_layout(checkpoint: Checkpoint) -> tuple[bool, bool]:
    """(nibbles swapped, scales tiled); CheckpointError names the open readings and their flags."""
    layout = find_layout(checkpoint)
    if not layout.known:
        raise CheckpointError(explain_open(checkpoint, layout))
    return layout.nibbles == "high", layout.scales == "tiles"
