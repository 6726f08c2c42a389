"""`stage rewards`: finds out whether rewards work, and serves them to other machines."""

from __future__ import annotations

import importlib.util
import math
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from stage_rl.cli.options import Overrides, finite
from stage_rl.errors import InputError, RewardError
from stage_rl.recipes import is_file, list_recipes
from stage_rl.settings import BUILT_IN, TOKEN_ENV, did_you_mean

if TYPE_CHECKING:
    from stage_rl.recipe import Recipe
    from stage_rl.rewards.base import RewardConfig
    from stage_rl.rewards.judge import WeightedReward

Name = Annotated[
    str, typer.Argument(help="Kind of a reward, module:Class, a built-in recipe or YAML file.")
]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option()]
app = typer.Typer(
    help="Check rewards before they steer a training; serve them over HTTP.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command()
def check(name: Name, overrides: Overrides = None, device: Device = "auto") -> None:
    """Score reference images of known order; exit with 1 where the order is wrong.

    A reward without any is tried on two drawn images, with prompts of the recipe where one is
    named; that it fails, or says nothing, is exit code 1 too.
    """
    configs, recipe = _rewards(name, overrides or [])
    from stage_rl.distributed import pick_device
    from stage_rl.rewards.check import check_reward
    from stage_rl.rewards.judge import build_reward

    wrong, where = 0, pick_device(device, key="--device")
    for config in configs:
        if hasattr(config, "give_up_s"):  # whoever checks does not wait for a server to come
            config = config.model_copy(update={"give_up_s": CHECK_S})
        try:
            item = build_reward(config, where)
        except InputError as error:  # of what is not here, such as a program or its extra
            raise RewardError(str(error)) from error
        if not config.reference_cases():
            typer.echo(f"{config.name}: no reference images; {_try_once(config, item, recipe)}")
            continue
        for outcome in check_reward(config, item):
            verdict = "right" if outcome.is_right else "WRONG"
            typer.echo(f"{config.name}: {verdict}: {outcome.sentence()}")
            wrong += not outcome.is_right
    if wrong:
        pairs = "1 reference pair is" if wrong == 1 else f"{wrong} reference pairs are"
        raise RewardError(f"{name}: {pairs} in the wrong order; put the weights right")


CHECK_S = 5.0
"""How long a server that is checked may be out of reach."""

MAX_TRIED = 8
"""Prompts of a recipe that a reward is tried on: one may be of a task that it does not judge."""


def _try_once(config: RewardConfig, item: WeightedReward, recipe: Recipe | None) -> str:
    """What a reward says of two drawn images, in words; a RewardError where it says nothing."""
    from stage_rl.rewards.base import shape_cases
    from stage_rl.rewards.judge import ask

    case = shape_cases()[0]
    prompts = recipe.prompts.build() if recipe else (case.prompt,)
    tried = prompts[:: -(-len(prompts) // MAX_TRIED)]
    if reason := config.unsupported_reason(tried[0]):
        what = f"it {reason}; check a recipe whose prompts have what it needs"
        raise RewardError(f"reward '{config.name}': not tried: {what}")
    size = recipe.policy.size() if recipe else None
    if size:  # as the policy draws them: a detector may know no other
        case = case.resized(math.isqrt(size.pixels))
    images_NHWC = case.images_NHWC().repeat(len(tried), 1, 1, 1)
    scores = ask(item, images_NHWC, [prompt for prompt in tried for _ in range(2)])
    if isinstance(scores, str):
        raise RewardError(f"reward '{config.name}': {scores}; mend it")
    for prompt, better, worse in zip(tried, scores[::2], scores[1::2], strict=True):
        values = [None if score.value is None else float(score.value) for score in (better, worse)]
        if values != [None, None]:
            return f"'{prompt.text}': {case.what}: {values[0]} against {values[1]}"
    what = f"no score for '{tried[0].text}' ({scores[0].why})"
    more = f" nor for {len(tried) - 1} others" if len(tried) > 1 else ""
    raise RewardError(
        f"reward '{config.name}': {what}{more}; check a recipe with prompts that it applies to"
    )


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
    for module in ("starlette", "uvicorn", "prometheus_client"):
        if importlib.util.find_spec(module) is None:
            raise InputError(f"{module} is not installed; run pip install 'stage-rl[server]'")
    configs, _ = _rewards(name, overrides or [])
    from stage_rl.distributed import pick_device
    from stage_rl.rewards.protocol import read_token
    from stage_rl.serving.limits import MEGABYTE, Limits
    from stage_rl.serving.server import Serving
    from stage_rl.serving.server import serve as run

    serving = Serving(
        host=host,
        port=port,
        token=read_token(token_file, token_env),
        batch_size=batch_size,
        delay_s=delay_ms / 1000,
        drain_s=drain_s,
        limits=Limits(body_bytes=max_body_mb * MEGABYTE, image_pixels=max_side**2),
    )
    run(configs, serving, pick_device(device, key="--device"))


def _rewards(name: str, overrides: list[str]) -> tuple[tuple[RewardConfig, ...], Recipe | None]:
    """The rewards behind a reward's kind or a recipe, and the recipe; an InputError for a name that
    is neither.
    """
    kinds, recipes = BUILT_IN["reward"], list_recipes()
    is_reward = name in kinds or ":" in name
    if not (is_reward or name in recipes or is_file(name)):
        hint = did_you_mean(name, [*kinds, *recipes])
        raise InputError(f"{name}: no reward or recipe; {hint} (or module:Class, or a recipe)")
    from stage_rl.config import load_recipe, load_reward

    if is_reward:
        return (load_reward(name, overrides),), None
    recipe = load_recipe(name, overrides)
    return recipe.rewards, recipe
