"""What one pass of the loop leaves for the metrics, the checks and the run folder.

Shape suffixes: P prompts, G group, N = P x G completions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from stage_rl.pictures import image_grid
from stage_rl.training.clock import Clock
from stage_rl.training.distributed import Ranks
from stage_rl.training.metrics import report_arrays
from stage_rl.training.runs import RunFolder
from stage_rl.training.update import Learned
from stage_rl.types import Judged, Measured, Rollout


@dataclass(frozen=True)
class Step:
    """One pass of the loop; the judgement and the numbers are those of all ranks."""

    number: int
    """Counted from 0."""
    rollout: Rollout
    judged: Judged
    reference: Sequence[Measured]
    """By micro-batch."""
    learned: Learned | None
    """None where no group was judged."""
    numbers: dict[str, float]
    """The step's metrics, without its times."""
    clock: Clock

    @property
    def grad_norm(self) -> float | None:
        """Before clipping; None for a step that had nothing to learn from."""
        return self.learned.grad_norm if self.learned else None

    def joined(self, ranks: Ranks) -> Step:
        """The same with the samples of all ranks, whose parts are in the order of the groups."""
        learned = ranks.join(self.learned)
        if learned is not None and self.learned is not None:
            learned = replace(learned, losses=self.learned.losses)  # those of all ranks before
        return replace(
            self,
            rollout=ranks.join(self.rollout),
            reference=ranks.join(self.reference),
            learned=learned,
        )


def log_samples(run: RunFolder, step: Step, *, num_groups: int) -> None:
    """Writes a grid with rewards and reasons, and the arrays of its groups."""
    rollout, judged, size = step.rollout, step.judged, step.rollout.group_size
    shown = rollout.prompts[:num_groups]
    rewards = judged.rewards_PG.flatten().tolist()
    count = len(shown) * size
    picture = image_grid(
        rollout.images_NHWC[:count],
        captions=[f"{rewards[i]:.2f}  {judged.reasons[i]}" for i in range(count)],
        columns=size,
        titles=[prompt.text for prompt in shown],
    )
    records = [
        {"prompt": shown[i // size].text, "reward": rewards[i], "reason": judged.reasons[i]}
        for i in range(count)
    ]
    run.log_images(step.number, picture, records)
    assert step.learned is not None, "a step that learned nothing has no arrays"
    arrays = report_arrays(rollout, judged, step.learned, step.reference, num_groups=num_groups)
    run.log_arrays(step.number, arrays)
