"""Tokenizer, prompt template and image processor in the files of DeepSeek's layout.

The ids of pad and begin-of-image differ between the published sizes: they are looked up by the
token that `processor_config.json` names, or DeepSeek's code takes where the file is silent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import JanusProcessor, PreTrainedTokenizerFast
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

from stage_rl.errors import WeightsError
from stage_rl.policies.hub import one_line

TAGS = {
    "image_tag": "<image_placeholder>",
    "image_start_tag": "<begin_of_image>",
    "image_end_tag": "<end_of_image>",
    "pad_tag": "<｜▁pad▁｜>",
}
ROLES = {"deepseek": ("<|User|>", "<|Assistant|>"), "deepseek_old": ("User", "Assistant")}
PLAIN = "plain"
FORMATS = (*ROLES, PLAIN)
IMAGE_KEYS = ("do_normalize", "image_mean", "image_std", "min_size", "rescale_factor")


def read_processor(folder: Path, source: str) -> tuple[JanusProcessor, dict[str, int]]:
    """The processor of a folder, and the ids of bos, eos, pad, boi and image.

    A file or a token that is missing is a `WeightsError`.
    """
    settings = read_json(folder, "processor_config.json", source)
    tags = {key: settings.get(key, tag) for key, tag in TAGS.items()}
    tokenizer, ids = _read_tokenizer(folder, source, tags)
    style = settings.get("sft_format", "deepseek")
    if style not in FORMATS:
        raise WeightsError(
            f"{source}: processor_config.json: sft_format is {style!r}; "
            f"this policy knows {', '.join(FORMATS)}"
        )
    images = read_json(folder, "preprocessor_config.json", source)
    side = images["image_size"]
    image_processor = JanusImageProcessorPil(
        size={"height": side, "width": side},
        **{key: images[key] for key in IMAGE_KEYS if key in images},
    )
    return JanusProcessor(
        image_processor,
        tokenizer,
        chat_template=_template(style, tags["image_tag"], str(tokenizer.eos_token)),
        num_image_tokens=settings.get("num_image_tokens", 576),
    ), ids


def write_processor(processor: Any, pad_id: int, folder: Path) -> None:
    """Writes the files that `read_processor` and DeepSeek's own code read.

    A prompt template that DeepSeek's code does not know is a `WeightsError`.
    """
    tokenizer, images = processor.tokenizer, processor.image_processor
    pad = tokenizer.convert_ids_to_tokens(pad_id)
    tags = {
        "image_tag": tokenizer.image_token,
        "image_start_tag": tokenizer.boi_token,
        "image_end_tag": tokenizer.eoi_token,
        "pad_tag": pad,
    }
    files = _tokenizer_files(tokenizer, pad) | {
        "processor_config.json": {
            **tags,
            "num_image_tokens": processor.num_image_tokens,
            "processor_class": "VLChatProcessor",
            "sft_format": prompt_format(processor),
        },
        "preprocessor_config.json": {
            "image_processor_type": "VLMImageProcessor",
            "image_size": images.size["height"],
            **{key: getattr(images, key) for key in IMAGE_KEYS},
            "processor_class": "VLChatProcessor",
        },
    }
    for name, content in files.items():
        write_json(folder / name, content)


def _tokenizer_files(tokenizer: Any, pad: str) -> dict[str, dict[str, Any]]:
    tokens = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token, "pad_token": pad}
    tokens |= {"unk_token": tokenizer.unk_token}
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())
    special = [t["content"] for t in vocabulary["added_tokens"] if t["special"]]
    # Batches are no property of a checkpoint; transformers sets these when it encodes one.
    vocabulary |= {"truncation": None, "padding": None}
    starts_with_bos = bool(tokenizer("").input_ids[:1] == [tokenizer.bos_token_id])
    return {
        "tokenizer.json": vocabulary,
        "tokenizer_config.json": {
            **tokens,
            "add_bos_token": starts_with_bos,
            "add_eos_token": False,
            "model_max_length": tokenizer.model_max_length,
            "processor_class": "VLChatProcessor",
            "tokenizer_class": "LlamaTokenizerFast",
        },
        "special_tokens_map.json": {
            **{key: token for key, token in tokens.items() if token is not None},
            "additional_special_tokens": [t for t in special if t not in tokens.values()],
        },
    }


def set_prompt_format(processor: Any, style: str) -> None:
    """Gives a processor the prompt format of that name, in place."""
    tokenizer = processor.tokenizer
    processor.chat_template = _template(style, tokenizer.image_token, tokenizer.eos_token)


def prompt_format(processor: Any) -> str:
    """DeepSeek's name of the processor's template: the one that makes the same prompt.

    A template that makes another one is a `WeightsError`.
    """
    message = {"role": "user", "content": [{"type": "text", "text": "a red circle"}]}
    made = processor.apply_chat_template([message], add_generation_prompt=True)
    prompts = {f"{u}: a red circle\n\n{a}:": style for style, (u, a) in ROLES.items()}
    style = (prompts | {"a red circle": PLAIN}).get(made)
    if style is None:
        raise WeightsError(
            f"the prompt template makes {made!r} of 'a red circle', a format that DeepSeek's "
            "layout has no name for; write --layout transformers"
        )
    return style


def read_json(folder: Path, name: str, source: str) -> dict[str, Any]:
    """A file of a folder; one that is missing or no mapping is a `WeightsError`."""
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise WeightsError(
            f"{source}: lacks {name}; put the files of a Janus tokenizer and processor beside "
            "the weights, such as those of deepseek-ai/Janus-Pro-7B"
        ) from error
    except (OSError, ValueError) as error:
        raise WeightsError(f"{source}: {name} cannot be read: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{source}: {name} is no mapping; write a complete checkpoint")
    return content


def write_json(path: Path, content: Any) -> None:
    """One file of a checkpoint; non-ASCII tokens stay readable."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_tokenizer(
    folder: Path, source: str, tags: Mapping[str, str]
) -> tuple[PreTrainedTokenizerFast, dict[str, int]]:
    """The tokenizer as tokenizer.json has it; what a class of transformers would change is not."""
    config = read_json(folder, "tokenizer_config.json", source)
    listed = folder / "special_tokens_map.json"
    tokens = {**config, **(read_json(folder, listed.name, source) if listed.is_file() else {})}
    vocabulary = json.dumps(read_json(folder, "tokenizer.json", source))
    known = {"bos": _text(tokens.get("bos_token")), "eos": _text(tokens.get("eos_token"))}
    known |= {"pad": tags["pad_tag"], "boi": tags["image_start_tag"], "image": tags["image_tag"]}
    known |= {"eoi": tags["image_end_tag"]}
    backend = Tokenizer.from_str(vocabulary)
    ids: dict[str, int] = {}
    for name, token in known.items():
        found = backend.token_to_id(token or "")
        if found is None:
            raise WeightsError(
                f"{source}: tokenizer.json has no {name} token ({token!r}); "
                "write the tokenizer the weights were trained with"
            )
        ids[name] = found
    options: dict[str, Any] = {}
    if config.get("tokenizer_class", "LlamaTokenizer").startswith("LlamaTokenizer"):
        # That class prepends BOS by itself, whatever tokenizer.json says.
        options["add_bos_token"] = config.get("add_bos_token", True)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=known["bos"],
        eos_token=known["eos"],
        pad_token=known["pad"],
        unk_token=_text(tokens.get("unk_token")),
        padding_side="left",
        model_max_length=config.get("model_max_length"),
        extra_special_tokens={
            "image_token": known["image"],
            "boi_token": known["boi"],
            "eoi_token": known["eoi"],
        },
        **options,
    )
    return tokenizer, ids


def _text(token: Any) -> str | None:
    """A special token is written as text, or as a mapping with its content."""
    return token["content"] if isinstance(token, dict) else token


def _template(style: str, image: str, eos: str) -> str:
    """The prompt format of that name as a chat template."""
    if style == PLAIN:
        return (
            "{%- for message in messages -%}{%- for content in message['content'] -%}"
            "{%- if content['type'] == 'text' -%}{{ content['text'] | trim }}"
            f"{{%- else -%}}{{{{ {image!r} }}}}{{%- endif -%}}"
            "{%- endfor -%}{%- endfor -%}"
        )
    user, assistant = ROLES[style]
    return (
        f"{{%- set roles = {{'user': {user!r}, 'assistant': {assistant!r}}} -%}}"
        "{%- for message in messages -%}{{ roles[message['role'] | lower] + ': ' }}"
        "{%- for content in message['content'] -%}"
        "{%- if content['type'] == 'text' -%}{{ content['text'] | trim }}"
        f"{{%- else -%}}{{{{ {image + chr(10)!r} }}}}{{%- endif -%}}"
        "{%- endfor -%}"
        "{%- if not loop.last or add_generation_prompt -%}"
        f"{{{{ '\\n\\n' if loop.index0 % 2 == 0 else {eos!r} }}}}{{%- endif -%}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ roles['assistant'] + ':' }}{%- endif -%}"
    )
