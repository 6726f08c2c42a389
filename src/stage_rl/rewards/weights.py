"""Loading of the models behind rewards: transformers folders and hub ids, whole or not at all."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from stage_rl.errors import WeightsError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LOADING_ERRORS = (
    *(OSError, ValueError, RuntimeError, ImportError, KeyError, TypeError),
    *(SafetensorError, StrictDataclassError),
)
COMPUTED = r"(^|\.)(position_ids|relative_position_index|inv_freq)$"
"""Tables that old checkpoints keep and newer models compute from their configuration."""
SWIN_UNREAD = r"\.swin\.layernorm\."
"""The last norm of a Swin that serves as a backbone; published detectors come without it."""
Loaded = TypeVar("Loaded")


def load_model(
    model_class: Any,
    path: str,
    *,
    dtype: str = "float32",
    device: torch.device | str = "cpu",
    unread: str | None = None,
) -> Any:
    """A frozen transformers model in eval mode, from a folder or hub id; remote code is never run.

    A model with tensors missing, over or of another shape, or of another kind, is a `WeightsError`;
    `unread` matches the names of those that no forward pass reads, which may be missing or over.
    """
    source = locate(path)
    options = {
        "dtype": DTYPES[dtype],
        "ignore_mismatched_sizes": True,  # to be named below, together with the missing
        "output_loading_info": True,
    }
    load = functools.partial(model_class.from_pretrained, source, **options)
    module, info = quietly(load, source, "the weights")
    idle = re.compile(COMPUTED if unread is None else f"{COMPUTED}|{unread}")
    refuse(
        f"{source}: the weights do not fill a {type(module).__name__}",
        {
            "missing": {name for name in info["missing_keys"] if not idle.search(name)},
            "unexpected": {name for name in info["unexpected_keys"] if not idle.search(name)},
            "of another shape": {entry[0] for entry in info["mismatched_keys"]},
        },
        "write a checkpoint of this model, complete and with nothing else",
    )
    nn.Module.to(module, device)
    return module.requires_grad_(False).eval()


def load_part(loader: Callable[..., Loaded], path: str, what: str, **options: Any) -> Loaded:
    """A processor or config, by its `from_pretrained`; failure is a `WeightsError`."""
    source = locate(path)
    return quietly(lambda: loader(source, **options), source, what)


def load_tokenizer(path: str) -> Any:
    """The tokenizer beside the weights; one without a vocabulary is a `WeightsError`."""
    tokenizer = load_part(AutoTokenizer.from_pretrained, path, "the tokenizer")
    # Without its files, transformers builds a tokenizer that knows no word and says nothing.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise WeightsError(f"{path}: no tokenizer there; write a folder that has its files too")
    return tokenizer


def locate(path: str) -> str:
    """The folder or hub id behind a path; a path that names no folder is a `WeightsError`."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return str(folder)
    if folder.exists():
        raise WeightsError(f"{path}: is a file; write the folder of the weights")
    if path.count("/") != 1 or path[0] in "./~":
        raise WeightsError(f"{path}: no such folder; write a folder with weights or a hub id")
    return path


def quietly(load: Callable[[], Loaded], source: str, what: str) -> Loaded:
    """What `load` returns, nothing on the console; its failure is a `WeightsError` of one line."""
    try:
        with _quiet():
            return load()
    except LOADING_ERRORS as error:
        text = " ".join(str(error).split())
        text = text if len(text) <= 300 else text[:297] + "..."
        raise WeightsError(f"{source}: cannot load {what}: {text}") from error


def refuse(what: str, faults: Mapping[str, Iterable[str]], advice: str) -> None:
    """Raises a WeightsError that names three tensors of each kind of fault, where there is one."""
    told = []
    for kind, names in faults.items():
        found = sorted(names)
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        told += [f"{kind}: {', '.join(found[:3])}{more}"] if found else []
    if told:
        raise WeightsError(f"{what}: {'; '.join(told)}; {advice}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers' bars and reports off the console; what matters becomes an error."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
