"""Models out of runs: a folder for other programs, with a model card."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from torch import nn

from stage_rl.config import load_recipe
from stage_rl.errors import InputError, StageError
from stage_rl.policies.base import Policy
from stage_rl.policies.hub import SHIPPED_MODEL, find
from stage_rl.policies.janus import JanusPolicy
from stage_rl.policies.lora import has_adapter, save_adapter
from stage_rl.policies.weights import DTYPES, original_folder, quiet
from stage_rl.training.card import model_card
from stage_rl.training.models import find_run, load_policy

Layout = Literal["transformers", "deepseek"]


def export(
    model: str,
    out: str | Path,
    *,
    layout: Layout = "transformers",
    merge: bool = False,
    dtype: Literal["float32", "bfloat16"] | None = None,
) -> Path:
    """Writes a model to a new folder `out`, which is there whole or not at all.

    `model` is what `load_policy` takes. Where its run trained an adapter, `out` holds the adapter
    alone, for PEFT, unless `merge` adds it to the weights. `dtype` is that of the tensors; None:
    the one they are held in. A run's `out` has a model card, README.md.
    """
    out = Path(out)
    _check_free(out)
    policy = load_policy(model, torch.device("cpu"))
    adapter = has_adapter(policy.module) and not merge
    _check_wish(model, policy, layout=layout, adapter=adapter, dtype=dtype)
    if dtype is not None:
        _hold_in(policy.module, DTYPES[dtype])
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        _write(policy, temporary, base=base_of(model), layout=layout, adapter=adapter)
        _write_card(model, temporary, layout=layout, adapter=adapter)
        temporary.rename(out)
    # safetensors and torch wrap a full disk in errors of their own
    except (OSError, SafetensorError, RuntimeError) as error:
        raise StageError(f"{out}: could not be written ({error}); name another folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def base_of(model: str) -> str:
    """The weights a model began with: those of its run's recipe, else the model itself."""
    found = find_run(model)
    if found is None:
        return model
    return getattr(load_recipe(found[0] / "recipe.json").policy, "path", "")


def _hold_in(module: nn.Module, dtype: torch.dtype) -> None:
    """Casts the weights in place; an adapter stays in fp32 until it is merged into them."""
    for name, parameter in module.named_parameters():
        if ".lora_" not in name:
            parameter.data = parameter.data.to(dtype)


def _check_free(out: Path) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out}: is there already; name a folder that is not")
    if not out.absolute().parent.is_dir():
        raise InputError(f"{out}: no folder '{out.parent}'; name a place in a folder that is")


def _check_wish(
    model: str, policy: Policy, *, layout: Layout, adapter: bool, dtype: str | None
) -> None:
    if layout == "deepseek" and not isinstance(policy, JanusPolicy):
        raise InputError(f"{model}: --layout deepseek is for Janus; write --layout transformers")
    if adapter and layout == "deepseek":
        raise InputError(f"{model}: --layout deepseek has no form for an adapter; add --merge")
    if adapter and dtype is not None:
        raise InputError(f"{model}: an adapter keeps its precision; leave --dtype out, or --merge")


def _write(policy: Policy, folder: Path, *, base: str, layout: Layout, adapter: bool) -> None:
    with quiet():
        if adapter:
            save_adapter(policy.module, folder, base=_absolute(base))
        elif isinstance(policy, JanusPolicy) and layout == "deepseek":
            policy.save(folder, layout=layout, like=original_folder(base))
        else:
            policy.save(folder)


def _absolute(base: str) -> str:
    """A base as it can be found from another working directory: a hub id, or a whole path."""
    local = base == SHIPPED_MODEL or Path(base).expanduser().is_dir()
    return str(find(base).folder.absolute()) if local else base


def _write_card(model: str, folder: Path, *, layout: Layout, adapter: bool) -> None:
    found = find_run(model)
    if found is None:
        return
    run, checkpoint = found
    text = model_card(run, checkpoint.state.step, layout=layout, adapter=adapter)
    (folder / "README.md").write_text(text, encoding="utf-8")
