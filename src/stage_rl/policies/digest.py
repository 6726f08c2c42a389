"""Which weights a policy holds, in one line, to know them again when a run goes on.

A CPU hashes all bytes. A GPU, where that would mean copying 25 GB to one core, adds up mixed words
on the device and hashes the sums; a digest says which form it is, and either device computes both.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from stage_rl.policies.base import Policy

SUMS = "sums-"
"""What the digests of the second form begin with."""

CHUNK = 2**24
"""Words that are mixed at one time."""


def base_digest(policy: Policy, *, like: str = "") -> str:
    """A digest over all parameters as they were loaded: names in order, types, shapes and values.

    `like` is a digest that was recorded, whose form is taken; without one the device's own.
    """
    sums = like.startswith(SUMS) if like else policy.device.type == "cuda"
    digest = hashlib.sha256()
    parameters = dict(policy.module.named_parameters())
    for part, module in policy.frozen_modules().items():
        parameters |= {f"{part}:{name}": value for name, value in module.named_parameters()}
    for name, parameter in sorted(parameters.items()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)};".encode())
        values = parameter.detach().contiguous().flatten()
        if sums:
            digest.update(f"{mixed_sum(values)};".encode())
        else:
            digest.update(values.cpu().view(torch.uint8).numpy().data)
    return f"{SUMS if sums else ''}{digest.hexdigest()}"


def mixed_sum(values_N: Tensor) -> int:
    """The sum of the 32-bit words of a tensor, each mixed with its place, modulo 2^64.

    The same on every device, whatever the order of the sum. It tells weights apart that differ by
    accident, not by design.
    """
    bytes_B = values_N.view(torch.uint8)
    # A tail of fewer than four bytes is filled up with zeros; the shape is hashed beside it.
    if len(bytes_B) % 4 or values_N.storage_offset() * values_N.itemsize % 4:
        bytes_B = torch.nn.functional.pad(bytes_B, (0, -len(bytes_B) % 4)).clone()
    total = 0
    for number, words in enumerate(bytes_B.view(torch.int32).split(CHUNK)):
        places = torch.arange(len(words), device=words.device) + number * CHUNK
        total += int(_mixed(words + places * 0x1E3779B97F4A7C15).sum())
    return total % 2**64


def _mixed(x: Tensor) -> Tensor:
    """Spreads every bit of a 64-bit integer over all, in place (the finalizer of splitmix64)."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        x ^= (x >> shift) & (2 ** (64 - shift) - 1)
        x *= factor
    return x
