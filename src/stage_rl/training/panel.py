"""The held-out panel: a benchmark in small, scored while a run trains, to keep its best policy."""

from __future__ import annotations

from dataclasses import dataclass

from stage_rl.evaluation.benchmark import Setup
from stage_rl.evaluation.runner import BENCHMARKS
from stage_rl.health import EvaluationConfig
from stage_rl.rollout.engine import Engine


@dataclass(frozen=True)
class Best:
    """The best panel of a run so far."""

    step: int
    """Steps done when it was scored: the number of its checkpoint."""
    score: float


def score_panel(
    engine: Engine, settings: EvaluationConfig, *, guidance_scale: float
) -> dict[str, float]:
    """Scores the weights of the engine's last reload; every measure's overall mean as panel/NAME.

    panel/score is the measure that decides, the first one the benchmark prints by task.
    `guidance_scale` is that of the rollout, for an evaluation that names none.
    """
    own = settings.guidance_scale
    setup = Setup(
        settings.benchmark,
        settings.panel_images_per_task,
        guidance_scale if own is None else own,
        settings.panel_seed,
        engine.dtype,
    )
    results = BENCHMARKS[settings.benchmark].run(engine.policy, setup, name="panel", engine=engine)
    numbers = {f"panel/{name}": results.summary(name).overall.mean for name in results.scores}
    return numbers | {"panel/score": numbers[f"panel/{results.by_task[0]}"]}


def best_of(best: Best | None, new: Best) -> Best:
    """The better one of the best so far and a new panel; of equals, the earlier."""
    return new if best is None or new.score > best.score else best
