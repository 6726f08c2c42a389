"""Emu3-Gen through transformers (Wang et al. 2024, arXiv 2409.18869).

Text and image share one vocabulary, in which the V codes of the image tokenizer are one row of ids.
An image is written row by row, with an end-of-line token behind each row: those between the rows
are control tokens here, the last is never read. What is unconditional is a negative prompt, a row
of its own length.

Shape suffixes: P prompts, N completions, T image tokens, U columns with end-of-line tokens, L
positions of a prompt, D model width, C codebook channels, V codebook size, H x W pixels.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import PositiveInt, field_validator
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoProcessor, Emu3ForConditionalGeneration, Emu3Processor
from transformers import Emu3Config as HfEmu3Config

from stage_rl.errors import InputError, RecipeError, WeightsError
from stage_rl.policies.base import (
    DecoderWeights,
    Policy,
    PolicyConfig,
    Prefix,
    TokenLayout,
    check_words,
)
from stage_rl.policies.loading import (
    SETTINGS_KEY,
    Source,
    find,
    load_whole,
    model_type_of,
    quiet,
    refused,
    require,
    select_trainable,
)
from stage_rl.policies.lora import PATTERN, add_adapter, merged_state
from stage_rl.policies.sizes import ModelSize, size_of_module
from stage_rl.policies.trunk import teacher_forced, trunk_weights, use_own_parts
from stage_rl.settings import validation_error
from stage_rl.types import Prompt

NEGATIVE_PROMPT = (
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, "
    "cropped, worst quality, low quality, normal quality, jpeg artifacts, signature, watermark, "
    "username, blurry."
)
"""That of the published code."""

END_OF_LINE = "<|extra_200|>"
FIRST_CODE = "<|visual token 000000|>"

IMAGES_PER_CHUNK = 2
IMAGES_PER_CHUNK_ON_CPU = 1
"""Images that are decoded at one time."""


class Emu3Policy(Policy):
    """An Emu3 as the trainer and the rollout engine see it; `grid` has rows and columns of tokens.

    Only the parameters whose names match a trainable pattern require a gradient; a pattern that
    matches none is a `RecipeError`, and so is a grid that the model has no positions for.
    """

    default_guidance = 3.0
    default_top_k = 2048

    def __init__(
        self,
        module: Emu3ForConditionalGeneration,
        processor: Emu3Processor,
        *,
        grid: tuple[int, int],
        prompt_suffix: str = "",
        negative_prompt: str = NEGATIVE_PROMPT,
        trainable: Sequence[str] = (),
    ):
        super().__init__(module, processor)
        select_trainable(module, trainable)
        use_own_parts(self._trunk)
        self._prompt_suffix, self._negative_prompt = prompt_suffix, negative_prompt
        config: Any = module.config
        self.codebook_size = config.vq_config.codebook_size
        self._first_code = config.vocabulary_map[FIRST_CODE]
        self._end_of_line = config.vocabulary_map[END_OF_LINE]
        self.layout = token_layout(grid, self.codebook_size)
        self._room = config.text_config.max_position_embeddings - num_columns(grid)
        self._control = frozenset(
            (*processor.tokenizer.added_tokens_encoder, *processor.tokenizer.all_special_tokens)
        )
        length = len(self._ids_of(negative_prompt))
        if length > self._room:
            raise RecipeError(
                f"policy.image_area: {grid[0]} x {grid[1]} tokens leave the negative prompt "
                f"{self._room} positions of the model's, and it needs {length}; write a smaller one"
            )

    @property
    def _trunk(self) -> Any:
        return self.module.model.text_model

    @property
    def trunk_blocks(self) -> Sequence[nn.Module]:
        return self._trunk.layers

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt: BOS, its text, begin-of-image and the size of the image.

        A prompt that is empty, holds a special token or an unknown word, or leaves no room for the
        image is an `InputError`.
        """
        where = check_words(prompt)
        spelled = self.processor.tokenizer.tokenize(prompt.text)
        special = next((token for token in spelled if token in self._control), None)
        if special is not None:
            raise InputError(
                f"{where}: '{special}' is a special token of the model, or stands for a word that "
                "it does not know; write plain words"
            )
        ids = self._ids_of(prompt.text + self._prompt_suffix)
        if len(ids) > self._room:
            raise InputError(
                f"{where} ('{prompt.text[:40]}...'): {len(ids)} tokens, but the model has room for "
                f"{self._room} before the image; write a shorter one"
            )
        return ids

    def _ids_of(self, text: str) -> list[int]:
        tokenizer: Any = self.processor.tokenizer
        rows, columns = self.layout.grid
        size = f"{tokenizer.boi_token}{rows}*{columns}{tokenizer.image_wrapper_token}"
        return tokenizer(f"{tokenizer.bos_token}{text}{size}", add_special_tokens=False)[
            "input_ids"
        ]

    def encode(self, prompts: Sequence[Prompt]) -> Prefix:
        """The prompts as embeddings, with a gradient where the embedding trains; the unconditional
        row of each is the negative prompt."""
        rows = [torch.tensor(self.prompt_ids(prompt)) for prompt in prompts]
        lengths_P = torch.tensor([len(row) for row in rows], device=self.device)
        ids_PL = pad_sequence(rows, batch_first=True)
        negative_1L = torch.tensor([self._ids_of(self._negative_prompt)])
        embed = self._trunk.embed_tokens
        uncond = Prefix(
            embed(negative_1L.to(self.device)).expand(len(rows), -1, -1),
            torch.full_like(lengths_P, negative_1L.shape[1]),
        )
        return Prefix(embed(ids_PL.to(self.device)), lengths_P, uncond)

    def embed(self, tokens_NU: Tensor) -> Tensor:
        is_code_NU = tokens_NU < self.codebook_size
        return self._trunk.embed_tokens(
            torch.where(is_code_NU, tokens_NU + self._first_code, self._end_of_line)
        )

    def hidden(self, prefix: Prefix, tokens_NT: Tensor) -> Tensor:
        return teacher_forced(self, self._trunk, prefix, tokens_NT)

    @property
    def _head_weight(self) -> Tensor:
        """The rows of the text head that are image tokens, VD."""
        return self.module.lm_head.weight[self._first_code :][: self.codebook_size]

    def head(self, hidden: Tensor) -> Tensor:
        """Logits over the codebook, fp32 or wider whatever the weights are."""
        weight_VD = self._head_weight
        wide = torch.promote_types(weight_VD.dtype, torch.float32)
        return linear(hidden.to(wide), weight_VD.to(wide))

    @torch.no_grad()
    def codes(self, tokens_NT: Tensor) -> Tensor:
        """The codebook vectors as they are, codes_NTC in fp32; their lengths differ."""
        return self.module.model.vqmodel.quantize.embedding(tokens_NT).float()

    @torch.no_grad()
    def images(self, prompts: Sequence[Prompt], tokens_NT: Tensor) -> Tensor:
        settings = self.processor.image_processor
        mean = torch.tensor(settings.image_mean, device=self.device)
        std = torch.tensor(settings.image_std, device=self.device)
        on_cpu = self.device.type == "cpu"
        chunks = []
        for tokens in tokens_NT.split(IMAGES_PER_CHUNK_ON_CPU if on_cpu else IMAGES_PER_CHUNK):
            tokens_NHW = tokens.view(-1, *self.layout.grid)
            pixels_NCHW = decode_first_frame(self.module.model.vqmodel, tokens_NHW)
            shares_NHWC = pixels_NCHW.float().permute(0, 2, 3, 1) * std + mean
            chunks.append(shares_NHWC.mul(255).round().clamp(0, 255).to(torch.uint8).cpu())
        return torch.cat(chunks)

    @torch.no_grad()
    def decoder_weights(self) -> DecoderWeights:
        inputs = torch.arange(self.codebook_size + 1, device=self.device)
        weights = trunk_weights(
            self._trunk, input_embeds=self.embed(inputs), head=(), adapter=self.adapter
        )
        return replace(weights, head=[(self._head_weight, None)])

    def save(
        self, folder: str | Path, *, layout: str = "transformers", base: str | Path = ""
    ) -> None:
        """Writes weights, configuration, tokenizer and processor; an adapter is merged into them.

        The configuration says how images were drawn, so that the folder alone draws them again.
        """
        rows, columns = self.layout.grid
        drawn_with = {
            "image_area": rows * columns * _factor(self.module.config.vq_config) ** 2,
            "ratio": f"{columns}:{rows}",
            "prompt_suffix": self._prompt_suffix,
            "negative_prompt": self._negative_prompt,
        }
        setattr(self.module.config, SETTINGS_KEY, drawn_with)
        self.module.save_pretrained(folder, state_dict=merged_state(self.module))
        self.processor.save_pretrained(folder)


def grid_of(image_area: int, ratio: str, factor: int) -> tuple[int, int]:
    """Rows and columns of tokens, `factor` pixels each, of an image of about so many pixels; the
    rule of the published code. One without tokens is a `RecipeError`."""
    width, height = map(int, ratio.split(":"))
    scale = (image_area / (width * height)) ** 0.5
    grid = round(height * scale / factor), round(width * scale / factor)
    if not all(grid):
        raise RecipeError(
            f"policy.image_area: an image of {image_area} pixels and ratio {ratio} has no token of "
            f"{factor} x {factor}; write a larger one"
        )
    return grid


def num_columns(grid: tuple[int, int]) -> int:
    """Tokens of an image and the end-of-line tokens between its rows."""
    rows, columns = grid
    return rows * (columns + 1) - 1


def token_layout(grid: tuple[int, int], codebook_size: int) -> TokenLayout:
    """Rows of tokens with an end-of-line token, row V of the inputs, between them."""
    rows, columns = grid
    fixed_U = torch.full((num_columns(grid),), -1)
    fixed_U[columns :: columns + 1] = codebook_size
    return TokenLayout(grid, rows * columns, fixed_U)


def decode_first_frame(vqmodel: Any, tokens_NHW: Tensor) -> Tensor:
    """The image of each grid of tokens as the tokenizer has it, normalised pixels, NCHW.

    The tokenizer is one of videos: it decodes a few equal frames, of which the first is the image.
    Behind its temporal layers the frames do not meet, so the others are left out there.
    """
    hook = vqmodel.decoder.time_conv[-1].register_forward_hook(
        lambda module, inputs, output: output[:, :, :1].contiguous()
    )
    try:
        quant_N1CHW = vqmodel.quantize.embedding(tokens_NHW).permute(0, 3, 1, 2)[:, None]
        post_N1CHW = vqmodel.post_quant_conv(quant_N1CHW.transpose(1, 2)).transpose(1, 2)
        return vqmodel.decoder(post_N1CHW, quant_N1CHW)
    finally:
        hook.remove()


class Emu3Config(PolicyConfig):
    """Emu3-Gen in transformers' layout."""

    policy_class = Emu3Policy
    default_trainable = ("model.text_model.layers.*", "model.text_model.norm.*")
    tags = ("emu3",)
    loading_code: ClassVar = {
        "transformers": """from transformers import Emu3ForConditionalGeneration, Emu3Processor
model = Emu3ForConditionalGeneration.from_pretrained(FOLDER)
processor = Emu3Processor.from_pretrained(FOLDER)""",
        "adapter": """from peft import PeftModel
from transformers import Emu3ForConditionalGeneration
model = Emu3ForConditionalGeneration.from_pretrained(BASE)
model = PeftModel.from_pretrained(model, FOLDER)""",
    }

    path: str = "BAAI/Emu3-Gen-hf"
    """Folder of the weights, or hub id: OWNER/NAME, OWNER/NAME/FOLDER, with @REVISION or without;
    in the layout of transformers."""
    image_area: PositiveInt = 518_400
    """Pixels of an image, about: 518400 is 720 x 720, as published, 262144 is 512 x 512."""
    ratio: str = "1:1"
    """Width to height of an image, in quotes."""
    prompt_suffix: str = ""
    """Written behind each prompt; published images were drawn with ' masterpiece, film grained,
    best quality.'."""
    negative_prompt: str = NEGATIVE_PROMPT
    """The text that guidance leads away from; the published one. Empty: the prompt that the model
    was trained with where a caption was left out."""

    @field_validator("ratio")
    @classmethod
    def _is_ratio(cls, ratio: str) -> str:
        if not re.fullmatch(r"[1-9]\d*:[1-9]\d*", ratio):
            raise validation_error("", f"'{ratio}' is none; write WIDTH:HEIGHT, such as '16:9'")
        return ratio

    def size(self) -> ModelSize | None:
        return size_of(self.path, image_area=self.image_area, ratio=self.ratio)

    def build(self, device: torch.device) -> Emu3Policy:
        """The policy; wrong weights are a `WeightsError`, wrong patterns a `RecipeError`."""
        module, processor = load_emu3(self.path, dtype=self.dtype, device=device)
        trainable = self.trainable
        if self.lora:
            add_adapter(module.model.text_model, self.lora)
            trainable = (PATTERN,)
        return Emu3Policy(
            module,
            processor,
            grid=grid_of(self.image_area, self.ratio, _factor(module.config.vq_config)),
            prompt_suffix=self.prompt_suffix,
            negative_prompt=self.negative_prompt,
            trainable=trainable,
        )


# Sizes without weights: the module of a configuration, whose tensors have no memory.

OWNERS = ("BAAI", "Emu3-community")
PUBLISHED = "Emu3-Gen-hf"


def size_of(path: str, *, image_area: int, ratio: str) -> ModelSize | None:
    """The size of a folder or of the published hub id with images of this size, else None.

    What is in a folder and is no Emu3 is a `WeightsError`.
    """
    if Path(path).expanduser().is_dir():
        return _size(_read_config(find(path)), image_area, ratio)
    owner, _, name = path.partition("@")[0].partition("/")
    if owner not in OWNERS or name != PUBLISHED:
        return None
    # The published configuration is that of the class; a vocabulary has no size.
    return _size(HfEmu3Config(vocabulary_map={}), image_area, ratio)


def _size(config: Any, image_area: int, ratio: str) -> ModelSize:
    text, vq = config.text_config, config.vq_config
    with torch.device("meta"):
        module: Any = Emu3ForConditionalGeneration(config)
    grid = grid_of(image_area, ratio, _factor(vq))
    num_tokens = grid[0] * grid[1]
    return size_of_module(
        module,
        trunk="model.text_model",
        outside=("model.text_model.", "lm_head."),
        image_head=vq.codebook_size * text.hidden_size,
        codebook=vq.codebook_size,
        inputs=vq.codebook_size + 1,
        image_tokens=num_tokens,
        columns=num_columns(grid),
        pixels=num_tokens * _factor(vq) ** 2,
        # The last level begins with the width of the level before: what its first block adds to,
        # and four steps of the norm in it.
        decoder_channels=5 * vq.base_channels * max(vq.channel_multiplier[:2]),
        images_at_once=IMAGES_PER_CHUNK,
        images_at_once_on_cpu=IMAGES_PER_CHUNK_ON_CPU,
    )


def _factor(vq_config: Any) -> int:
    """Pixels of a token, in height and width."""
    return 2 ** (len(vq_config.channel_multiplier) - 1)


# Strict loading of Emu3 folders: every tensor there, none over, each of its shape.


def load_emu3(
    path: str | Path, *, dtype: str = "float32", device: torch.device | str = "cpu"
) -> tuple[Emu3ForConditionalGeneration, Emu3Processor]:
    """The model and processor of a folder or a hub id in transformers' layout.

    Nothing of a checkpoint is ever run. What is no whole Emu3 checkpoint is a `WeightsError`; a hub
    model of another kind is refused before its weights are downloaded.
    """
    source = find(path)
    with quiet():
        config = _read_config(source)
        processor = _read_processor(source)
        check_structure(source.name, config, processor)
        source.fetch_weights()
        module = load_whole(
            Emu3ForConditionalGeneration,
            source.name,
            source.folder,
            config=config,
            dtype=getattr(torch, dtype),
            attn_implementation="sdpa",
        )
    # nn.Module spells out what transformers' wrapper of `to` hides from type checkers.
    nn.Module.to(module, device)
    return module.eval(), processor


def _read_config(source: Source) -> Any:
    model_type = model_type_of(source)
    if model_type != HfEmu3Config.model_type:
        raise WeightsError(
            f"{source.name}: model_type is '{model_type}'; write a model of type 'emu3', such as "
            f"{OWNERS[0]}/{PUBLISHED}"
        )
    with refused(f"{source.name}: config.json"):
        return HfEmu3Config.from_pretrained(source.folder)


def _read_processor(source: Source) -> Emu3Processor:
    # A tokenizer without image tokens shows as a missing attribute.
    with refused(f"{source.name}: cannot load the processor"):
        processor = AutoProcessor.from_pretrained(source.folder, trust_remote_code=False)
    if not isinstance(processor, Emu3Processor):
        raise WeightsError(
            f"{source.name}: its processor is a {type(processor).__name__}; write a folder with "
            "the files of an Emu3Processor beside the weights"
        )
    return processor


def check_structure(source: str, config: Any, processor: Any) -> None:
    """Refuses an Emu3 whose parts the adapter does not know, or do not fit (`WeightsError`)."""
    text, images = config.text_config, processor.image_processor
    require(
        source,
        {
            "text_config.hidden_act": (text.hidden_act, "silu"),
            "text_config.attention_bias": (text.attention_bias, False),
            "text_config.mlp_bias": (text.mlp_bias, False),
            "do_normalize of the image processor": (images.do_normalize, True),
            "do_rescale of the image processor": (images.do_rescale, True),
        },
    )
    _check_vocabulary(source, config, processor.tokenizer)


def _check_vocabulary(source: str, config: Any, tokenizer: Any) -> None:
    """Refuses image tokens that are not one row of ids, and an end of line of no or another id."""
    ids = config.vocabulary_map or {}
    first, num_codes = ids.get(FIRST_CODE, -1), config.vq_config.codebook_size
    wanted = {f"<|visual token {code:06d}|>": first + code for code in range(num_codes)}
    wanted[END_OF_LINE] = tokenizer.convert_tokens_to_ids(END_OF_LINE)
    wrong = next((token for token, index in wanted.items() if ids.get(token) != index), None)
    if wrong is not None:
        raise WeightsError(
            f"{source}: vocabulary_map of config.json has '{wrong}' at {ids.get(wrong)}; image "
            "tokens must follow each other, and the end of a line be that of the tokenizer: write "
            "the files of one model"
        )
