"""A folder in DeepSeek's layout: a Janus from it, and a Janus into it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import GenerationConfig, JanusForConditionalGeneration, JanusProcessor

from stage_rl.errors import WeightsError
from stage_rl.policies.deepseek import config as settings
from stage_rl.policies.deepseek.names import (
    Entry,
    entries,
    is_unused,
    to_deepseek,
    to_transformers,
)
from stage_rl.policies.deepseek.processor import (
    prompt_format,
    read_json,
    read_processor,
    write_json,
    write_processor,
)
from stage_rl.policies.tensor_files import describe_faults, read_tensors

TEXT_HEAD = "language_model.lm_head.weight"
COPIED = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("processor_config.json", "preprocessor_config.json"),
)


def is_deepseek(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of this layout."""
    return config.get("model_type") == settings.MODEL_TYPE


def describe(folder: Path, source: str) -> tuple[Any, JanusProcessor, GenerationConfig]:
    """Configuration, processor and generation settings of a folder; its tensors are not read."""
    processor, ids = read_processor(folder, source)
    config = settings.to_transformers(read_json(folder, "config.json", source), source, ids)
    generation = GenerationConfig(
        bos_token_id=ids["bos"],
        eos_token_id=ids["eos"],
        pad_token_id=ids["pad"],
        guidance_scale=5,
        generation_kwargs={"boi_token_id": ids["boi"]},
    )
    return config, processor, generation


def read_state(folder: Path, source: str, config: Any) -> dict[str, Tensor]:
    """The tensors of a folder as the state of transformers' Janus.

    One that is missing, unexpected or of another shape is a `WeightsError` with DeepSeek's name.
    """
    layout = _layout(config)
    tensors = read_tensors(folder)
    wanted = {name: entry.shape for name, entry in layout.items()}
    faults = describe_faults(wanted, {k: v for k, v in tensors.items() if not is_unused(k)})
    if faults:
        raise WeightsError(
            f"{source}: the weights do not fit the model: {faults}; write a complete checkpoint"
        )
    return to_transformers(layout, tensors)


def write_folder(
    module: JanusForConditionalGeneration,
    processor: JanusProcessor,
    folder: Path,
    *,
    state: Mapping[str, Tensor],
    pad_id: int,
    like: Path | None,
) -> None:
    """Writes a Janus in DeepSeek's layout: safetensors, settings, tokenizer and processor.

    `like` is the folder of this layout that the model came from, if it did: its files are copied,
    and the tensors that no forward pass reads come along. Without it these are left out, and
    DeepSeek's code says that it initialises them anew.
    """
    tensors = to_deepseek(_layout(module.config), state)
    dtype = str(module.dtype).removeprefix("torch.")
    if like is None:
        tied = module.lm_head.weight is module.get_input_embeddings().weight
        write_json(folder / "config.json", settings.to_deepseek(module.config, dtype, tied=tied))
        write_processor(processor, pad_id, folder)
    else:
        unused = {name: t for name, t in read_tensors(like).items() if is_unused(name)}
        tensors |= {name: tensor.to(module.dtype) for name, tensor in unused.items()}
        raw = read_json(like, "config.json", str(like))
        write_json(folder / "config.json", raw | {"torch_dtype": dtype})
        for name in COPIED:
            if (like / name).is_file():
                shutil.copyfile(like / name, folder / name)
        spoken, file = prompt_format(processor), folder / "processor_config.json"
        described = read_json(folder, file.name, str(like))
        if described.get("sft_format", "deepseek") != spoken:
            write_json(file, described | {"sft_format": spoken})
    held = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    # Where the text head is tied to the embedding the layout still has both.
    held[TEXT_HEAD] = held[TEXT_HEAD].clone()
    save_torch_state_dict(held, folder, metadata={"format": "pt"})


def _layout(config: Any) -> dict[str, Entry]:
    """The tensors that a Janus of this configuration has in DeepSeek's layout."""
    with torch.device("meta"):
        module = JanusForConditionalGeneration(config)
    return entries({name: tensor.shape for name, tensor in module.state_dict().items()})
