"""The model card of a run: base, method, data, rewards, figures, recipe; from its folder alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from stage_rl.config import load_recipe, resolved_json
from stage_rl.policies.hub import HUB_ID
from stage_rl.schema import Recipe

TITLE = "STAGE: Stable and Generalizable GRPO for Autoregressive Image Generation"
SHOWN = ("reward/", "entropy/policy", "entropy/reference", "kl/mean", "probe/kl", "panel/score")
"""Beginnings of the metrics that the card shows."""
WINDOW = 10
"""Steps that the figures are averaged over."""
LOADING = {
    "transformers": """from transformers import JanusForConditionalGeneration, JanusProcessor
model = JanusForConditionalGeneration.from_pretrained(FOLDER)
processor = JanusProcessor.from_pretrained(FOLDER)""",
    "deepseek": """from janus.models import MultiModalityCausalLM, VLChatProcessor
processor = VLChatProcessor.from_pretrained(FOLDER)
model = MultiModalityCausalLM.from_pretrained(FOLDER)""",
    "adapter": """from peft import PeftModel
from transformers import JanusForConditionalGeneration
model = JanusForConditionalGeneration.from_pretrained(BASE)
model = PeftModel.from_pretrained(model, FOLDER)""",
}


def model_card(run: Path, step: int, *, layout: str, adapter: bool) -> str:
    """The text of README.md for the checkpoint of a run after `step` steps."""
    recipe = load_recipe(run / "recipe.json")
    base = str(getattr(recipe.policy, "path", recipe.policy.kind))
    parts = [
        _front_matter(base, adapter=adapter),
        f"# {recipe.name}",
        f"{'An adapter for' if adapter else 'Trained from'} `{base}` for {step} steps with "
        "[stage-rl](https://arxiv.org/abs/2509.25027). The weights keep the licence of their base.",
        "## Load\n\n```python\n" + LOADING["adapter" if adapter else layout] + "\n```",
        f"## Method\n\n{_method(recipe)}",
        f"## Data\n\n{_data(recipe)}",
        f"## Rewards\n\n{_rewards(recipe)}",
        f"## Figures\n\n{_figures(run / 'metrics.jsonl', step)}",
        *_evaluation(run / "evaluation.txt", step),
        f"## Recipe\n\n```yaml\n{_resolved(recipe)}```",
        f"## Made with\n\n{_environment(run / 'environment.json')}",
        f"If you use it, cite the paper: {TITLE}, arXiv 2509.25027.",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(base: str, *, adapter: bool) -> str:
    """What the hub reads of a card."""
    fields: dict[str, Any] = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-to-image",
        "tags": ["stage-rl", "grpo", "janus"],
    }
    hub = HUB_ID.fullmatch(base)
    if hub is not None and not Path(base).exists():
        fields["base_model"] = hub[1]
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---"


def _method(recipe: Recipe) -> str:
    algorithm, rollout, optimizer = recipe.algorithm, recipe.rollout, recipe.optimizer
    parts = ["Group-relative policy optimisation (equations 2 to 4 of the paper)"]
    if algorithm.reweights_advantages:
        parts.append("advantages weighted by the similarity of opposed tokens (5 to 8)")
    if algorithm.weights_kl:
        parts.append("a KL weight from the same similarity (3.2)")
    if algorithm.entropy.mode != "none":
        equations = "11, 12" if algorithm.entropy.mode == "reward" else "13, 14"
        parts.append(f"an entropy {algorithm.entropy.mode} ({equations})")
    told = parts[0] + (" with " + " and ".join(parts[1:]) if parts[1:] else "")
    return (
        f"{told}. "
        f"Preset `{algorithm.preset}`, beta {algorithm.beta:g}; {rollout.prompts_per_step} prompts "
        f"x {rollout.group_size} images a step, guidance {rollout.guidance_scale:g}; learning rate "
        f"{optimizer.lr:g} ({optimizer.schedule}), seed {recipe.seed}."
    )


def _data(recipe: Recipe) -> str:
    """Training by reward needs prompts alone."""
    settings = recipe.prompts.model_dump(mode="json", exclude={"kind"})
    told = ", ".join(f"{key} {value}" for key, value in settings.items() if value is not None)
    return f"Prompts only, no images: `{recipe.prompts.kind}`{f' ({told})' if told else ''}."


def _rewards(recipe: Recipe) -> str:
    rows = [f"| {r.name} | {r.kind} | {r.weight:g} |" for r in recipe.rewards]
    return "\n".join(["| reward | kind | weight |", "|---|---|---|", *rows])


def _figures(metrics: Path, step: int) -> str:
    """First and last steps of what was logged until the checkpoint."""
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
    records = [record for record in map(json.loads, lines) if record["step"] < step]
    if not records:
        return "None were logged."
    window = max(1, min(WINDOW, len(records) // 2))
    names = dict.fromkeys(name for record in records for name in record if name.startswith(SHOWN))
    rows = [
        f"| {name} | {_mean(records[:window], name)} | {_mean(records[-window:], name)} |"
        for name in names
    ]
    span = "step" if window == 1 else f"{window} steps"
    return "\n".join([f"| metric | first {span} | last {span} |", "|---|---|---|", *rows])


def _mean(records: list[dict[str, Any]], name: str) -> str:
    values = [record[name] for record in records if record.get(name) is not None]
    return f"{sum(values) / len(values):.4g}" if values else "-"


def _evaluation(table: Path, step: int) -> list[str]:
    """The comparison with the base, where it was made for this number of steps."""
    text = table.read_text(encoding="utf-8") if table.exists() else ""
    if not text.startswith(f"after {step} steps; "):
        return []
    kept = [line for line in text.splitlines() if not line.startswith("images: ")]
    return ["## Evaluation\n\n```\n" + "\n".join(kept) + "\n```"]


def _resolved(recipe: Recipe) -> str:
    """Every setting, as YAML that `stage train` takes."""
    return yaml.safe_dump(json.loads(resolved_json(recipe)), sort_keys=False)


def _environment(file: Path) -> str:
    made = json.loads(file.read_text(encoding="utf-8"))
    packages = ", ".join(f"{name} {version}" for name, version in made["packages"].items())
    devices = ", ".join(dict.fromkeys(made["devices"])) or "CPU"
    return f"Python {made['python']}, {packages}; {devices}."
