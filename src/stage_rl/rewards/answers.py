"""Yes or no, read off a language model's next token.

Shape suffixes: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from stage_rl.errors import WeightsError


@dataclass(frozen=True)
class Answer:
    """What a model thinks of one question on one image."""

    yes: float
    """P(yes) / (P(yes) + P(no)), in [0, 1]."""
    belief: float
    """P(yes) + P(no): near 0 where the model would have said something else."""


def answers_from(logits_RV: Tensor, yes: Sequence[int], no: Sequence[int]) -> list[Answer]:
    """The answer of each row, from the logits of the next token and the tokens of either word."""
    logprobs_RV = logits_RV.float().log_softmax(-1)
    yes_R = logprobs_RV[:, list(yes)].logsumexp(-1)
    no_R = logprobs_RV[:, list(no)].logsumexp(-1)
    # In logarithms, so that two tiny probabilities still have a ratio.
    shares = (yes_R - no_R).sigmoid().tolist()
    beliefs = (yes_R.exp() + no_R.exp()).tolist()
    return [Answer(share, belief) for share, belief in zip(shares, beliefs, strict=True)]


def tokens_of(tokenizer: Any, spellings: Sequence[str]) -> list[int]:
    """The tokens of those spellings of a word that are one token; a WeightsError without any."""
    encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in spellings]
    unknown = tokenizer.unk_token_id
    tokens = sorted({ids[0] for ids in encoded if len(ids) == 1 and ids[0] != unknown})
    if not tokens:
        raise WeightsError(
            f"the tokenizer has no token '{spellings[0]}'; write a model that answers by it"
        )
    return tokens
