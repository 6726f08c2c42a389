"""Strict loading of Janus folders: every tensor there, none over, each of its shape."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoProcessor, JanusConfig, JanusForConditionalGeneration, JanusProcessor
from transformers.utils import logging

from stage_rl.errors import WeightsError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SHAPES = "shapes"
EXAMPLE = "deepseek-community/Janus-Pro-1B"
LOADING_ERRORS = (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError)


def load_janus(
    path: str | Path, *, dtype: str = "float32", device: torch.device | str = "cpu"
) -> tuple[JanusForConditionalGeneration, JanusProcessor]:
    """The model and processor of a folder, a hub id or `shapes`; remote code is never run.

    Anything that is not a whole Janus checkpoint is a `WeightsError`.
    """
    source = locate(path)
    check_kind(source)
    with _quiet():
        module = _load_module(source, DTYPES[dtype])
        processor = _load_processor(source)
    check_structure(source, module.config)
    # nn.Module spells out what transformers' wrapper of `to` hides from type checkers.
    nn.Module.to(module, device)
    return module.eval(), processor


def locate(path: str | Path) -> str:
    """The folder or hub id behind a path; a path that names no folder is a `WeightsError`."""
    if str(path) == SHAPES:
        folder = Path(str(resources.files("stage_rl") / "shapes" / "checkpoint"))
        if not (folder / "config.json").is_file():
            raise WeightsError(
                "shapes: this copy of the package has no weights; reinstall it, "
                "or build them with `stage shapes pretrain`"
            )
        return str(folder)
    folder = Path(path).expanduser()
    if folder.is_dir():
        return str(folder)
    if folder.exists():
        raise WeightsError(f"{path}: is a file; write the folder of the weights")
    if str(path).count("/") != 1 or str(path)[0] in "./~":
        raise WeightsError(
            f"{path}: no such folder; write a folder with a Janus checkpoint, "
            f"a hub id such as {EXAMPLE}, or {SHAPES}"
        )
    return str(path)


def check_kind(source: str) -> None:
    """Refuses what is not a Janus in transformers' layout (`WeightsError`)."""
    try:
        config, _ = JanusConfig.get_config_dict(source)
    except (OSError, ValueError) as error:
        raise WeightsError(f"{source}: no model there: {_one_line(error)}") from error
    kind = config.get("model_type")
    if kind == JanusConfig.model_type:
        return
    if kind == "multi_modality":
        raise WeightsError(
            f"{source}: a Janus in DeepSeek's own layout; write its conversion for transformers, "
            f"such as {EXAMPLE}"
        )
    if kind is None:
        raise WeightsError(f"{source}: holds no config.json of a model; write a Janus folder")
    raise WeightsError(f"{source}: model_type is '{kind}'; write a model of type 'janus'")


def check_structure(source: str, config: Any) -> None:
    """Refuses a Janus whose parts the adapter does not know, or do not fit (`WeightsError`)."""
    text, vision, vq = config.text_config, config.vision_config, config.vq_config
    wanted = (
        ("text_config.model_type", text.model_type, "llama"),
        ("text_config.hidden_act", text.hidden_act, "silu"),
        ("text_config.attention_bias", text.attention_bias, False),
        ("text_config.mlp_bias", text.mlp_bias, False),
        ("vq_config.hidden_act", vq.hidden_act, "gelu"),
        ("vision_config.num_image_tokens", vision.num_image_tokens, vq.num_patches**2),
        ("vq_config.projection_dim", vq.projection_dim, text.hidden_size),
    )
    for key, value, needed in wanted:
        if value != needed:
            raise WeightsError(f"{source}: {key} is {value!r}; this policy needs {needed!r}")


def _load_module(source: str, dtype: torch.dtype) -> JanusForConditionalGeneration:
    try:
        # Mismatched shapes are let through here to be named below, together with the rest.
        loaded: Any = JanusForConditionalGeneration.from_pretrained(
            source,
            dtype=dtype,
            attn_implementation="sdpa",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        module, info = loaded
    except LOADING_ERRORS as error:
        raise WeightsError(f"{source}: cannot load the weights: {_one_line(error)}") from error
    faults = []
    for kind in ("missing", "unexpected", "mismatched"):
        entries = info[f"{kind}_keys"]
        names = sorted(entry if isinstance(entry, str) else entry[0] for entry in entries)
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            what = "of another shape" if kind == "mismatched" else kind
            faults.append(f"{what}: {', '.join(names[:3])}{more}")
    if faults:
        raise WeightsError(
            f"{source}: the weights do not fit the model: {'; '.join(faults)}; "
            "write a complete checkpoint"
        )
    return module


def _load_processor(source: str) -> JanusProcessor:
    try:
        # A tokenizer without image tokens shows as a missing attribute.
        processor = AutoProcessor.from_pretrained(source)
    except (*LOADING_ERRORS, AttributeError) as error:
        raise WeightsError(f"{source}: cannot load the processor: {_one_line(error)}") from error
    if not isinstance(processor, JanusProcessor):
        raise WeightsError(
            f"{source}: its processor is a {type(processor).__name__}; write a folder with the "
            "files of a JanusProcessor beside the weights"
        )
    return processor


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers' bars and reports off the console; what matters becomes an error."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
