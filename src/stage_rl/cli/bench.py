"""`stage bench`: the shipped benchmarks; each prints one line with its ratio."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated

import typer

from stage_rl.cli.options import FORWARD, JsonFile, read_options, write_json, writing

app = typer.Typer(
    help="Measure what costs time; `stage bench NAME --help` lists the options.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

BENCHMARKS = {
    "gpu": "Whether a GPU computes what it should, and how fast: the acceptance run.",
    "rollout": "The engine against transformers' own generate.",
    "decode-attention": "The attention kernel against what a copy moves (GPU).",
    "draw": "The kernel that draws a token against torch's operations (GPU).",
    "scale": "What a step costs for each image, against group size and tokens.",
    "mismatch": "What the engine and the trainer say of the same tokens.",
    "logprobs": "Chunked log-probability and entropy against the naive form.",
    "reweight": "One batched matmul against the loop over pairs.",
    "rewards": "Images per second of each reward, batched against one by one.",
    "reward-overlap": "How much of a slow reward the step does not wait for.",
    "fsdp2": "Several processes against one, on a CPU.",
    "conflict": "Which tokens of a group pull against each other, by similarity.",
    "gradient-signal": "How much the gradients of independent steps have in common.",
    "memory": "The memory of each phase, predicted and seen.",
    "busy": "A step beside processes that use the cores, against an idle one.",
    "step": "A training step against one built on generate and naive forms.",
}

MODULES = {
    "gpu": "gpu.acceptance",
    "decode-attention": "gpu.decode_attention",
    "draw": "gpu.draw",
    "conflict": "signal.conflict",
    "gradient-signal": "signal.gradient_signal",
}
"""Of the benchmarks that lie in a folder."""


@app.command()
def show(
    folder: Annotated[Path, typer.Option(help="Records that --json left.")] = Path("benchmarks"),
    into: Annotated[Path | None, typer.Option(help="Page to write them into.")] = None,
) -> None:
    """Print the measurements of a folder as tables, or write them into docs/performance.md."""
    from stage_rl.bench.record import into_page, page, read_records

    tables = page(read_records(folder))
    if into is None:
        typer.echo(tables)
        return
    with writing("--into", into):
        into.write_text(into_page(into.read_text("utf-8"), tables, file=into), "utf-8")


def _register(name: str, purpose: str) -> None:
    @app.command(name, help=purpose, context_settings=FORWARD)
    def measure(context: typer.Context, json_file: JsonFile = None) -> None:
        place = MODULES.get(name, name.replace("-", "_"))
        module = importlib.import_module(f"stage_rl.bench.{place}")
        from stage_rl.bench.record import record_of

        settings = read_options(module.run, context.args)
        result = module.run(**settings)
        verdict = {True: "reached", False: "MISSED", None: "not set for these sizes"}
        line = f"{name}: {result.headline}; bar {module.BAR}: {verdict[result.reached]}"
        typer.echo("\n".join([*result.table, line]))
        write_json(json_file, record_of(name, module.BAR, settings, result))


for _name, _purpose in BENCHMARKS.items():
    _register(_name, _purpose)
