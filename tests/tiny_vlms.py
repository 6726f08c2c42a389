"""Vision-language models of random weights with the processors' files, as folders to load from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny_models import random_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

QWENS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "qwen3_5_moe")

MARKS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|image_pad|>", "<|video_pad|>", "<image>", "<video>"),
)

ANSWERS = ("yes", "Yes", "no", "No", "Excellent", "Good", "Fair", "Poor", "Bad")

WORDS = ("<unk>", *MARKS, *map(chr, range(32, 127)), *ANSWERS)

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}:{% for part in m.content %}"
    "{% if part.type == 'image' %}PLACE{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant:"
    "{% if enable_thinking is defined and not enable_thinking %}!{% endif %}{% endif %}"
)

QWEN_PLACE = "<|vision_start|><|image_pad|><|vision_end|>"

TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": len(WORDS),
    "max_position_embeddings": 4096,
    "bos_token_id": None,
    "eos_token_id": None,
}


def token(word: str) -> int:
    """The id of a word."""
    return WORDS.index(word)


def save_vlm(kind: str, folder: Path) -> None:
    """Saves a model of a model_type with tokenizer, image processor and chat template."""
    config = _llava_onevision() if kind == "llava_onevision" else _qwen(kind)
    model = random_model(lambda: AutoModelForImageTextToText.from_config(config), scale=4.0)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    image_processor(kind).save_pretrained(folder)
    place = "<image>" if kind == "llava_onevision" else QWEN_PLACE
    if kind == "llava_onevision":
        settings = {"num_image_tokens": 4, "vision_feature_select_strategy": "full"}
        (folder / "processor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT.replace("PLACE", place), encoding="utf-8")


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable character, and one per answer."""
    letters = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    letters.add_tokens(list(ANSWERS))
    return PreTrainedTokenizerFast(
        tokenizer_object=letters,
        unk_token="<unk>",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=list(MARKS[1:]),
    )


def image_processor(kind: str) -> Any:
    """At most 128 x 128 pixels."""
    if kind == "llava_onevision":
        return LlavaOnevisionImageProcessorPil(
            size={"height": 32, "width": 32}, image_grid_pinpoints=[[32, 32], [64, 64]]
        )
    patch = _patch(kind)
    size = {"shortest_edge": (4 * patch) ** 2, "longest_edge": 128 * 128}
    return Qwen2VLImageProcessorPil(patch_size=patch, size=size)


def _patch(kind: str) -> int:
    return 14 if kind in ("qwen2_vl", "qwen2_5_vl") else 16


def _qwen(kind: str) -> Any:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    vision: dict[str, Any] = {"depth": 1, "hidden_size": 32, "num_heads": 2}
    vision |= {"patch_size": _patch(kind)}
    text = dict(TEXT)
    if kind == "qwen2_vl":
        vision |= {"embed_dim": 32, "mlp_ratio": 1}
    else:
        vision |= {"intermediate_size": 32, "out_hidden_size": 32}
    if kind == "qwen2_5_vl":
        vision |= {"fullatt_block_indexes": [0]}
    if kind.startswith("qwen3"):
        vision |= {"num_position_embeddings": 16}
        text |= {"head_dim": 16}
        rope |= {"mrope_interleaved": True}
    if kind == "qwen3_vl":
        vision |= {"deepstack_visual_indexes": [0]}
    if kind.startswith("qwen3_5"):
        sizes = ("key_head_dim", "value_head_dim", "num_key_heads", "num_value_heads")
        text |= {f"linear_{name}": 8 if "dim" in name else 2 for name in sizes}
        text |= {"layer_types": ["linear_attention", "full_attention"]}
        rope |= {"partial_rotary_factor": 1.0}
    if kind == "qwen3_5_moe":
        text |= {"num_experts": 4, "num_experts_per_tok": 2}
        text |= {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
    return AutoConfig.for_model(
        kind,
        text_config={**text, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )


def _llava_onevision() -> Any:
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads")
    vision = {"model_type": "siglip_vision_model", "num_hidden_layers": 2, "image_size": 32}
    return AutoConfig.for_model(
        "llava_onevision",
        text_config={**TEXT, "model_type": "qwen2"},
        vision_config={**vision, "patch_size": 16, **{name: TEXT[name] for name in sizes}},
        image_token_id=token("<image>"),
        video_token_id=token("<video>"),
        image_grid_pinpoints=[[32, 32], [64, 64]],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
