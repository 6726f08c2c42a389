"""`stage rewards`: the order of reference images, what cannot be served, exit codes."""

import re

import pytest

from stage_rl.cli import rewards
from stage_rl.errors import InputError, RewardError

PARTS = """
from stage_rl import RewardConfig, Score


class Bright(RewardConfig):
    sign: float = 1.0

    def build(self, device):
        return lambda images, prompts: [
            Score(self.sign * image.float().mean().item(), "luminance") for image in images
        ]

    def reference_cases(self):
        from stage_rl.rewards.base import shape_cases

        return shape_cases((("white", "square", "black", "square"),))


class Raises(RewardConfig):
    def build(self, device):
        def score(images, prompts):
            return {}["x"]

        return score


class Leaves(Bright):
    def build(self, device):
        return lambda images, prompts: exit(0)


class LeavesUntried(Leaves):
    def reference_cases(self):
        return ()


class Tagged(Raises):
    required_fields = ("tag",)


class Judges(RewardConfig):
    task: str = "none"

    def build(self, device):
        return lambda images, prompts: [
            Score(1.0 if prompt.metadata.get("tag") == self.task else None, "no such task")
            for prompt in prompts
        ]


class Floats(Bright):
    def build(self, device):
        return lambda images, prompts: [0.5] * len(images)


class Unbuilt(Bright):
    def build(self, device):
        return {}["weights"]


class Hangs(Bright):
    def build(self, device):
        import threading

        return lambda images, prompts: threading.Event().wait(60)


class Always(RewardConfig):
    def build(self, device):
        return lambda images, prompts: [Score(1, "")] * len(images)
"""


@pytest.fixture
def bright(tmp_path, monkeypatch):
    (tmp_path / "check_parts.py").write_text(PARTS)
    monkeypatch.syspath_prepend(tmp_path)
    return "check_parts:Bright"


def test_the_right_order_is_printed_and_exits_with_0(bright, stage):
    done = stage("rewards", "check", bright, "name=mine", "--device", "cpu")
    assert done.exit_code == 0, done.exception
    # white everywhere against a black square over the 193 x 193 middle of 384 x 384:
    # 255 x (1 - 193^2 / 384^2) = 190.5842
    assert done.stdout == (
        "mine: right: 'a white square': a white square against a black square: "
        "255.0000 against 190.5842\n"
    )


def test_the_wrong_order_is_an_error(bright, stage):
    done = stage("rewards", "check", bright, "sign=-1.0", "--device", "cpu")
    assert isinstance(done.exception, RewardError)
    assert done.exception.exit_code == 1
    assert "WRONG" in done.stdout


def test_a_recipe_is_checked_reward_by_reward(stage):
    done = stage("rewards", "check", "shapes_geneval", "--device", "cpu")
    assert done.exit_code == 0, done.exception
    # One that needs metadata is tried with a prompt that has it.
    assert re.fullmatch(
        r"geneval: no reference images; 'a photo of .*': a red square against a blue square: "
        r"\S+ against \S+\n",
        done.stdout,
    ), done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("external", "command=[/no/such/program]"), "command: no program '/no/such/program'"),
        (("external", "command=['false']"), r"ended with exit status 1, for the second time"),
        (("remote", "url=http://127.0.0.1:9"), "reward server http://127.0.0.1:9: ConnectError"),
        (("check_parts:Raises",), r"reward 'Raises': failed: KeyError: 'x' \(check_parts\.py:22\)"),
        (("check_parts:Leaves",), r"reward 'Leaves': failed: SystemExit"),
        (("check_parts:LeavesUntried",), r"reward 'LeavesUntried': failed: SystemExit"),
        (("check_parts:Tagged",), "reward 'Tagged': not tried: it needs 'tag', which this prompt"),
        (
            ("shapes_geneval", "rewards=[{kind: 'check_parts:Tagged'}]"),
            r"reward 'Tagged': failed: KeyError: 'x' \(check_parts\.py:22\)",
        ),
        (("check_parts:Judges",), r"no score for 'a red square' \(no such task\); check a recipe"),
        (
            ("shapes_geneval", "rewards=[{kind: 'check_parts:Judges'}]"),
            r"no score for 'a photo of .* nor for \d others",
        ),
        (("check_parts:Floats",), "reward 'Floats': returned a list of float; return a list with"),
        (("check_parts:Unbuilt",), r"could not be built: KeyError: 'weights' \(check_parts\.py"),
        (("check_parts:Hangs", "timeout_s=0.1"), "reward 'Hangs': gave no answer for 0.1 s"),
    ],
)
def test_a_reward_that_cannot_score_an_image_exits_with_1(
    arguments, message, bright, run_main, monkeypatch
):
    monkeypatch.setattr(rewards, "CHECK_S", 0.1)
    code, said = run_main("rewards", "check", *arguments, "--device", "cpu")
    assert re.search(message, said.splitlines()[-1]), said
    assert code == 1


def test_a_reward_without_reference_images_is_tried(bright, stage):
    done = stage("rewards", "check", "check_parts:Always", "--device", "cpu")
    assert done.exit_code == 0, done.exception
    assert done.stdout == (
        "Always: no reference images; 'a red square': a red square against a blue square: "
        "1.0 against 1.0\n"
    )


def test_a_wrong_name_or_setting_says_what_to_write(bright, stage):
    done = stage("rewards", "check", "shapes_genevil")
    assert isinstance(done.exception, InputError)
    assert "did you mean 'shapes_geneval'?" in str(done.exception)
    done = stage("rewards", "check", "hpsv2")
    assert str(done.exception).startswith("hpsv2: no reward or recipe; did you mean 'hps'?")
    done = stage("rewards", "check", "brightness")
    assert "write one of: geneval, hps, pickscore" in str(done.exception)
    done = stage("rewards", "check", bright, "sing=1")
    assert str(done.exception) == f"{bright}: sing: unknown key; did you mean 'sign'?"


def test_a_missing_setting_is_one_line(run_main):
    expected = (2, "error: aesthetic: head: is required; write a value\n")
    assert run_main("rewards", "check", "aesthetic") == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "others reach it, which needs a token"),
        (["--token-file", "/no/such"], "No such file or directory; name a file"),
    ],
)
def test_what_cannot_be_served_is_one_line(arguments, message, run_main, monkeypatch):
    monkeypatch.delenv("STAGE_REWARD_TOKEN", raising=False)
    code, printed = run_main("rewards", "serve", "shapes_geneval", *arguments)
    assert (code, printed.count("\n")) == (2, 1)
    assert message in printed
