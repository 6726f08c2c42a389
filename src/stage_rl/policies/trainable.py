"""Which parameters train, by name patterns."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Sequence

from torch import nn

from stage_rl.errors import RecipeError


def select_trainable(module: nn.Module, patterns: Sequence[str]) -> None:
    """Freezes every parameter but those whose name matches a pattern (in place)."""
    module.requires_grad_(False)
    parameters = dict(module.named_parameters())
    for pattern in patterns:
        names = fnmatch.filter(parameters, pattern)
        if not names:
            known = _patterns(parameters)
            near = difflib.get_close_matches(pattern, known, n=3)
            parts = near or [name for name in known if name.count(".") == 2]
            raise RecipeError(
                f"policy.trainable: '{pattern}' matches no parameter; "
                f"write one of: {', '.join(parts)}, ..."
            )
        for name in names:
            parameters[name].requires_grad_(True)


def _patterns(names: Iterable[str]) -> list[str]:
    """Every parameter name, and every module's name with `.*`."""
    found = {}
    for name in names:
        parts = name.split(".")
        found |= dict.fromkeys(".".join([*parts[:k], "*"]) for k in range(1, len(parts)))
        found[name] = None
    return list(found)
