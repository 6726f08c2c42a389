"""A small family that has what Janus has not: control tokens, two rotary axes, no guidance.

An image is 2 x 3 tokens with a control token at the end of the first row. Tokens rotate by their
row and column on the grid, the prompt by nothing, so that coordinates and cache positions differ.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaModel

from stage_rl.errors import InputError
from stage_rl.policies.base import Policy, Prefix, TokenLayout
from stage_rl.policies.trunk import run_trunk, trunk_weights, use_own_parts

CODES, CONTROL, WIDTH, HEADS = 11, 11, 16, 2
WORDS = ("a", "red", "blue", "square", "circle", "and", "two")
FIXED = [-1, -1, -1, CONTROL, -1, -1, -1]
COORDS = [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (2, 3)]
AXIS = torch.tensor([0, 0, 1, 1] * 2)
"""Of each rotary dimension; half of the pairs turn by the row, half by the column."""


class FakePolicy(Policy):
    codebook_size = CODES
    guided = False
    layout = TokenLayout((2, 3), 6, torch.tensor(FIXED), torch.tensor(COORDS), absolute=True)

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        sizes = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "num_hidden_layers": 2}
        trunk = LlamaModel(LlamaConfig(**sizes, intermediate_size=24, vocab_size=len(WORDS)))
        parts = {"trunk": trunk, "tokens": nn.Embedding(CODES + 1, WIDTH)}
        parts["head"] = nn.Linear(WIDTH, CODES, bias=False)
        super().__init__(nn.ModuleDict(parts).eval(), processor=WORDS.index)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5 if parameter.ndim == 2 else 1.0)
        use_own_parts(trunk)
        angle_SR = torch.arange(5)[:, None] * torch.tensor([1.0, 0.3, 0.7, 0.2] * 2)
        self.cos_SR, self.sin_SR = angle_SR.cos(), angle_SR.sin()

    @property
    def trunk_blocks(self):
        return self.module["trunk"].layers

    def encode(self, prompts):
        rows = [[self.processor(word) for word in prompt.text.split()] for prompt in prompts]
        if not all(rows):
            raise InputError("a prompt is empty; write what to draw")
        ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        lengths_P = torch.tensor([len(row) for row in rows])
        return Prefix(self.module["trunk"].embed_tokens(ids), lengths_P)

    def embed(self, tokens_NU):
        return self.module["tokens"](tokens_NU)

    def rotary(self, states_NSD, coords_NSA):
        index_NSR = coords_NSA[..., AXIS]
        place = torch.arange(len(AXIS))
        return self.cos_SR[index_NSR, place], self.sin_SR[index_NSR, place]

    def hidden(self, prefix, tokens_NT):
        columns_NUD = self.embed(self.layout.with_control(tokens_NT)[:, :-1])
        parts = (self.trunk_blocks, self.module["trunk"].norm, self.rotary)
        return run_trunk(*parts, prefix=prefix, columns_NUD=columns_NUD, layout=self.layout)

    def head(self, hidden):
        return self.module["head"](hidden)

    def codes(self, tokens_NT):
        return nn.functional.normalize(self.embed(tokens_NT).detach(), dim=-1)

    def images(self, prompts, tokens_NT):
        grid = tokens_NT.view(-1, *self.layout.grid, 1).expand(-1, -1, -1, 3)
        return (20 * grid).to(torch.uint8).cpu()

    def decoder_weights(self):
        parts = self.module
        weights = trunk_weights(
            parts["trunk"], input_embeds=parts["tokens"].weight, head=[parts["head"]]
        )
        tables = {"rotary_cos_SR": self.cos_SR, "rotary_sin_SR": self.sin_SR}
        return replace(weights, **tables, rotary_axis_R=AXIS)

    def save(self, folder, *, layout="transformers", base=""):
        torch.save(self.module.state_dict(), f"{folder}/weights.pt")


class GuidedFakePolicy(FakePolicy):
    """The same with unconditional rows of two words, whatever the length of the prompt."""

    guided = True
    default_guidance = 3.0
    default_top_k = 2

    def encode(self, prompts):
        prefix = super().encode(prompts)
        ids = torch.tensor([[WORDS.index("and"), WORDS.index("a")]]).repeat(len(prompts), 1)
        embeds_PLD = self.module["trunk"].embed_tokens(ids)
        return replace(prefix, uncond=Prefix(embeds_PLD, torch.full((len(prompts),), 2)))


class EncodedFakePolicy(FakePolicy):
    """The same with a text encoder outside of `module`."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self._outside = [nn.Embedding(len(WORDS), WIDTH)]

    def frozen_modules(self):
        return {"text_encoder": self._outside[0]}
