"""Says when a run goes astray, and stops it where the recipe asks so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from stage_rl.errors import DivergedError
from stage_rl.health import TripwiresConfig
from stage_rl.training.panel import Best

PREFIX = "tripwires."
WORDS = {
    "entropy_gap": "the entropy is {value:.3g} nats from the reference's",
    "kl": "the KL from the reference is {value:.3g} nats a token",
    "grad_norm": "the gradient norm is {value:.3g}",
    "panel_drop": "the held-out panel is {value:.3g} below its best",
}


class Tripwires:
    """Counts for how many steps in a row each number has been beyond its threshold."""

    def __init__(self, settings: TripwiresConfig, counters: Mapping[str, int] | None = None):
        self._settings = settings
        self._tripped: list[str] = []
        self.counters = {
            name: count for name, count in (counters or {}).items() if name.startswith(PREFIX)
        }

    def count(self, numbers: Mapping[str, float], best: Best | None) -> dict[str, float]:
        """Takes the metrics of a step into account; those of the wires that it is beyond.

        The panel counts the steps that it is scored at, and its first fall trips at once.
        """
        self._tripped = []
        beyond = {}
        for name, value in _watched(numbers, best).items():
            threshold = getattr(self._settings, name)
            if threshold is None:
                continue
            wire = PREFIX + name
            count = self.counters.get(wire, 0) + 1 if value > threshold else 0
            self.counters[wire] = count
            if count == (1 if name == "panel_drop" else self._settings.steps):
                self._tripped.append(self._says(name, value, threshold, best))
            if count:
                beyond[f"tripwires/{name}"] = float(count)
        return beyond

    def check(self) -> Sequence[str]:
        """What the last counted step tripped, each wire once until it was within its threshold
        again; where the recipe stops, a DivergedError with it.
        """
        if self._tripped and self._settings.action == "stop":
            raise DivergedError("; ".join(self._tripped))
        return self._tripped

    def _says(self, name: str, value: float, threshold: float, best: Best | None) -> str:
        held = "" if name == "panel_drop" else f" for {self._settings.steps} steps in a row"
        kept = f" (the best checkpoint is that of step {best.step})" if best else ""
        return (
            f"tripwire {name}: {WORDS[name].format(value=value)}, above {threshold:g}{held}{kept}; "
            f"lower optimizer.lr, raise algorithm.beta, or raise {PREFIX}{name}"
        )


def _watched(numbers: Mapping[str, float], best: Best | None) -> dict[str, float]:
    """The numbers by wire; one that the step does not have is left out, and its count stays."""
    watched = {
        "entropy_gap": abs(numbers["entropy/gap"]) if "entropy/gap" in numbers else None,
        "kl": numbers.get("kl/mean"),
        "grad_norm": numbers.get("grad/norm"),
        "panel_drop": best.score - numbers["panel/score"]
        if best and "panel/score" in numbers
        else None,
    }
    return {name: value for name, value in watched.items() if value is not None}
