"""Digests of weights: both forms tell weights apart, and know them again."""

import hashlib

import pytest
import torch
from fake_family import EncodedFakePolicy

from stage_rl.policies import digest
from stage_rl.policies.digest import SUMS, base_digest, mixed_sum

MASK = 2**64 - 1


def mixed_slowly(words):
    """The finalizer of splitmix64 (Steele et al. 2014) over words and places, in Python's ints."""
    total = 0
    for place, word in enumerate(words):
        x = (word + place * 0x1E3779B97F4A7C15) & MASK
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
        total += x ^ (x >> 31)
    return total & MASK


def test_the_sum_is_that_of_plain_integers_in_pieces_of_any_size(monkeypatch):
    values = torch.randn(37, generator=torch.Generator().manual_seed(0))
    expected = mixed_slowly(values.view(torch.int32).tolist())
    assert mixed_sum(values) == expected
    monkeypatch.setattr(digest, "CHUNK", 5)
    assert mixed_sum(values) == expected


def test_the_sum_sees_a_bit_an_exchange_and_a_tail():
    values = torch.arange(1.0, 8).bfloat16()  # 14 bytes: three words and a half
    found = [mixed_sum(values)]
    for index in (0, 6):
        other = values.clone()
        other.view(torch.int16)[index] ^= 1
        found.append(mixed_sum(other))
    found.append(mixed_sum(values.flip(0)))
    assert len(set(found)) == 4
    # A view that begins between two words.
    assert mixed_sum(torch.arange(0.0, 8).bfloat16()[1:]) == found[0]


def test_the_form_is_that_of_the_recorded_digest_and_on_a_cpu_all_bytes():
    policy = EncodedFakePolicy()
    plain, sums = base_digest(policy), base_digest(policy, like=SUMS)
    by_hand = hashlib.sha256()
    parameters = dict(policy.module.named_parameters())
    encoder = policy.frozen_modules()["text_encoder"]
    parameters |= {f"text_encoder:{name}": p for name, p in encoder.named_parameters()}
    for name, p in sorted(parameters.items()):
        by_hand.update(f"{name} {p.dtype} {tuple(p.shape)};".encode())
        by_hand.update(p.detach().numpy().tobytes())
    assert plain == by_hand.hexdigest()
    assert sums.startswith(SUMS)
    assert base_digest(policy, like=plain) == plain
    assert base_digest(policy, like=sums) == sums
    with torch.no_grad():
        encoder.weight.view(-1)[0] += 1
    assert base_digest(policy, like=sums) != sums
    assert base_digest(policy, like=plain) != plain


@pytest.mark.gpu
def test_a_gpu_and_a_cpu_find_the_same_sum():
    values = torch.randn(1000)
    assert mixed_sum(values.cuda()) == mixed_sum(values)
