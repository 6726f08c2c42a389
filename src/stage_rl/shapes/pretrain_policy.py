"""Trains the base policy of the shapes world on captioned scenes.

Scenes are drawn and tokenized once into a pool of chunks, then the decoder learns to continue a
caption with the image's tokens; a tenth of the captions is dropped for guidance.

Shape suffixes: N sequences, L prompt slots, S = L + T slots, T image tokens, D model width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from stage_rl.policies.trunk import use_causal
from stage_rl.shapes.pretrain_tokenizer import (
    Progress,
    learning_rate,
    save_state,
    set_rate,
    to_pixels,
    unit_codes,
)
from stage_rl.shapes.prompts import pretraining_caption, pretraining_record
from stage_rl.shapes.scenes import CUT_OFF, render, scene_for

CHUNK = 2000
"""Scenes in one file of the pool; the last may hold fewer."""
_POOL_KEY = 2_000_000


@dataclass(frozen=True)
class PolicyTraining:
    """How long and how fast the base policy is trained."""

    steps: int = 7000
    batch: int = 64
    lr: float = 2e-3
    warmup_steps: int = 150
    drop: float = 0.1
    """Share of captions replaced by the unconditional prompt."""
    pool: int = 240_000
    """Captioned scenes; more steps than the pool holds go round it again."""
    compile: bool = True
    """Fuse the decoder with torch.compile (needs a C++ compiler); 2 to 3 times faster on a CPU."""


@torch.inference_mode()
def tokenize(vq: Any, images_NHWC: np.ndarray) -> Tensor:
    """The tokens of images, NT."""
    codebook = F.normalize(vq.quantize.embedding.weight, dim=1)
    pixels = to_pixels(images_NHWC).to(codebook.device)
    unit = unit_codes(vq, pixels).permute(0, 2, 3, 1)
    return (unit.flatten(0, 2) @ codebook.T).argmax(1).view(len(unit), -1)


def chunk_sizes(pool: int) -> list[int]:
    """The scenes of each file of a pool."""
    sizes = [CHUNK] * (pool // CHUNK)
    return [*sizes, pool % CHUNK] if pool % CHUNK else sizes


def write_chunk(vq: Any, folder: Path, chunk: int, *, size: int, seed: int) -> None:
    """Draws and tokenizes one chunk of the pool; a chunk that exists stays."""
    path = folder / f"pool-{chunk:04d}.npz"
    if path.exists():
        return
    rng = np.random.Generator(np.random.Philox(key=[seed, _POOL_KEY + chunk]))
    records = [pretraining_record(rng) for _ in range(size)]
    images = render([scene_for(record, rng, cut_off=CUT_OFF) for record in records])
    tokens = torch.cat([tokenize(vq, part) for part in np.array_split(images, -(-size // 100))])
    temporary = path.with_suffix(".tmp.npz")
    texts = np.array([pretraining_caption(record, rng) for record in records])
    np.savez(temporary, texts=texts, tokens=tokens.numpy().astype(np.uint16))
    temporary.replace(path)


def read_pool(folder: Path, num_chunks: int) -> tuple[np.ndarray, np.ndarray]:
    """All captions and their tokens."""
    chunks = [np.load(folder / f"pool-{chunk:04d}.npz") for chunk in range(num_chunks)]
    return (
        np.concatenate([chunk["texts"] for chunk in chunks]),
        np.concatenate([chunk["tokens"] for chunk in chunks]),
    )


def prompt_rows(processor: Any, texts: list[str], dropped: list[bool]) -> tuple[Tensor, Tensor]:
    """Input ids of captions, right-padded (NL), and their lengths.

    A dropped caption becomes BOS, pads and begin-of-image at its own length: the unconditional row
    of Janus.
    """
    tokenizer = processor.tokenizer
    boi = tokenizer.convert_tokens_to_ids(tokenizer.boi_token)
    rows = [[*ids, boi] for ids in tokenizer(texts)["input_ids"]]
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.full((len(rows), int(lengths.max())), tokenizer.pad_token_id)
    for out, row, drop in zip(ids, rows, dropped, strict=True):
        out[: len(row)] = torch.tensor(row)
        if drop:
            out[1 : len(row) - 1] = tokenizer.pad_token_id
    return ids, lengths


class BaseLoss:
    """Mean negative log-likelihood of image tokens given captions, in bf16 autocast on a CPU."""

    def __init__(self, model: Any, num_slots: int, *, compiled: bool) -> None:
        self.model = model
        self.num_slots = num_slots
        use_causal(model.model.language_model)
        self.decode = torch.compile(self._decode, dynamic=False) if compiled else self._decode

    def _decode(self, embeds_NSD: Tensor, places_NT: Tensor, tokens_NT: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out = self.model.model.language_model(inputs_embeds=embeds_NSD, use_cache=False)
            index = places_NT[..., None].expand(-1, -1, embeds_NSD.shape[-1])
            hidden = out.last_hidden_state.gather(1, index)
            logits = self.model.model.generation_head(hidden)
        return F.cross_entropy(logits.float().flatten(0, 1), tokens_NT.flatten())

    def __call__(self, ids_NL: Tensor, lengths_N: Tensor, tokens_NT: Tensor) -> Tensor:
        model = self.model
        num_tokens = tokens_NT.shape[1]
        text = model.get_input_embeddings()(ids_NL)
        image = model.prepare_embeddings_for_image_generation(tokens_NT[:, :-1])
        room = text.new_zeros(len(text), self.num_slots - text.shape[1], text.shape[2])
        # Row n: its caption at slots 0 to length - 1, image token k at length + k, junk behind.
        steps = torch.arange(num_tokens)
        slots = lengths_N[:, None] + steps[:-1]
        index = slots[..., None].expand(-1, -1, text.shape[2])
        embeds = torch.cat([text, room], 1).scatter(1, index, image)
        return self.decode(embeds, lengths_N[:, None] - 1 + steps, tokens_NT)


def optimizers(model: Any, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the decoder layers, AdamW for the rest."""
    matrices = [p for p in model.model.language_model.layers.parameters() if p.ndim == 2]
    in_muon = {id(p) for p in matrices}
    unused = ("vision_model", "vqmodel", "lm_head", "model.aligner")
    rest = [
        p
        for name, p in model.named_parameters()
        if id(p) not in in_muon and not any(part in name for part in unused)
    ]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train_policy(
    model: Any,
    processor: Any,
    training: PolicyTraining,
    *,
    seed: int,
    folder: Path,
    report: Callable[[str], None],
    save_every: int = 200,
) -> None:
    """Trains the model's decoder and image head in place; continues from `folder`/policy.pt.

    The pool's chunks must be in `folder`.
    """
    texts, tokens = read_pool(folder, len(chunk_sizes(training.pool)))
    num_tokens = tokens.shape[1]
    loss_of = BaseLoss(model, num_tokens + 16, compiled=training.compile)
    opts = optimizers(model, training.lr)
    first = _resume(folder / "policy.pt", model, opts)
    progress = Progress("policy", training.steps, first=first, every=50, report=report)
    losses: deque[float] = deque(maxlen=progress.every)
    model.train()
    for step in range(first, training.steps):
        rows, dropped = batch_rows(len(texts), training, seed=seed, step=step)
        ids, lengths = prompt_rows(processor, texts[rows].tolist(), dropped)
        loss = loss_of(ids, lengths, torch.from_numpy(tokens[rows].astype(np.int64)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = learning_rate(
            step, steps=training.steps, warmup_steps=training.warmup_steps, peak=training.lr
        )
        for optimizer in opts:
            set_rate(optimizer, rate)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        done = step + 1
        progress.show(done, f"loss {np.mean(losses):.4f}")
        if done % save_every == 0 or done == training.steps:
            saved = [optimizer.state_dict() for optimizer in opts]
            state = {"model": model.state_dict(), "optimizers": saved, "step": done}
            save_state(folder / "policy.pt", state)
    model.eval()


def _resume(file: Path, model: Any, opts: list[torch.optim.Optimizer]) -> int:
    """The step at which a training goes on, with its state loaded; 0 without a file."""
    if not file.exists():
        return 0
    state = torch.load(file, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(opts, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["step"]


def batch_rows(
    size: int, training: PolicyTraining, *, seed: int, step: int
) -> tuple[np.ndarray, list[bool]]:
    """Which scenes a step takes, each once per round of the pool, and whose captions it drops."""
    per_round = size // training.batch
    order = np.random.default_rng((seed, step // per_round)).permutation(size)
    start = step % per_round * training.batch
    drops = np.random.default_rng((seed, 7, step)).uniform(size=training.batch) < training.drop
    return order[start : start + training.batch], drops.tolist()
