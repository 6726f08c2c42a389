"""Strict loading of Janus folders: every tensor there, none over, each of its shape."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoProcessor,
    GenerationConfig,
    JanusConfig as HfJanusConfig,
    JanusForConditionalGeneration,
    JanusProcessor,
)
from transformers.utils import logging

from stage_rl.errors import WeightsError
from stage_rl.policies.deepseek import files as deepseek
from stage_rl.policies.hub import Source, find, one_line
from stage_rl.policies.tensor_files import INDEXES, SINGLE, read_tensors

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LOADING_ERRORS = (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError)


def load_janus(
    path: str | Path, *, dtype: str = "float32", device: torch.device | str = "cpu"
) -> tuple[JanusForConditionalGeneration, JanusProcessor]:
    """The model and processor of a folder, a hub id or `shapes`, in either layout.

    Nothing of a checkpoint is ever run. What is no whole Janus checkpoint is a `WeightsError`;
    a hub model of another kind is refused before its weights are downloaded.
    """
    source = find(path)
    original = check_kind(source)
    with quiet():
        config, processor, generation = (_describe_original if original else _describe)(source)
        check_structure(source.name, config)
        source.fetch_weights()
        state = _state(source, config, original=original)
        module = _load_module(source, config, state, DTYPES[dtype])
    if generation is not None:
        module.generation_config = generation
    # nn.Module spells out what transformers' wrapper of `to` hides from type checkers.
    nn.Module.to(module, device)
    return module.eval(), processor


def original_folder(path: str | Path) -> Path | None:
    """The folder behind a path where it is in DeepSeek's layout, its weights present; else None."""
    source = find(path)
    if not check_kind(source):
        return None
    source.fetch_weights()
    return source.folder


def check_kind(source: Source) -> bool:
    """Whether a Janus is in DeepSeek's layout; what is no Janus is a `WeightsError`."""
    try:
        config, _ = HfJanusConfig.get_config_dict(source.folder)
    except (OSError, ValueError) as error:
        raise WeightsError(f"{source.name}: no model there: {one_line(error)}") from error
    kind = config.get("model_type")
    if kind is None:
        raise WeightsError(
            f"{source.name}: holds no config.json of a model; write a Janus folder, "
            "on the hub as OWNER/NAME or OWNER/NAME/FOLDER"
        )
    original = deepseek.is_deepseek(config)
    if kind != HfJanusConfig.model_type and not original:
        raise WeightsError(f"{source.name}: model_type is '{kind}'; write a model of type 'janus'")
    return original


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


def _describe(source: Source) -> tuple[Any, JanusProcessor, GenerationConfig | None]:
    """Configuration and processor; the generation settings come with the weights."""
    try:
        config = HfJanusConfig.from_pretrained(source.folder)
    except LOADING_ERRORS as error:
        raise WeightsError(f"{source.name}: config.json: {one_line(error)}") from error
    return config, _load_processor(source), None


def _describe_original(source: Source) -> tuple[Any, JanusProcessor, GenerationConfig]:
    try:
        return deepseek.describe(source.folder, source.name)
    except LOADING_ERRORS as error:
        raise WeightsError(f"{source.name}: {one_line(error)}") from error


def _state(source: Source, config: Any, *, original: bool) -> dict[str, Tensor] | None:
    """The tensors where transformers would not find them by itself, else None."""
    if original:
        return deepseek.read_state(source.folder, source.name, config)
    if any((source.folder / name).is_file() for name in (*INDEXES, *SINGLE)):
        return None
    return read_tensors(source.folder)


def _load_module(
    source: Source, config: Any, state: dict[str, Tensor] | None, dtype: torch.dtype
) -> JanusForConditionalGeneration:
    try:
        # Mismatched shapes are let through here to be named below, together with the rest.
        loaded: Any = JanusForConditionalGeneration.from_pretrained(
            source.folder if state is None else None,
            config=config,
            state_dict=state,
            dtype=dtype,
            attn_implementation="sdpa",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        module, info = loaded
    except LOADING_ERRORS as error:
        raise WeightsError(f"{source.name}: cannot load the weights: {one_line(error)}") from error
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
            f"{source.name}: the weights do not fit the model: {'; '.join(faults)}; "
            "write a complete checkpoint"
        )
    return module


def _load_processor(source: Source) -> JanusProcessor:
    try:
        # A tokenizer without image tokens shows as a missing attribute.
        processor = AutoProcessor.from_pretrained(source.folder, trust_remote_code=False)
    except (*LOADING_ERRORS, AttributeError) as error:
        raise WeightsError(
            f"{source.name}: cannot load the processor: {one_line(error)}"
        ) from error
    if not isinstance(processor, JanusProcessor):
        raise WeightsError(
            f"{source.name}: its processor is a {type(processor).__name__}; write a folder with "
            "the files of a JanusProcessor beside the weights"
        )
    return processor


@contextmanager
def quiet() -> Iterator[None]:
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
