"""Arguments of one small forward of a transformer class, by the names in its signature.

| kind of latents | shape | by |
| --------------- | ----- | -- |
| packed | [1, 16, channels] | `img_ids`, `img_shapes`, or `height` and `width` among the arguments |
| a clip | [1, channels, 2, 8, 8] | `3D` in the class's name |
| a sequence | [1, 16, channels] | `1D` in it |
| a picture | [1, channels, 8, 8] | any other |

An argument that has a default is left out, unless `MAKERS` names it as one that matters. `ARGUMENTS`
has what is left: arguments of single classes, as functions of the configuration and a `Draw`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

SIDE, FRAMES, ROWS = 8, 2, 8
"""Latents of a picture's side, frames of a clip, and rows of text."""
SEQUENCE = 16
TEXT_WIDTHS = (
    *("joint_attention_dim", "caption_channels", "text_embed_dim", "text_dim", "cap_feat_dim"),
    *("context_in_dim", "in_text_dim", "text_hidden_dim", "text_in_dim", "llm_features_dim"),
    *("condition_dim", "cross_attention_dim", "encoder_hidden_size", "dit_text_dim"),
    *("cond_token_dim", "embedding_dim"),
)
"""Options that say how wide the text is; the first that a class has counts."""
CHANNELS = ("in_channels", "in_visual_dim", "in_dim", "latent_dim", "io_channels", "latent_channel")
AXES = ("axes_dims_rope", "axes_dims", "rope_axes_dim")


@dataclass(frozen=True)
class Draw:
    """Random numbers of one dtype, the same for the same seed."""

    generator: torch.Generator
    dtype: torch.dtype

    def normal(self, *shape: int) -> torch.Tensor:
        """Normally distributed numbers [*shape] in the compute dtype, a float dtype."""
        return torch.randn(*shape, generator=self.generator).to(self.dtype)

    def ones(self, *shape: int) -> torch.Tensor:
        """A mask [*shape] of ones, in the compute dtype."""
        return torch.ones(*shape, dtype=self.dtype)


Maker = Callable[[Any, Draw], Any]


def read(config: Any, names: tuple[str, ...]) -> int:
    """The first of these options that is set to a number; KeyError where none is."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and value:
            return value
    raise KeyError(f"none of {', '.join(names)} in the configuration")


def make_text(config: Any, draw: Draw) -> torch.Tensor:
    """The text encoder's output [1, 8, width], in the compute dtype."""
    return draw.normal(1, ROWS, read(config, TEXT_WIDTHS))


def count_axes(config: Any) -> int:
    """Axes of a position."""
    return next(len(getattr(config, name)) for name in AXES if getattr(config, name, None))


MAKERS: Mapping[str, Maker] = {
    "timestep": lambda c, d: torch.tensor([0.5], dtype=d.dtype),
    "encoder_hidden_states": make_text,
    "pooled_projections": lambda c, d: d.normal(1, read(c, ("pooled_projection_dim", "in_text_dim2"))),
    "img_ids": lambda c, d: make_positions(count_axes(c)),
    "txt_ids": lambda c, d: torch.zeros(ROWS, count_axes(c)),
    "img_shapes": lambda c, d: [[(1, 4, 4)]],
    "original_size": lambda c, d: torch.tensor([[64.0, 64.0]], dtype=d.dtype),
    "target_size": lambda c, d: torch.tensor([[64.0, 64.0]], dtype=d.dtype),
    "crop_coords": lambda c, d: torch.zeros(1, 2, dtype=d.dtype),
    "encoder_attention_mask": lambda c, d: torch.ones(1, ROWS, dtype=torch.bool),
    "encoder_hidden_states_mask": lambda c, d: torch.ones(1, ROWS, dtype=torch.bool),
    "num_frames": lambda c, d: 1,
    "height": lambda c, d: 4,
    "width": lambda c, d: 4,
}  # fmt: skip
"""Arguments by name."""
GUIDANCE = "guidance"


def text_rows(*shape: int) -> Maker:
    """Text of another shape: [1, *shape, width]."""
    return lambda c, d: d.normal(1, *shape, read(c, TEXT_WIDTHS))


def numbers(*shape: int) -> Maker:
    """Random numbers of a shape."""
    return lambda c, d: d.normal(*shape)


def indices(start: int, stop: int) -> Maker:
    """Whole numbers from `start` to `stop`, int64."""
    return lambda c, d: torch.arange(start, stop)


def zeros(*shape: int) -> Maker:
    """Zeros of a shape, int64."""
    return lambda c, d: torch.zeros(*shape, dtype=torch.int64)


def time(c: Any, d: Draw) -> torch.Tensor:
    """A time [1] in the compute dtype."""
    return torch.tensor([0.25], dtype=d.dtype)


def frames_first(c: Any, d: Draw) -> torch.Tensor:
    """A clip [1, 2, channels, 8, 8], in the compute dtype."""
    return d.normal(1, FRAMES, read(c, CHANNELS), SIDE, SIDE)


def channels_last(count: Callable[[Any], int]) -> Maker:
    """A clip [1, 2, 8, 8, channels]."""
    return lambda c, d: d.normal(1, FRAMES, SIDE, SIDE, count(c))


def sequence(c: Any, d: Draw) -> torch.Tensor:
    """A sequence [1, 16, channels], in the compute dtype."""
    return d.normal(1, SEQUENCE, read(c, CHANNELS))


def signal(c: Any, d: Draw) -> torch.Tensor:
    """A sequence with its channels first [1, channels, 16], in the compute dtype."""
    return d.normal(1, read(c, CHANNELS), SEQUENCE)


def rotary(rows: int, columns: int) -> Maker:
    """Cosines and sines float32 [rows, columns]."""

    def make(c: Any, d: Draw) -> tuple[torch.Tensor, torch.Tensor]:
        angles = torch.arange(rows * columns).reshape(rows, columns) / columns
        return angles.cos(), angles.sin()

    return make


def joint_positions(rows: int) -> Maker:
    """Positions [rows, 3] of text, at zero, and of a picture of 4 x 4 patches behind it."""
    return lambda c, d: torch.cat([torch.zeros(rows - SEQUENCE, 3), make_positions(3)])


ARGUMENTS: Mapping[str, Mapping[str, Maker | None]] = {
    "AceStepTransformer1DModel": {
        "hidden_states": numbers(1, SEQUENCE, 64), "context_latents": numbers(1, SEQUENCE, 128),
        "timestep_r": time, "encoder_hidden_states": numbers(1, ROWS, 64),
    },
    "AnyFlowTransformer3DModel": {
        "hidden_states": frames_first,
        "timestep": lambda c, d: torch.full((1, FRAMES), 0.5, dtype=d.dtype),
        "r_timestep": lambda c, d: torch.full((1, FRAMES), 0.25, dtype=d.dtype),
    },
    "BriaFiboTransformer2DModel": {
        "text_encoder_layers": lambda c, d: [d.normal(1, ROWS, c.text_encoder_dim)] * 2,
    },
    "BriaFibo2Transformer2DModel": {"encoder_hidden_states": text_rows(2, ROWS)},
    "CogVideoXTransformer3DModel": {"hidden_states": frames_first},
    "ConsisIDTransformer3DModel": {"hidden_states": frames_first},
    "DiTTransformer2DModel": {"class_labels": zeros(1), "timestep": indices(500, 501)},
    "ErnieImageTransformer2DModel": {
        "text_bth": make_text, "text_lens": lambda c, d: torch.tensor([ROWS]),
    },
    "GlmImageTransformer2DModel": {
        "prior_token_id": zeros(1, SEQUENCE), "prior_token_drop": lambda c, d: torch.zeros(1, dtype=torch.bool),
    },
    "HiDreamImageTransformer2DModel": {
        "hidden_states": numbers(1, 16, SIDE, SIDE), "timesteps": time, "img_ids": None,
        "encoder_hidden_states": None,
        "encoder_hidden_states_t5": numbers(1, ROWS, 64),
        "encoder_hidden_states_llama3": numbers(1, 1, ROWS, 64),
        "pooled_embeds": numbers(1, 64),
    },
    "HunyuanDiT2DModel": {
        "text_embedding_mask": lambda c, d: d.ones(1, ROWS),
        "encoder_hidden_states_t5": lambda c, d: d.normal(1, ROWS, c.cross_attention_dim_t5),
        "text_embedding_mask_t5": lambda c, d: d.ones(1, ROWS),
        "image_meta_size": lambda c, d: torch.full((1, 6), 64.0, dtype=d.dtype),
        "style": zeros(1), "image_rotary_emb": rotary(16, 32),
    },
    "HunyuanVideo15Transformer3DModel": {
        "encoder_hidden_states_2": lambda c, d: d.normal(1, ROWS, c.text_embed_2_dim),
        "encoder_attention_mask_2": lambda c, d: torch.ones(1, ROWS, dtype=torch.bool),
        "image_embeds": lambda c, d: d.normal(1, ROWS, c.image_embed_dim),
    },
    "HunyuanVideoFramepackTransformer3DModel": {
        "image_embeds": lambda c, d: d.normal(1, ROWS, c.image_proj_dim),
        "indices_latents": indices(7, 7 + FRAMES),
        "latents_clean": numbers(1, 16, 1, SIDE, SIDE),
        "indices_latents_clean": indices(6, 7),
        "latents_history_2x": numbers(1, 16, 2, SIDE, SIDE),
        "indices_latents_history_2x": indices(4, 6),
        "latents_history_4x": numbers(1, 16, 4, SIDE, SIDE),
        "indices_latents_history_4x": indices(0, 4),
    },
    "Ideogram4Transformer2DModel": {
        "hidden_states": lambda c, d: d.normal(1, ROWS + SEQUENCE, c.in_channels),
        "encoder_hidden_states": text_rows(ROWS + SEQUENCE),
        "position_ids": lambda c, d: joint_positions(ROWS + SEQUENCE)(c, d)[None].long(),
        "segment_ids": zeros(1, ROWS + SEQUENCE),
        "indicator": lambda c, d: torch.tensor([[3] * ROWS + [2] * SEQUENCE]),
    },
    "JoyImageEditPlusTransformer3DModel": {
        "hidden_states": numbers(1, SEQUENCE, 16, 1, 2, 2), "shape_list": lambda c, d: [[(1, 4, 4)]],
    },
    "Kandinsky5Transformer3DModel": {
        "hidden_states": channels_last(lambda c: c.in_visual_dim),
        "visual_rope_pos": lambda c, d: [torch.arange(FRAMES), torch.arange(4), torch.arange(4)],
        "text_rope_pos": indices(0, ROWS),
    },
    "Kandinsky6Transformer3DModel": {
        "hidden_states": channels_last(lambda c: 2 * c.in_visual_dim + 1),
        "audio_hidden_states": lambda c, d: d.normal(1, ROWS, c.in_audio_dim),
        "encoder_attention_mask": None,
    },
    "Kandinsky6SRTransformer3DModel": {
        "hidden_states": channels_last(lambda c: 2 * c.in_visual_dim + 1),
    },
    "Krea2Transformer2DModel": {
        "hidden_states": sequence, "position_ids": joint_positions(ROWS + SEQUENCE),
        "encoder_hidden_states": lambda c, d: d.normal(1, ROWS, c.num_text_layers, c.text_hidden_dim),
    },
    "LTX2VideoTransformer3DModel": {
        "audio_hidden_states": lambda c, d: d.normal(1, ROWS, c.audio_in_channels),
        "audio_encoder_hidden_states": make_text, "audio_num_frames": lambda c, d: ROWS,
        "fps": lambda c, d: 16.0,
    },
    "LongCatAudioDiTTransformer": {"hidden_states": sequence},
    "LuminaNextDiT2DModel": {
        "cross_attention_kwargs": lambda c, d: {},
        "encoder_mask": lambda c, d: torch.ones(1, ROWS, dtype=torch.bool),
        "image_rotary_emb": lambda c, d: torch.polar(torch.ones(384, 384, 16), torch.zeros(384, 384, 16)),
    },
    "MiniMaxH3Transformer3DModel": {
        "hidden_states": lambda c, d: d.normal(1, SEQUENCE, c.in_channels * 4),
        "audio_hidden_states": lambda c, d: d.normal(1, ROWS, c.audio_in_channels),
        "timestep_indices": zeros(2 * ROWS + SEQUENCE),
        "token_tags": lambda c, d: torch.tensor([1] * ROWS + [2] * ROWS + [0] * SEQUENCE),
        "position_ids": joint_positions(2 * ROWS + SEQUENCE),
        "text_indices": indices(0, ROWS), "audio_indices": indices(ROWS, 2 * ROWS),
        "video_indices": indices(2 * ROWS, 2 * ROWS + SEQUENCE),
    },
    "MiniMaxMusic3RVQDepthDecoder": {"inputs_embeds": numbers(1, ROWS, 64)},
    "MiniMaxMusic3Transformer1DModel": {
        "hidden_states": signal, "encoder_hidden_states": text_rows(SEQUENCE),
    },
    "OmniGenTransformer2DModel": {
        "input_ids": zeros(1, ROWS), "input_img_latents": lambda c, d: [],
        "input_image_sizes": lambda c, d: {}, "attention_mask": lambda c, d: d.ones(1, 25, 25),
        "position_ids": indices(0, ROWS + 1 + SEQUENCE),
    },
    "PriorTransformer": {
        "hidden_states": numbers(1, 64), "proj_embedding": numbers(1, 64),
        "encoder_hidden_states": lambda c, d: d.normal(1, c.num_embeddings, 64),
    },
    "QwenImage21Transformer2DModel": {
        "img_mask": lambda c, d: torch.tensor([[False] * ROWS + [True] * (SEQUENCE // 4)]),
        "encoder_hidden_states_mask": None,
    },
    "SanaWMLTX2RefinerTransformer3DModel": {"hidden_states": sequence, "video_rotary_emb": rotary(16, 64)},
    "SanaWMTransformer3DModel": {
        "encoder_hidden_states": text_rows(1, ROWS),
        "timestep": lambda c, d: torch.full((1, 1, FRAMES), 500),
    },
    "StableAudio3DiTModel": {
        "hidden_states": signal, "global_hidden_states": lambda c, d: d.normal(1, c.global_cond_dim),
    },
    "StableAudioDiTModel": {
        "hidden_states": signal, "encoder_attention_mask": None,
        "global_hidden_states": lambda c, d: d.normal(1, 1, c.global_states_input_dim),
        "rotary_embedding": rotary(SEQUENCE + 1, 16),
    },
    "T5FilmDecoder": {
        "encodings_and_masks": lambda c, d: [(d.normal(1, ROWS, c.d_model), torch.ones(1, ROWS))],
        "decoder_input_tokens": lambda c, d: d.normal(1, SEQUENCE, c.input_dims),
        "decoder_noise_time": time,
    },
    "TransformerTemporalModel": {
        "hidden_states": numbers(2, 32, SIDE, SIDE), "num_frames": lambda c, d: FRAMES,
        "encoder_hidden_states": None,
    },
    "WanAnimateTransformer3DModel": {
        "hidden_states": numbers(1, 36, FRAMES + 1, SIDE, SIDE),
        "pose_hidden_states": numbers(1, 16, FRAMES, SIDE, SIDE),
        "face_pixel_values": numbers(1, 3, 5, 16, 16),
        "encoder_hidden_states_image": lambda c, d: d.normal(1, ROWS, c.image_dim),
    },
    "WanVACETransformer3DModel": {
        "control_hidden_states": lambda c, d: d.normal(1, c.vace_in_channels, FRAMES, SIDE, SIDE),
    },
    "ZImageTransformer2DModel": {
        "x": lambda c, d: [d.normal(c.in_channels, 1, SIDE, SIDE)], "t": time,
        "cap_feats": lambda c, d: [d.normal(16, c.cap_feat_dim)],
    },
}  # fmt: skip
"""Arguments of single classes; None leaves one out."""

UNKNOWN: Mapping[str, str] = {
    "AnyFlowFARTransformer3DModel": "its forward attends by chunks of a rollout, with a block mask",
    "Cosmos3OmniTransformer": "its forward takes one packed sequence of text, pictures, sound and actions",
    "RFD4ProteinaTransformer": "its forward takes atoms and residues of a protein",
    "WanAnimate2Transformer3DModel": "its forward needs a key and value cache, and lists of clips",
}
"""Classes whose forward is not described here, each with the reason."""


def make_positions(axes: int) -> torch.Tensor:
    """Positions float32 [16, axes] of a picture of 4 x 4 patches; those of further axes are 0."""
    found = torch.zeros(SEQUENCE, axes)
    rows = torch.arange(SEQUENCE)
    found[:, -2], found[:, -1] = rows // 4, rows % 4
    return found


def make_latents(class_name: str, parameters: Mapping[str, Any], config: Any, draw: Draw) -> Any:
    """Latents in the form that the class takes (see the module's table)."""
    channels = read(config, CHANNELS)
    packed = {"img_ids", "img_shapes"} & parameters.keys() or "height" in parameters
    if packed or "1D" in class_name:
        return draw.normal(1, SEQUENCE, channels)
    if "3D" in class_name:
        return draw.normal(1, channels, FRAMES, SIDE, SIDE)
    return draw.normal(1, channels, SIDE, SIDE)


def make_inputs(class_name: str, model: torch.nn.Module, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of a forward of a small model of a class, floats in `dtype`, a float dtype.

    Raises KeyError for an argument without a default that nothing is known of.
    """
    draw = Draw(torch.Generator("cpu").manual_seed(0), dtype)
    config: Any = model.config
    own = ARGUMENTS.get(class_name, {})
    parameters = inspect.signature(type(model).forward).parameters
    found: dict[str, Any] = {}
    for name, parameter in parameters.items():
        if name in own:
            if (maker := own[name]) is not None:
                found[name] = maker(config, draw)
        elif name == "hidden_states":
            found[name] = make_latents(class_name, parameters, config, draw)
        elif name == GUIDANCE and getattr(config, "guidance_embeds", False):
            found[name] = torch.tensor([4.0], dtype=dtype)
        elif name in MAKERS and (name != "pooled_projections" or has_pooled(config)):
            found[name] = MAKERS[name](config, draw)
        elif parameter.default is inspect.Parameter.empty and name not in (
            "self",
            "pooled_projections",
        ):
            raise KeyError(f"{class_name}: nothing is known of the argument {name}")
    return found


def has_pooled(config: Any) -> bool:
    """Whether a class takes one vector of the whole text."""
    return any(getattr(config, name, None) for name in ("pooled_projection_dim", "in_text_dim2"))
