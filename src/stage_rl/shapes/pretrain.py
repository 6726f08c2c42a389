"""`stage shapes pretrain`: tokenizer, detector and base policy from nothing.

One command and a seed. The state of every stage lies in OUT/work, so that the same command goes on
where it was stopped. What comes out are OUT/checkpoint, a Janus folder with training.json, and
OUT/detector.safetensors: the two files of the package that hold weights.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from stage_rl.distributed import environment
from stage_rl.errors import InputError
from stage_rl.files import replace_text, writing
from stage_rl.policies.janus import load_janus
from stage_rl.settings import Seed
from stage_rl.shapes.detector import WEIGHTS
from stage_rl.shapes.model import JanusSize, build_janus, save_janus
from stage_rl.shapes.pretrain_detector import train_detector
from stage_rl.shapes.pretrain_policy import PolicyTraining, fill_pool, train_policy
from stage_rl.shapes.pretrain_tokenizer import TokenizerTraining, train_tokenizer
from stage_rl.shapes.prompts import WORDS
from stage_rl.training.parallelize import require_compiler

SIZE = JanusSize(width=192, layers=6, heads=6, mlp=512, codebook_size=2048, codebook_dim=8)


@dataclass(frozen=True)
class Plan:
    """Everything that decides what comes out."""

    seed: int
    size: JanusSize
    tokenizer: TokenizerTraining
    detector_steps: int
    policy: PolicyTraining
    start_from: str = ""
    """`shipped`: the package's tokenizer and detector, and its base policy to go on from."""


def main(
    *,
    out: str = "shapes-model",
    seed: Seed = 0,
    tokenizer_steps: PositiveInt = 2400,
    decoder_steps: NonNegativeInt = 400,
    detector_steps: PositiveInt = 1500,
    policy_steps: PositiveInt = 7000,
    batch: PositiveInt = 64,
    lr: PositiveFloat = 2e-3,
    pool: PositiveInt = 240_000,
    start_from: Literal["", "shipped"] = "",
    no_compile: bool = False,
    workers: PositiveInt = 2,
) -> None:
    """Train tokenizer, detector and base policy; the same command again goes on.

    --out: folder of the result, and of the state in its folder work. --decoder-steps: the last
    steps of the tokenizer, which train its decoder alone. --batch, --lr, --pool: scenes of a step
    of the policy, its peak learning rate, and captioned scenes drawn for it. --start-from shipped:
    go on from the package's own base policy, with its tokenizer and detector. --no-compile: do
    without a C++ compiler, at a half to a third of the speed. --workers: processes that draw.
    """
    plan = Plan(
        seed=seed,
        size=SIZE,
        tokenizer=TokenizerTraining(steps=tokenizer_steps, decoder_steps=decoder_steps),
        detector_steps=detector_steps,
        policy=PolicyTraining(
            steps=policy_steps, batch=batch, lr=lr, pool=pool, compile=not no_compile
        ),
        start_from=start_from,
    )
    for name, value, smallest in (
        ("tokenizer-steps", tokenizer_steps, decoder_steps + 1),
        ("pool", pool, batch),
    ):
        if value < smallest:
            raise InputError(f"--{name}: {value} is too small; write at least {smallest}")
    if not no_compile:
        require_compiler("pretrain", instead="--no-compile")
    pretrain(plan, Path(out), workers=workers)


def pretrain(plan: Plan, out: Path, *, workers: int) -> None:
    """Carries out a plan, or goes on with it; an `out` that holds another one is an InputError."""
    work, checkpoint = out / "work", out / "checkpoint"
    if _claim(plan, out) and (checkpoint / "training.json").exists():
        print(f"{out}: finished; name another --out to start again")
        return
    detector = work / WEIGHTS.name
    if plan.start_from:
        model, processor = load_janus("shapes")
        with writing(detector):
            shutil.copyfile(WEIGHTS, detector)
    else:
        model, processor = build_janus(plan.size, words=WORDS, seed=plan.seed)
        with _timed(work, "tokenizer"):
            state_file = work / "tokenizer.pt"
            vq = model.model.vqmodel
            train_tokenizer(vq, plan.tokenizer, seed=plan.seed, state_file=state_file)
        with _timed(work, "detector"):
            train_detector(detector, steps=plan.detector_steps, seed=plan.seed)
    with _timed(work, "pool"):
        fill_pool(model.model.vqmodel, work, plan.policy.pool, seed=plan.seed, workers=workers)
    with _timed(work, "policy"):
        train_policy(model, processor, plan.policy, seed=plan.seed, folder=work)
    with writing(out):
        shutil.copyfile(detector, out / detector.name)
        _write_checkpoint(plan, model, processor, out)
    print(f"{checkpoint}: written")


def _claim(plan: Plan, out: Path) -> bool:
    """Makes the folder of a plan, or takes up the one that exists; whether it existed."""
    file, settings = out / "work" / "settings.json", _settings(plan)
    if file.exists():
        found = json.loads(file.read_text(encoding="utf-8"))
        differing = [key for key in settings if found.get(key) != settings[key]]
        if differing:
            raise InputError(
                f"{out}: holds a pretraining with other settings ({', '.join(differing)}); "
                "name another --out, or give the same settings"
            )
        return True
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out}: is not empty and holds no pretraining; name another --out")
    with writing(file):
        file.parent.mkdir(parents=True)
    replace_text(file, json.dumps(settings, indent=1) + "\n")
    return False


def _settings(plan: Plan) -> dict[str, Any]:
    """A plan by dotted key as its file holds it, without what does not decide the outcome."""
    flat: dict[str, Any] = {}
    for key, value in asdict(plan).items():
        items = value.items() if isinstance(value, dict) else ()
        flat |= {f"{key}.{name}": item for name, item in items} or {key: value}
    del flat["policy.compile"]
    return json.loads(json.dumps(flat))  # tuples become lists


@contextmanager
def _timed(work: Path, stage: str) -> Iterator[None]:
    """Adds the seconds of a stage, over all runs of the command, to seconds.json."""
    file, started = work / "seconds.json", time.monotonic()
    try:
        yield
    finally:
        seconds = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        seconds[stage] = round(seconds.get(stage, 0) + time.monotonic() - started, 1)
        replace_text(file, json.dumps(seconds))


def _write_checkpoint(plan: Plan, model: Any, processor: Any, out: Path) -> None:
    """Writes the Janus folder in fp16 with the record of its making, whole or not at all."""
    temporary, final = out / ".checkpoint.tmp", out / "checkpoint"
    shutil.rmtree(temporary, ignore_errors=True)
    save_janus(model.half().to(memory_format=torch.contiguous_format), processor, temporary)
    made_with = environment(num_ranks=1)
    record = {
        "command": " ".join(["stage", *sys.argv[1:]]),
        "seed": plan.seed,
        "seconds": json.loads((out / "work" / "seconds.json").read_text(encoding="utf-8")),
        **{key: made_with[key] for key in ("python", "packages", "threads")},
        "settings": _settings(plan),
    }
    text = json.dumps(record, indent=1) + "\n"
    (temporary / "training.json").write_text(text, encoding="utf-8")
    temporary.replace(final)
