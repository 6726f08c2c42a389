"""A folder in DeepSeek's layout: a Janus from it, and a Janus into it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    GenerationConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusProcessor,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

from stage_rl.errors import WeightsError
from stage_rl.policies.loading import describe_faults, one_line, read_tensors

TEXT_HEAD = "language_model.lm_head.weight"

COPIED = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("processor_config.json", "preprocessor_config.json"),
)


def is_deepseek(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of this layout."""
    return config.get("model_type") == MODEL_TYPE


def describe(folder: Path, source: str) -> tuple[Any, JanusProcessor, GenerationConfig]:
    """Configuration, processor and generation settings of a folder; its tensors are not read."""
    processor, ids = read_processor(folder, source)
    config = config_to_transformers(read_json(folder, "config.json", source), source, ids)
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
    return tensors_to_transformers(layout, tensors)


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
    tensors = tensors_to_deepseek(_layout(module.config), state)
    dtype = str(module.dtype).removeprefix("torch.")
    if like is None:
        tied = module.lm_head.weight is module.get_input_embeddings().weight
        write_json(folder / "config.json", config_to_deepseek(module.config, dtype, tied=tied))
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


# How the tensors of transformers' Janus are called in DeepSeek's layout.
#
# Two tensors differ in more than their name: the three projections of an attention layer of the
# image encoder are one tensor, and its position embedding has a leading axis of 1.


POSITIONS = "vision_model.vision_tower.pos_embed"

UNUSED = ("vision_model.vision_tower.attn_pool.", "gen_vision_model.quantize.codebook_used")
"""Beginnings of tensors that are published and that no forward pass reads."""

# (pattern of transformers' name, DeepSeek's); each is tried in turn, on what the ones before left.
RULES = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^model\.language_model\.", "language_model.model."),
        (r"^model\.generation_embeddings\.", "gen_embed."),
        (r"^model\.generation_aligner\.", "gen_aligner."),
        (r"^model\.aligner\.", "aligner."),
        (r"^((?:gen_)?aligner)\.fc1\.", r"\1.layers.0."),
        (r"^model\.generation_head\.proj_out\.", "gen_head.output_mlp_projector."),
        (r"^model\.generation_head\.", "gen_head."),
        (r"^model\.vqmodel\.", "gen_vision_model."),
        (r"^(gen_vision_model\.(?:encoder|decoder))\.(?:down|up)\.", r"\1.conv_blocks."),
        (r"^(gen_vision_model\.\w+\.conv_blocks\.\d+)\.block\.", r"\1.res."),
        (r"^(gen_vision_model\.\w+\.mid)\.block_1\.", r"\1.0."),
        (r"^(gen_vision_model\.\w+\.mid)\.attn_1\.", r"\1.1."),
        (r"^(gen_vision_model\.\w+\.mid)\.block_2\.", r"\1.2."),
        (r"^model\.vision_model\.embeddings\.position_embedding\.weight$", POSITIONS),
        (r"^model\.vision_model\.embeddings\.patch_embedding\.", "VIT.patch_embed.proj."),
        (r"^model\.vision_model\.post_layernorm\.", "VIT.norm."),
        (r"^model\.vision_model\.encoder\.layers\.", "VIT.blocks."),
        (r"^(VIT\.blocks\.\d+)\.layer_norm(\d)\.", r"\1.norm\2."),
        (r"^(VIT\.blocks\.\d+)\.self_attn\.[qkv]_proj\.", r"\1.attn.qkv."),
        (r"^(VIT\.blocks\.\d+)\.self_attn\.projection_layer\.", r"\1.attn.proj."),
        (r"^VIT\.", "vision_model.vision_tower."),
    )
)

HIDDEN_LAYER = re.compile(r"^((?:gen_)?aligner)\.hidden_layers\.(\d+)\.")


@dataclass(frozen=True)
class Entry:
    """A tensor of DeepSeek's layout."""

    parts: tuple[str, ...]
    """transformers' names of what it holds, one behind the other along axis 0."""
    shape: torch.Size


def deepseek_name(name: str) -> str:
    """DeepSeek's name of the tensor that transformers calls `name`."""
    for pattern, replacement in RULES:
        name = pattern.sub(replacement, name)
    # Layers and activations alternate: hidden layer 0 is layer 2.
    return HIDDEN_LAYER.sub(lambda m: f"{m[1]}.layers.{2 * int(m[2]) + 2}.", name)


def entries(shapes: Mapping[str, torch.Size]) -> dict[str, Entry]:
    """The tensors of DeepSeek's layout for a Janus with these tensors, in transformers' order."""
    found: dict[str, Entry] = {}
    for name, shape in shapes.items():
        theirs = deepseek_name(name)
        if theirs == POSITIONS:
            found[theirs] = Entry((name,), torch.Size((1, *shape)))
        elif theirs in found:
            before = found[theirs]
            rows = before.shape[0] + shape[0]
            found[theirs] = Entry((*before.parts, name), torch.Size((rows, *shape[1:])))
        else:
            found[theirs] = Entry((name,), shape)
    return found


def tensors_to_transformers(
    layout: Mapping[str, Entry], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The state of transformers' Janus from tensors of DeepSeek's layout.

    Whole tensors stay views of the given ones; parts are copied, so that none share their memory.
    """
    state = {}
    for name, entry in layout.items():
        tensor = tensors[name].squeeze(0) if name == POSITIONS else tensors[name]
        parts = tensor.chunk(len(entry.parts))
        copies = parts if len(parts) == 1 else [part.clone() for part in parts]
        state |= zip(entry.parts, copies, strict=True)
    return state


def tensors_to_deepseek(
    layout: Mapping[str, Entry], state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of DeepSeek's layout from the state of transformers' Janus."""
    tensors = {}
    for name, entry in layout.items():
        parts = [state[part] for part in entry.parts]
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        tensors[name] = tensor[None] if name == POSITIONS else tensor
    return tensors


def is_unused(name: str) -> bool:
    """Whether a tensor of DeepSeek's layout has no place in transformers' Janus."""
    return name.startswith(UNUSED)


# The settings of a Janus in DeepSeek's config.json, to and from transformers' `JanusConfig`.
#
# The file names the published image tokenizer and image encoder and leaves their sizes to the
# code.
# A model of other sizes names them among the `params`, which DeepSeek's own code passes over.


MODEL_TYPE = "multi_modality"

TOWER = "siglip_large_patch16_384"

TOWER_SIZES = {"width": 1024, "layers": 24, "heads": 16, "patch_size": 16, "mlp_ratio": 4}

VQ = "VQ-16"

VQ_SIZES = {"ch": 128, "ch_mult": [1, 1, 2, 2, 4], "num_res_blocks": 2, "z_channels": 256}

CLASSES = {
    "vision_config": "CLIPVisionTower",
    "aligner_config": "MlpProjector",
    "gen_vision_config": VQ,
    "gen_aligner_config": "MlpProjector",
    "gen_head_config": "vision_head",
}

TEXT_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act"),
    *("max_position_embeddings", "rms_norm_eps", "attention_bias", "mlp_bias"),
    *("initializer_range", "bos_token_id", "eos_token_id", "pad_token_id"),
)


def config_to_transformers(
    raw: Mapping[str, Any], source: str, token_ids: Mapping[str, int]
) -> JanusConfig:
    """transformers' settings of the same model; `token_ids` holds bos, eos and image.

    A setting that is missing, or that the adapter does not know, is a `WeightsError`.
    """
    try:
        return _config_to_transformers(raw, source, token_ids)
    except KeyError as error:
        raise WeightsError(
            f"{source}: config.json lacks {error.args[0]!r}; write a Janus or Janus-Pro checkpoint"
        ) from error


def _config_to_transformers(
    raw: Mapping[str, Any], source: str, token_ids: Mapping[str, int]
) -> JanusConfig:
    part = {section: _params(raw, section, source) for section in CLASSES}
    aligner, head = part["gen_aligner_config"], part["gen_head_config"]
    _agree(source, "gen_head_config.image_token_embed", head["image_token_embed"], aligner)
    vision = _vision(part["vision_config"], part["aligner_config"], source)
    vq = {**VQ_SIZES, **part["gen_vision_config"]}
    language = raw["language_config"]
    return JanusConfig(
        text_config=_text(language, source, token_ids),
        vision_config=vision,
        vq_config=JanusVQVAEConfig(
            embed_dim=vq["n_embed"],
            num_embeddings=vq["image_token_size"],
            latent_channels=vq["z_channels"],
            base_channels=vq["ch"],
            channel_multiplier=vq["ch_mult"],
            num_res_blocks=vq["num_res_blocks"],
            projection_dim=aligner["n_embed"],
            num_hidden_layers=aligner["depth"],
            image_token_embed_dim=head["n_embed"],
        ),
        image_token_id=token_ids["image"],
        architectures=["JanusForConditionalGeneration"],
        tie_word_embeddings=language.get("tie_word_embeddings", False),
    )


def config_to_deepseek(config: Any, dtype: str, *, tied: bool) -> dict[str, Any]:
    """DeepSeek's settings of the same model, its tensors in `dtype` (float32, bfloat16).

    `tied`: whether the text head is the embedding.
    """
    language = {"torch_dtype": dtype, "tie_word_embeddings": tied, **_language(config.text_config)}
    return {
        "architectures": ["MultiModalityCausalLM"],
        "model_type": MODEL_TYPE,
        "torch_dtype": dtype,
        "language_config": language,
        **{
            section: {
                "cls": CLASSES[section],
                "model_type": section.removesuffix("_config"),
                "params": values,
            }
            for section, values in _written_params(config.vision_config, config.vq_config).items()
        },
    }


def _language(text: Any) -> dict[str, Any]:
    given = {key: getattr(text, key) for key in TEXT_KEYS}
    given |= {"model_type": "llama", "rope_theta": _rope_theta(text)}
    # transformers 4 reads no null here, and has the default -1 for it.
    return {key: value for key, value in given.items() if value is not None}


def _written_params(vision: Any, vq: Any) -> dict[str, dict[str, Any]]:
    """The `params` of every section but the decoder's; published sizes are left to the code."""
    tower = {
        "width": vision.hidden_size,
        "layers": vision.num_hidden_layers,
        "heads": vision.num_attention_heads,
        "patch_size": vision.patch_size,
        "mlp_ratio": vision.mlp_ratio,
    }
    sizes = {
        "ch": vq.base_channels,
        "ch_mult": list(vq.channel_multiplier),
        "num_res_blocks": vq.num_res_blocks,
        "z_channels": vq.latent_channels,
    }
    return {
        "vision_config": {
            "image_size": vision.image_size,
            "model_name": TOWER,
            "select_feature": "same",
            "select_layer": -1,
            **({} if tower == TOWER_SIZES else tower),
        },
        "aligner_config": _aligner(vision.hidden_size, vision.projection_dim, vision.depth),
        "gen_vision_config": {
            "image_token_size": vq.num_embeddings,
            "n_embed": vq.embed_dim,
            **({} if sizes == VQ_SIZES else sizes),
        },
        "gen_aligner_config": _aligner(vq.embed_dim, vq.projection_dim, vq.num_hidden_layers),
        "gen_head_config": {
            "image_token_embed": vq.projection_dim,
            "image_token_size": vq.num_embeddings,
            "n_embed": vq.image_token_embed_dim,
        },
    }


def _params(raw: Mapping[str, Any], section: str, source: str) -> dict[str, Any]:
    given = raw[section]
    if given.get("cls") != CLASSES[section]:
        raise WeightsError(
            f"{source}: {section}.cls is {given.get('cls')!r}; "
            f"this policy needs {CLASSES[section]!r}"
        )
    params = given["params"]
    kind = params.get("projector_type", "mlp_gelu")
    if kind != "mlp_gelu":
        raise WeightsError(
            f"{source}: {section}.params.projector_type is {kind!r}; this policy needs 'mlp_gelu'"
        )
    return params


def _agree(source: str, key: str, value: int, aligner: Mapping[str, Any]) -> None:
    """transformers has one setting for two widths of the original."""
    if value != aligner["n_embed"]:
        raise WeightsError(
            f"{source}: {key} is {value} and gen_aligner_config.n_embed {aligner['n_embed']}; "
            "this policy needs them equal"
        )


def _vision(
    params: Mapping[str, Any], aligner: Mapping[str, Any], source: str
) -> JanusVisionConfig:
    if params["model_name"] != TOWER and not TOWER_SIZES.keys() <= params.keys():
        raise WeightsError(
            f"{source}: vision_config.params.model_name is {params['model_name']!r}; this policy "
            f"knows '{TOWER}', and others whose params give {', '.join(TOWER_SIZES)}"
        )
    sizes: dict[str, Any] = {**TOWER_SIZES, **params}
    last = params.get("select_layer", -1)
    layers = sizes["layers"] + last + 1 if last <= 0 else min(sizes["layers"], last)
    return JanusVisionConfig(
        hidden_size=sizes["width"],
        num_hidden_layers=layers,
        num_attention_heads=sizes["heads"],
        mlp_ratio=sizes["mlp_ratio"],
        image_size=params["image_size"],
        patch_size=sizes["patch_size"],
        num_image_tokens=(params["image_size"] // sizes["patch_size"]) ** 2,
        projection_dim=aligner["n_embed"],
        depth=aligner["depth"],
    )


def _text(language: Mapping[str, Any], source: str, token_ids: Mapping[str, int]) -> LlamaConfig:
    """What the file leaves out has LlamaConfig's default, which is what DeepSeek's code takes."""
    if language.get("rope_scaling") is not None:
        raise WeightsError(
            f"{source}: language_config.rope_scaling is {language['rope_scaling']!r}; "
            "this policy needs null"
        )
    given: dict[str, Any] = {"bos_token_id": token_ids["bos"], "eos_token_id": token_ids["eos"]}
    given |= {"pad_token_id": None}
    given |= {key: language[key] for key in TEXT_KEYS if key in language}
    rope = {"rope_type": "default", "rope_theta": language.get("rope_theta", 10000.0)}
    return LlamaConfig(**given, rope_parameters=rope)


def _rope_theta(text: Any) -> float:
    rope = text.rope_parameters
    if rope["rope_type"] != "default":
        raise WeightsError(
            f"text_config.rope_parameters: type '{rope['rope_type']}' has no place in DeepSeek's "
            "layout; write --layout transformers"
        )
    return rope["rope_theta"]


def _aligner(inputs: int, width: int, depth: int) -> dict[str, Any]:
    return {"depth": depth, "input_dim": inputs, "n_embed": width, "projector_type": "mlp_gelu"}


# Tokenizer, prompt template and image processor in the files of DeepSeek's layout.
#
# The ids of pad and begin-of-image differ between the published sizes: they are looked up by the
# token that `processor_config.json` names, or DeepSeek's code takes where the file is silent.


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
    known = {
        "bos": _prompt_text(tokens.get("bos_token")),
        "eos": _prompt_text(tokens.get("eos_token")),
    }
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
        unk_token=_prompt_text(tokens.get("unk_token")),
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


def _prompt_text(token: Any) -> str | None:
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
