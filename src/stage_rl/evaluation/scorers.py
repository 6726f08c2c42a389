"""The rewards of a benchmark with what the command line says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from yaml import YAMLError

from stage_rl.errors import InputError
from stage_rl.evaluation.suites import Scorer, Suite
from stage_rl.recipe_errors import explain
from stage_rl.schema import RewardConfig
from stage_rl.settings import near_or_all

Overrides = Mapping[str, Mapping[str, Any] | None]
"""Settings by the name of a scorer; None leaves the scorer out."""


def parse_overrides(texts: Sequence[str]) -> Overrides:
    """SCORER.key=value as a tree; SCORER=null leaves a scorer out. Else an `InputError`."""
    for text in texts:
        key, equals, _ = text.partition("=")
        if not equals or not all(key.split(".")):
            raise InputError(f"{text}: is no setting of a scorer; write SCORER.key=value")
    try:
        tree = OmegaConf.to_container(OmegaConf.from_dotlist(list(texts)))
    except (YAMLError, OmegaConfBaseException) as error:
        raise InputError(f"{' '.join(texts)}: the value is not YAML; quote it") from error
    assert isinstance(tree, dict)
    for name, settings in tree.items():
        if settings is not None and not isinstance(settings, dict):
            raise InputError(f"{name}: write {name}.key=value, or {name}=null to leave it out")
    return {str(name): settings for name, settings in tree.items()}


def check_names(suites: Sequence[Suite], overrides: Overrides) -> None:
    """Refuses settings of a scorer that no chosen benchmark has, but for new ones with a kind."""
    known = {name for suite in suites for name in suite.scorers}
    for name, settings in overrides.items():
        if name not in known and not (settings and "kind" in settings):
            hint = near_or_all(name, sorted(known))
            raise InputError(f"{name}: no scorer of that name; {hint}, or add one: {name}.kind=...")


def scorers_of(
    suite: Suite, overrides: Overrides, *, tiny: bool
) -> dict[str, tuple[Scorer, RewardConfig]]:
    """The scorers of a benchmark with their settings; a wrong setting is an `InputError`.

    A scorer that the settings add is asked about every prompt.
    """
    added = {name: Scorer({}) for name, own in overrides.items() if own and "kind" in own}
    scorers = {}
    for name, scorer in {**added, **suite.scorers}.items():
        own = overrides.get(name, {})
        if own is None:
            continue
        settings = _merged(scorer.settings, scorer.tiny if tiny and scorer.settings else {})
        try:
            config = RewardConfig.model_validate({**_merged(settings, own), "name": name})
        except ValidationError as error:
            told = f"{suite.name}: {name}.{explain(error)}"
            raise InputError(f"{told}; {name}=null leaves it out") from error
        scorers[name] = (scorer, config)
    return scorers


def _merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Both trees as one; the other's leaves win."""
    merged = dict(one)
    for key, value in other.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = _merged(old, value) if both else value  # type: ignore[arg-type]
    return merged
