"""The settings of a Janus in DeepSeek's config.json, to and from transformers' `JanusConfig`.

The file names the published image tokenizer and image encoder and leaves their sizes to the code.
A model of other sizes names them among the `params`, which DeepSeek's own code passes over.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import JanusConfig, JanusVisionConfig, JanusVQVAEConfig, LlamaConfig

from stage_rl.errors import WeightsError

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


def to_transformers(
    raw: Mapping[str, Any], source: str, token_ids: Mapping[str, int]
) -> JanusConfig:
    """transformers' settings of the same model; `token_ids` holds bos, eos and image.

    A setting that is missing, or that the adapter does not know, is a `WeightsError`.
    """
    try:
        return _to_transformers(raw, source, token_ids)
    except KeyError as error:
        raise WeightsError(
            f"{source}: config.json lacks {error.args[0]!r}; write a Janus or Janus-Pro checkpoint"
        ) from error


def _to_transformers(
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


def to_deepseek(config: Any, dtype: str, *, tied: bool) -> dict[str, Any]:
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
