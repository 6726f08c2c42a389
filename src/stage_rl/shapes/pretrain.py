"""`stage shapes pretrain`: tokenizer, detector and base policy from nothing.

One command and a seed. The state of every stage lies in OUT/work, so that the same command goes on
where it was stopped. What comes out are OUT/checkpoint, a Janus folder with training.json, and
OUT/detector.safetensors: the two files of the package that hold weights.
"""

from __future__ import annotations

import json
import multiprocessing
import pickle
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from stage_rl.errors import CheckpointError, InputError
from stage_rl.files import replace_text, writing
from stage_rl.policies.janus import load_janus
from stage_rl.shapes.detector import CELL, WEIGHTS, DetectorNet, DetectorOutput
from stage_rl.shapes.model import JanusSize, build_janus, save_janus
from stage_rl.shapes.pretrain_policy import PolicyTraining, chunk_sizes, train_policy, write_chunk
from stage_rl.shapes.pretrain_tokenizer import (
    Progress,
    TokenizerTraining,
    learning_rate,
    set_rate,
    to_pixels,
    train_tokenizer,
)
from stage_rl.shapes.prompts import WORDS
from stage_rl.shapes.scenes import COLORS, CUT_OFF, IMAGE_SIZE, SHAPES, Scene, random_scene, render
from stage_rl.training.run import environment

SIZE = JanusSize(width=192, layers=6, heads=6, mlp=512, codebook_size=2048, codebook_dim=8)

SHIPPED = "shipped"

_FULL_DISK = re.compile("No space left|file write failed|unexpected pos|stream write")
"""What torch says of a file that it could not write to its end."""

COMPILERS = ("g++", "c++", "clang++", "cl")

Report = Callable[[str], None]


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
    seed: int = 0,
    tokenizer_steps: int = 2400,
    decoder_steps: int = 400,
    detector_steps: int = 1500,
    policy_steps: int = 7000,
    batch: int = 64,
    lr: float = 2e-3,
    pool: int = 240_000,
    start_from: str = "",
    no_compile: bool = False,
    workers: int = 2,
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
    check(plan)
    try:
        pretrain(plan, Path(out), workers=workers, report=lambda line: print(line, flush=True))
    # safetensors wraps a full disk in an error of its own, torch in a RuntimeError.
    except (OSError, SafetensorError) as error:
        raise _unwritten(out, error) from error
    except RuntimeError as error:
        if not _FULL_DISK.search(str(error)):
            raise
        raise _unwritten(out, error) from error


def _unwritten(out: str, error: Exception) -> CheckpointError:
    what = " ".join(str(error).split())
    return CheckpointError(
        f"{out}: could not be written ({what}); make room and run the same command again"
    )


def check(plan: Plan) -> None:
    """Raises an InputError where a plan cannot be carried out."""
    if plan.start_from not in ("", SHIPPED):
        raise InputError(f"--start-from: unknown '{plan.start_from}'; write {SHIPPED}")
    least = {
        "seed": (plan.seed, 0),
        "tokenizer-steps": (plan.tokenizer.steps, plan.tokenizer.decoder_steps + 1),
        "decoder-steps": (plan.tokenizer.decoder_steps, 0),
        "detector-steps": (plan.detector_steps, 1),
        "policy-steps": (plan.policy.steps, 1),
        "batch": (plan.policy.batch, 1),
        "pool": (plan.policy.pool, plan.policy.batch),
    }
    for name, (value, lowest) in least.items():
        if value < lowest:
            raise InputError(f"--{name}: {value} is too small; write at least {lowest}")
    if plan.policy.lr <= 0:
        raise InputError(f"--lr: {plan.policy.lr} is out of range; write a number above 0")
    if plan.policy.compile and not any(map(shutil.which, COMPILERS)):
        raise InputError("no C++ compiler found; install one (such as g++), or add --no-compile")


def pretrain(plan: Plan, out: Path, *, workers: int, report: Report) -> None:
    """Carries out a plan, or goes on with it; an `out` that holds another one is an InputError."""
    work, checkpoint = out / "work", out / "checkpoint"
    if _claim(plan, out) and (checkpoint / "training.json").exists():
        report(f"{out}: finished; name another --out to start again")
        return
    model, processor = _start(plan)
    vq, detector = model.model.vqmodel, work / "detector.safetensors"
    if plan.start_from:
        shutil.copyfile(WEIGHTS, detector)
    else:
        with _timed(work, "tokenizer"):
            state_file = work / "tokenizer.pt"
            train_tokenizer(
                vq, plan.tokenizer, seed=plan.seed, state_file=state_file, report=report
            )
        if not detector.exists():
            with _timed(work, "detector"):
                train_detector(detector, steps=plan.detector_steps, seed=plan.seed, report=report)
    with _timed(work, "pool"):
        _fill_pool(plan, vq, work, workers=workers, report=report)
    with _timed(work, "policy"):
        train_policy(model, processor, plan.policy, seed=plan.seed, folder=work, report=report)
    shutil.copyfile(detector, out / detector.name)
    _write_checkpoint(plan, model, processor, out)
    report(f"{checkpoint}: written")


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
        nested = value if isinstance(value, dict) else {"": value}
        flat |= {f"{key}.{name}" if name else key: item for name, item in nested.items()}
    del flat["policy.compile"]
    return json.loads(json.dumps(flat))  # tuples become lists


def _start(plan: Plan) -> tuple[Any, Any]:
    """The model as training finds it, and its processor."""
    if plan.start_from:
        return load_janus("shapes")
    return build_janus(plan.size, words=WORDS, seed=plan.seed)


def _fill_pool(plan: Plan, vq: Any, work: Path, *, workers: int, report: Report) -> None:
    """Draws and tokenizes the scenes that are missing, in processes of their own."""
    sizes = dict(enumerate(chunk_sizes(plan.policy.pool)))
    missing = {c: n for c, n in sizes.items() if not (work / f"pool-{c:04d}.npz").exists()}
    if not missing:
        return
    if workers < 2:
        for chunk, size in missing.items():
            write_chunk(vq, work, chunk, size=size, seed=plan.seed)
        return
    # As bytes: tensors sent to a process as they are would need shared memory.
    pickled, started = pickle.dumps(vq), time.monotonic()
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        jobs = [
            pool.submit(_write, pickled, work, chunk, size=size, seed=plan.seed)
            for chunk, size in missing.items()
        ]
        for done, job in enumerate(as_completed(jobs), 1):
            job.result()
            left_min = (time.monotonic() - started) / done * (len(jobs) - done) / 60
            report(f"pool: chunk {done}/{len(jobs)}, {left_min:.1f} min left")
    finally:
        pool.shutdown(cancel_futures=True)


def _write(pickled_vq: bytes, work: Path, chunk: int, *, size: int, seed: int) -> None:
    """One job of a worker process."""
    torch.set_num_threads(1)
    write_chunk(pickle.loads(pickled_vq), work, chunk, size=size, seed=seed)


@contextmanager
def _timed(work: Path, stage: str) -> Iterator[None]:
    """Adds the seconds of a stage, over all runs of the command, to seconds.json."""
    started = time.monotonic()
    try:
        yield
    finally:
        seconds = _seconds(work)
        seconds[stage] = round(seconds.get(stage, 0) + time.monotonic() - started, 1)
        replace_text(work / "seconds.json", json.dumps(seconds))


def _seconds(work: Path) -> dict[str, float]:
    file = work / "seconds.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _write_checkpoint(plan: Plan, model: Any, processor: Any, out: Path) -> None:
    """Writes the Janus folder in fp16 with the record of its making, whole or not at all."""
    temporary, final = out / ".checkpoint.tmp", out / "checkpoint"
    shutil.rmtree(temporary, ignore_errors=True)
    save_janus(model.half().to(memory_format=torch.contiguous_format), processor, temporary)
    made_with = environment(num_ranks=1)
    record = {
        "command": " ".join(["stage", *sys.argv[1:]]),
        "seed": plan.seed,
        "seconds": _seconds(out / "work"),
        "python": made_with["python"],
        "packages": made_with["packages"],
        "threads": made_with["threads"],
        "settings": _settings(plan),
    }
    text = json.dumps(record, indent=1) + "\n"
    (temporary / "training.json").write_text(text, encoding="utf-8")
    temporary.replace(final)


# Trains the reward's detector on renders of the shapes world.
#
# Shape suffixes: N images, C channels, H x W pixels, Y x X cells.


BATCH = 64

PEAK_LR = 3e-3

_CELLS = IMAGE_SIZE // CELL

_COLORS = list(COLORS)


def targets(scenes: Sequence[Scene]) -> tuple[Tensor, Tensor]:
    """What the network should say: a centre map (NYX) and, for each whole object, a row of

    image, cell y, cell x, class, colour, and the four sides in tenths of ten pixels.
    """
    center = torch.zeros(len(scenes), _CELLS, _CELLS)
    rows: list[list[float]] = []
    for n, scene in enumerate(scenes):
        for thing in (thing for thing in scene.objects if thing.whole):
            y, x = thing.y // CELL, thing.x // CELL
            center[n, y, x] = 1
            x0, y0, x1, y1 = thing.box
            cx, cy = (x + 0.5) * CELL, (y + 0.5) * CELL
            sides = [(cx - x0) / 10, (cy - y0) / 10, (x1 - cx) / 10, (y1 - cy) / 10]
            ids = [n, y, x, SHAPES.index(thing.shape), _COLORS.index(thing.color)]
            rows.append([*ids, *sides])
    return center, torch.tensor(rows)


def detector_loss(output: DetectorOutput, center_NYX: Tensor, rows: Tensor) -> Tensor:
    """Cross-entropy of centre, class and colour, L1 of the sides."""
    n, y, x, shape, color = rows[:, :5].long().unbind(1)
    weight = torch.where(center_NYX > 0, 5.0, 1.0)
    center = F.binary_cross_entropy_with_logits(output.object_NYX, center_NYX, weight)
    return (
        10 * center
        + F.cross_entropy(output.shape_NCYX[n, :, y, x], shape)
        + F.cross_entropy(output.color_NCYX[n, :, y, x], color)
        + F.l1_loss(output.sides_NCYX[n, :, y, x], rows[:, 5:])
    )


def _soften(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """Half of the batches are blurred a little, as decoded images are."""
    if rng.uniform() < 0.5:
        return pixels
    return torch.lerp(pixels, F.avg_pool2d(pixels, 3, 1, 1), float(rng.uniform(0.2, 0.9)))


def train_detector(
    path: Path, *, steps: int, seed: int, report: Callable[[str], None]
) -> DetectorNet:
    """Trains a detector and writes its weights in fp16."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = DetectorNet()
    optimizer = torch.optim.AdamW(net.parameters(), lr=PEAK_LR)
    progress = Progress("detector", steps, first=0, every=100, report=report)
    for step in range(steps):
        rng = np.random.Generator(np.random.Philox(key=[seed, 1_000_000 + step]))
        scenes = [random_scene(rng, cut_off=CUT_OFF) for _ in range(BATCH)]
        center, rows = targets(scenes)
        loss = detector_loss(net(_soften(to_pixels(render(scenes)), rng)), center, rows)
        set_rate(optimizer, learning_rate(step, steps=steps, warmup_steps=50, peak=PEAK_LR))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress.show(step + 1, f"loss {loss.item():.4f}")
    temporary = path.with_suffix(".tmp")
    save_file({name: t.half().contiguous() for name, t in net.state_dict().items()}, temporary)
    temporary.replace(path)
    return net
