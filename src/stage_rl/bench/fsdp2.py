"""`stage bench fsdp2`: several processes over gloo against one, on a CPU in fp32."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import PositiveInt
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from stage_rl.bench.base import BenchResult, Group, one_thread
from stage_rl.bench.models import recipe_of
from stage_rl.config import load_recipe, resolved_json
from stage_rl.distributed import SINGLE, World, full_tensor, init_distributed
from stage_rl.recipe import Recipe
from stage_rl.training.checkpoint import Progress, latest_checkpoint, trained_parameters
from stage_rl.training.loop import train_step
from stage_rl.training.trainer import build_trainer

BAR = "tokens identical, gradients <= 1e-6 relative, parameters <= 1e-6 after 3 steps and resumed"
LARGEST_DIFFERENCE = 1e-6
STEPS = 3
SAVED_AT = 2
"""Steps after which a checkpoint is written, for the other number of processes to go on from."""
SETTINGS = (
    *(f"steps={STEPS}", "training.device=cpu", "rollout.guidance_scale=1"),
    *("rollout.dtype=float32", "training.dtype=float32"),
    # Passes of one group have the same shapes, and so the same rounding, on any rank.
    *("training.groups_per_microbatch=1", "optimizer.warmup_steps=0", "optimizer.lr=1e-5"),
)


def run(
    *,
    model: str = "shapes",
    num_ranks: Group = 2,
    num_prompts: PositiveInt = 2,
    group_size: Group = 4,
    overrides: str = "",
) -> BenchResult:
    """Three steps of the recipe shapes_geneval by one process and by several, and the last step by
    each from the checkpoint of the other. `num_prompts` is a multiple of `num_ranks`.
    """
    settings = [*SETTINGS, *overrides.split()]
    recipe = recipe_of(model, settings, num_prompts=num_prompts, group_size=group_size)
    with tempfile.TemporaryDirectory() as folder, one_thread():
        measures = compare(recipe, num_ranks, Path(folder))
    return BenchResult(
        f"{measures['tokens_identical']:.0%} of the tokens identical, gradients within "
        f"{measures['gradients_relative']:.0e}, parameters within {measures['parameters']:.0e}; "
        f"saved by {num_ranks} and resumed by 1 within {measures['parameters_many_to_one']:.0e}, "
        f"back within {measures['parameters_one_to_many']:.0e}",
        measures["tokens_identical"] == 1
        and all(v <= LARGEST_DIFFERENCE for k, v in measures.items() if k != "tokens_identical"),
        measures,
    )


class Trace(NamedTuple):
    """What some steps did, whole on every rank."""

    tokens: list[Tensor]
    """The images of each step, NT."""
    gradients: list[Tensor]
    """Of each update, all parameters in one row."""
    parameters: Tensor
    """After the last step, in one row."""


def compare(recipe: Recipe, num_ranks: int, folder: Path) -> dict[str, float]:
    """Differences of several processes from one, of unbroken and of resumed steps; `folder` takes
    the checkpoints.
    """
    (folder / "recipe.json").write_text(resolved_json(recipe))
    alone = trace(recipe, SINGLE, range(STEPS), save_to=folder / "one")
    spawn(_several, (num_ranks, _free_port(), folder), nprocs=num_ranks)
    several, resumed = (Trace(*parts) for parts in torch.load(folder / "several.pt"))
    back = trace(recipe, SINGLE, range(SAVED_AT, STEPS), resume=folder / "several")
    return differences(alone, several, resumed=resumed, back=back)


def differences(alone: Trace, several: Trace, *, resumed: Trace, back: Trace) -> dict[str, float]:
    """Of one process and several; `resumed` several from the checkpoint of one, `back` one from
    that of several.
    """
    identical = [(a == b).float().mean() for a, b in zip(alone.tokens, several.tokens, strict=True)]
    # Later updates start from parameters that differ in their last bits.
    gradients = [
        (alone.gradients[0], several.gradients[0]),
        (alone.gradients[-len(resumed.gradients)], resumed.gradients[0]),
    ]
    parameters = {"": several, "_many_to_one": back, "_one_to_many": resumed}
    return {
        "tokens_identical": torch.stack(identical).mean().item(),
        "gradients_relative": max(((a - b).norm() / a.norm()).item() for a, b in gradients),
        **{
            f"parameters{name}": (alone.parameters - other.parameters).abs().max().item()
            for name, other in parameters.items()
        },
    }


def trace(
    recipe: Recipe,
    world: World,
    steps: Iterable[int],
    *,
    save_to: Path | None = None,
    resume: Path | None = None,
) -> Trace:
    """Runs steps by a trainer of its own and keeps what they did; all ranks call it."""
    trainer = build_trainer(recipe, recipe.prompts.build(), world)
    if resume is not None:
        saved = latest_checkpoint(resume)
        assert saved is not None
        trainer.restore(saved)
    tokens: list[Tensor] = []
    gradients: list[Tensor] = []

    def keep_gradient(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients.append(_in_a_row(p.grad for p in parameters if p.grad is not None))

    trainer.optimizer.register_step_pre_hook(keep_gradient)
    for step in steps:
        tokens.append(world.concat(train_step(trainer, step).rollout.tokens_NT))
        if save_to is not None and step + 1 == SAVED_AT:
            trainer.save(save_to, Progress(step + 1, {}, trainer.base))
    trained = trained_parameters(trainer.policy.module)
    return Trace(tokens, gradients, _in_a_row(p.detach() for p in trained.values()))


def _several(rank: int, num_ranks: int, port: int, folder: Path) -> None:
    """One of several processes: unbroken steps, then the last one from the other's checkpoint."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
    torch.set_num_threads(1)
    recipe = load_recipe(folder / "recipe.json")
    with init_distributed(torch.device("cpu")) as world:
        unbroken = trace(recipe, world, range(STEPS), save_to=folder / "several")
        resumed = trace(recipe, world, range(SAVED_AT, STEPS), resume=folder / "one")
        if world.first:
            torch.save((tuple(unbroken), tuple(resumed)), folder / "several.pt")


def _in_a_row(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([full_tensor(tensor).flatten().cpu() for tensor in tensors])


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
