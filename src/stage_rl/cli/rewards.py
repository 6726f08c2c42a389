"""`stage rewards`: finds out whether rewards work, and serves them to other machines."""

from __future__ import annotations

import difflib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stage_rl.cli.options import finite
from stage_rl.errors import InputError, RewardError
from stage_rl.rewards.protocol import TOKEN_ENV, read_token
from stage_rl.settings import BUILT_IN

if TYPE_CHECKING:
    from stage_rl.rewards.base import RewardConfig

Name = Annotated[
    str, typer.Argument(help="Kind of a reward, module:Class, a built-in recipe or YAML file.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Settings as dotted.key=value.", metavar="[KEY=VALUE]..."),
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
app = typer.Typer(
    help="Check rewards before they steer a training; serve them over HTTP.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.callback()
def _group() -> None:
    """Keeps the verbs below a sub-command, however few they are."""


@app.command()
def check(
    name: Name,
    overrides: Overrides = None,
    device: Device = "auto",
) -> None:
    """Score reference images of known order; exit with 1 where the order is wrong."""
    configs = _rewards(name, overrides or [])
    from stage_rl.training.trainer import pick_device

    place = pick_device(device)
    wrong = 0
    for config in configs:
        wrong += _check(config, place)
    if wrong:
        pairs = "1 reference pair is" if wrong == 1 else f"{wrong} reference pairs are"
        raise RewardError(f"{name}: {pairs} in the wrong order; put the weights right")


@app.command()
def serve(
    name: Name,
    overrides: Overrides = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    host: Annotated[
        str, typer.Option(help="Address to bind to; beyond loopback a token is required.")
    ] = "127.0.0.1",
    token_file: Annotated[
        str | None, typer.Option(help="File with the token that clients must send.")
    ] = None,
    token_env: Annotated[
        str, typer.Option(help="Environment variable with the token, without a file.")
    ] = TOKEN_ENV,
    device: Device = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Images of a call.")] = 32,
    delay_ms: Annotated[
        float, typer.Option(min=0, callback=finite, help="How long an image waits for others.")
    ] = 10.0,
    drain_s: Annotated[
        float, typer.Option(min=0, callback=finite, help="Longest time to finish when stopped.")
    ] = 120.0,
    max_body_mb: Annotated[int, typer.Option(min=1, max=256, help="Size of a request.")] = 64,
    max_side: Annotated[int, typer.Option(min=1, max=8192, help="Side of a square image.")] = 2048,
) -> None:
    """Serve rewards over HTTP for `kind: remote`, until a signal; see docs/server.md."""
    configs = _rewards(name, overrides or [])
    token = read_token(token_file, token_env)
    _require_server()
    from stage_rl.serving.limits import limits
    from stage_rl.serving.server import Serving, check_reach

    serving = Serving(
        host=host,
        port=port,
        token=token,
        batch_size=batch_size,
        delay_s=delay_ms / 1000,
        drain_s=drain_s,
        limits=limits(body_mb=max_body_mb, side=max_side),
    )
    check_reach(serving)
    from stage_rl.serving.server import serve
    from stage_rl.training.trainer import pick_device

    serve(configs, serving, pick_device(device))


def _require_server() -> None:
    """An InputError that says what to install where a module of the server is missing."""
    for module in ("starlette", "uvicorn", "prometheus_client"):
        if importlib.util.find_spec(module) is None:
            raise InputError(f"{module} is not installed; run pip install 'stage-rl[server]'")


def _rewards(name: str, overrides: list[str]) -> tuple[RewardConfig, ...]:
    """The rewards behind a reward's kind or a recipe; an InputError for a name that is neither."""
    from stage_rl.config import FILE_SUFFIXES, list_recipes, load_recipe, load_reward

    kinds = BUILT_IN["reward"]
    if name in kinds or ":" in name:
        return (load_reward(name, overrides),)
    recipes = list_recipes()
    is_file = Path(name).suffix in FILE_SUFFIXES or Path(name).name != name
    if name not in recipes and not is_file:
        near = difflib.get_close_matches(name, [*kinds, *recipes], n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"write one of: {', '.join(kinds)}"
        raise InputError(f"{name}: no reward or recipe; {hint} (or module:Class, or a recipe)")
    return load_recipe(name, overrides).rewards


def _check(config: RewardConfig, device) -> int:
    """Prints the outcomes of one reward; how many are wrong."""
    from stage_rl.rewards.selftest import check_reward

    if not config.reference_cases():
        typer.echo(f"{config.name}: no reference images, nothing to check")
        return 0
    outcomes = check_reward(config, config.build(device))
    for outcome in outcomes:
        verdict = "right" if outcome.is_right else "WRONG"
        typer.echo(f"{config.name}: {verdict}: {outcome.sentence()}")
    return sum(not outcome.is_right for outcome in outcomes)
