"""`stage eval`: the tables it prints and the figures it writes."""

import json
import re
from dataclasses import dataclass

import pytest

from stage_rl import api
from stage_rl.cli.evaluate import UNDERSTANDING
from stage_rl.evaluation import needs
from stage_rl.evaluation.understanding import BENCHMARKS


@dataclass
class Scores:
    """Stands in for a benchmark's results."""

    model: str
    benchmark: str

    def table(self):
        return f"table of {self.model}"

    def to_json(self):
        return {"model": self.model}


@pytest.fixture
def called(monkeypatch):
    """What the verbs behind the command are called with; they score nothing."""
    seen = {}

    def evaluate_all(model, names, request):
        seen.update(model=model, names=names, request=request)
        return [Scores(str(model), name) for name in names]

    def evaluate_against(model, base, names, request):
        return evaluate_all(f"{model} against {base}", names, request)

    monkeypatch.setattr(api, "evaluate_all", evaluate_all)
    monkeypatch.setattr(api, "evaluate_against", evaluate_against)
    return seen


def test_eval_prints_the_table_and_writes_the_figures(tmp_path, called, stage):
    file = tmp_path / "out.json"
    done = stage("eval", "shapes", "--images-per-task", 4, "--json", file)
    assert done.exit_code == 0, done.output
    assert done.stdout == "table of shapes\n\n"
    figures = json.loads(file.read_text())
    assert {"command", "packages", "devices"} < set(figures.pop("environment"))
    assert figures == {"model": "shapes"}
    request = called["request"]
    assert called["names"] == ["shapes-geneval"]
    assert (request.images_per_task, request.guidance_scale, request.seed) == (4, None, 0)
    assert request.dtype == "mixed"
    assert stage("eval", "shapes", "--dtype", "bf16").exit_code == 2


def test_eval_against_a_base_prints_the_comparison(called, stage):
    done = stage("eval", "runs/mine", "--against", "shapes", "--seed", 5, "--dtype", "float32")
    assert done.exit_code == 0, done.output
    assert done.stdout == "table of runs/mine against shapes\n\n"
    assert (called["request"].seed, called["request"].dtype) == (5, "float32")


def test_eval_runs_benchmarks_with_settings_of_their_rewards(tmp_path, called, stage):
    file = tmp_path / "out.json"
    names = ["--benchmark", "hps", "--benchmark", "ocr", "--data", tmp_path]
    done = stage("eval", "runs/mine", "hps.path=x", *names, "--json", file)
    assert done.exit_code == 0, done.output
    assert done.stdout == "table of runs/mine\n\ntable of runs/mine\n\n"
    assert json.loads(file.read_text()).keys() == {"hps", "ocr"}
    assert called["names"] == ["hps", "ocr"]
    assert called["request"].scorers == {"hps": {"path": "x"}}
    assert called["request"].data == tmp_path


def test_eval_lists_what_each_benchmark_needs_and_what_is_missing(tmp_path, stage, monkeypatch):
    monkeypatch.setattr(needs.torch.cuda, "is_available", lambda: False)
    (tmp_path / "drawbench").mkdir()
    (tmp_path / "drawbench/prompts.csv").touch()
    done = stage("eval", "--benchmark", "list", "--data", tmp_path)
    assert done.exit_code == 0, done.output
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line}
    assert lines["shapes-geneval"].endswith("nothing")
    assert "facebook/mask2former-swin-small-coco-instance, openai/clip-vit-l" in lines["geneval"]
    assert re.search(r"800 x 1 +Qwen/Qwen3-VL-8B-Instruct +17\.5 +not known", lines["geneval2"])
    assert lines["geneval2"].endswith("; a GPU of 17.5 GB")
    assert re.search(r"rapidocr, openai/clip-vit-large-patch14 +0 +60 ", lines["cvtg"])
    assert "GPU of" not in lines["cvtg"]
    assert "--data has no questions/geneval2.jsonl; Qwen/Qwen3-VL-8B-" in lines["geneval2"]
    assert f"--data {tmp_path}: has no coco/val2014/COCO_val2014_" in lines["pope"]
    assert "has no mmbench/MMBench_DEV_EN.tsv" in lines["mmbench"]
    assert "mplug_scorer" in lines["dpg"]
    assert "program 'mplug/bin/python'" in lines["dpg"]
    (tmp_path / "val2014").mkdir()  # without pictures it is nothing
    done = stage("eval", "--benchmark", "list", "--data", tmp_path, "ocr.engine=paddleocr")
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line}
    assert "has no coco/val2014/COCO_val2014_" in lines["pope"]
    assert lines["ocr"].endswith("package paddleocr")
    assert "--data" not in lines["drawbench"]
    assert "aesthetic.head: is required" in lines["drawbench"]


def test_weights_are_here_where_a_file_of_them_is(tmp_path, monkeypatch):
    monkeypatch.setattr(needs, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--x--y/snapshots/0"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").touch()  # all that an interrupted download left
    for path in ("x/y", str(snapshot)):
        assert not needs.is_here(path)
        assert needs.is_here(path, has_weights=False)
    (snapshot / "model.safetensors").touch()
    assert needs.is_here("x/y")
    assert needs.is_here(str(snapshot))
    assert needs.is_here(str(snapshot / "config.json"))
    assert not needs.is_here("x/z")


def test_eval_scores_external_images(tmp_path, called, stage):
    arguments = ("--images", tmp_path, "--benchmark", "geneval", "geneval.threshold=0.2")
    assert stage("eval", *arguments).exit_code == 0
    assert called["model"] is None
    assert called["request"].images == tmp_path
    assert called["request"].scorers == {"geneval": {"threshold": 0.2}}


def test_eval_smoke_takes_the_shapes_policy_and_every_benchmark(called, stage):
    done = stage("eval", "--smoke", "--benchmark", "all")
    assert done.exit_code == 0, done.output
    assert called["model"] == "shapes"
    assert called["names"] == ["shapes-geneval", "all"]
    assert called["request"].smoke


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--images-per-prompt", "3"], "--images-per-prompt: shapes-geneval does not take it"),
        (
            [*("--benchmark", "ocr", "--images-per-task", "3"), *("--images-per-prompt", "3")],
            "--images-per-task: --images-per-prompt is given too",
        ),
        (["--benchmark", "shapes_geneval"], "benchmark: unknown 'shapes_geneval'; did you mean"),
    ],
)
def test_eval_refuses_what_it_would_drop_and_names_that_are_none(arguments, line, run_main):
    code, printed = run_main("eval", "shapes", *arguments)
    assert (code, printed.count("\n")) == (2, 1)
    assert printed.startswith(f"error: {line}")


def test_eval_without_anything_to_score_is_one_line(tmp_path, run_main):
    assert run_main("eval") == (2, "error: MODEL: is missing; write one, or --images FOLDER\n")
    code, printed = run_main("eval", "--images", tmp_path)
    assert code == 2
    assert printed.startswith("error: --images: shapes-geneval draws its own; write another")
    code, printed = run_main("eval", "--images", tmp_path, "--benchmark", "ocr", "--against", "x")
    assert (code, printed.count("\n")) == (2, 1)
    assert printed.startswith("error: --against: compares models")


@pytest.mark.parametrize(
    "given",
    [
        *("--images-per-prompt=7", "--images-per-task=7", "--guidance-scale=9", "--seed=0"),
        *("--temperature=1", "--top-k=5", "--dtype=mixed"),
    ],
)
def test_eval_of_external_images_refuses_how_to_draw(tmp_path, called, given, run_main):
    code, printed = run_main("eval", "--images", tmp_path, "--benchmark", "hps", given)
    option = given.partition("=")[0]
    assert (code, called) == (2, {})
    assert printed == f"error: {option}: with --images nothing is drawn; leave it out\n"


def test_eval_asks_questions_about_images_of_a_model_and_its_base(tmp_path, monkeypatch, stage):
    seen = {}

    def evaluate_understanding(model, name, request, *, against):
        seen.update(model=model, against=against, data=request.data)
        return Scores(str(model), name)

    monkeypatch.setattr(api, "evaluate_understanding", evaluate_understanding)
    arguments = ("--benchmark", "pope", "--against", "base", "--data", tmp_path)
    assert stage("eval", "runs/mine", *arguments).exit_code == 0
    assert seen == {"model": "runs/mine", "against": "base", "data": tmp_path}


def test_questions_about_images_stand_alone(run_main):
    assert set(UNDERSTANDING) == BENCHMARKS.keys()
    code, printed = run_main("eval", "x", "--benchmark", "pope", "--benchmark", "geneval")
    assert (code, printed.count("\n")) == (2, 1)
    assert printed.startswith("error: --benchmark pope: takes a MODEL, and no others beside it")
    code, printed = run_main("eval", "x", "--benchmark", "pope", "--smoke")
    assert (code, printed.count("\n")) == (2, 1)
    assert printed.startswith("error: --smoke: pope asks about pictures of its own")
