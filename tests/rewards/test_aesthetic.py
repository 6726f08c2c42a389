"""The aesthetic predictor: an affine head on unit vectors, read from the published layout."""

import os

import pytest
import torch

from stage_rl.config import load_reward
from stage_rl.errors import RecipeError, WeightsError
from stage_rl.rewards.clip import AestheticReward, load_clip, load_head
from stage_rl.rewards.pretrained import AffineHead
from stage_rl.rewards.tiny import tiny_clip, tiny_clip_tokenizer
from stage_rl.types import Prompt

PLACES = (0, 2, 4, 6, 7)
WIDTHS = (32, 1024, 128, 64, 16, 1)


def published_head(width=32):
    """Each layer takes the mean of its inputs and adds a tenth of its place."""
    widths = (width, *WIDTHS[1:])
    tensors = {}
    for i, place in enumerate(PLACES):
        tensors[f"layers.{place}.weight"] = torch.full((widths[i + 1], widths[i]), 1 / widths[i])
        tensors[f"layers.{place}.bias"] = torch.full((widths[i + 1],), place / 10)
    return tensors


def noise(num=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (num, 40, 56, 3), generator=generator, dtype=torch.uint8)


def test_the_head_is_the_composition_of_its_layers(tmp_path):
    torch.save(published_head(), tmp_path / "head.pth")
    head = load_head(str(tmp_path / "head.pth"), width=32)
    # f(0) = 0 + 0.2 + 0.4 + 0.6 + 0.7 = 1.9; the first unit vector adds its mean 1 / 32
    vectors = torch.zeros(2, 32)
    vectors[1, 0] = 1
    assert head(vectors).tolist() == pytest.approx([1.9, 1.9 + 1 / 32], abs=1e-5)
    # affine: f(x + y) = f(x) + f(y) - f(0)
    x, y = torch.randn(2, 1, 32, generator=torch.Generator().manual_seed(1))
    assert head(x + y).item() == pytest.approx(head(x).item() + head(y).item() - 1.9, abs=1e-4)


def test_the_rating_is_the_heads_word_on_the_unit_vector(tmp_path):
    torch.save(published_head(), tmp_path / "head.pth")
    tiny_clip().save_pretrained(tmp_path / "clip")
    tiny_clip_tokenizer().save_pretrained(tmp_path / "clip")
    config = load_reward("aesthetic", [f"path={tmp_path}/clip", f"head={tmp_path}/head.pth"])
    scores = config.build(torch.device("cpu"))(noise(), [Prompt("anything", i) for i in range(3)])
    units_ND = load_clip("tiny").images_ND(noise())
    wanted = (1.9 + units_ND.mean(-1)).tolist()
    assert [score.value for score in scores] == pytest.approx(wanted, abs=1e-5)
    assert scores[0].why == f"rated {wanted[0]:.2f} of 10"


def test_the_prompt_plays_no_part():
    reward = load_reward("aesthetic", ["path=tiny", "head=tiny"]).build(torch.device("cpu"))
    assert isinstance(reward, AestheticReward)
    one, other = (reward(noise(1), [Prompt(text)]) for text in ("a cat", "a dog"))
    assert one == other


def test_a_head_for_other_vectors_is_refused(tmp_path):
    torch.save(published_head(width=16), tmp_path / "head.pth")
    with pytest.raises(WeightsError, match=r"of another shape: layers\.0\.weight"):
        load_head(str(tmp_path / "head.pth"), width=32)
    tensors = published_head()
    del tensors["layers.6.bias"]
    torch.save(tensors, tmp_path / "head.pth")
    with pytest.raises(WeightsError, match=r"missing: layers\.6\.bias"):
        load_head(str(tmp_path / "head.pth"), width=32)


def test_a_head_that_is_not_there_says_where_it_is_published(tmp_path):
    with pytest.raises(WeightsError, match="no such file; write the path of sac"):
        load_head(str(tmp_path / "none.pth"), width=32)
    with pytest.raises(RecipeError, match="aesthetic: head: is required"):
        load_reward("aesthetic")


def test_the_published_head_has_the_tensors_of_ours():
    # inputs and bias times outputs, layer by layer
    head = AffineHead(768)
    assert set(head.state_dict()) == set(published_head())
    wanted = 769 * 1024 + 1025 * 128 + 129 * 64 + 65 * 16 + 17
    assert sum(p.numel() for p in head.parameters()) == wanted


@pytest.mark.skipif("STAGE_AESTHETIC_HEAD" not in os.environ, reason="names the published file")
def test_the_published_head_rates_three_vectors_as_its_authors_code_does():
    head = load_head(os.environ["STAGE_AESTHETIC_HEAD"], width=768)
    vectors_ND = torch.stack([torch.zeros(768), torch.eye(768)[0], torch.full((768,), 768**-0.5)])
    assert head(vectors_ND).tolist() == pytest.approx([5.2366458, 4.5450524, 4.8832849], abs=1e-5)


def test_the_self_test_is_a_photograph_against_noise():
    cases = load_reward("aesthetic", ["head=head.pth"]).reference_cases()
    assert [case.what for case in cases] == [
        "a photograph of a cat against noise",
        "a photograph of a cup against noise",
    ]
    assert load_reward("aesthetic", ["path=tiny", "head=tiny"]).reference_cases() == ()
    # neighbouring pixels of a photograph are alike, those of noise are not
    for case in cases:
        steps = case.images_NHWC().float().diff(dim=2).abs().mean((1, 2, 3))
        assert steps[0] < 20 < steps[1]
