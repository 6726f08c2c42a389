"""A policy as a folder for other programs, with a model card of the run that trained it."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from stage_rl.algorithm_config import AlgorithmConfig
from stage_rl.config import load_recipe, resolved_json, values_to_show
from stage_rl.errors import InputError, StageError
from stage_rl.files import read_metrics, writing
from stage_rl.policies.base import Policy, PolicyConfig
from stage_rl.policies.loading import HUB_ID, find, quiet
from stage_rl.policies.lora import has_adapter, save_adapter
from stage_rl.recipe import Recipe
from stage_rl.run_records import record_of
from stage_rl.settings import SHIPPED_MODELS


def export(
    policy: Policy,
    out: Path,
    *,
    base: str,
    run: Path | None = None,
    step: int = 0,
    layout: str | None = None,
    merge: bool = False,
    dtype: Literal["float32", "bfloat16"] | None = None,
) -> Path:
    """Writes a policy to a new folder `out`, which is there whole or not at all.

    `base` names the weights it began with; `run` and `step` are those that trained it, for the
    model card. An adapter is written alone, for PEFT, unless `merge` adds it to the weights.
    `layout` None is the first that the family has. `dtype` is that of the tensors, which the policy
    has from then on; None: that they are held in.
    """
    check_free(out)
    layout = layout or policy.folder_layouts[0]
    if merge and not has_adapter(policy.module):
        raise InputError("--merge: the model has no adapter to merge; leave it out")
    adapter = has_adapter(policy.module) and not merge
    _check_form(policy, layout=layout, adapter=adapter, dtype=dtype)
    if dtype is not None:
        for name, parameter in policy.module.named_parameters():
            if ".lora_" not in name:  # an adapter stays in fp32 until it is merged
                parameter.data = parameter.data.to(getattr(torch, dtype))
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with writing(out, hint="make room, or name another folder"):
            temporary.mkdir(parents=True)
            _write(policy, temporary, base=base, layout=layout, adapter=adapter)
            if run is not None:
                card = model_card(run, step, layout=layout, adapter=adapter)
                (temporary / "README.md").write_text(card, encoding="utf-8")
            for file in temporary.rglob("*.safetensors"):
                # safetensors makes files that nobody else can read, whatever the umask says.
                file.chmod(stat.S_IMODE(temporary.stat().st_mode) & 0o666)
            temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def push(folder: Path, name: str) -> str:
    """Uploads an export as the model OWNER/NAME of the hub, which is made private where it is new;
    its address. A StageError where that fails; the folder stays.
    """
    try:
        hub = HfApi()
        url = str(hub.create_repo(name, private=True, exist_ok=True))
        hub.upload_folder(folder_path=folder, repo_id=name)
    except (HfHubHTTPError, OSError, ValueError) as error:
        text = " ".join(str(error).split())
        raise StageError(
            f"--push {name}: {text}; log in with `hf auth login`, then `hf upload {name} {folder}`"
        ) from error
    return url


def check_free(out: Path) -> None:
    """An InputError for a folder that cannot be made, or that holds something."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out}: is there already; name a folder that is not")
    if not out.absolute().parent.is_dir():
        raise InputError(f"{out}: no folder '{out.parent}'; name a place in a folder that is")
    if not os.access(out.absolute().parent, os.W_OK):
        raise InputError(f"{out}: no folder can be made there; name another")


def _check_form(policy: Policy, *, layout: str, adapter: bool, dtype: str | None) -> None:
    if layout not in policy.folder_layouts:
        known = " or ".join(policy.folder_layouts)
        raise InputError(f"--layout {layout}: is not for this family; write --layout {known}")
    if adapter and layout not in policy.adapter_layouts:
        raise InputError(f"--layout {layout}: has no form for an adapter; add --merge")
    if adapter and dtype is not None:
        raise InputError("--dtype: an adapter keeps its precision; leave it out, or add --merge")


def _write(policy: Policy, folder: Path, *, base: str, layout: str, adapter: bool) -> None:
    with quiet():
        if adapter:
            # A base that can be found from another working directory.
            local = base in SHIPPED_MODELS or Path(base).expanduser().is_dir()
            known = str(find(base).folder.absolute()) if local else base
            save_adapter(policy.module, folder, base=known)
        else:
            policy.save(folder, layout=layout, base=base)


# The model card of a run, from its folder alone.


TITLE = "STAGE: Stable and Generalizable GRPO for Autoregressive Image Generation"

SHOWN = (
    "reward/",
    "entropy/policy",
    "entropy/reference",
    "kl/mean",
    "probe/kl",
    "validation/score",
)
"""Beginnings of the metrics that the card shows."""

WINDOW = 10
"""Steps that the figures are averaged over."""


def model_card(run: Path, step: int, *, layout: str, adapter: bool) -> str:
    """The text of README.md for the checkpoint of a run after `step` steps."""
    recipe = load_recipe(run / "recipe.json")
    shown = values_to_show(recipe)
    base = str(shown["policy"].get("path", recipe.policy.kind))
    written = recipe.policy.loading_code.get("adapter" if adapter else layout, "")
    # transformers' generate fails at 1, where guidance does nothing.
    code = written.replace("GUIDANCE", f"{max(recipe.guidance_scale, 1.0001):g}")
    parts = [
        _front_matter(base, recipe.policy, adapter=adapter),
        f"# {recipe.name}",
        f"{'An adapter for' if adapter else 'Trained from'} `{base}` for {step} steps with "
        "[stage-rl](https://arxiv.org/abs/2509.25027). The weights keep the licence of their base.",
        f"## {'Draw' if 'GUIDANCE' in written else 'Load'}\n\n```python\n{code}\n```",
        f"## Method\n\n{_method(recipe, shown['algorithm'])}",
        f"## Data\n\n{_data(shown['prompts'])}",
        f"## Rewards\n\n{_rewards(recipe)}",
        f"## Figures\n\n{_figures(run / 'metrics.jsonl', step)}",
        *_evaluation(run / "evaluation.txt", step),
        f"## Recipe\n\n```yaml\n{_resolved(recipe)}```",
        f"## Made with\n\n{_environment(run / 'environment.json')}",
        f"If you use it, cite the paper: {TITLE}, arXiv 2509.25027.",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(base: str, policy: PolicyConfig, *, adapter: bool) -> str:
    """What the hub reads of a card."""
    fields: dict[str, Any] = {
        "pipeline_tag": "text-to-image",
        "tags": ["stage-rl", "grpo", *policy.tags],
    }
    if adapter or "transformers" in policy.loading_code:
        fields = {"library_name": "peft" if adapter else "transformers"} | fields
    hub = HUB_ID.fullmatch(base)
    if hub is not None and not Path(base).exists():
        fields["base_model"] = hub[1]
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---"


def _method(recipe: Recipe, shown: Mapping[str, Any]) -> str:
    """`shown`: the section algorithm without what the environment gave."""
    algorithm, rollout, optimizer = recipe.algorithm, recipe.rollout, recipe.optimizer
    kinds = {
        "token credit": shown["credit"],
        "loss": shown["loss"],
        "advantages": algorithm.advantage,
        "KL estimator": algorithm.kl.estimator,
        "importance sampling": algorithm.importance_sampling,
    }
    return (
        f"{_objective(algorithm)}. Preset `{algorithm.preset}`: "
        f"{', '.join(f'{name} `{_written(kind)}`' for name, kind in kinds.items())}; "
        f"beta {algorithm.beta:g}; {rollout.prompts_per_step} prompts "
        f"x {rollout.group_size} images a step, guidance {recipe.guidance_scale:g}; learning rate "
        f"{optimizer.lr:g} ({optimizer.schedule}), seed {recipe.seed}."
    )


def _objective(algorithm: AlgorithmConfig) -> str:
    """What of STAGE is in the objective, by the paper's equations."""
    parts = []
    if algorithm.credit == "stage" and algorithm.reweights_advantages:
        parts.append("advantages weighted by the similarity of opposed tokens (5 to 8)")
    if algorithm.credit == "stage" and algorithm.weights_kl:
        parts.append("a KL weight from the same similarity (section 3.2)")
    entropy_forms = {
        "reward": "an entropy reward (11, 12)",
        "constant": "a constant for the best samples (12 with an entropy reward of 1)",
        "loss": "an entropy loss (13, 14)",
    }
    if algorithm.entropy.mode in entropy_forms:
        parts.append(entropy_forms[algorithm.entropy.mode])
    named = f" with {' and '.join(parts)}, equations of the paper" if parts else ""
    return f"Group-relative policy optimisation{named}"


def _written(kind: str | Mapping[str, Any]) -> str:
    """The name of a function, with its parameters where it has some."""
    if isinstance(kind, str):
        return kind
    parameters = [f"{name}: {value}" for name, value in kind.items() if name != "kind"]
    return f"{kind['kind']} ({', '.join(parameters)})"


def _data(prompts: Mapping[str, Any]) -> str:
    """Training by reward needs prompts alone."""
    settings = {key: value for key, value in prompts.items() if key != "kind"}
    given = ", ".join(f"{key} {value}" for key, value in settings.items() if value is not None)
    return f"Prompts only, no images: `{prompts['kind']}`{f' ({given})' if given else ''}."


def _rewards(recipe: Recipe) -> str:
    rows = [f"| {r.name} | {r.kind} | {r.weight:g} |" for r in recipe.rewards]
    return "\n".join(["| reward | kind | weight |", "|---|---|---|", *rows])


def _figures(metrics: Path, step: int) -> str:
    """First and last steps of what was logged until the checkpoint."""
    records = [record for record in read_metrics(metrics) if record["step"] < step]
    if not records:
        return "None were logged."
    window = max(1, min(WINDOW, len(records) // 2))

    def mean(part: list[dict[str, Any]], name: str) -> str:
        values = [record[name] for record in part if record.get(name) is not None]
        return f"{sum(values) / len(values):.4g}" if values else "-"

    names = dict.fromkeys(name for record in records for name in record if name.startswith(SHOWN))
    rows = [
        f"| {name} | {mean(records[:window], name)} | {mean(records[-window:], name)} |"
        for name in names
    ]
    span = "step" if window == 1 else f"{window} steps"
    return "\n".join([f"| metric | first {span} | last {span} |", "|---|---|---|", *rows])


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
    made = record_of(file)
    if not made:
        return "Not known."
    packages = ", ".join(f"{name} {version}" for name, version in made["packages"].items())
    devices = ", ".join(dict.fromkeys(made["devices"])) or made.get("processor") or "CPU"
    return f"Python {made['python']}, {packages}; {devices}."
