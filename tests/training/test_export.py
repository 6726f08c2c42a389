"""Models out of runs: what plain transformers, PEFT and the loader make of an export."""

import importlib.util
import json

import pytest
import torch
import yaml
from PIL import Image
from torch.testing import assert_close
from transformers import JanusForConditionalGeneration

from stage_rl.api import export, load, sample
from stage_rl.config import load_recipe, resolved_json
from stage_rl.errors import InputError, StageError
from stage_rl.policies.loading import read_tensors
from stage_rl.training import export as export_module
from stage_rl.training.loop import train
from stage_rl.types import Prompt

CPU = torch.device("cpu")
PROMPT = Prompt("a red circle", 0)
TOKENS_NT = torch.arange(16)[None]

needs_peft = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="needs the extra lora"
)


@torch.no_grad()
def logits_of(policy):
    return policy.head(policy.hidden(policy.encode([PROMPT]), TOKENS_NT))


@torch.no_grad()
def plain_logits(module, policy):
    """What a module says, by transformers' own forward pass."""
    text = module.get_input_embeddings()(torch.tensor([policy.prompt_ids(PROMPT)]))
    image = module.prepare_embeddings_for_image_generation(TOKENS_NT)
    states = module.model.language_model(inputs_embeds=torch.cat([text, image], 1))[0]
    return module.model.generation_head(states[:, text.shape[1] - 1 : -1])


@pytest.fixture
def run(recipe):
    """Two steps at a rate that shows."""
    return train(recipe("steps=2", "run.save_every=1"))


@pytest.mark.parametrize("layout", ["transformers", "deepseek"])
def test_an_export_draws_what_the_run_draws(run, tmp_path, layout, tiny_janus):
    out = export(str(run), tmp_path / "out", layout=layout)
    trained, back = load(str(run), CPU), load(str(out), CPU)
    assert torch.equal(logits_of(back), logits_of(trained))
    assert (logits_of(back) - logits_of(tiny_janus)).abs().max() > 1e-3
    drawn = [sample(policy, [PROMPT.text], seed=3).tokens_NT for policy in (trained, back)]
    assert torch.equal(*drawn)
    assert not list(tmp_path.glob(".*.tmp"))
    if layout == "transformers":
        module = JanusForConditionalGeneration.from_pretrained(out)
        assert_close(plain_logits(module, trained), logits_of(trained), atol=1e-5, rtol=0)


def test_a_run_on_the_original_layout_exports_to_both(recipe, tmp_path, original_janus_folder):
    run = train(recipe("steps=1", f"policy.path={original_janus_folder}"))
    trained = load(str(run), CPU)
    out = export(str(run), tmp_path / "deepseek", layout="deepseek")
    before, after = read_tensors(original_janus_folder), read_tensors(out)
    assert before.keys() == after.keys()
    changed = {n for n, tensor in before.items() if not torch.equal(tensor.float(), after[n])}
    # What trains is the language model; of the pickle's tensors those that are never read stay.
    assert changed
    assert all(name.startswith("language_model.model.") for name in changed)
    assert torch.equal(logits_of(load(str(out), CPU)), logits_of(trained))
    module = JanusForConditionalGeneration.from_pretrained(export(str(run), tmp_path / "plain"))
    assert_close(plain_logits(module, trained), logits_of(trained), atol=1e-5, rtol=0)


def test_a_step_of_a_run_is_exported_as_it_was_then(run, tmp_path):
    (run / "evaluation.txt").write_text("after 2 steps; the table")
    first, last = (export(f"{run}@{step}", tmp_path / str(step)) for step in (1, 2))
    for step, out in ((1, first), (2, last)):
        saved = load(f"{run}@{step}", CPU).module.state_dict()
        assert all(torch.equal(t, saved[n]) for n, t in read_tensors(out).items())
    cards = [(out / "README.md").read_text() for out in (first, last)]
    assert "for 1 steps" in cards[0]
    assert ["the table" in card for card in cards] == [False, True]
    assert logits_of(load(str(first), CPU)).ne(logits_of(load(str(last), CPU))).any()


def test_the_code_of_a_card_draws(run, tmp_path, monkeypatch):
    out = export(run, tmp_path / "out")
    code = (out / "README.md").read_text().split("## Draw\n\n```python\n")[1].split("```")[0]
    monkeypatch.chdir(out)
    exec(code, {})
    with Image.open("drawn.png") as picture:
        assert picture.size == (16, 16)
        assert len(picture.getcolors(256)) > 10


def test_plain_weights_are_converted_without_a_card(original_janus_folder, tmp_path):
    out = export(str(original_janus_folder), tmp_path / "out", dtype="bfloat16")
    assert {tensor.dtype for tensor in read_tensors(out).values()} == {torch.bfloat16}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert not (out / "README.md").exists()


def test_the_card_says_what_was_done(run, tmp_path, tiny_janus_folder):
    (run / "evaluation.txt").write_text("after 2 steps; the table\nimages: /home/me/x.png")
    card = (export(str(run), tmp_path / "out") / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "transformers"
    # The base is a folder here, which is no model of the hub.
    assert "base_model" not in head
    assert f"Trained from `{tiny_janus_folder}` for 2 steps" in card
    assert "advantages weighted by the similarity of opposed tokens (5 to 8)" in card
    assert "| Brightness | loop_parts:Brightness | 1 |" in card
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first, last = (f"{record['reward/mean']:.4g}" for record in records)
    assert f"| reward/mean | {first} | {last} |" in card
    assert "the table" in card
    assert "/home/me" not in card
    written = card.split("```yaml\n")[1].split("```")[0]
    (tmp_path / "again.yaml").write_text(written)
    again = load_recipe(tmp_path / "again.yaml")
    assert resolved_json(again) == resolved_json(load_recipe(run / "recipe.json"))


def test_the_card_of_another_rule_does_not_call_it_stage(run):
    recipe = json.loads((run / "recipe.json").read_text())
    recipe["algorithm"] |= {
        "credit": {"kind": "critical", "daw": "none"},
        "loss": "gspo_token",
        "entropy": {"mode": "none"},
    }
    (run / "recipe.json").write_text(json.dumps(recipe))
    card = export_module.model_card(run, 2, layout="transformers", adapter=False)
    method = card.split("## Method\n\n")[1].split("\n")[0]
    assert method.startswith(
        "Group-relative policy optimisation. Preset `default`: token credit "
        "`critical (daw: none)`, loss `gspo_token`, advantages `sum`, KL estimator `k3`, "
        "importance sampling `none`; beta "
    )


def test_a_card_shows_what_the_environment_gave_as_a_reference(run, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    recipe = json.loads((run / "recipe.json").read_text())
    recipe["policy"]["path"] = "/models/${oc.env:SECRET}"
    recipe["prompts"]["texts"] = ["${oc.env:SECRET}"]
    (run / "recipe.json").write_text(json.dumps(recipe))
    card = export_module.model_card(run, 2, layout="transformers", adapter=False)
    assert "hunter2" not in card
    assert "Trained from `/models/${oc.env:SECRET}` for" in card
    assert "(texts ['${oc.env:SECRET}'])" in card


def test_a_base_of_the_hub_is_named_for_the_hub(run, tmp_path):
    recipe = json.loads((run / "recipe.json").read_text())
    recipe["policy"]["path"] = "krennic/STAGE/geneval_ours@v1"
    (run / "recipe.json").write_text(json.dumps(recipe))
    card = export_module.model_card(run, 2, layout="deepseek", adapter=False)
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "krennic/STAGE"


@needs_peft
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_an_adapter_is_exported_alone_or_merged(recipe, tmp_path, tiny_janus_folder):
    from peft import PeftModel

    run = train(recipe("steps=2", "policy.lora.rank=2"))
    trained = load(str(run), CPU)
    adapter = export(str(run), tmp_path / "adapter")
    names = {file.name for file in adapter.iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    card = (adapter / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "peft"
    base = JanusForConditionalGeneration.from_pretrained(tiny_janus_folder)
    module = PeftModel.from_pretrained(base, adapter).base_model.model
    assert_close(plain_logits(module, trained), logits_of(trained), atol=1e-5, rtol=0)
    for layout in ("transformers", "deepseek"):
        merged = load(str(export(str(run), tmp_path / layout, layout=layout, merge=True)), CPU)
        assert_close(logits_of(merged), logits_of(trained), atol=1e-5, rtol=0)
    with pytest.raises(InputError, match="has no form for an adapter; add --merge"):
        export(str(run), tmp_path / "no", layout="deepseek")
    with pytest.raises(InputError, match="an adapter keeps its precision"):
        export(str(run), tmp_path / "no", dtype="bfloat16")
    low = export(str(run), tmp_path / "low", merge=True, dtype="bfloat16")
    assert {tensor.dtype for tensor in read_tensors(low).values()} == {torch.bfloat16}


def test_a_folder_that_is_there_is_not_written_to(tmp_path, tiny_janus_folder):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(InputError, match="is there already; name a folder that is not"):
        export(str(tiny_janus_folder), tmp_path)
    with pytest.raises(InputError, match=r"no folder .*nowhere'; name a place"):
        export(str(tiny_janus_folder), tmp_path / "nowhere" / "out")


def test_a_write_that_fails_leaves_nothing(tmp_path, tiny_janus_folder, monkeypatch):
    def fail(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(JanusForConditionalGeneration, "save_pretrained", fail)
    with pytest.raises(StageError, match=r"could not be written .*No space left"):
        export(str(tiny_janus_folder), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
