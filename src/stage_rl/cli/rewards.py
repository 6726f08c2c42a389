"""`stage rewards`: finds out whether rewards work before they steer a training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from stage_rl import registry
from stage_rl.errors import RewardError

if TYPE_CHECKING:
    from stage_rl.schema import RewardConfig

app = typer.Typer(
    help="Check rewards before they steer a training.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.callback()
def _group() -> None:
    """Keeps the verbs below a sub-command, however few they are."""


@app.command()
def check(
    name: Annotated[
        str, typer.Argument(help="Kind of a reward, module:Class, a built-in recipe or YAML file.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Settings as dotted.key=value.", metavar="[KEY=VALUE]..."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Score reference images of known order; exit with 1 where the order is wrong."""
    configs = _rewards(name, overrides or [])
    from stage_rl.training.setup import pick_device

    place = pick_device(device)
    wrong = 0
    for config in configs:
        wrong += _check(config, place)
    if wrong:
        pairs = "1 reference pair is" if wrong == 1 else f"{wrong} reference pairs are"
        raise RewardError(f"{name}: {pairs} in the wrong order; put the weights right")


def _rewards(name: str, overrides: list[str]) -> tuple[RewardConfig, ...]:
    """The rewards behind a reward's kind or a recipe."""
    from stage_rl.config import load_recipe, load_reward

    if name in registry.BUILT_IN["reward"] or ":" in name:
        return (load_reward(name, overrides),)
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
