"""Models of a few thousand random parameters that find nouns in images or answer questions."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertTokenizer,
    CLIPVisionConfig,
    GitConfig,
    GitForCausalLM,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SwinConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from stage_rl.rewards.tiny import random_model

NUM_TOKENS = 1040
"""Enough for the ids of the marks that GroundingDINO has in its code."""
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}
ANSWERS = ("yes", "Yes", "no", "No")
CHAT = (
    "{% for message in messages %}USER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}ANSWER: "
)


def tiny_scene_tokenizer() -> BertTokenizer:
    """yes, no and one token per printable ASCII character; GroundingDINO's marks at its ids."""
    marks = {"[CLS]": 101, "[SEP]": 102, ".": 1012, "?": 1029}
    letters = [chr(code) for code in range(33, 127) if chr(code) not in marks]
    words = [
        "[PAD]",
        "[UNK]",
        "[MASK]",
        "yes",
        "no",
        *letters,
        *(f"##{letter}" for letter in letters),
    ]
    free = (i for i in range(NUM_TOKENS) if i not in marks.values())
    vocabulary = {**marks, **dict(zip(words, free, strict=False))}
    # The tokenizer wants an unbroken row of ids.
    vocabulary |= {f"[unused{i}]": i for i in free}
    return BertTokenizer(vocab=vocabulary)


def tiny_grounding_dino() -> GroundingDinoForObjectDetection:
    """A GroundingDINO of 20 queries on a Swin of width 8."""
    backbone: dict[str, Any] = {"depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]}
    backbone |= {"image_size": 64, "patch_size": 4, "embed_dim": 8, "window_size": 7}
    backbone |= {"out_features": ["stage2", "stage3", "stage4"]}
    swin = SwinConfig(**backbone)
    sizes: dict[str, Any] = dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
    sizes |= dict.fromkeys(("d_model", "encoder_ffn_dim", "decoder_ffn_dim"), 32)
    config = GroundingDinoConfig(
        backbone_config=swin,
        text_config=BertConfig(**TEXT, vocab_size=NUM_TOKENS),
        encoder_layers=1,
        decoder_layers=2,  # the names of shared boxes need a second one
        num_queries=20,
        **sizes,
    )
    return random_model(lambda: GroundingDinoForObjectDetection(config))


def tiny_git() -> GitForCausalLM:
    """A GIT that reads images of 32 x 32 and what `tiny_scene_tokenizer` writes."""
    config = GitConfig(vision_config=VISION, **TEXT, vocab_size=NUM_TOKENS)
    return random_model(lambda: GitForCausalLM(config), scale=4.0)


def tiny_vlm() -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A LLaVA that reads images of 32 x 32, with a processor that has a chat template."""
    letters = [chr(code) for code in range(32, 127)]
    words = ["<unk>", "<pad>", "<s>", "</s>", "<image>", *letters, *ANSWERS]
    letter_by_letter = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    letter_by_letter.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    letter_by_letter.add_tokens(list(ANSWERS))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=letter_by_letter,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
    )
    images = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        chat_template=CHAT,
        num_additional_image_tokens=1,
    )
    image: dict[str, Any] = {"image_token_id": tokenizer.convert_tokens_to_ids("<image>")}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**TEXT, vocab_size=len(tokenizer)),
        vision_feature_layer=-1,
        **image,
    )
    return random_model(lambda: LlavaForConditionalGeneration(config), scale=4.0), processor
