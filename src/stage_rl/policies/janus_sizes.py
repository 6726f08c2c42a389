"""The dimensions of a Janus, from its configuration or a table; free of torch."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from stage_rl.errors import WeightsError
from stage_rl.policies.sizes import ModelSize
from stage_rl.settings import SHIPPED_MODELS


def _size(text: Mapping[str, Any], vq: Mapping[str, Any], *, others: int) -> ModelSize:
    """The size by the settings of decoder and image tokenizer, as transformers spells them."""
    layers, width, mlp = (
        text[name] for name in ("num_hidden_layers", "hidden_size", "intermediate_size")
    )
    heads, codebook = text["num_attention_heads"], vq["num_embeddings"]
    kv_width = width // heads * (text.get("num_key_value_heads") or heads)
    linears = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (kv_width, width),
        "self_attn.v_proj": (kv_width, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (mlp, width),
        "mlp.up_proj": (mlp, width),
        "mlp.down_proj": (width, mlp),
    }
    # Two linear layers with biases, from the width to itself and to the codebook.
    image_head = (width + codebook) * (width + 1)
    parameters = {"model.language_model.embed_tokens.weight": text["vocab_size"] * width}
    for index in range(layers):
        layer = f"model.language_model.layers.{index}."
        parameters |= {f"{layer}{n}.weight": rows * wide for n, (rows, wide) in linears.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            parameters[f"{layer}{norm}.weight"] = width
    parameters["model.language_model.norm.weight"] = width
    parameters["model.generation_head.weight"] = image_head
    side = vq.get("num_patches", 24)
    return ModelSize(
        layers=layers,
        width=width,
        mlp=mlp,
        heads=heads,
        kv_width=kv_width,
        linears=linears,
        parameters=parameters,
        image_head=image_head,
        codebook=codebook,
        image_tokens=side**2,
        image_side=side * 2 ** (len(vq.get("channel_multiplier", (1, 1, 2, 2, 4))) - 1),
        decoder_channels=vq.get("base_channels", 128),
        positions=text["max_position_embeddings"],
        others=others,
    )


# Dimensions: `config.json` of the models on the hub. The other parameters: transformers' module of
# these dimensions (image encoder, its aligner, image tokenizer, codebook embedding and its aligner)
# and the text head, which is not tied.
_PRO = {"vocab_size": 102_400, "max_position_embeddings": 16_384}
_PRO_1B = _size(
    _PRO
    | {"num_hidden_layers": 24, "hidden_size": 2048, "intermediate_size": 5632}
    | {"num_attention_heads": 16},
    {"num_embeddings": 16_384},
    others=386_213_515 + 209_715_200,
)
_PRO_7B = _size(
    _PRO
    | {"num_hidden_layers": 30, "hidden_size": 4096, "intermediate_size": 11_008}
    | {"num_attention_heads": 32},
    {"num_embeddings": 16_384},
    others=413_501_067 + 419_430_400,
)
KNOWN = {
    f"{owner}/Janus-Pro-{name}": size
    for owner in ("deepseek-community", "deepseek-ai")
    for name, size in (("1B", _PRO_1B), ("7B", _PRO_7B))
}
"""Models of the hub by id."""


_LLAMA = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
}


def size_of(path: str) -> ModelSize | None:
    """The size of a folder in either layout, of `shapes` or of a known hub id, else None."""
    if path in SHIPPED_MODELS:
        path = str(resources.files("stage_rl") / SHIPPED_MODELS[path])
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return KNOWN.get(path.partition("@")[0])
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: config.json cannot be read ({error})") from error
    if "language_config" in config and "gen_vision_config" in config:
        return _from_config(*_of_original(config), folder)
    if "text_config" not in config or "vq_config" not in config:
        return None
    return _from_config(config["text_config"], config["vq_config"], folder)


def _of_original(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of decoder and image tokenizer in DeepSeek's layout, as transformers has them.

    What the file leaves out has LlamaConfig's defaults.
    """
    vision, vq = (config[name]["params"] for name in ("vision_config", "gen_vision_config"))
    sizes = {"num_embeddings": vq["image_token_size"]}
    sizes["num_patches"] = vision["image_size"] // vision.get("patch_size", 16)
    sizes |= {"base_channels": vq["ch"]} if "ch" in vq else {}
    sizes |= {"channel_multiplier": vq["ch_mult"]} if "ch_mult" in vq else {}
    return {**_LLAMA, **config["language_config"]}, sizes


def _from_config(text: Mapping[str, Any], vq: Mapping[str, Any], folder: Path) -> ModelSize:
    stored = sum(map(_stored_parameters, folder.glob("*.safetensors")))
    if stored == 0:  # pickles, which are published in bf16, are not opened for this
        stored = (
            sum(f.stat().st_size for end in ("bin", "pt") for f in folder.glob(f"*.{end}")) // 2
        )
    size = _size(text, vq, others=0)
    return replace(size, others=max(0, stored - size.total))


def _stored_parameters(file: Path) -> int:
    """Numbers in a safetensors file, by its header: 8 bytes of length, then JSON."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    tensors = (entry for name, entry in header.items() if name != "__metadata__")
    return sum(math.prod(entry["shape"]) for entry in tensors)
