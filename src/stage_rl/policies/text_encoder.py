"""A frozen T5 encoder: what a family that is conditioned on features of a text reads of prompts.

Shape suffixes: L tokens of a prompt, F width of the features.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, T5Config, T5EncoderModel

from stage_rl.errors import InputError
from stage_rl.policies.base import check_text
from stage_rl.policies.loading import Source, find, load_whole, quiet, refused, require
from stage_rl.types import Prompt

MAX_KEPT = 1024
"""Prompts whose features are kept; at the width of flan-t5-xl 50 MB where they are of 12 tokens."""

PUBLISHED = {
    "google/flan-t5-xl": {
        **{"d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_layers": 24, "num_heads": 32},
        **{"vocab_size": 32_128, "feed_forward_proj": "gated-gelu"},
    }
}
"""Sizes in `config.json` of encoders on the hub."""


class TextEncoder:
    """Encodes each prompt alone, so that its features are the same in any batch.

    It is no module of a policy: it is neither trained, sharded nor saved, and copies share it.
    """

    def __init__(self, model: T5EncoderModel, tokenizer: Any, *, max_tokens: int) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        """With the end-of-text token."""
        self._kept: OrderedDict[str, Tensor] = OrderedDict()

    @property
    def width(self) -> int:
        """F."""
        return int(self.model.config.d_model)

    def features(self, prompt: Prompt) -> Tensor:
        """features_LF of a prompt, end of text last, on the CPU in the encoder's precision.

        A prompt that is empty, over-long or holds a special token is an `InputError`.
        """
        text = _cleaned(prompt.text)
        if text not in self._kept:
            self._kept[text] = self._encode(self.token_ids(prompt))
            if len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(text)
        return self._kept[text]

    def token_ids(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, end of text last; see `features`."""
        text = _cleaned(prompt.text)
        check_text(replace(prompt, text=text), self.tokenizer)
        check_text(prompt, self.tokenizer)
        # No padding or truncation, also where the file of the tokenizer asks for them.
        ids = self.tokenizer(text, padding=False, truncation=False).input_ids
        if len(ids) > self.max_tokens:
            raise InputError(
                f"{prompt.place} ('{prompt.text[:40]}...'): {len(ids)} tokens, but the "
                f"model reads at most {self.max_tokens}; write a shorter one"
            )
        return ids

    @torch.no_grad()
    def _encode(self, ids: list[int]) -> Tensor:
        ids_1L = torch.tensor([ids], device=self.model.device)
        return self.model(input_ids=ids_1L).last_hidden_state[0].cpu()


def _cleaned(text: str) -> str:
    """As captions were cleaned for training, but for what that takes from web pages."""
    return text.lower().strip()


def load_text_encoder(
    path: str, *, dtype: torch.dtype, device: torch.device, max_tokens: int
) -> TextEncoder:
    """The encoder half of the T5 in a folder or on the hub; wrong weights are a `WeightsError`."""
    source = find(path)
    with quiet():
        _read_config(source)
        with refused(f"{source.name}: cannot load the tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False)
        source.fetch_weights()
        model = load_whole(
            T5EncoderModel,
            source.name,
            source.folder,
            ignore_keys=r"^(decoder\.|lm_head\.)",  # the other half
            dtype=dtype,
        )
    nn.Module.to(model, device)
    return TextEncoder(model, tokenizer, max_tokens=max_tokens)


def encoder_parameters(path: str) -> int | None:
    """Parameters of the encoder in a folder or of a published one; None where it is not known."""
    if Path(path).expanduser().is_dir():
        config = _read_config(find(path))
    elif path.partition("@")[0] in PUBLISHED:
        config = T5Config(**PUBLISHED[path.partition("@")[0]])
    else:
        return None
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in T5EncoderModel(config).parameters())


def _read_config(source: Source) -> T5Config:
    with refused(f"{source.name}: config.json"):
        config: Any = T5Config.get_config_dict(source.folder)[0]
        require(source.name, {"model_type": (config.get("model_type"), "t5")})
        return T5Config.from_dict(config)
