"""Janus and Janus-Pro through transformers, from a few million parameters to 7 B.

Shape suffixes: P prompts, N completions, T image tokens, L positions of a prompt, S of prompt and
image together, D model width, C codebook channels, V codebook size, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoProcessor,
    JanusForConditionalGeneration,
    JanusProcessor,
)
from transformers import JanusConfig as HfJanusConfig

from stage_rl.errors import InputError, WeightsError
from stage_rl.policies import janus_deepseek as deepseek
from stage_rl.policies.base import (
    DecoderWeights,
    Policy,
    PolicyConfig,
    Prefix,
    TokenLayout,
    check_text,
)
from stage_rl.policies.loading import (
    DTYPES,
    INDEXES,
    SINGLE,
    Source,
    find,
    load_whole,
    model_type_of,
    quiet,
    read_tensors,
    refused,
    require,
    select_trainable,
)
from stage_rl.policies.lora import (
    PATTERN,
    add_adapter,
    merged_state,
)
from stage_rl.policies.sizes import ModelSize, size_of_module
from stage_rl.policies.trunk import teacher_forced, trunk_weights, use_own_parts
from stage_rl.policies.vq import (
    IMAGES_PER_CHUNK,
    IMAGES_PER_CHUNK_ON_CPU,
    decode_images,
    unit_codes,
)
from stage_rl.settings import SHIPPED_MODELS
from stage_rl.types import Prompt


class JanusPolicy(Policy):
    """A Janus as the trainer and the rollout engine see it.

    Only the parameters whose names match a trainable pattern require a gradient; a pattern that
    matches none is a `RecipeError`.
    """

    folder_layouts = ("transformers", "deepseek")
    understands = True

    def __init__(
        self,
        module: JanusForConditionalGeneration,
        processor: JanusProcessor,
        *,
        trainable: Sequence[str],
    ):
        super().__init__(module, processor)
        select_trainable(module, trainable)
        use_own_parts(self._trunk)
        config: Any = module.config
        self._text_config = config.text_config
        side = config.vq_config.num_patches
        self.layout = TokenLayout(grid=(side, side), num_tokens=side * side)
        self.codebook_size = config.vq_config.num_embeddings
        self._ids = _special_ids(module, processor)

    @property
    def _model(self) -> Any:
        return self.module.model

    @property
    def _trunk(self) -> Any:
        return self._model.language_model

    @property
    def trunk_blocks(self) -> Sequence[nn.Module]:
        return self._trunk.layers

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt in the checkpoint's own template, begin-of-image last.

        A prompt that is empty, holds a special token or an unknown word, or leaves no room for
        the image is an `InputError`.
        """
        where = prompt.place
        check_text(prompt, self.processor.tokenizer)
        self._check_words(where, prompt.text)
        message = {"role": "user", "content": [{"type": "text", "text": prompt.text}]}
        text = self.processor.apply_chat_template([message], add_generation_prompt=True)
        ids = self.processor(text=[text], generation_mode="image")["input_ids"][0]
        room = self._text_config.max_position_embeddings - self.layout.num_tokens
        if len(ids) > room:
            raise InputError(
                f"{where} ('{prompt.text[:40]}...'): {len(ids)} tokens, but the model has room for "
                f"{room} before the image; write a shorter one"
            )
        return [int(token) for token in ids]

    def encode(self, prompts: Sequence[Prompt]) -> Prefix:
        """The prompts as embeddings, with a gradient where the text embedding trains.

        The unconditional row is as long as the prompt: its BOS and begin-of-image, pads elsewhere.
        """
        rows = [torch.tensor(self.prompt_ids(prompt)) for prompt in prompts]
        lengths_P = torch.tensor([len(row) for row in rows], device=self.device)
        ids_PL = pad_sequence(rows, batch_first=True, padding_value=self._ids["pad"])
        kept_PL = (ids_PL == self._ids["bos"]) | (ids_PL == self._ids["boi"])
        uncond_PL = ids_PL.masked_fill(~kept_PL, self._ids["pad"])
        embed = self._trunk.get_input_embeddings()
        uncond = Prefix(embed(uncond_PL.to(self.device)), lengths_P)
        return Prefix(embed(ids_PL.to(self.device)), lengths_P, uncond)

    def embed(self, tokens_NU: Tensor) -> Tensor:
        return self.module.prepare_embeddings_for_image_generation(tokens_NU)

    def hidden(self, prefix: Prefix, tokens_NT: Tensor) -> Tensor:
        return teacher_forced(self, self._trunk, prefix, tokens_NT)

    def head(self, hidden: Tensor) -> Tensor:
        head = self._model.generation_head
        return head(hidden.to(head.proj_out.weight.dtype))

    def codes(self, tokens_NT: Tensor) -> Tensor:
        return unit_codes(self._model.vqmodel, tokens_NT)

    def images(self, prompts: Sequence[Prompt], tokens_NT: Tensor) -> Tensor:
        return decode_images(self._model.vqmodel, tokens_NT)

    @torch.no_grad()
    @torch.inference_mode()
    def answer_logits(self, image_HWC: Tensor, question: str) -> Tensor:
        """Without a system prompt, the image on a line of its own before the question."""
        text = f"{self.processor.image_token}\n{question}"
        message = {"role": "user", "content": [{"type": "text", "text": text}]}
        asked = self.processor.apply_chat_template([message], add_generation_prompt=True)
        picture = Image.fromarray(image_HWC.cpu().numpy())
        inputs = self.processor(text=[asked], images=[picture], generation_mode="text")
        return self.module(**inputs.to(self.device), logits_to_keep=1).logits[0, -1].float()

    def decoder_weights(self) -> DecoderWeights:
        head = self._model.generation_head
        return trunk_weights(
            self._trunk,
            input_embeds=self.embed(torch.arange(self.codebook_size, device=self.device)),
            head=(head.proj_out, head.vision_head),
            adapter=self.adapter,
        )

    def save(
        self, folder: str | Path, *, layout: str = "transformers", base: str | Path = ""
    ) -> None:
        """Writes weights, configurations, tokenizer and processor; an adapter is merged into them.

        Of a `base` in DeepSeek's layout, what no forward pass reads comes along into that layout.
        """
        state = merged_state(self.module)
        if layout == "transformers":
            self.module.save_pretrained(folder, state_dict=state)
            self.processor.save_pretrained(folder)
            return
        source, like = find(base) if base else None, None
        if source and is_original(source):
            source.fetch_weights()
            like = source.folder
        parts = (self.module, self.processor, Path(folder))
        deepseek.write_folder(*parts, state=state, pad_id=self._ids["pad"], like=like)

    def _check_words(self, where: str, text: str) -> None:
        tokenizer = self.processor.tokenizer
        if tokenizer.unk_token is None:
            return
        unknown = [word for word in text.split() if tokenizer.unk_token in tokenizer.tokenize(word)]
        if unknown:
            named = ", ".join(f"'{word}'" for word in unknown)
            raise InputError(f"{where}: the model does not know {named}; write words it knows")


def _special_ids(
    module: JanusForConditionalGeneration, processor: JanusProcessor
) -> dict[str, int]:
    """Pad, BOS and begin-of-image as the checkpoint says, in its generation settings first."""
    tokenizer, settings = processor.tokenizer, module.generation_config
    image_settings = getattr(settings, "generation_kwargs", None) or {}
    boi = tokenizer.convert_tokens_to_ids(tokenizer.boi_token)
    named = {
        "pad": (settings.pad_token_id, tokenizer.pad_token_id),
        "bos": (settings.bos_token_id, tokenizer.bos_token_id),
        "boi": (image_settings.get("boi_token_id"), boi),
    }
    ids: dict[str, Any] = {
        name: next((i for i in found if i is not None), None) for name, found in named.items()
    }
    for name, token in ids.items():
        if token is None:
            raise WeightsError(
                f"{module.name_or_path}: neither its generation_config nor its tokenizer names the "
                f"{name} token; write {name}_token_id into generation_config.json"
            )
    return ids


class JanusConfig(PolicyConfig):
    """Janus and Janus-Pro of any size, in transformers' layout or DeepSeek's own."""

    policy_class = JanusPolicy
    default_trainable = ("model.language_model.*",)
    tags = ("janus",)
    loading_code: ClassVar = {
        "transformers": """from PIL import Image
from transformers import JanusForConditionalGeneration, JanusProcessor

FOLDER, PROMPT = ".", "a photo of a red circle"
model = JanusForConditionalGeneration.from_pretrained(FOLDER)
processor = JanusProcessor.from_pretrained(FOLDER)
message = {"role": "user", "content": [{"type": "text", "text": PROMPT}]}
text = processor.apply_chat_template([message], add_generation_prompt=True)
inputs = processor(text=[text], generation_mode="image", return_tensors="pt")
drawn = {"do_sample": True, "top_k": 0, "guidance_scale": GUIDANCE}
tokens = model.generate(**inputs, generation_mode="image", **drawn)
pixels = model.decode_image_tokens(tokens)[0].float().clamp(-1, 1)
Image.fromarray(((pixels + 1) * 127.5).round().byte().numpy()).save("drawn.png")""",
        "deepseek": """from janus.models import MultiModalityCausalLM, VLChatProcessor
processor = VLChatProcessor.from_pretrained(FOLDER)
model = MultiModalityCausalLM.from_pretrained(FOLDER)""",
        "adapter": """from peft import PeftModel
from transformers import JanusForConditionalGeneration
model = JanusForConditionalGeneration.from_pretrained(BASE)
model = PeftModel.from_pretrained(model, FOLDER)""",
    }

    path: str = "shapes"
    """Folder of the weights, or hub id: OWNER/NAME, OWNER/NAME/FOLDER, with @REVISION or without;
    shapes: the small model that comes with the package."""
    prompt_format: Literal["checkpoint", "deepseek", "deepseek_old"] = "checkpoint"
    """What stands around a prompt: the checkpoint's own; <|User|>: and <|Assistant|>: (deepseek);
    User: and Assistant: (deepseek_old), with which the paper's released code trains Janus-Pro."""

    def size(self) -> ModelSize | None:
        return size_of(self.path)

    def load(self, device: torch.device) -> tuple[JanusForConditionalGeneration, JanusProcessor]:
        """The module and its processor; wrong weights are a `WeightsError`."""
        module, processor = load_janus(self.path, dtype=self.dtype, device=device)
        if self.prompt_format != "checkpoint":
            tokenizer = processor.tokenizer
            processor.chat_template = deepseek.chat_template(self.prompt_format, tokenizer)
        return module, processor

    def build(self, device: torch.device) -> JanusPolicy:
        """The policy; wrong weights are a `WeightsError`, wrong patterns a `RecipeError`."""
        module, processor = self.load(device)
        trainable = self.trainable
        if self.lora:
            add_adapter(module.model.language_model, self.lora)
            module.model.generation_head.float()  # log-probabilities are fp32
            trainable = (PATTERN,)
        return JanusPolicy(module, processor, trainable=trainable)


# Sizes without weights: the module of a configuration, whose tensors have no memory.

# Layers, width, width of the MLP and heads in `config.json` of the models on the hub.
PUBLISHED = {"Janus-Pro-1B": (24, 2048, 5632, 16), "Janus-Pro-7B": (30, 4096, 11_008, 32)}


def size_of(path: str) -> ModelSize | None:
    """The size of a folder in either layout, of `shapes` or of a published hub id, else None.

    What is in a folder and is no Janus is a `WeightsError`.
    """
    if path in SHIPPED_MODELS or Path(path).expanduser().is_dir():
        return size_of_config(read_config(find(path)))
    owner, _, name = path.partition("@")[0].partition("/")
    if owner not in ("deepseek-ai", "deepseek-community") or name not in PUBLISHED:
        return None
    layers, width, mlp, heads = PUBLISHED[name]
    sizes: dict[str, dict[str, int]] = {
        "text_config": {
            **{"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": mlp},
            **{"num_attention_heads": heads, "vocab_size": 102_400},
            "max_position_embeddings": 16_384,
        },
        "vision_config": {"image_size": 384, "projection_dim": width, "depth": 2},
        "vq_config": {"projection_dim": width, "image_token_embed_dim": width},
    }
    return size_of_config(HfJanusConfig.from_dict(sizes | {"tie_word_embeddings": False}))


def size_of_config(config: Any) -> ModelSize:
    """The size of a Janus of this configuration."""
    vq = config.vq_config
    with torch.device("meta"):
        module: Any = JanusForConditionalGeneration(config)
    head = module.model.generation_head
    return size_of_module(
        module,
        trunk="model.language_model",
        outside=("model.language_model.", "model.generation_head."),
        image_head=sum(parameter.numel() for parameter in head.parameters()),
        codebook=vq.num_embeddings,
        inputs=vq.num_embeddings,
        image_tokens=vq.num_patches**2,
        columns=vq.num_patches**2,
        pixels=(vq.num_patches * 2 ** (len(vq.channel_multiplier) - 1)) ** 2,
        decoder_channels=3 * vq.base_channels,
        images_at_once=IMAGES_PER_CHUNK,
        images_at_once_on_cpu=IMAGES_PER_CHUNK_ON_CPU,
    )


# Strict loading of Janus folders: every tensor there, none over, each of its shape.


def load_janus(
    path: str | Path, *, dtype: str = "float32", device: torch.device | str = "cpu"
) -> tuple[JanusForConditionalGeneration, JanusProcessor]:
    """The model and processor of a folder, a hub id or `shapes`, in either layout.

    Nothing of a checkpoint is ever run. What is no whole Janus checkpoint is a `WeightsError`;
    a hub model of another kind is refused before its weights are downloaded.
    """
    source = find(path)
    original = is_original(source)
    with quiet():
        if original:
            with refused(source.name):
                config, processor = deepseek.describe(source.folder, source.name)
        else:
            config, processor = read_config(source), _read_processor(source)
        check_structure(source.name, config)
        source.fetch_weights()
        module = _load_module(source, config, dtype, original=original)
    if original:
        module.generation_config = deepseek.generation_config(processor.tokenizer)
    # nn.Module spells out what transformers' wrapper of `to` hides from type checkers.
    nn.Module.to(module, device)
    return module.eval(), processor


def is_original(source: Source) -> bool:
    """Whether a Janus is in DeepSeek's layout; what is no Janus is a `WeightsError`."""
    kind = model_type_of(source)
    if kind not in (HfJanusConfig.model_type, deepseek.MODEL_TYPE):
        raise WeightsError(f"{source.name}: model_type is '{kind}'; write a model of type 'janus'")
    return kind == deepseek.MODEL_TYPE


def read_config(source: Source) -> Any:
    """The configuration of a folder in either layout."""
    if is_original(source):
        raw = deepseek.read_json(source.folder, "config.json", source.name)
        return deepseek.config_to_transformers(raw, source.name)
    with refused(f"{source.name}: config.json"):
        return HfJanusConfig.from_pretrained(source.folder)


def check_structure(source: str, config: Any) -> None:
    """Refuses a Janus whose parts the adapter does not know, or do not fit (`WeightsError`)."""
    text, vision, vq = config.text_config, config.vision_config, config.vq_config
    require(
        source,
        {
            "text_config.model_type": (text.model_type, "llama"),
            "text_config.hidden_act": (text.hidden_act, "silu"),
            "text_config.attention_bias": (text.attention_bias, False),
            "text_config.mlp_bias": (text.mlp_bias, False),
            "vq_config.hidden_act": (vq.hidden_act, "gelu"),
            "vision_config.num_image_tokens": (vision.num_image_tokens, vq.num_patches**2),
            "vq_config.projection_dim": (vq.projection_dim, text.hidden_size),
        },
    )


def _read_processor(source: Source) -> JanusProcessor:
    # A tokenizer without image tokens shows as a missing attribute.
    with refused(f"{source.name}: cannot load the processor"):
        processor = AutoProcessor.from_pretrained(source.folder, trust_remote_code=False)
    if not isinstance(processor, JanusProcessor):
        raise WeightsError(
            f"{source.name}: its processor is a {type(processor).__name__}; write a folder with "
            "the files of a JanusProcessor beside the weights"
        )
    return processor


def _load_module(
    source: Source, config: Any, dtype: str, *, original: bool
) -> JanusForConditionalGeneration:
    folder, state = source.folder, None
    if original:
        state = deepseek.read_state(folder, source.name, config)
    elif not any((folder / name).is_file() for name in (*INDEXES, *SINGLE)):
        state = read_tensors(folder)  # which transformers would not find by itself
    return load_whole(
        JanusForConditionalGeneration,
        source.name,
        folder if state is None else None,
        config=config,
        state_dict=state,
        dtype=DTYPES[dtype],
        attn_implementation="sdpa",
    )
