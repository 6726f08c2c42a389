"""The dimensions of a model, from its configuration or a table, without loading it."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from stage_rl.errors import WeightsError


@dataclass(frozen=True)
class ModelSize:
    """What the memory of a Janus depends on. Parameters are counted, not bytes."""

    layers: int
    width: int
    mlp: int
    heads: int
    kv_heads: int
    vocabulary: int
    codebook: int
    image_tokens: int
    image_side: int
    """Pixels."""
    decoder_channels: int
    """Of the image decoder at full resolution."""
    positions: int
    """Slots of the rotary table."""
    others: int
    """Parameters outside decoder, text embedding and image head: none of them trains by default."""

    @property
    def kv_width(self) -> int:
        """Width of keys, and of values."""
        return self.width // self.heads * self.kv_heads

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of the matrices of one decoder layer."""
        width, mlp, kv = self.width, self.mlp, self.kv_width
        return {
            "self_attn.q_proj": (width, width),
            "self_attn.k_proj": (kv, width),
            "self_attn.v_proj": (kv, width),
            "self_attn.o_proj": (width, width),
            "mlp.gate_proj": (mlp, width),
            "mlp.up_proj": (mlp, width),
            "mlp.down_proj": (width, mlp),
        }

    @property
    def layer_matrices(self) -> int:
        """Parameters of the matrices of one decoder layer."""
        return sum(rows * columns for rows, columns in self.linears.values())

    @property
    def image_head(self) -> int:
        """Two linear layers with biases, from the width to itself and to the codebook."""
        return (self.width + self.codebook) * (self.width + 1)

    @property
    def parameters(self) -> dict[str, int]:
        """By name, of decoder, text embedding and image head."""
        names = {"model.language_model.embed_tokens.weight": self.vocabulary * self.width}
        for index in range(self.layers):
            layer = f"model.language_model.layers.{index}."
            for name, (rows, columns) in self.linears.items():
                names[f"{layer}{name}.weight"] = rows * columns
            for norm in ("input_layernorm", "post_attention_layernorm"):
                names[f"{layer}{norm}.weight"] = self.width
        names["model.language_model.norm.weight"] = self.width
        names["model.generation_head.weight"] = self.image_head
        return names

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(self.parameters.values()) + self.others


# Dimensions: `config.json` of the models on the hub. The other parameters: transformers' module of
# these dimensions (image encoder, its aligner, image tokenizer, codebook embedding and its aligner)
# and the text head, which is not tied.
_PRO_1B = ModelSize(
    layers=24,
    width=2048,
    mlp=5632,
    heads=16,
    kv_heads=16,
    vocabulary=102_400,
    codebook=16_384,
    image_tokens=576,
    image_side=384,
    decoder_channels=128,
    positions=16_384,
    others=386_213_515 + 209_715_200,
)
_PRO_7B = replace(
    _PRO_1B,
    layers=30,
    width=4096,
    mlp=11_008,
    heads=32,
    kv_heads=32,
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
    if path == "shapes":
        path = str(resources.files("stage_rl") / "shapes" / "checkpoint")
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
    halvings = len(vq.get("channel_multiplier", (1, 1, 2, 2, 4))) - 1
    side = vq.get("num_patches", 24)
    size = ModelSize(
        layers=text["num_hidden_layers"],
        width=text["hidden_size"],
        mlp=text["intermediate_size"],
        heads=text["num_attention_heads"],
        kv_heads=text.get("num_key_value_heads") or text["num_attention_heads"],
        vocabulary=text["vocab_size"],
        codebook=vq["num_embeddings"],
        image_tokens=side**2,
        image_side=side * 2**halvings,
        decoder_channels=vq.get("base_channels", 128),
        positions=text["max_position_embeddings"],
        others=0,
    )
    stored = sum(map(_stored_parameters, folder.glob("*.safetensors")))
    if stored == 0:  # pickles, which are published in bf16, are not opened for this
        stored = (
            sum(f.stat().st_size for end in ("bin", "pt") for f in folder.glob(f"*.{end}")) // 2
        )
    return replace(size, others=max(0, stored - size.total))


def _stored_parameters(file: Path) -> int:
    """Numbers in a safetensors file, by its header: 8 bytes of length, then JSON."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    count = 0
    for name, entry in header.items():
        if name != "__metadata__":
            size = 1
            for dimension in entry["shape"]:
                size *= dimension
            count += size
    return count
