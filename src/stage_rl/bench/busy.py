"""`stage bench busy`: a step beside processes that use the cores, and what that costs idle.

How threads wait is settled when torch loads, so each way runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from pydantic import NonNegativeInt, PositiveInt

from stage_rl.bench.base import BenchResult, Group, flat, medians_in_turn, seconds_of, table
from stage_rl.bench.models import recipe_of
from stage_rl.errors import StageError
from stage_rl.openmp import CHOSEN_BY_USER, limit_spinning, num_cores
from stage_rl.training.loop import train_step
from stage_rl.training.trainer import build_trainer

BAR = "idle <= 1.05x OpenMP's own waiting, busy <= 4x idle (CPU)"
MAX_IDLE_COST, MAX_BUSY_FACTOR = 1.05, 4.0
FORMATS = {"idle_s": ".2f", "busy_s": ".2f"}
OWN_WAITING = {"GOMP_SPINCOUNT": "300000", "KMP_BLOCKTIME": "200"}
"""What GNU's and LLVM's OpenMP take by themselves; said by the user, nothing else is done."""
SERVE = "from stage_rl.bench.busy import serve; serve()"


def run(
    *,
    model: str = "shapes",
    num_prompts: PositiveInt = 8,
    group_size: Group = 8,
    busy_processes: NonNegativeInt = 0,
    rounds: PositiveInt = 3,
    overrides: str = "",
) -> BenchResult:
    """Steps whose threads wait as the package has them wait and as OpenMP does by itself, in turn;
    then the first beside busy processes.

    `busy_processes`: 0 takes one for each core. Measure on a machine without other work.
    """
    settings = {
        "model": model,
        "num_prompts": num_prompts,
        "group_size": group_size,
        "overrides": overrides.split(),
    }
    recipe_of(**settings)  # what is wrong with it shows here
    unset = {name: value for name, value in os.environ.items() if name not in CHOSEN_BY_USER}
    limited = dict(unset)
    limit_spinning(limited)
    with ExitStack() as stack:
        steps = {
            name: stack.enter_context(stepping(settings, environment))
            for name, environment in (("own", unset | OWN_WAITING), ("set", limited))
        }
        idle = medians_in_turn(steps, rounds)
        with burning(busy_processes or num_cores()):
            busy = medians_in_turn({"set": steps["set"]}, rounds)
    return _result({name: figures["s"] for name, figures in idle.items()}, busy["set"]["s"])


def _result(idle_s: Mapping[str, float], busy_s: float) -> BenchResult:
    """From the seconds of a step, idle by form, and busy with the waiting that is set."""
    rows = {
        "own": {"idle_s": idle_s["own"]},
        "set": {"idle_s": idle_s["set"], "busy_s": busy_s},
    }
    cost, factor = idle_s["set"] / idle_s["own"], busy_s / idle_s["set"]
    return BenchResult(
        f"an idle step takes {cost:.2f}x its time with OpenMP's own waiting, a busy one "
        f"{factor:.1f}x the idle one",
        cost <= MAX_IDLE_COST and factor <= MAX_BUSY_FACTOR,
        {**flat(rows), "idle_cost": cost, "busy_factor": factor},
        table(rows, FORMATS),
    )


@contextmanager
def stepping(settings: Mapping[str, Any], environment: Mapping[str, str]) -> Iterator[Any]:
    """A call that takes the next step in a process with an environment; its seconds, under `s`."""
    command = [sys.executable, "-c", SERVE, json.dumps(settings)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, text=True, stdin=pipe, stdout=pipe) as process:
        _read(process)  # it is ready

        def step() -> dict[str, float]:
            print(file=process.stdin, flush=True)
            return {"s": float(_read(process))}

        yield step


def _read(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    if line := process.stdout.readline():
        return line
    raise StageError("bench busy: a process that takes the steps ended; see its error above")


def serve() -> None:
    """Says that it is ready, takes a step for each line that comes in and prints its seconds."""
    recipe = recipe_of(**json.loads(sys.argv[1]))
    trainer = build_trainer(recipe, recipe.prompts.build())
    print("ready", flush=True)
    for number, _ in enumerate(sys.stdin):
        print(seconds_of(partial(train_step, trainer, number)), flush=True)


@contextmanager
def burning(num_processes: int) -> Iterator[None]:
    """So many processes that each use a core, inside the block.

    Each in a session of its own: some systems share out processor time by session.
    """
    command = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(command, start_new_session=True) for _ in range(num_processes)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()
