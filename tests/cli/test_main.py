"""`stage` itself and `stage recipes`: output, exit codes, no torch."""

import json
import os
import signal
import subprocess
import sys
from importlib import metadata

import pytest

from stage_rl import api
from stage_rl.errors import DivergedError, InputError, Stopped
from stage_rl.recipes import list_recipes


def test_help_names_every_verb_without_loading_torch(stage_process):
    done = stage_process("--help")
    assert done.returncode == 0, done.stderr
    for verb in ("train", "sample", "eval", "export", "recipes", "bench", "figure", "shapes"):
        assert f"\n  {verb} " in done.stdout


def test_the_version_is_printed_and_h_is_help(stage, stage_process):
    done = stage_process("--version")
    assert (done.returncode, done.stdout) == (0, f"stage-rl {metadata.version('stage-rl')}\n")
    for arguments in ((), ("train",), ("recipes", "show"), ("bench", "reweight")):
        assert stage(*arguments, "-h").stdout == stage(*arguments, "--help").stdout != ""


def test_a_shell_completes_verbs_and_recipes(stage_process, monkeypatch):
    monkeypatch.setenv("_STAGE_COMPLETE", "complete_bash")
    for words, number, answer in (("stage tra", 1, {"train"}), ("stage train shapes_g", 2, SOME)):
        for name, value in {"COMP_WORDS": words, "COMP_CWORD": str(number)}.items():
            monkeypatch.setenv(name, value)
        assert set(stage_process().stdout.split()) == answer


SOME = {"shapes_geneval", "shapes_grpo"}


def test_recipes_are_listed_without_loading_torch(stage_process):
    done = stage_process("recipes")
    assert done.returncode == 0, done.stderr
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert names == sorted(list_recipes())
    assert {"shapes_geneval", "janus_pro_7b_geneval"} < set(names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "No such command 'trian'. Did you mean 'train'?"),
        (["train", "shapes_genevil"], "shapes_genevil: unknown recipe; did you mean 'shapes_"),
        (["recipes", "show", "shapes_genevil"], "shapes_genevil: unknown recipe; did you mean"),
        (["rewards", "serve", "shapes_genevil"], "shapes_genevil: no reward or recipe; did you"),
    ],
)
def test_a_wrong_name_is_one_line_and_exit_code_2_without_loading_torch(
    arguments, message, stage_process
):
    done = stage_process(*arguments)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train"], "missing argument 'recipe'"),
        (["train", "x", "--no-such"], "no such option"),
        (["train", "shapes_geneval", "--steps=5"], "; a setting is written key=value"),
        (["sample"], "missing argument 'model'"),
        (["sample", "shapes", "a star", "--images", "0"], "invalid value for '--images'"),
    ],
)
def test_wrong_usage_is_one_line(arguments, words, run_main):
    code, printed = run_main(*arguments)
    assert (code, printed.count("\n")) == (2, 1)
    assert printed.startswith("error: ")
    assert words in printed.lower()


def test_an_interrupt_says_how_to_go_on(monkeypatch, run_main):
    def interrupted(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr("stage_rl.config.load_recipe", interrupted)
    assert run_main("train", "shapes_grpo") == (130, "stopped; the same command starts again\n")


def test_show_explains_a_recipe(tiny_recipe, stage):
    done = stage("recipes", "show", tiny_recipe)
    assert done.exit_code == 0
    assert "guidance_scale: null" in done.stdout
    assert "# Images per prompt." in done.stdout


def test_a_fault_in_a_prompt_file_is_one_line_with_its_place(tmp_path, run_main):
    star = {"class": "star", "count": 1}
    good = {"tag": "colors", "include": [star], "prompt": "a star"}
    bad = {"tag": "colors", "include": [{**star, "color": "rad"}], "prompt": "a star"}
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(json.dumps(record) for record in (good, bad)))
    code, printed = run_main("train", "shapes_geneval", f"prompts.path={file}")
    assert (code, printed.count("\n")) == (2, 1)
    assert printed.startswith(f"error: {file}:2: include.0.color: unknown 'rad'; did you mean")


@pytest.mark.parametrize(
    ("raised", "code", "printed"),
    [
        (InputError("prompt 3 is empty; write a text"), 2, "error: prompt 3 is empty"),
        (DivergedError("loss is nan; lower optimizer.lr"), 1, "error: loss is nan; lower"),
        (Stopped("stopped after step 3", signal_number=15), 143, "stopped after step 3\n"),
    ],
)
def test_errors_become_one_line_and_an_exit_code(
    tiny_recipe, monkeypatch, raised, code, printed, run_main
):
    def fail(recipe):
        raise raised

    monkeypatch.setattr(api, "train", fail)
    ended, said = run_main("train", tiny_recipe)
    assert (ended, said.count("\n")) == (code, 1)
    assert said.startswith(printed)


def test_an_exit_of_somebody_elses_code_is_no_success(monkeypatch, run_main):
    monkeypatch.setattr("stage_rl.config.load_recipe", lambda *_args, **_options: sys.exit(0))
    code, said = run_main("train", "shapes_grpo")
    assert (code, said) == (1, "error: code that the recipe names ended the process; mend it\n")


def test_a_signal_while_things_are_loaded_says_how_to_go_on(monkeypatch, run_main):
    def wait(*_args, **_options):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("stage_rl.config.load_recipe", wait)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGHUP)
    try:
        assert run_main("train", "shapes_grpo") == (143, "stopped; the same command starts again\n")
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGHUP, before[1])


@pytest.mark.parametrize(
    ("shell", "code", "said"),
    [
        ("$STAGE recipes > /dev/full", 1, "the output cannot be written (No space left on device)"),
        ("mkdir gone; cd gone; rmdir ../gone; $STAGE recipes", 2, "the working folder is gone"),
        ("$STAGE train $(printf 'a%.0s' {1..5000})/x.yaml", 1, "aaaa...: File name too long"),
    ],
)
def test_what_the_machine_refuses_is_one_line(shell, code, said, tmp_path):
    stage = f"{sys.executable} -m stage_rl"
    done = subprocess.run(
        ["bash", "-c", shell],
        cwd=tmp_path,
        env={**os.environ, "STAGE": stage},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr.count("\n")) == (code, 1), done.stderr
    assert said in done.stderr


@pytest.mark.parametrize(
    ("arguments", "taken"),
    [
        (("sample", "shapes", "a star", "--out", "a.png"), "a.png"),
        (("report", "run", "--out", "a.html"), "a.html"),
        (("figure", "curves", "run", "--out", "a.png"), "a.csv"),
        (("figure", "similarity", "run", "--out", "a.pdf"), "a.png"),
        (("eval", "shapes", "--json", "a.json"), "a.json"),
        (("bench", "reweight", "--json", "a.json"), "a.json"),
        (("data", "geneval", "--out", "a.jsonl"), "a.jsonl"),
        (("data", "questions", "wise", "--from", "WISE", "--out", "a.jsonl"), "a.jsonl"),
    ],
)
def test_no_option_writes_over_a_file(arguments, taken, tmp_path, monkeypatch, run_main):
    monkeypatch.chdir(tmp_path)
    (tmp_path / taken).write_text("somebody's")
    option = arguments[-2]
    said = f"error: {option} {taken}: is there already; name another, or remove it first\n"
    assert run_main(*arguments) == (2, said)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["somebody's"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("data", "geneval", "--out", "x", "--evaluation", "--num-prompts", "5"), "--num-prompts:"),
        (
            ("data", "geneval", "--out", "x", "--num-prompts", "1000000000"),
            "1000000",
        ),
        (("sample", "shapes", "a", "--images", "100000000"), "draw at most 10000 at a time"),
        (("sample", "shapes", "a", "--seed", str(2**64)), "write a number below 2**63"),
        (
            ("eval", "shapes", "detector=null", "gold=null"),
            "shapes-geneval: every reward is left out; keep one",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused_at_once(arguments, said, run_main):
    code, printed = run_main(*arguments)
    assert (code, printed.count("\n")) == (2, 1)
    assert said in printed
