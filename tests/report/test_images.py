"""Figures of images: what lies beside each, against the run's own samples and against loops."""

import csv
import itertools
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from stage_rl import api, cli
from stage_rl.errors import InputError
from stage_rl.evaluation.request import Request
from stage_rl.evaluation.run import run_suite
from stage_rl.evaluation.suites import PromptSet
from stage_rl.report import images
from stage_rl.report.figures import paper_style

PROMPTS = ("a photo of a red circle", "a photo of two stars")


def drawn(out, *arguments):
    """What `stage figure` wrote beside a figure, after a look at the picture."""
    command = ["figure", *map(str, arguments), "--out", str(out)]
    done = CliRunner().invoke(cli.app, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert out.with_suffix(".png").stat().st_size > 1000
    return json.loads(out.with_suffix(".json").read_text())


def cosine(one, other):
    return one @ other / np.linalg.norm(one) / np.linalg.norm(other)


@pytest.fixture(scope="session")
def codebook(tiny_shapes_folder):
    """Codebook vectors by token."""
    tensors = load_file(tiny_shapes_folder / "model.safetensors")
    (name,) = [name for name in tensors if name.endswith("quantize.embedding.weight")]
    return tensors[name]


def test_similarity_maps_are_cosines_of_codebook_vectors(tiny_run, codebook, tmp_path):
    data = drawn(tmp_path / "a.png", "similarity", tiny_run, "--step", 0, "--group", 1)
    with np.load(tiny_run / "samples" / "000000.npz") as arrays:
        tokens_GT, rewards_G = arrays["tokens"][1], arrays["rewards"][1]
        similarity_GT = arrays["similarity"][1]
        assert data["prompt"] == arrays["prompts"][1]
    order = sorted(range(4), key=lambda image: -rewards_G[image])
    assert data["images"] == order
    assert data["rewards"] == pytest.approx(rewards_G[order].tolist())
    best, maps = codebook[tokens_GT[order[0]]], data["similarity"]
    for place, image in enumerate(order):
        wanted = [cosine(a, b) for a, b in zip(codebook[tokens_GT[image]], best, strict=True)]
        assert np.ravel(maps["pair"][place]) == pytest.approx(wanted, abs=1e-5)
        assert np.ravel(maps["group"][place]) == pytest.approx(similarity_GT[image], abs=1e-6)
    assert np.shape(maps["pair"]) == (4, 12, 12)


def test_a_run_that_weighed_nothing_by_similarity_has_maps_all_the_same(
    tiny_run, codebook, tmp_path
):
    run = tmp_path / "run"
    (run / "samples").mkdir(parents=True)
    shutil.copy(tiny_run / "recipe.json", run)
    with np.load(tiny_run / "samples" / "000001.npz") as arrays:
        kept = {name: arrays[name] for name in arrays if name != "similarity"}
    np.savez(run / "samples" / "000001.npz", **kept)
    data = drawn(tmp_path / "a.png", "similarity", run)
    deviations = kept["rewards"].std(1)
    assert deviations[data["group"]] == deviations.max()
    rewards_G, codes_GTC = kept["rewards"][data["group"]], codebook[kept["tokens"][data["group"]]]
    above_G = rewards_G > rewards_G.mean()
    place, image = 1, data["images"][1]
    for position, value in enumerate(np.ravel(data["similarity"]["group"][place])):
        codes_GC = codes_GTC[:, position]
        wanted = [cosine(codes_GC[image], other) for other in codes_GC[above_G != above_G[image]]]
        assert value == pytest.approx(np.mean(wanted), abs=1e-5)


def test_before_and_after_are_drawn_from_the_same_streams(tiny_run, tiny_shapes_folder, tmp_path):
    options = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    data = drawn(tmp_path / "a.pdf", "before-after", tiny_run, *options, "--images", 2)
    assert (tmp_path / "a.pdf").stat().st_size > 1000
    assert data["guidance_scale"] == 2  # that of the rollout
    for name, model in (("base", tiny_shapes_folder), ("trained", tiny_run)):
        rollout = api.sample(model, PROMPTS, images_per_prompt=2, guidance_scale=2.0)
        assert np.reshape(data["tokens"][name], (4, -1)).tolist() == rollout.tokens_NT.tolist()
    assert data["tokens"]["base"] != data["tokens"]["trained"]


def test_diversity_is_one_less_the_mean_cosine_over_pairs(tiny_run, codebook, tmp_path):
    arguments = ("diversity", f"{tiny_run}@2", tiny_run, "--label", "one", "--label", "two")
    data = drawn(tmp_path / "a.png", *arguments, "--images", 3)
    # Without --prompt: a prompt for each of the six tasks and the two held-out sets.
    assert len(data["prompts"]) == 8
    assert data["tokens"]["one"] == data["tokens"]["two"]
    codes_GTC = codebook[np.array(data["tokens"]["one"][5])]
    pairs = itertools.combinations(codes_GTC, 2)
    cosines = [cosine(a, b) for one, two in pairs for a, b in zip(one, two, strict=True)]
    assert data["diversity"]["one"][5] == pytest.approx(1 - np.mean(cosines), abs=1e-5)


def test_scores_and_entropies_are_those_of_each_temperature(
    tiny_shapes_folder, tmp_path, monkeypatch
):
    real = PromptSet.prompts
    monkeypatch.setattr(PromptSet, "prompts", lambda *args, **more: real(*args, **more)[:2])
    options = {"images_per_task": 4, "guidance_scale": 1.0, "dtype": "float32"}
    model = str(tiny_shapes_folder)
    with paper_style():
        drawing = images.temperature(model, temperatures=(0.0, 1.0, 3.0), **options)
        drawing.write(tmp_path / "a.png")
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    cold, usual, hot = rows
    asked = Request(temperature=3.0, **options)
    overall = run_suite(api.load(model), "shapes-geneval", asked).summary("gold")["overall"]
    assert (hot["gold"], hot["standard_error"]) == (overall.mean, overall.standard_error)
    # Without guidance both distributions are one at temperature 1; ln 32 is the largest entropy.
    assert cold["entropy_sampled"] == 0
    assert usual["entropy_sampled"] == pytest.approx(usual["entropy_conditional"], abs=1e-4)
    assert usual["entropy_sampled"] < hot["entropy_sampled"] < np.log(32) + 1e-5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda run: images.similarity(run, step=7), "--step 7: the run kept no samples of it; wr"),
        (lambda run: images.similarity(run, group=2), "--group 2: step 1 kept 2; write 0 to 1"),
        (lambda run: images.similarity(run.parent), "holds no samples; train with run.log_images"),
        (
            lambda run: images.before_after("shapes"),
            "shapes: is not a run, so it has no base; name a",
        ),
        (lambda run: images.diversity(["shapes"]), "--prompt: is missing, and no model is a run"),
        (lambda run: images.diversity([str(run)] * 2), "run, run: are alike; write a --label for"),
        (
            lambda run: images.diversity(["shapes"], prompts=["x"], seed=2**64),
            r"seed: 18446744073709551616 is out of range; write a number below 2\*\*63",
        ),
        (
            lambda run: images.before_after(str(run), prompts=["x", "y"], num_images=5001),
            "images: 5001 of 2 prompts are 10002; draw at most 10000 of each model",
        ),
        (lambda run: images.diversity(["x"], labels="ab"), "--label: 2 for 1 models; write one"),
    ],
)
def test_wrong_input_is_named(tiny_run, make, message):
    with pytest.raises(InputError, match=message):
        make(tiny_run)


def test_a_group_on_which_a_reward_failed_is_not_compared(tiny_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    file = run / "samples" / "000001.npz"
    with np.load(file) as arrays:
        kept = dict(arrays)
    kept["rewards"][1] = np.nan
    np.savez(file, **kept)
    with pytest.raises(InputError, match="--group 1: a reward failed on it in step 1; name anot"):
        images.similarity(run, group=1)
    assert images.similarity(run, group=None).data["group"] == 0
