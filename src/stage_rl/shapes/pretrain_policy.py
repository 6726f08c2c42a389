"""Trains the base policy of the shapes world on captioned scenes.

Scenes are drawn and tokenized once into a pool of chunks, then the decoder learns to continue a
caption with the image's tokens; a tenth of the captions is dropped for guidance.

Shape suffixes: N sequences, L prompt positions, S = L + T positions, T image tokens, D model width.
"""

from __future__ import annotations

import multiprocessing
import pickle
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from stage_rl.files import replace_file
from stage_rl.policies.trunk import use_own_parts
from stage_rl.shapes.pretrain_stage import train_stage
from stage_rl.shapes.pretrain_tokenizer import tokenize
from stage_rl.shapes.prompts import pretraining_caption, pretraining_record
from stage_rl.shapes.scenes import CUT_OFF, render, scene_for
from stage_rl.training.optim import apply_gradient

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


def fill_pool(vq: Any, folder: Path, size: int, *, seed: int, workers: int) -> None:
    """Draws and tokenizes the scenes that a pool misses, in processes of their own."""
    # As bytes: tensors sent to a process as they are would need shared memory.
    pickled, started = pickle.dumps(vq), time.monotonic()
    missing = [
        (pickled, file, part, (seed, _POOL_KEY + number))
        for number, (file, part) in enumerate(chunks(folder, size).items())
        if not file.exists()
    ]
    if workers < 2:
        for job in missing:
            _write_chunk(*job)
        return
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(1,),
    )
    try:
        jobs = [pool.submit(_write_chunk, *job) for job in missing]
        for done, job in enumerate(as_completed(jobs), 1):
            job.result()
            left_min = (time.monotonic() - started) / done * (len(jobs) - done) / 60
            print(f"pool: chunk {done}/{len(jobs)}, {left_min:.1f} min left", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)


def chunks(folder: Path, size: int) -> dict[Path, int]:
    """The files of a pool and how many scenes each holds."""
    firsts = range(0, size, CHUNK)
    return {folder / f"pool-{n:04d}.npz": min(CHUNK, size - i) for n, i in enumerate(firsts)}


def _write_chunk(pickled_vq: bytes, path: Path, size: int, key: tuple[int, int]) -> None:
    rng = np.random.Generator(np.random.Philox(key=list(key)))
    records = [pretraining_record(rng) for _ in range(size)]
    images = render([scene_for(record, rng, cut_off=CUT_OFF) for record in records])
    vq = pickle.loads(pickled_vq)
    parts = [tokenize(vq, part) for part in np.array_split(images, -(-size // 100))]
    tokens_NT = torch.cat(parts).numpy().astype(np.uint16)
    texts = np.array([pretraining_caption(record, rng) for record in records])
    replace_file(path, lambda file: np.savez(file, texts=texts, tokens=tokens_NT))


def train_policy(
    model: Any, processor: Any, training: PolicyTraining, *, seed: int, folder: Path
) -> None:
    """Trains the model's decoder and image head in place; continues from `folder`/policy.pt.

    The pool's chunks must be in `folder`.
    """
    pool = [np.load(file) for file in chunks(folder, training.pool)]
    texts = np.concatenate([chunk["texts"] for chunk in pool])
    tokens_NT = np.concatenate([chunk["tokens"] for chunk in pool])
    loss_of = BaseLoss(model, tokens_NT.shape[1] + 16, compiled=training.compile)
    muon, adamw = optimizers(model, training.lr)
    losses: deque[float] = deque(maxlen=50)

    def train_step(step: int, rate: float) -> str:
        rows, dropped = _batch_rows(len(texts), training, seed=seed, step=step)
        ids, lengths = prompt_rows(processor, texts[rows].tolist(), dropped)
        loss = loss_of(ids, lengths, torch.from_numpy(tokens_NT[rows].astype(np.int64)))
        loss.backward()
        # Clipped together, before either optimizer steps.
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in (muon, adamw):
            apply_gradient(optimizer, rate=rate, max_grad_norm=None)
        losses.append(loss.item())
        return f"loss {np.mean(losses):.4f}"

    model.train()
    train_stage(
        folder / "policy.pt",
        {"model": model, "muon": muon, "adamw": adamw},
        train_step,
        steps=training.steps,
        lr=training.lr,
        warmup_steps=training.warmup_steps,
    )
    model.eval()


class BaseLoss:
    """Mean negative log-likelihood of image tokens given captions, in bf16 autocast on a CPU."""

    def __init__(self, model: Any, num_positions: int, *, compiled: bool) -> None:
        self.model = model
        self.num_positions = num_positions
        use_own_parts(model.model.language_model)
        self.decode = torch.compile(self._decode, dynamic=False) if compiled else self._decode

    def __call__(self, ids_NL: Tensor, lengths_N: Tensor, tokens_NT: Tensor) -> Tensor:
        model = self.model
        text = model.get_input_embeddings()(ids_NL)
        image = model.prepare_embeddings_for_image_generation(tokens_NT[:, :-1])
        room = text.new_zeros(len(text), self.num_positions - text.shape[1], text.shape[2])
        # Row n: its caption at positions 0 to length - 1, image token k at length + k, junk behind.
        steps = torch.arange(tokens_NT.shape[1])
        positions = lengths_N[:, None] + steps[:-1]
        index = positions[..., None].expand(-1, -1, text.shape[2])
        embeds = torch.cat([text, room], 1).scatter(1, index, image)
        return self.decode(embeds, lengths_N[:, None] - 1 + steps, tokens_NT)

    def _decode(self, embeds_NSD: Tensor, positions_NT: Tensor, tokens_NT: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out = self.model.model.language_model(inputs_embeds=embeds_NSD, use_cache=False)
            index = positions_NT[..., None].expand(-1, -1, embeds_NSD.shape[-1])
            hidden = out.last_hidden_state.gather(1, index)
            logits = self.model.model.generation_head(hidden)
        return F.cross_entropy(logits.float().flatten(0, 1), tokens_NT.flatten())


def optimizers(model: Any, lr: float) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Muon for the matrices of the decoder layers, AdamW for the rest."""
    matrices = [p for p in model.model.language_model.layers.parameters() if p.ndim == 2]
    in_muon = {id(p) for p in matrices}
    unused = ("vision_model", "vqmodel", "lm_head", "model.aligner")
    rest = [
        p
        for name, p in model.named_parameters()
        if id(p) not in in_muon and not any(part in name for part in unused)
    ]
    return (
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
    )


def _batch_rows(
    size: int, training: PolicyTraining, *, seed: int, step: int
) -> tuple[np.ndarray, list[bool]]:
    """Which scenes a step takes, each once per round of the pool, and whose captions it drops."""
    per_round = size // training.batch
    order = np.random.default_rng((seed, step // per_round)).permutation(size)
    start = step % per_round * training.batch
    drops = np.random.default_rng((seed, 7, step)).uniform(size=training.batch) < training.drop
    return order[start : start + training.batch], drops.tolist()


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
