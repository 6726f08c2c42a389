"""LlamaGen, text to image (Sun et al. 2024, arXiv 2406.06525): Llama layers behind T5 features.

The layers are transformers' own. Two things differ from Llama: a token is turned by its row and
column on the grid, and queries and keys of the prompt are turned to zero, so that the tokens of an
image weigh all of its prompt alike. A folder has the published files, which are read and written.

Shape suffixes: P prompts, N completions, T image tokens, L positions of a prompt, S coordinates, R
rotary dimensions, A axes, F width of the features of a text, D model width, V codebook size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import PositiveInt, ValidationError
from torch import Tensor, nn
from torch.nn.functional import gelu
from torch.nn.utils.rnn import pad_sequence
from transformers import JanusVQVAE, LlamaConfig, LlamaModel
from transformers.models.janus.configuration_janus import JanusVQVAEConfig

from stage_rl.errors import WeightsError
from stage_rl.policies.base import DecoderWeights, Policy, PolicyConfig, Prefix, TokenLayout
from stage_rl.policies.janus_deepseek import deepseek_name
from stage_rl.policies.loading import (
    DTYPES,
    Source,
    find,
    joined_tensors,
    read_file,
    refuse_misfits,
    refused,
    require,
    select_trainable,
    split_tensors,
)
from stage_rl.policies.lora import PATTERN, add_adapter, merged_state
from stage_rl.policies.sizes import ModelSize, size_of_module
from stage_rl.policies.text_encoder import TextEncoder, encoder_parameters, load_text_encoder
from stage_rl.policies.trunk import teacher_forced, trunk_weights, use_own_parts
from stage_rl.policies.vq import (
    IMAGES_PER_CHUNK,
    IMAGES_PER_CHUNK_ON_CPU,
    decode_images,
    unit_codes,
)
from stage_rl.settings import WITHOUT_CONFIG, Settings
from stage_rl.types import Prompt


class LlamaGenSizes(Settings):
    """The dimensions of a LlamaGen. What `config.json` leaves out is that of the published XL."""

    hidden_size: PositiveInt = 1280
    intermediate_size: PositiveInt = 3584
    num_hidden_layers: PositiveInt = 36
    num_attention_heads: PositiveInt = 20
    codebook_size: PositiveInt = 16_384
    caption_dim: PositiveInt = 2048
    """F."""
    caption_tokens: PositiveInt = 120
    """The most positions of a prompt."""
    image_size: PositiveInt = 256
    """Pixels."""
    base_channels: PositiveInt = 128
    channel_multiplier: tuple[PositiveInt, ...] = (1, 1, 2, 2, 4)
    latent_channels: PositiveInt = 256
    embed_dim: PositiveInt = 8
    """Width of a codebook vector."""
    text_encoder: str = "google/flan-t5-xl"

    @property
    def pixels_of_a_token(self) -> int:
        """Of its side."""
        return 2 ** (len(self.channel_multiplier) - 1)

    @property
    def grid_side(self) -> int:
        """Rows of tokens, and columns."""
        return self.image_size // self.pixels_of_a_token

    def decoder_config(self) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            vocab_size=self.codebook_size,
            max_position_embeddings=self.grid_side + 1,  # coordinates
            rms_norm_eps=1e-5,
            pad_token_id=None,
        )

    def vq_config(self) -> JanusVQVAEConfig:
        return JanusVQVAEConfig(
            embed_dim=self.embed_dim,
            num_embeddings=self.codebook_size,
            latent_channels=self.latent_channels,
            base_channels=self.base_channels,
            channel_multiplier=self.channel_multiplier,
            num_patches=self.grid_side,
        )


class LlamaGen(nn.Module):
    """All of the model but the text encoder."""

    def __init__(self, sizes: LlamaGenSizes) -> None:
        super().__init__()
        width, head_dim = sizes.hidden_size, sizes.hidden_size // sizes.num_attention_heads
        self.language_model: Any = LlamaModel(sizes.decoder_config())
        self.language_model.rotary_emb = GridRotary(sizes.grid_side, head_dim)
        self.lm_head = nn.Linear(width, sizes.codebook_size, bias=False)
        self.caption_projection = CaptionProjection(sizes.caption_dim, width)
        self.register_buffer("null_caption", torch.zeros(sizes.caption_tokens, sizes.caption_dim))
        self.vqmodel = JanusVQVAE(sizes.vq_config())


class CaptionProjection(nn.Module):
    """Features of a text as inputs of the decoder."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(features, width, bias=False)
        self.fc2 = nn.Linear(width, width, bias=False)

    def forward(self, features_LF: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(features_LF), approximate="tanh"))


class GridRotary(nn.Module):
    """Cosines and sines by coordinate: 1 + row turns half of the pairs, 1 + column the other half.

    Coordinate 0 is that of a prompt and has zeros for both.
    """

    def __init__(self, side: int, head_dim: int, *, base: float = 10_000.0) -> None:
        super().__init__()
        # On the CPU, as a model is built without memory, and its tables are not loaded.
        exponent = torch.arange(0, head_dim // 2, 2, device="cpu") / (head_dim // 2)
        place_S1 = torch.arange(side, device="cpu")[:, None]
        angle_SR = (place_S1 / base**exponent).repeat(1, 4)
        prompt_1R = torch.zeros_like(angle_SR[:1])
        axis_R = torch.arange(2, device="cpu").repeat_interleave(head_dim // 4).repeat(2)
        self.cos_SR: Tensor
        self.sin_SR: Tensor
        self.axis_R: Tensor
        self.register_buffer("cos_SR", torch.cat([prompt_1R, angle_SR.cos()]), persistent=False)
        self.register_buffer("sin_SR", torch.cat([prompt_1R, angle_SR.sin()]), persistent=False)
        self.register_buffer("axis_R", axis_R, persistent=False)

    def forward(self, states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Of coordinates NSA, or NS where both axes have the same, NSR in the states' dtype."""
        if position_ids.ndim == 2:
            position_ids = position_ids[..., None].expand(-1, -1, 2)
        index_NSR = position_ids[..., self.axis_R]
        dimension_R = torch.arange(len(self.axis_R), device=index_NSR.device)
        tables = (self.cos_SR, self.sin_SR)
        cos_NSR, sin_NSR = (table[index_NSR, dimension_R].to(states.dtype) for table in tables)
        return cos_NSR, sin_NSR


class LlamaGenPolicy(Policy):
    """A LlamaGen as the trainer and the rollout engine see it; `processor` is its text encoder."""

    default_guidance = 7.5
    default_top_k = 1000
    folder_layouts = ("llamagen",)
    adapter_layouts = ()

    def __init__(
        self,
        module: LlamaGen,
        processor: TextEncoder,
        *,
        sizes: LlamaGenSizes,
        trainable: Sequence[str],
    ):
        super().__init__(module, processor)
        select_trainable(module, trainable)
        use_own_parts(module.language_model)
        self.sizes = sizes
        side = sizes.grid_side
        coords_UA = 1 + torch.cartesian_prod(torch.arange(side), torch.arange(side))
        self.layout = TokenLayout(
            grid=(side, side),
            num_tokens=side * side,
            coords_UA=coords_UA,  # row and column
            absolute=True,
        )
        self.codebook_size = sizes.codebook_size

    @property
    def trunk_blocks(self) -> Sequence[nn.Module]:
        return self.module.language_model.layers

    def frozen_modules(self) -> Mapping[str, nn.Module]:
        return {"text_encoder": self.processor.model}

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Tokenizes them, which is all that can go wrong."""
        for prompt in prompts:
            self.processor.token_ids(prompt)

    def encode(self, prompts: Sequence[Prompt]) -> Prefix:
        """The projected features of the prompts, with a gradient where the projection trains.

        The unconditional row is as long as the prompt. The original pads on the left, so that it is
        the last rows of the null caption.
        """
        weight = self.module.caption_projection.fc1.weight
        rows = [self.processor.features(prompt).to(weight) for prompt in prompts]
        null = self.module.null_caption.to(weight)
        embeds, uncond = (
            pad_sequence([self.module.caption_projection(row) for row in part], batch_first=True)
            for part in (rows, [null[len(null) - len(row) :] for row in rows])
        )
        lengths_P = torch.tensor([len(row) for row in rows], device=self.device)
        return Prefix(embeds, lengths_P, Prefix(uncond, lengths_P))

    def embed(self, tokens_NU: Tensor) -> Tensor:
        return self.module.language_model.embed_tokens(tokens_NU)

    def hidden(self, prefix: Prefix, tokens_NT: Tensor) -> Tensor:
        return teacher_forced(self, self.module.language_model, prefix, tokens_NT)

    def head(self, hidden: Tensor) -> Tensor:
        return self.module.lm_head(hidden.to(self.module.lm_head.weight.dtype))

    def codes(self, tokens_NT: Tensor) -> Tensor:
        return unit_codes(self.module.vqmodel, tokens_NT)

    def images(self, prompts: Sequence[Prompt], tokens_NT: Tensor) -> Tensor:
        return decode_images(self.module.vqmodel, tokens_NT)

    @torch.no_grad()
    def decoder_weights(self) -> DecoderWeights:
        trunk = self.module.language_model
        weights = trunk_weights(
            trunk,
            input_embeds=trunk.embed_tokens.weight,
            head=[self.module.lm_head],
            adapter=self.adapter,
        )
        return replace(weights, rotary_axis_R=trunk.rotary_emb.axis_R)

    def save(self, folder: str | Path, *, layout: str = "llamagen", base: str | Path = "") -> None:
        """Writes the published files and `config.json`; an adapter is merged into the weights."""
        write_folder(Path(folder), merged_state(self.module), self.sizes)


class LlamaGenConfig(PolicyConfig):
    """LlamaGen, text to image, from the published files or an export."""

    policy_class = LlamaGenPolicy
    default_trainable = ("language_model.layers.*", "language_model.norm.*")
    tags = ("llamagen",)
    loading_code: ClassVar = {
        "llamagen": """# in github.com/FoundationVision/LlamaGen; GPT-XL is the only size published
import json, torch
from pathlib import Path
from autoregressive.models.gpt import GPT_models
sizes = json.loads(Path(FOLDER, "config.json").read_text())
tokens = (sizes["image_size"] // 16) ** 2
model = GPT_models["GPT-XL"](
    block_size=tokens, cls_token_num=sizes["caption_tokens"], model_type="t2i"
)
(weights,) = Path(FOLDER).glob("t2i_*.pt")
model.load_state_dict(torch.load(weights)["model"])""",
    }

    path: str = "peizesun/llamagen_t2i"
    """Folder or hub id of the published files (`t2i_XL_stage1_256.pt` or `t2i_XL_stage2_512.pt`,
    and `vq_ds16_t2i.pt`), or of an export, which has a config.json beside them."""
    image_size: PositiveInt | None = None
    """Pixels, 256 or 512 of the published ones; null: that of config.json, else of the one
    published file in the folder, else 256."""
    text_encoder: str | None = None
    """Folder or hub id of the T5 encoder; null: that of config.json, else google/flan-t5-xl."""
    text_encoder_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of the text encoder; the published models were trained on features in bfloat16."""

    def sizes(self, source: Source | None) -> LlamaGenSizes:
        """Those of config.json where a source has one; null settings are filled from it."""
        file = None if source is None else source.folder / "config.json"
        described: dict[str, Any] = {}
        if file is not None and file.is_file():
            with refused(f"{self.path}: config.json"):
                described = json.loads(file.read_text(encoding="utf-8"))
                kind = described.pop("model_type", None)
                require(self.path, {"model_type": (kind, "llamagen")})
        elif source is not None and Path(self.path).expanduser().is_dir():
            # What a cache of the hub holds depends on what was loaded before.
            files = TRANSFORMER_FILES.items()
            there = [size for size, name in files if (source.folder / name).is_file()]
            described = {"image_size": there[0]} if len(there) == 1 else {}
        own = {"image_size": self.image_size, "text_encoder": self.text_encoder}
        if self.image_size and "image_size" in described:
            require(self.path, {"image_size": (described["image_size"], self.image_size)})
        written = {key: value for key, value in own.items() if value is not None}
        return _checked(self.path, described | written)

    def size(self) -> ModelSize | None:
        on_disk = Path(self.path).expanduser().is_dir()
        if not on_disk and self.path.partition("@")[0] != PUBLISHED:
            return None
        return _size(self.sizes(find(self.path) if on_disk else None), self.text_encoder_dtype)

    def build(self, device: torch.device) -> LlamaGenPolicy:
        """The policy; wrong weights are a `WeightsError`, wrong patterns a `RecipeError`."""
        source = find(self.path)
        sizes = self.sizes(source)
        module = read_folder(source, sizes, dtype=DTYPES[self.dtype]).to(device)
        encoder = load_text_encoder(
            sizes.text_encoder,
            dtype=DTYPES[self.text_encoder_dtype],
            device=device,
            max_tokens=sizes.caption_tokens,
        )
        require(sizes.text_encoder, {"d_model": (encoder.width, sizes.caption_dim)})
        trainable = self.trainable
        if self.lora:
            add_adapter(module.language_model, self.lora)
            module.lm_head.float()  # log-probabilities are fp32
            trainable = (PATTERN,)
        return LlamaGenPolicy(module, encoder, sizes=sizes, trainable=trainable)


def _checked(path: str, described: Mapping[str, Any]) -> LlamaGenSizes:
    """The sizes; a WeightsError for what is unknown, or does not fit the rest."""
    try:
        sizes = LlamaGenSizes.model_validate(dict(described))
    except ValidationError as error:
        first = error.errors()[0]
        key = first.get("ctx", {}).get("key") or ".".join(map(str, first["loc"]))
        raise WeightsError(f"{path}: config.json: {key}: {first['msg']}") from error
    for key, factor in (
        ("image_size", sizes.pixels_of_a_token),
        ("hidden_size", 4 * sizes.num_attention_heads),
    ):
        if getattr(sizes, key) % factor:
            raise WeightsError(
                f"{path}: {key} is {getattr(sizes, key)}; this policy needs a multiple of {factor}"
            )
    return sizes


def _size(sizes: LlamaGenSizes, text_encoder_dtype: str) -> ModelSize | None:
    """None where nothing is known of the text encoder."""
    encoder = encoder_parameters(sizes.text_encoder)
    if encoder is None:
        return None
    with torch.device("meta"):
        module = LlamaGen(sizes)
    return size_of_module(
        module,
        trunk="language_model",
        outside=("language_model.", "lm_head.", "caption_projection."),
        image_head=module.lm_head.weight.numel(),
        codebook=sizes.codebook_size,
        inputs=sizes.codebook_size,
        image_tokens=sizes.grid_side**2,
        columns=sizes.grid_side**2,
        pixels=sizes.image_size**2,
        decoder_channels=3 * sizes.base_channels,
        images_at_once=IMAGES_PER_CHUNK,
        images_at_once_on_cpu=IMAGES_PER_CHUNK_ON_CPU,
        frozen_bytes=encoder * DTYPES[text_encoder_dtype].itemsize,
    )


# The published files: transformer and image tokenizer, each a pickle of tensors under "model".

TRANSFORMER_FILES = {256: "t2i_XL_stage1_256.pt", 512: "t2i_XL_stage2_512.pt"}
"""By image size."""

PUBLISHED, TOKENIZER_FILE = WITHOUT_CONFIG["llamagen"]

KEYS = ("model", "module", "state_dict")
"""Under one of which the tensors lie; beside it there may be a training state."""

UNUSED = ("freqs_cis", "quantize.codebook_used")
"""What a file may hold besides: a table, and which codes a training step drew."""

# (our name, theirs), each replaced in turn; queries, keys and values are one matrix.
RULES = (
    ("caption_projection", "cls_embedding.cap_proj"),
    ("null_caption", "cls_embedding.uncond_embedding"),
    ("language_model.embed_tokens", "tok_embeddings"),
    ("language_model.", ""),
    ("lm_head", "output"),
    *((f"self_attn.{name}_proj", "attention.wqkv") for name in "qkv"),
    ("self_attn.o_proj", "attention.wo"),
    ("mlp.gate_proj", "feed_forward.w1"),
    ("mlp.up_proj", "feed_forward.w3"),
    ("mlp.down_proj", "feed_forward.w2"),
    ("input_layernorm", "attention_norm"),
    ("post_attention_layernorm", "ffn_norm"),
)


def transformer_name(name: str) -> str:
    """The name in the published file of the transformer."""
    for ours, theirs in RULES:
        name = name.replace(ours, theirs)
    return name


def tokenizer_name(name: str) -> str:
    """That in the file of the image tokenizer, which is the one in DeepSeek's Janus."""
    return deepseek_name(f"model.{name}").removeprefix("gen_vision_model.")


def read_folder(source: Source, sizes: LlamaGenSizes, *, dtype: torch.dtype) -> LlamaGen:
    """The module with the values of the published files.

    A tensor that is missing, unexpected or of another shape is a `WeightsError` with its name
    there, and so is a file that is missing, damaged or holds more than tensors.
    """
    with torch.device("meta"):
        module = LlamaGen(sizes)
    source.fetch_weights(*_files(sizes))
    state: dict[str, Tensor] = {}
    for name, (wanted, rename) in _files(sizes, module.state_dict()).items():
        file = source.folder / name
        if not file.is_file():
            raise WeightsError(
                f"{source.name}: lacks {name}; put the published {TOKENIZER_FILE} and "
                f"{' or '.join(TRANSFORMER_FILES.values())} into a folder, one of the two, or "
                "write policy.image_size for the other one"
            )
        tensors = {n: t for n, t in read_file(file, under=KEYS).items() if n not in UNUSED}
        names = joined_tensors(wanted, rename)
        both = names.keys() & tensors.keys()
        refuse_misfits(
            f"{file}: the weights do not fit the model",
            missing=names.keys() - both,
            unexpected=tensors.keys() - both,
            of_another_shape=[n for n in both if names[n].shape != tensors[n].shape],
        )
        state |= split_tensors(tensors, wanted, rename)
    state = _rows_by(partial(_pairs_apart, heads=sizes.num_attention_heads), state)
    # Copied, so that nothing is left of the mapped files.
    module.load_state_dict({n: t.to(dtype, copy=True) for n, t in state.items()}, assign=True)
    return module.eval()


def write_folder(folder: Path, state: Mapping[str, Tensor], sizes: LlamaGenSizes) -> None:
    """Writes the files that `read_folder` and the original code read."""
    state = _rows_by(partial(_pairs_together, heads=sizes.num_attention_heads), state)
    for name, (part, rename) in _files(sizes, state).items():
        tensors = joined_tensors(part, rename)
        if name == TOKENIZER_FILE:
            tensors["quantize.codebook_used"] = torch.zeros(65_536)  # which its code asks for
        tensors = {n: t.detach().cpu().clone() for n, t in tensors.items()}
        torch.save({"model": tensors}, folder / name)
    described = {"model_type": "llamagen", **sizes.model_dump(mode="json")}
    local = Path(sizes.text_encoder).expanduser()
    if local.is_dir():  # so that it is found from any folder
        described["text_encoder"] = str(local.absolute())
    text = json.dumps(described, indent=2)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def _files(
    sizes: LlamaGenSizes, state: Mapping[str, Tensor] | None = None
) -> dict[str, tuple[dict[str, Tensor], Any]]:
    """The files, with the part of a state that each holds and the names that this has there."""
    transformer = TRANSFORMER_FILES.get(sizes.image_size, f"t2i_{sizes.image_size}.pt")
    parts: dict[bool, dict[str, Tensor]] = {False: {}, True: {}}
    for name, tensor in (state or {}).items():
        parts[name.startswith("vqmodel.")][name] = tensor
    return {
        transformer: (parts[False], transformer_name),
        TOKENIZER_FILE: (parts[True], tokenizer_name),
    }


def _rows_by(order: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state with the rows of queries and keys in another order."""
    turned = (".q_proj.weight", ".k_proj.weight")
    return {name: order(t) if name.endswith(turned) else t for name, t in state.items()}


def _pairs_apart(weight: Tensor, *, heads: int) -> Tensor:
    """Rows for pairs of dimensions that lie half a head apart, from those of neighbours."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _pairs_together(weight: Tensor, *, heads: int) -> Tensor:
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
