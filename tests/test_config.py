"""Recipes: reading, overriding, refusing, describing."""

import json

import pytest
from pydantic import ValidationError

from stage_rl.algorithm_config import AlgorithmConfig
from stage_rl.config import (
    describe,
    diff_recipes,
    load_recipe,
    load_reward,
    resolved_json,
    run_folder,
    run_hash8,
    written_out,
)
from stage_rl.errors import RecipeError
from stage_rl.recipe import Origin, RolloutConfig


def refusal(recipe, *overrides):
    """The message of a refused recipe, without the part that names the file."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == 2
    return message.removeprefix(f"{recipe}: ")


def test_a_recipe_takes_the_name_of_its_file_and_the_defaults(tiny_recipe):
    recipe = load_recipe(tiny_recipe, ["seed=0"])
    assert (recipe.name, recipe.steps, recipe.seed) == ("tiny", 10, 0)
    # What is left out of guidance is the family's.
    assert (recipe.rollout, recipe.guidance_scale) == (RolloutConfig(), 5.0)
    assert recipe.policy.build(None) == 8
    reward = recipe.rewards[0]
    assert (reward.kind, reward.name) == ("tiny_parts:TinyReward", "TinyReward")
    assert reward.build(None) == 0.5
    assert recipe.origin == Origin(str(tiny_recipe), ("seed=0",), "# A recipe for tests.\n")


@pytest.mark.parametrize(
    ("former", "now"),
    [
        (["kl.estimator=k3", "ratio=clipped", "loss=grpo"], []),
        (["ratio=unclipped", "loss=grpo"], ["loss=unclipped"]),
        (["preset=release", "ratio=clipped"], ["preset=release", "loss=clip"]),
        (["importance_sampling=truncated"], ["importance_sampling=token_truncate"]),
    ],
)
def test_a_former_recipe_says_the_same_in_other_words(tiny_recipe, former, now):
    one, other = (
        load_recipe(tiny_recipe, [f"algorithm.{override}" for override in overrides])
        for overrides in (former, now)
    )
    assert one.algorithm == other.algorithm


def test_an_estimator_of_the_kl_that_is_none_is_refused(tiny_recipe):
    with pytest.raises(RecipeError, match=r"algorithm\.kl\.estimator: unknown value"):
        load_recipe(tiny_recipe, ["algorithm.kl.estimator=k4"])


def test_overrides_reach_sections_list_items_and_parts_of_parts(tiny_recipe):
    parts = ["optimizer.lr=5e-6", "rewards.0.weight=2", "rewards.0.detector.threshold=.25"]
    values = ["optimizer.betas=[0.5, 0.75]", "rollout={group_size: 4}", "seed=${steps}", "steps=3"]
    recipe = load_recipe(tiny_recipe, [*parts, *values])
    assert (recipe.optimizer.lr, recipe.optimizer.betas) == (5e-6, (0.5, 0.75))
    assert recipe.rewards[0].weight == 2.0
    assert recipe.rewards[0].build(None) == 0.25
    assert recipe.rollout == RolloutConfig(group_size=4)
    assert recipe.steps == recipe.seed == 3


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def f(:\n", "SyntaxError: "),
        ("import json\njson.no_such\n", "AttributeError: module 'json' has no attribute"),
        ("1 / 0\n", "ZeroDivisionError: division by zero"),
        ("raise ValueError('two\\nlines')\n", "ValueError: two lines"),
        ("from json import no_such\n", "ImportError: cannot import name 'no_such'"),
    ],
)
def test_a_module_that_fails_is_named_with_its_error(tiny_recipe, source, message):
    (tiny_recipe.parent / "broken_parts.py").write_text(source)
    said = refusal(tiny_recipe, "policy.kind=broken_parts:X")
    assert said.startswith(f"policy.kind: cannot import 'broken_parts' ({message}")
    assert said.endswith("; fix the module")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.guidance=3", "rollout.guidance: unknown key; did you mean 'guidance_scale'?"),
        ("lr=1e-5", "lr: unknown key; did you mean 'optimizer.lr'?"),
        ("tripwires.panel_drop=1", "tripwires.panel_drop: was renamed; write 'tripwires.valid"),
        ("eps=1e-5", "eps: unknown key; did you mean 'steps'?"),
        (
            "evaluation={benchmark: genevals}",
            "evaluation.benchmark: unknown benchmark kind 'genevals'; ",
        ),
        ("zzz=1", "zzz: unknown key; write one of: name, steps, seed, "),
        ("rewards.0.detector.q=1", "rewards.0.detector.q: unknown key; write one of: threshold"),
        ("steps=ten", "steps: expected a whole number, not 'ten'"),
        ("steps=1.5", "steps: expected a whole number, not 1.5"),
        ("steps=null", "steps: expected a whole number, not null"),
        ("steps=true", "steps: expected a whole number, not true"),
        ("steps.more=3", "steps: expected a whole number, not {'more': 3}"),
        ("steps=0", "steps: 0 is out of range; write a number above 0"),
        ("rollout.group_size=1", "rollout.group_size: 1 is out of range; write a number of at"),
        ("optimizer.lr=0", "optimizer.lr: 0 is out of range; write a number above 0"),
        ("rollout.top_p=1.5", "rollout.top_p: 1.5 is out of range; write a number of at most 1"),
        ("algorithm.clip=1", "algorithm.clip: 1 is out of range; write a number below 1"),
        ("optimizer.lr=.nan", "optimizer.lr: expected a finite number, not nan"),
        ("rewards.0.weight=.inf", "rewards.0.weight: expected a finite number, not inf"),
        ("steps=.nan", "steps: expected a whole number, not nan"),
        ("algorithm.preset=papr", "algorithm.preset: unknown value 'papr'; did you mean 'paper'?"),
        ("algorithm.self_similarity=2", "algorithm.self_similarity: unknown value 2; write 0 or 1"),
        ("optimizer.betas=[1,2,3]", "optimizer.betas: has 3 items; write at most 2"),
        ("rewards=[]", "rewards: has 0 items; write at least 1"),
        ("rewards=3", "rewards: expected a list, not 3"),
        ("policy=janus", "policy: expected a mapping of keys, not 'janus'"),
        ("policy={}", "policy.kind: is required; write one of: janus, "),
        ("policy.kind=jan", "policy.kind: unknown policy kind 'jan'; did you mean 'janus'?"),
        ("policy.kind=no_such:X", "policy.kind: cannot import 'no_such' (No module named"),
        ("policy.kind=json:X", "policy.kind: 'json' has no 'X'; write the name of a class in it"),
        (
            "policy.kind=json:loads",
            "policy.kind: 'json:loads' is not a PolicyConfig; name a subclass",
        ),
        ("policy.kind=.x:Y", "policy.kind: unknown policy kind '.x:Y'; write one of: janus"),
        ("name=a b", "name: 'a b' will not do; write letters, digits, '_', '.' and '-' only"),
        ("rewards.1.weight=1", "rewards.1.weight: no such list item; write the number of an item"),
        ("rewards.first=1", "rewards.first: no such list item; write the number of an item"),
        ("steps", "steps: is not an override; write dotted.key=value"),
        ("=3", "=3: is not an override; write dotted.key=value"),
        ("[=3", "[=3: is not an override; write dotted.key=value"),
        ("run..dir=3", "run..dir=3: is not an override; write dotted.key=value"),
        ("run.dir='x", "run.dir: the value is not YAML; quote it"),
        ("seed=${nowhere}", "seed: Interpolation key 'nowhere' not found; write the value itself"),
        ("seed=???", "seed: Missing mandatory value: seed; write the value itself"),
        ("optimizer.warmup_steps=11", "optimizer.warmup_steps: 11 is more than steps (10)"),
        ("seed=9223372036854775808", "seed: 9223372036854775808 is out of range; write a number"),
        ("rewards.0.name=std", "rewards: 'std' is a metric of the summed reward; give the reward"),
        ("algorithm.kl.weight_clip=[1,0]", "algorithm.kl.weight_clip: 1.0 is above 0.0; write"),
    ],
)
def test_a_mistake_is_answered_with_key_reason_and_remedy(tiny_recipe, override, message):
    assert refusal(tiny_recipe, override).startswith(message)


REWARD = "{kind: 'tiny_parts:TinyReward', detector: {kind: 'tiny_parts:TinyDetector'}}"
SEVERAL = ("algorithm.loss=unclipped", "optimizer.updates_per_rollout=2")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([f"rewards=[{REWARD}, {REWARD}]"], "rewards: 2 rewards are named 'TinyReward'; give"),
        (SEVERAL, "algorithm.loss: unclipped is for one update per rollout; write clip, or "),
        (
            ["algorithm.entropy={mode: loss, scale: 0.1}"],
            "algorithm.entropy.scale: has no effect with entropy.mode: loss; write penalty_scale",
        ),
        (["steps=0", "seed=-1"], "steps: 0 is out of range; write a number above 0 (and 1 m"),
    ],
)
def test_parts_that_do_not_agree_are_refused_and_several_mistakes_are_counted(
    tiny_recipe, overrides, message
):
    assert refusal(tiny_recipe, *overrides).startswith(message)


@pytest.mark.parametrize("override", SEVERAL)
def test_each_of_two_settings_that_do_not_agree_will_do_alone(tiny_recipe, override):
    load_recipe(tiny_recipe, [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; start from `stage recipes show NAME`"),
        ("# only a comment\n", "is empty; start from `stage recipes show NAME`"),
        ("- a\n- b\n", "is not a mapping; write lines of the form key: value"),
        ("just words", "is not a mapping; write lines of the form key: value"),
        ("12", "is not a mapping; write lines of the form key: value"),
        ("steps: 1\nsteps: 2\n", "line 2: found duplicate key steps; write each key once"),
        ("steps: [1\nseed: 2\n", "line 2: did not find expected ',' or ']'; correct the YAML"),
        ("steps: !!set {a}", "Value 'set' is not a supported primitive type; write plain keys"),
        ("null: 3", "Incompatible key type 'NoneType'; write plain keys and values"),
        ("seed: 3", "steps: is required; write a value (and 3 more)"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path, text, message):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    assert refusal(file).startswith(message)


def test_a_file_that_is_not_text_or_not_there_is_refused_with_the_near_one(tmp_path):
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\x00")
    assert refusal(tmp_path / "bad.yaml") == "is not UTF-8 text; name a recipe file"
    assert refusal("shapes_genval").startswith("unknown recipe; did you mean 'shapes_geneval'?")
    for missing in (tmp_path / "none.yaml", tmp_path):
        assert refusal(missing).startswith("no such file or run; name one")


def test_a_described_recipe_is_a_recipe_that_gives_the_same(tiny_recipe, tmp_path):
    recipe = load_recipe(tiny_recipe, ["algorithm.preset=release", "optimizer.lr=3e-5"])
    text = describe(recipe)
    assert "# Width of the model." in text
    (tmp_path / "again.yaml").write_text(text)
    (tmp_path / "again.json").write_text(resolved_json(recipe))
    for file in ("again.yaml", "again.json"):
        again = load_recipe(tmp_path / file)
        assert diff_recipes(again, recipe) == ()
        assert run_hash8(again) == run_hash8(recipe)


def test_the_run_folder_is_named_by_everything_but_the_steps(tiny_recipe):
    one, longer, other = (
        load_recipe(tiny_recipe, overrides) for overrides in ([], ["steps=99"], ["seed=1"])
    )
    assert run_folder(one) == run_folder(longer) != run_folder(other)
    means = load_recipe(tiny_recipe, ["training.logprob_rows=8", "rewards.0.self_test=false"])
    assert run_folder(means) == run_folder(one)
    weighted = load_recipe(tiny_recipe, ["rewards.0.weight=2"])
    assert run_folder(weighted) != run_folder(one)
    assert run_folder(one).parts[0] == "runs"
    assert run_folder(load_recipe(tiny_recipe, ["run.dir=here"])).name == "here"


def test_a_written_recipe_needs_no_overrides_and_keeps_the_opening_comment(tiny_recipe, tmp_path):
    recipe = load_recipe(tiny_recipe, ["seed=3", "name=other"])
    (tmp_path / "recipe.yaml").write_text(written_out(recipe))
    head = ["# A recipe for tests.", f"# Every setting of: {tiny_recipe} seed=3 name=other"]
    assert (tmp_path / "recipe.yaml").read_text().splitlines()[:2] == head
    again = load_recipe(tmp_path / "recipe.yaml")
    assert resolved_json(again) == resolved_json(recipe)
    assert again.name == "other"


def test_the_recipe_of_a_run_folder_goes_on_with_it_and_remembers_its_overrides(
    tiny_recipe, tmp_path
):
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.json").write_text(resolved_json(load_recipe(tiny_recipe, ["seed=3"])))
    assert load_recipe(run, ["steps=12"]).origin == Origin(str(run), ("steps=12",))
    status = {"recipe": "tiny", "overrides": ["seed=3", "steps=11"]}
    (run / "status.json").write_text(json.dumps(status))
    longer = load_recipe(run, ["steps=12"])
    assert (longer.seed, longer.steps, run_folder(longer)) == (3, 12, run)
    assert longer.origin == Origin("tiny", ("seed=3", "steps=12"))
    assert run_folder(load_recipe(run, ["run.dir=elsewhere"])).name == "elsewhere"


def test_two_recipes_differ_in_dotted_keys(tiny_recipe):
    one = load_recipe(tiny_recipe)
    other = load_recipe(tiny_recipe, ["rewards.0.weight=2", "optimizer.betas=[0.9, 0.99]"])
    assert diff_recipes(one, other) == ("rewards.0.weight", "optimizer.betas.1")
    evaluated = load_recipe(tiny_recipe, ["evaluation={seed: 3}"])
    assert diff_recipes(one, evaluated)[0] == "evaluation"


def test_a_preset_sets_what_a_recipe_does_not_even_inside_a_section():
    assert AlgorithmConfig().preset == "default"
    assert AlgorithmConfig().advantage_std_floor == 0.0
    paper = AlgorithmConfig(preset="paper", advantage_std_floor=0.01)
    assert (paper.mask_normalization, paper.self_similarity) == ("none", 1)
    assert paper.advantage_std_floor == 0.01
    release = AlgorithmConfig.model_validate({"preset": "release", "entropy": {"scale": 0.1}})
    assert (release.entropy.scale, release.entropy.centred) == (0.1, True)
    assert (release.loss, release.logprob_dtype) == ("unclipped", "bfloat16")


def test_a_recipe_of_the_entropy_loss_that_is_written_out_in_full_is_read_again():
    penalty = AlgorithmConfig.model_validate({"preset": "release", "entropy": {"mode": "loss"}})
    assert AlgorithmConfig.model_validate(penalty.model_dump()) == penalty


def test_settings_are_frozen_and_strict():
    settings = RolloutConfig()
    with pytest.raises(ValidationError, match="frozen"):
        settings.top_k = 3
    with pytest.raises(ValidationError, match="valid integer"):
        RolloutConfig.model_validate({"top_k": "3"})


def test_what_comes_from_the_environment_is_used_and_stays_a_reference(tmp_path, monkeypatch):
    monkeypatch.setenv("SCORER_KEY", "s3cr3t-of-mine")
    file = tmp_path / "secret.yaml"
    file.write_text("""
steps: 1
policy: {kind: janus, path: shapes}
prompts: {kind: shapes}
rewards:
  - kind: external
    command: [scorer, --key, "${oc.env:SCORER_KEY}", "--again=${rewards.0.command.2}"]
""")
    recipe = load_recipe(file)
    assert recipe.rewards[0].command[2:] == ("s3cr3t-of-mine", "--again=s3cr3t-of-mine")
    for text in (describe(recipe), resolved_json(recipe), written_out(recipe)):
        assert "s3cr3t" not in text
        assert text.count("${oc.env:SCORER_KEY}") == 2
    (tmp_path / "recipe.json").write_text(resolved_json(recipe))
    again = load_recipe(tmp_path / "recipe.json")
    assert again.model_dump() == recipe.model_dump()
    monkeypatch.setenv("SCORER_KEY", "another")
    assert run_hash8(load_recipe(file)) == run_hash8(recipe)
    monkeypatch.delenv("SCORER_KEY")
    with pytest.raises(RecipeError, match="Environment variable 'SCORER_KEY' not found"):
        load_recipe(file)


@pytest.mark.parametrize(
    "text",
    [
        "${oc.env:SCORER_KEY}",
        '${oc.env:"SCORER_KEY"}',
        "${oc.env:'SCORER_KEY'}",
        "${ oc.env : SCORER_KEY }",
        "${oc.env:${rewards.0.name}}",
        "${oc.${rewards.1.name}:SCORER_KEY}",
    ],
)
def test_however_a_variable_is_written_its_value_stays_out(tiny_recipe, monkeypatch, text):
    monkeypatch.setenv("SCORER_KEY", "s3cr3t-of-mine")
    reward = {"kind": "external", "name": "SCORER_KEY", "command": ["scorer", text]}
    rewards = [
        reward,
        reward | {"name": "env"},
        reward | {"name": "by_way", "command": "${rewards.0.command}"},
    ]
    recipe = load_recipe(tiny_recipe, [f"rewards={json.dumps(rewards)}"])
    assert all(reward.command[1] == "s3cr3t-of-mine" for reward in recipe.rewards)
    for written in (describe(recipe), resolved_json(recipe), written_out(recipe)):
        assert "s3cr3t" not in written
        assert written.count("${") >= 3
    file = tiny_recipe.with_name("recipe.json")
    file.write_text(resolved_json(recipe))
    assert load_recipe(file).rewards == recipe.rewards


def test_a_message_names_the_variable_and_not_its_value(tiny_recipe, monkeypatch):
    monkeypatch.setenv("SCORER_KEY", "hunter2" * 20)
    for key in ("rewards.0.weight", "steps", "rewards.0.kind", "trackers", "rollout.dtype"):
        with pytest.raises(RecipeError, match=r"\$\{oc\.env:SCORER_KEY\}") as caught:
            load_recipe(tiny_recipe, [key + '=${oc.env:"SCORER_KEY"}'])
        assert "hunter2" not in str(caught.value)
    with pytest.raises(RecipeError) as caught:
        load_reward("hps", ["weight=${oc.env:SCORER_KEY}"])
    assert "hunter2" not in str(caught.value)


def test_a_key_without_a_value_is_refused_and_null_is_one(tiny_recipe):
    with pytest.raises(RecipeError, match=r"run\.dir=: has no value; write one, or run\.dir=null"):
        load_recipe(tiny_recipe, ["run.dir="])
    assert load_recipe(tiny_recipe, ["run.dir=null"]).run.dir is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "is nested too deeply"),
        ("steps: " + "9" * 5000, "holds a value that cannot be read"),
        ("steps: 010", "010 would be octal; write 10"),
        ("steps: 10000001", "is out of range"),
    ],
)
def test_what_yaml_reads_wrongly_or_not_at_all_is_one_line(tiny_recipe, text, message):
    file = tiny_recipe.with_name("mine.yaml")
    file.write_text(f"{tiny_recipe.read_text().replace('steps: 10', '')}\n{text}\n")
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(file)
    assert "\n" not in str(caught.value)


def test_a_home_is_expanded_and_an_empty_folder_refused(tiny_recipe, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert str(run_folder(load_recipe(tiny_recipe, ["run.dir=~/x"]))) == "/home/me/x"
    with pytest.raises(RecipeError, match=r"run\.dir: "):
        load_recipe(tiny_recipe, ["run.dir=''"])
    with pytest.raises(RecipeError, match=r"steps: 010 would be octal"):
        load_recipe(tiny_recipe, ["steps=010"])
