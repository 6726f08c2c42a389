"""`stage bench`: the shipped benchmarks; each prints one line with its ratio."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated

import typer

from stage_rl.cli.options import FORWARD, call, check_writable, write_json

app = typer.Typer(
    help="Measure what costs time; `stage bench NAME --help` lists the options.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

BENCHMARKS = {
    "rollout": "The engine against transformers' own generate.",
    "decode-attention": "The attention kernel against what a copy moves (GPU).",
    "scale": "What a step costs for each image, against group size and tokens.",
    "mismatch": "What the engine and the trainer say of the same tokens.",
    "logprobs": "Chunked log-probability and entropy against the naive form.",
    "reweight": "One batched product against the loop over pairs.",
    "rewards": "Images per second of each reward, batched against one by one.",
    "reward-overlap": "How much of a slow reward the step does not wait for.",
    "fsdp2": "Several processes against one, on a CPU.",
    "gradient-signal": "How much the gradients of independent steps have in common.",
    "memory": "The memory of each phase, predicted and seen.",
    "step": "A training step against one built on generate and naive forms.",
}


def _register(name: str, purpose: str) -> None:
    @app.command(name, help=purpose, context_settings=FORWARD)
    def measure(
        context: typer.Context,
        json_file: Annotated[
            Path | None, typer.Option("--json", help="Write all figures to this file.")
        ] = None,
    ) -> None:
        check_writable(json_file)
        module = importlib.import_module(f"stage_rl.bench.{name.replace('-', '_')}")
        result = call(module.run, context.args)
        typer.echo("\n".join([*result.table, result.line()]))
        write_json(json_file, result.to_dict())


for _name, _purpose in BENCHMARKS.items():
    _register(_name, _purpose)
