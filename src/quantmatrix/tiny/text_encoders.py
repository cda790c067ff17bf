"""Tiny text: tokenizers and text encoders of the stand-in pipelines, made without a download.

Real classes in small sizes. A tokenizer must keep the prompt alive through the pipeline's template
and its length limit, so the byte-pair ones are trained on the template and a word list.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from typing import Any

from quantmatrix.tiny.weights import fill

HIDDEN = 128
WORDS = (  # noqa: SIM905
    "a the of with in on through and curious pikachu beautiful sunset fox walking neon rain logo "
    "bold large text sgl diffusion cat dog red blue green city mountain river photo painting blurry "
    "static low quality watermark A Logo Bold Large Text SGL Diffusion"
).split()

QWEN_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, "
    "text, spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
    "<|im_end|>\n<|im_start|>assistant\n"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL_TEMPLATE = (
    "<s>{% for message in messages %}"
    "{% set mark = 'SYSTEM_PROMPT' if message['role'] == 'system' else 'INST' %}[{{ mark }}]"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}[/{{ mark }}]{% endfor %}"
)


def build_clip(prefix: str) -> tuple[Any, Any]:
    """(CLIP text encoder, its tokenizer)."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = sorted(set(_byte_alphabet()))
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in dict.fromkeys(word.lower() for word in WORDS):
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            pair = (pieces[0], pieces[1])
            if pair not in merges:
                merges.append(pair)
                vocabulary.append("".join(pair))
            pieces = ["".join(pair), *pieces[2:]]
    vocabulary = list(dict.fromkeys([*vocabulary, "<|startoftext|>", "<|endoftext|>"]))
    numbers = {piece: number for number, piece in enumerate(vocabulary)}
    tokenizer = CLIPTokenizer(vocab=numbers, merges=merges, model_max_length=77)
    model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocabulary),
            hidden_size=HIDDEN,
            intermediate_size=HIDDEN * 2,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            projection_dim=HIDDEN,
            bos_token_id=numbers["<|startoftext|>"],
            eos_token_id=numbers["<|endoftext|>"],
            pad_token_id=numbers["<|endoftext|>"],
        )
    )
    fill(model, prefix)
    return model, tokenizer


def _byte_alphabet() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return [str(letter) for letter in ByteLevel.alphabet()]


def _t5_tokenizer() -> Any:
    from transformers import T5TokenizerFast

    pieces = ["<pad>", "</s>", "<unk>", "▁"]
    pieces += [*string.printable.strip(), *(f"▁{word}" for word in WORDS)]
    scores = [
        (piece, 0.0 if i < 3 else -2.0 - i / 1000) for i, piece in enumerate(dict.fromkeys(pieces))
    ]
    return T5TokenizerFast(vocab=scores, extra_ids=0)


def _t5_config(config_class: Any, vocabulary: int) -> Any:
    return config_class(
        vocab_size=vocabulary,
        d_model=HIDDEN,
        d_kv=64,
        d_ff=HIDDEN,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )


def build_t5(prefix: str) -> tuple[Any, Any]:
    """(T5 encoder, its tokenizer)."""
    from transformers import T5Config, T5EncoderModel

    tokenizer = _t5_tokenizer()
    model = T5EncoderModel(_t5_config(T5Config, len(tokenizer)))
    fill(model, prefix)
    return model, tokenizer


def build_umt5(prefix: str) -> tuple[Any, Any]:
    """(UMT5 encoder, its tokenizer)."""
    from transformers import UMT5Config, UMT5EncoderModel

    tokenizer = _t5_tokenizer()
    model = UMT5EncoderModel(_t5_config(UMT5Config, len(tokenizer)))
    fill(model, prefix)
    return model, tokenizer


def train_bpe(texts: list[str], specials: list[str], **options: Any) -> Any:
    """A byte-level BPE tokenizer trained on a few texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = [f" {word}" for word in WORDS]
    tokenizer.train_from_iterator([*texts, *WORDS, *words] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


def build_mistral(prefix: str) -> tuple[Any, Any]:
    """(Mistral 3 with 31 layers, its tokenizer): FLUX.2 reads hidden states 10, 20 and 30.

    The system message is one token: spelled out, it and the padding would drown the prompt.
    """
    from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    marks = ["[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]"]
    tokenizer = train_bpe(
        [],
        ["<pad>", "<s>", "</s>", *marks, SYSTEM_MESSAGE],
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
    )
    tokenizer.chat_template = MISTRAL_TEMPLATE
    config = Mistral3Config(
        text_config={
            "model_type": "mistral",
            "vocab_size": len(tokenizer),
            "hidden_size": HIDDEN,
            "intermediate_size": 64,
            "num_hidden_layers": 31,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "max_position_embeddings": 1024,
        },
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 16,
        },
    )
    model = Mistral3ForConditionalGeneration(config)
    fill(model, prefix)
    return model, tokenizer


def build_qwen25(prefix: str) -> tuple[Any, Any]:
    """(Qwen2.5-VL, its tokenizer): the pipeline drops the 34 template tokens before the prompt."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = train_bpe(
        [QWEN_TEMPLATE], specials, pad_token="<|endoftext|>", eos_token="<|im_end|>"
    )
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": HIDDEN,
            "intermediate_size": HIDDEN,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [8, 12, 12],
            },
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": HIDDEN,
        },
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    fill(model, prefix)
    return model, tokenizer


def build_qwen3(prefix: str) -> tuple[Any, Any]:
    """(Qwen3 without a head, its tokenizer): Z-Image reads the second-to-last state."""
    from transformers import Qwen3Config, Qwen3Model

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = train_bpe(
        ["user\nassistant\n"], specials, pad_token="<|endoftext|>", eos_token="<|im_end|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
    )
    model = Qwen3Model(config)
    fill(model, prefix)
    return model, tokenizer


KINDS: Mapping[str, Callable[[str], tuple[Any, Any]]] = {
    "clip": build_clip,
    "t5": build_t5,
    "umt5": build_umt5,
    "mistral": build_mistral,
    "qwen2.5-vl": build_qwen25,
    "qwen3": build_qwen3,
}
"""Builders of a text encoder and its tokenizer, by the kind that a model's stand-in names; each takes
the name that the encoder's weights are drawn by."""
