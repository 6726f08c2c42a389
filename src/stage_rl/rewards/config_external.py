"""What a recipe says of a reward that another program gives; free of torch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from stage_rl.errors import InputError
from stage_rl.schema import RewardConfig
from stage_rl.settings import Count, Positive

if TYPE_CHECKING:
    import torch

    from stage_rl.rewards.external import ExternalReward


class ExternalRewardConfig(RewardConfig):
    """A program of the user's that reads JSON lines and answers each with a score."""

    command: tuple[Annotated[str, Field(min_length=1)], ...] = Field(min_length=1)
    """The program and its arguments; no shell reads them."""
    cwd: str | None = None
    """Folder it is started in; null: that of the trainer."""
    images: Literal["files", "base64"] = "files"
    """files: paths of PNG files, deleted when all of a batch are answered; base64: PNG inline."""
    batch_size: Count = 16
    """Images that are asked for before the first answer is waited for."""
    timeout_s: Positive = 600.0
    """Longest wait for an answer; the first includes what the program takes to start."""

    def build(self, device: torch.device) -> ExternalReward:
        """The reward; the program starts with the first image. An InputError without one."""
        from stage_rl.rewards.external import ExternalReward

        if self.cwd is not None and not Path(self.cwd).is_dir():
            raise InputError(f"reward '{self.name}': cwd: no folder '{self.cwd}'; name one")
        program = self.command[0]
        if shutil.which(program) is None and shutil.which(program, path=self.cwd or ".") is None:
            raise InputError(
                f"reward '{self.name}': command: no program '{program}'; write its path"
            )
        return ExternalReward(
            self.command,
            cwd=self.cwd,
            images=self.images,
            batch_size=self.batch_size,
            timeout_s=self.timeout_s,
        )
