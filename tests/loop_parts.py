"""Prompts and rewards of the recipes that tests train."""

import os
import signal
import threading

from stage_rl import Prompt, RewardConfig, Score
from stage_rl.prompts.files import PromptsConfig


class Texts(PromptsConfig):
    texts: tuple[str, ...] = ("a red circle", "two blue square and a star", "a star", "the photo")

    def build(self):
        return tuple(Prompt(text, i) for i, text in enumerate(self.texts))


class Brightness(RewardConfig):
    constant: bool = False

    def build(self, device):
        def score(images_NHWC, prompts):
            means = images_NHWC.float().mean(dim=(1, 2, 3)) / 255
            values = [0.5 if self.constant else x for x in means.tolist()]
            return [Score(value, f"luminance {value:.2f}") for value in values]

        return score


class Coarse(RewardConfig):
    edge: float = 0.482

    def build(self, device):
        def score(images_NHWC, prompts):
            means = images_NHWC.float().mean(dim=(1, 2, 3)) / 255
            return [Score(float(x > self.edge), "") for x in means.tolist()]

        return score


class Darkness(Brightness):
    def build(self, device):
        return lambda images, prompts: [Score(-x.float().mean().item(), "") for x in images]

    def reference_cases(self):
        from stage_rl.rewards.base import shape_cases

        return shape_cases((("white", "square", "black", "square"),))


class Failing(RewardConfig):
    def build(self, device):
        def score(images_NHWC, prompts):
            raise OSError("scorer is gone")

        return score


class FailsOnPhotos(Brightness):
    def build(self, device):
        judge = super().build(device)

        def score(images_NHWC, prompts):
            if any(prompt.text == "the photo" for prompt in prompts):
                raise OSError("cannot look at this")
            return judge(images_NHWC, prompts)

        return score


class SendsSignal(RewardConfig):
    number: int

    def build(self, device):
        def score(images_NHWC, prompts):
            os.kill(os.getpid(), self.number)
            return [Score(float(i), "") for i in range(len(prompts))]

        return score


class HangsAtCall(Brightness):
    """Is asked to stop and never answers."""

    call: int

    def build(self, device):
        judge, calls = super().build(device), []

        def score(images_NHWC, prompts):
            calls.append(1)
            if len(calls) == self.call:
                os.kill(os.getpid(), signal.SIGHUP)
                threading.Event().wait(60)
            return judge(images_NHWC, prompts)

        return score


class DoesNotApply(RewardConfig):
    def build(self, device):
        return lambda images, prompts: [Score(None, "no faces")] * len(images)


class FailsOn(Brightness):
    text: str

    def build(self, device):
        judge = super().build(device)

        def score(images_NHWC, prompts):
            if any(prompt.text == self.text for prompt in prompts):
                raise OSError("scorer is gone")
            return judge(images_NHWC, prompts)

        return score


class OnRank(Brightness):
    rank: int
    does: str
    call: int = 1

    def build(self, device):
        judge, calls = super().build(device), []
        here = os.environ.get("RANK") == str(self.rank)

        def score(images_NHWC, prompts):
            calls.append(1)
            if here and len(calls) == self.call:
                if self.does == "lie":
                    return "a lie"
                number = signal.SIGKILL if self.does == "kill" else signal.SIGTERM
                os.kill(os.getpid(), number)
            return judge(images_NHWC, prompts)

        return score


class BrokenTracker:
    def __init__(self, run, recipe):
        self.closed = False

    def log(self, step, numbers):
        raise OSError("the server\nis gone")

    def log_image(self, step, image, caption):
        raise AssertionError("it has failed before")

    close = log_image


class LeavingTracker(BrokenTracker):
    def log(self, step, numbers):
        raise SystemExit(3)
