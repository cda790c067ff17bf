"""Tiny encoders: those of further models, most of them one decoder of the real class as data.

`Causal` says the classes and sizes of a language model of which a pipeline reads a hidden state; how many
layers it has follows from which states are read. Tokenizers are trained on the pipeline's own template, or
the prompt would lie behind the tokens that the pipeline drops or cuts off.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from quantmatrix.tiny import text_encoders
from quantmatrix.tiny.text_encoders import CHAT_TEMPLATE, HIDDEN, QWEN_TEMPLATE, train_bpe
from quantmatrix.tiny.weights import fill

COMPANIONS = {"image_encoder": "image_processor", "vision_language_encoder": "processor"}
"""The component that comes with an encoder, where it is no tokenizer."""
PICTURE_MARKS = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")
CHAT_MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
GLM_MARKS = {"image_token": "<|image|>", "grid_bos_token": "<sop>", "grid_eos_token": "<eop>"}
GLM_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|image|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)
GLM_CODES = 64
"""Codes of pictures that GLM-Image's language model writes; the published one has 16384."""
LLAMA_MARKS = ("<pad>", "<s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]}
VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2}


@dataclass(frozen=True)
class Causal:
    """A language model of transformers, and the tokenizer before it."""

    config: str
    model: str
    layers: int
    marks: tuple[str, ...]
    """Special tokens; the first pads."""
    texts: Callable[[], list[str]] = list
    """What the tokenizer is trained on besides the words."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the configuration, besides the common sizes."""
    chat: str | None = None
    """The template of a chat, where the pipeline asks for one."""
    first: str = ""
    """The special token that every text begins with, be it empty."""


def hunyuan_template() -> list[str]:
    """What HunyuanVideo writes around a prompt."""
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

    return [DEFAULT_PROMPT_TEMPLATE["template"]]


CAUSALS: Mapping[str, Causal] = {
    "qwen3-deep": Causal(
        "Qwen3Config", "Qwen3ForCausalLM", 28, CHAT_MARKS, lambda: ["user\nassistant\n"],
        {"head_dim": 32, "intermediate_size": 64}, CHAT_TEMPLATE,
    ),
    "llama": Causal("LlamaConfig", "LlamaModel", 3, LLAMA_MARKS, hunyuan_template),
    "glm": Causal(
        "GlmConfig", "GlmModel", 2, CHAT_MARKS, options={"head_dim": 64}, first="<|im_start|>"
    ),
    "gemma2": Causal(
        "Gemma2Config", "Gemma2Model", 2, LLAMA_MARKS, options={"head_dim": 64}, first="<s>"
    ),
    "qwen2.5-text": Causal(
        "Qwen2_5_VLTextConfig", "Qwen2_5_VLTextModel", 3, CHAT_MARKS,
        options={"rope_parameters": ROPE}, chat=CHAT_TEMPLATE,
    ),
}  # fmt: skip
"""Language models by kind."""


def build_causal(kind: str, prefix: str) -> tuple[Any, Any]:
    """(language model, its tokenizer) of a kind."""
    import transformers
    from tokenizers.processors import TemplateProcessing

    own = CAUSALS[kind]
    tokenizer = train_bpe(own.texts(), list(own.marks), pad_token=own.marks[0])
    tokenizer.chat_template = own.chat
    if own.first:
        number = tokenizer.convert_tokens_to_ids(own.first)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{own.first} $A", special_tokens=[(own.first, number)]
        )
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": own.layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = getattr(transformers, own.config)(**{**sizes, **own.options})
    model = getattr(transformers, own.model)(config)
    fill(model, prefix)
    return model, tokenizer


def build_qwen25(prefix: str, *, layers: int = 2, edits: bool = False) -> tuple[Any, Any]:
    """(Qwen2.5-VL, its tokenizer), with marks of pictures where it `edits`."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    marks = [*CHAT_MARKS, *(PICTURE_MARKS if edits else ())]
    texts = edit_templates() if edits else [QWEN_TEMPLATE]
    tokenizer = train_bpe(texts, marks, pad_token="<|endoftext|>", eos_token="<|im_end|>")
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": ROPE,
    }
    ids = tokenizer.convert_tokens_to_ids(list(PICTURE_MARKS)) if edits else []
    names = ("vision_start_token_id", "image_token_id", "vision_end_token_id", "video_token_id")
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config={**VISION, "out_hidden_size": HIDDEN},
        **dict(zip(names, ids, strict=bool(ids))),
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    fill(model, prefix)
    return model, tokenizer


def edit_templates() -> list[str]:
    """What Qwen-Image's pipelines of edits write around a prompt."""
    from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline

    found = []
    for kind in (QwenImageEditPipeline, QwenImageEditPlusPipeline):
        parts = dict.fromkeys(
            ("scheduler", "vae", "text_encoder", "tokenizer", "processor", "transformer")
        )
        found.append(kind(**parts).prompt_template_encode)
    return found


def build_clip_projection(prefix: str) -> tuple[Any, Any]:
    """(CLIP text encoder with a projection, its tokenizer)."""
    from transformers import CLIPTextModelWithProjection

    plain, tokenizer = text_encoders.build_clip(prefix)
    model = CLIPTextModelWithProjection(plain.config)
    fill(model, prefix)
    return model, tokenizer


def build_clip_vision(prefix: str) -> tuple[Any, Any]:
    """(CLIP image encoder, its image processor): 32 pixels a side, four patches."""
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

    sizes = {"hidden_size": HIDDEN, "intermediate_size": HIDDEN, "num_hidden_layers": 2}
    config = CLIPVisionConfig(**sizes, num_attention_heads=2, image_size=32, patch_size=16)
    model = CLIPVisionModel(config)
    fill(model, prefix)
    side = {"height": 32, "width": 32}
    return model, CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=side)


def build_byt5(prefix: str) -> tuple[Any, Any]:
    """(T5 encoder over bytes, its tokenizer, which has no file)."""
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    tokenizer = ByT5Tokenizer()
    sizes = {"d_model": HIDDEN, "d_kv": 64, "d_ff": HIDDEN, "num_layers": 2, "num_heads": 2}
    model = T5EncoderModel(T5Config(vocab_size=len(tokenizer) + 3, **sizes))
    fill(model, prefix)
    return model, tokenizer


def build_t5_wide(prefix: str) -> tuple[Any, Any]:
    """(T5 encoder as wide as two CLIP encoders side by side, its tokenizer)."""
    from transformers import T5EncoderModel

    plain, tokenizer = text_encoders.build_t5(prefix)
    plain.config.d_model = 2 * HIDDEN
    model = T5EncoderModel(plain.config)
    fill(model, prefix)
    return model, tokenizer


def build_glm_image(prefix: str) -> tuple[Any, Any]:
    """(language model of GLM-Image that writes codes of a picture, its processor).

    Numbers that are drawn would end the picture anywhere, so nothing ends it before its last code.
    """
    from transformers import (
        GlmImageConfig,
        GlmImageForConditionalGeneration,
        GlmImageImageProcessorPil,
        GlmImageProcessor,
    )

    start, end = f"<|dit_token_{GLM_CODES}|>", "<|endoftext|>"
    tokenizer = train_bpe(
        [], [end, start, *GLM_MARKS.values()], pad_token=end, bos_token=start,
        extra_special_tokens=dict(GLM_MARKS),
    )  # fmt: skip
    text = {
        "vocab_size": len(tokenizer),
        "vision_vocab_size": GLM_CODES + 2,
        "hidden_size": HIDDEN,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "eos_token_id": GLM_CODES + 1,
        "pad_token_id": tokenizer.pad_token_id,
        "rope_parameters": ROPE,
    }
    config = GlmImageConfig(
        text_config=text,
        vision_config={**VISION, "image_size": 64},
        vq_config={"embed_dim": 32, "latent_channels": 32, "num_embeddings": GLM_CODES},
        image_token_id=tokenizer.convert_tokens_to_ids(GLM_MARKS["image_token"]),
        image_start_token_id=GLM_CODES,
        image_end_token_id=GLM_CODES + 1,
    )
    model = GlmImageForConditionalGeneration(config)
    model.generation_config.eos_token_id = None
    fill(model, prefix)
    images = GlmImageImageProcessorPil()
    return model, GlmImageProcessor(images, tokenizer, chat_template=GLM_TEMPLATE)


def write_qwen_processor(tokenizer: Any, folder: Path, name: str) -> None:
    """Write Qwen2-VL's processor into a pipeline folder, and its entry into the index.

    The class itself cannot be made without torchvision; its files can.
    """
    from transformers import Qwen2VLImageProcessorPil

    Qwen2VLImageProcessorPil().save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)
    index = folder / "model_index.json"
    content = json.loads(index.read_text(encoding="utf-8"))
    content[name] = ["transformers", "Qwen2VLProcessor"]
    index.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


KINDS: Mapping[str, Callable[[str], tuple[Any, Any]]] = {
    **text_encoders.KINDS,
    **{kind: partial(build_causal, kind) for kind in CAUSALS},
    "qwen2.5-vl-deep": partial(build_qwen25, layers=3),
    "qwen2.5-vl-edit": partial(build_qwen25, edits=True),
    "clip-projection": build_clip_projection,
    "clip-vision": build_clip_vision,
    "byt5": build_byt5,
    "t5-wide": build_t5_wide,
    "glm-image": build_glm_image,
}
"""Builders of an encoder and its companion, by the kind that a model's stand-in names; each takes the
name that the encoder's weights are drawn by."""
PROCESSORS: Mapping[str, Callable[[Any, Path, str], None]] = {"qwen2-vl": write_qwen_processor}
"""Writers of a processor into a pipeline folder, made of a tokenizer, by kind."""
