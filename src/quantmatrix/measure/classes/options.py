"""Options of a small transformer: the defaults of its class, shrunk by the names of the arguments.

Every rule sets a default to a small value (a number only where it is larger), so that one block of
each kind is left, of two heads with 32 columns each: a width of 64, which every scheme can store.
`OPTIONS` has what rules cannot know of a class: defaults that are None, and widths that others fix.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

HEADS, HEAD, WIDTH = 2, 32, 64
"""Heads, columns of a head, and columns of the model."""
TEXT = 64
"""Columns of the text encoder's output."""

RULES: tuple[tuple[str, Any], ...] = (
    (r"(num|n)_.*(layers|blocks)|nlayers|depth|dit_depth|mmdit_layers", 1),
    (r".*(num_attention_heads|num_key_value_heads|num_heads|num_kv_heads)|n_heads|n_kv_heads", HEADS),
    (r"dit_heads|nheads|num_cross_attention_heads|num_key_value_attention_heads", HEADS),
    (r".*attention_head_dim|head_dim|linear_head_dim|d_kv", HEAD),
    (r"(hidden_size|hidden_dim|dim|model_dim|inner_dim|dit_dim|embed_dim|token_dim|d_model)", WIDTH),
    (r".*(ffn_dim|ff_dim|intermediate_size|ffn_hidden_size|ff_inner_dim|d_ff|moe_intermediate_dim)", 128),
    (r"(text_dim|text_embed_dim|text_embed_2_dim|text_embed_dim_t5|text_hidden_dim|text_in_dim)", TEXT),
    (r"(joint_attention_dim|caption_channels|cap_feat_dim|context_in_dim|in_text_dim2?)", TEXT),
    (r"(cross_attention_dim|pooled_projection_dim|condition_dim|dit_text_dim|cond_token_dim)", TEXT),
    (r"(text_encoder_dim|encoder_hidden_states_channels|crossattn_proj_in_channels|adaln_dim)", TEXT),
    (r"(llm_features_dim|embedding_dim|caption_projection_dim|text_emb_dim|prior_.*_size)", TEXT),
    (r"(image_dim|image_embed_dim|image_proj_dim|siglip_feat_dim|vocab_size)", TEXT),
    (r"(time_embed_dim|time_dim|freq_dim|time_proj_dim|timestep_channels|adaln_lora_dim)", 64),
    (r"(timestep_guidance_channels|time_step_dim|timestep_embed_dim|timestep_features_dim)", 64),
    (r"(approximator_hidden_dim|fourier_embedding_dim|multiple_of|global_states_input_dim)", 64),
    (r"(global_cond_dim|cross_attention_input_dim|time_embed_hidden_dim|text_len)", 64),
    (r"(sample_size|sample_height|sample_width|num_experts|pos_embed_max_size)", 8),
)  # fmt: skip
"""Regular expression over an argument's whole name, and the value for it; the first one counts."""
AXES = r"(axes_dims?|axes_dims?_rope|rope_axes_dim|rope_dim_list|rope_dim)"
"""Arguments that cut the columns of a head among the axes of positions."""

OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "AuraFlowTransformer2DModel": {"pos_embed_max_size": 64},
    "CogVideoXTransformer3DModel": {"max_text_seq_length": 8, "sample_frames": 5},
    "ConsisIDTransformer3DModel": {"max_text_seq_length": 8, "sample_frames": 5},
    "BriaFibo2Transformer2DModel": {
        "injection_layer_ids": (0,), "min_num_gist_tokens": 4, "max_num_gist_tokens": 4,
        "gist_min_text_len": 4, "gist_max_text_len": 8, "gist_step": 1,
    },
    "CosmosTransformer3DModel": {"concat_padding_mask": False},
    "DreamLiteTransformer2DModel": {"in_channels": 64, "cross_attention_dim": TEXT},
    "EasyAnimateTransformer3DModel": {
        "in_channels": 16, "out_channels": 16, "patch_size": 2, "text_embed_dim_t5": None,
    },
    "HiDreamImageTransformer2DModel": {
        "patch_size": 2, "in_channels": 16, "caption_channels": [TEXT, TEXT], "llama_layers": [0, 0],
        "max_resolution": (16, 16), "axes_dims_rope": (16, 8, 8),
    },
    "HunyuanDiT2DModel": {"in_channels": 4, "patch_size": 2, "text_len": 8, "text_len_t5": 8},
    "HunyuanVideoFramepackTransformer3DModel": {"has_clean_x_embedder": True, "has_image_proj": True},
    "HunyuanVideo15Transformer3DModel": {"num_refiner_layers": 1},
    "Ideogram4Transformer2DModel": {"mrope_section": (8, 4, 4)},
    "LatteTransformer3DModel": {
        "in_channels": 4, "patch_size": 2, "caption_channels": TEXT, "video_length": 2,
        "norm_type": "ada_norm_single", "num_embeds_ada_norm": 1000, "norm_elementwise_affine": False,
    },
    "LTX2VideoTransformer3DModel": {"audio_cross_attention_dim": WIDTH},
    "MiniMaxH3Transformer3DModel": {"rope_freq_dim": 4},
    "SanaWMLTX2RefinerTransformer3DModel": {"audio_cross_attention_dim": WIDTH},
    "LuminaNextDiT2DModel": {"num_kv_heads": HEADS},
    "OmniGenTransformer2DModel": {
        "pad_token_id": 0, "vocab_size": 64,
        "rope_scaling": {"short_factor": [1.0] * 16, "long_factor": [1.0] * 16},
    },
    "PriorTransformer": {"num_embeddings": WIDTH // 8},
    "PRXTransformer2DModel": {"axes_dim": [16, 16]},
    "PixArtTransformer2DModel": {"caption_channels": TEXT},
    "Transformer2DModel": {"in_channels": 32, "cross_attention_dim": TEXT},
    "TransformerTemporalModel": {"in_channels": 32, "cross_attention_dim": TEXT},
    "WanAnimateTransformer3DModel": {
        "motion_encoder_size": 16, "motion_style_dim": 16, "motion_dim": 4, "motion_encoder_dim": 16,
        "face_encoder_hidden_dim": 16, "face_encoder_num_heads": 2, "inject_face_latents_blocks": 1,
        "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
    },
    "WanVACETransformer3DModel": {"vace_layers": [0], "vace_in_channels": 16},
}  # fmt: skip
"""Options by class that rules cannot know."""


def list_classes() -> list[str]:
    """Names of all transformer classes that diffusers has."""
    import diffusers

    from quantmatrix.models.generic import is_transformer

    return sorted(name for name in dir(diffusers) if is_transformer(name))


def shrink(class_name: str) -> dict[str, Any]:
    """Options of a small model of a class of diffusers."""
    import diffusers

    signature = inspect.signature(getattr(diffusers, class_name).__init__)
    found: dict[str, Any] = {}
    for name, parameter in signature.parameters.items():
        default = parameter.default
        if re.fullmatch(AXES, name) and isinstance(default, (tuple, list)):
            found[name] = cut_axes(len(default))
        elif isinstance(default, int) and not isinstance(default, bool):
            small = next((value for rule, value in RULES if re.fullmatch(rule, name)), default)
            if small < default:
                found[name] = small
    return found | dict(OPTIONS.get(class_name, {}))


def cut_axes(count: int) -> tuple[int, ...]:
    """Columns of a head by axis: even numbers whose sum is `HEAD`."""
    each = HEAD // count // 2 * 2
    return (HEAD - each * (count - 1), *(each,) * (count - 1))
