"""A tiny Emu3 of random weights, with its tokenizer."""

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    Emu3Config as HfEmu3Config,
)
from transformers import (
    Emu3ForConditionalGeneration,
    Emu3Processor,
    PreTrainedTokenizerFast,
)
from transformers.models.emu3.image_processing_emu3 import Emu3ImageProcessor

from stage_rl.policies.emu3 import Emu3Config

NEGATIVE = "low quality"
CODES, ROWS, COLUMNS = 40, 3, 4
SIZE = {"image_area": ROWS * COLUMNS * 64, "ratio": f"{COLUMNS}:{ROWS}"}

SPECIAL = {
    **{"bos_token": "<|extra_203|>", "eos_token": "<|extra_204|>", "pad_token": "<|endoftext|>"},
    "unk_token": "<|unknown|>",
}
IMAGE = {
    **{"image_token": "<image>", "eof_token": "<|extra_201|>", "eoi_token": "<|image end|>"},
    **{"boi_token": "<|image start|>", "image_wrapper_token": "<|image token|>"},
}
WORDS = (
    *("a", "photo", "of", "red", "blue", "square", "circle", "star", "two", "and"),
    *("low", "quality", *"0123456789*"),
)


def tiny_tokenizer():
    """Words, digits and special tokens; the codes are the last ids, as in the published model."""
    codes = [f"<|visual token {code:06d}|>" for code in range(CODES)]
    added = [*SPECIAL.values(), *IMAGE.values(), "<|extra_200|>", *codes]
    ids = {token: index for index, token in enumerate([*WORDS, *added])}
    backend = Tokenizer(models.WordLevel(ids, unk_token=SPECIAL["unk_token"]))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d|\*|[a-z]+"), "removed", invert=True)
    backend.add_special_tokens(added)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **SPECIAL, extra_special_tokens=IMAGE, padding_side="left"
    )


def tiny_config(tokenizer):
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 48}
    text |= {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    text |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    vq = {"codebook_size": CODES, "base_channels": 32, "channel_multiplier": [1, 1, 1, 1]}
    vq |= {"hidden_size": 32, "num_res_blocks": 1, "attn_resolutions": []}
    return HfEmu3Config(text_config=text, vq_config=vq, vocabulary_map=tokenizer.get_vocab())


def write_emu3(folder):
    """An Emu3 with grouped keys and values, 40 codes and opinions."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    module = Emu3ForConditionalGeneration(tiny_config(tokenizer)).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim == 2 and "vqmodel" not in name:
                parameter.mul_(8)
    half = [0.5] * 3
    images = Emu3ImageProcessor(image_mean=half, image_std=half)
    module.save_pretrained(folder)
    Emu3Processor(images, tokenizer).save_pretrained(folder)


def load_emu3(path, **settings):
    config = Emu3Config(path=str(path), negative_prompt=NEGATIVE, **SIZE, **settings)
    return config.build(torch.device("cpu"))
