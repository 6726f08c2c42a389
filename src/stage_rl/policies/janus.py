"""Janus and Janus-Pro through transformers, from a few million parameters to 7 B.

Shape suffixes: P prompts, N completions, T image tokens, L prompt slots, S slots of prompt and
image together, D model width, C codebook channels, V codebook size, H x W pixels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence
from transformers import JanusForConditionalGeneration, JanusProcessor

from stage_rl.errors import InputError, WeightsError
from stage_rl.policies.attention import use_causal
from stage_rl.policies.base import (
    DecoderWeights,
    LayersOnDemand,
    LayerWeights,
    Policy,
    Prefix,
    TokenLayout,
)
from stage_rl.policies.deepseek.files import write_folder
from stage_rl.policies.lora import AdapterOff, has_adapter, merged_state, merged_weight
from stage_rl.policies.trainable import select_trainable
from stage_rl.types import Prompt

IMAGES_PER_CHUNK = 32
IMAGES_PER_CHUNK_ON_CPU = 8
"""Images that are decoded at one time; so few stay in a processor's cache."""


class JanusCodebook:
    """The visual vocabulary of a Janus."""

    def __init__(self, vqmodel: Any):
        self._vqmodel = vqmodel
        self._embedding: nn.Embedding = vqmodel.quantize.embedding
        self.size: int = self._embedding.num_embeddings

    @torch.no_grad()
    def vectors(self, tokens_NT: Tensor) -> Tensor:
        """The codebook vectors as the image decoder sees them: codes_NTC, fp32, of length 1."""
        return normalize(self._embedding(tokens_NT).float(), dim=-1)

    @torch.no_grad()
    def decode(self, tokens_NT: Tensor) -> Tensor:
        """The images of tokens, images_NHWC uint8 on the CPU; -1 is black and 1 is white."""
        chunks = []
        on_cpu = self._embedding.weight.device.type == "cpu"
        size = IMAGES_PER_CHUNK_ON_CPU if on_cpu else IMAGES_PER_CHUNK
        for tokens in tokens_NT.split(size):
            pixels = self._vqmodel.decode(tokens).float().permute(0, 2, 3, 1)
            chunks.append(pixels.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).cpu())
        return torch.cat(chunks)


class JanusPolicy:
    """A Janus as the trainer and the rollout engine see it.

    Only the parameters whose names match a trainable pattern require a gradient; a pattern that
    matches none is a `RecipeError`.
    """

    def __init__(
        self,
        module: JanusForConditionalGeneration,
        processor: JanusProcessor,
        *,
        trainable: Sequence[str],
    ):
        self.module = module
        self.processor = processor
        select_trainable(module, trainable)
        self._trunk = module.model.language_model
        use_causal(self._trunk)
        self.trunk_blocks: Sequence[nn.Module] = self._trunk.layers
        self.codebook = JanusCodebook(module.model.vqmodel)
        config: Any = module.config
        self._text_config = config.text_config
        side = config.vq_config.num_patches
        self._layout = TokenLayout(grid=(side, side), num_tokens=side * side)
        self._ids = _special_ids(module, processor)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.module.device

    def layout(self, prompts: Sequence[Prompt]) -> TokenLayout:
        """The square token grid, the same for all prompts; no token is forced."""
        return self._layout

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt in the checkpoint's own template, begin-of-image last.

        A prompt that is empty, holds a special token or an unknown word, or leaves no room for
        the image is an `InputError`.
        """
        where = f"prompt {prompt.index}"
        if not prompt.text.strip():
            raise InputError(f"{where}: is empty; write what to draw")
        self._check_text(where, prompt.text)
        message = {"role": "user", "content": [{"type": "text", "text": prompt.text}]}
        text = self.processor.apply_chat_template([message], add_generation_prompt=True)
        ids = self.processor(text=[text], generation_mode="image")["input_ids"][0]
        room = self._text_config.max_position_embeddings - self._layout.num_tokens
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
        return Prefix(embed(ids_PL.to(self.device)), lengths_P, embed(uncond_PL.to(self.device)))

    def embed(self, tokens_NT: Tensor) -> Tensor:
        """Image tokens as decoder inputs, embeds_NTD."""
        return self.module.prepare_embeddings_for_image_generation(tokens_NT)

    def hidden(self, prefix: Prefix, tokens_NT: Tensor) -> Tensor:
        """Teacher-forced states that predict each image token, hidden_NTD, with gradient.

        Row b holds its prompt at slots 0 to len - 1 and image token k at len + k; what stands
        behind is never attended, because attention is causal. The last image token predicts none.
        """
        num_tokens = tokens_NT.shape[1]
        inputs_NSD = torch.cat([prefix.embeds_PLD, self.embed(tokens_NT[:, :-1])], 1)
        if torch.is_autocast_enabled(inputs_NSD.device.type):
            inputs_NSD = inputs_NSD.float()  # layers in bf16 add to an fp32 residual stream too
        length_N1 = prefix.lengths_P[:, None]
        num_slots = prefix.embeds_PLD.shape[1]
        slot_1S = torch.arange(inputs_NSD.shape[1], device=tokens_NT.device)[None]
        image_NS = (slot_1S - length_N1 + num_slots).clamp(max=inputs_NSD.shape[1] - 1)
        source_NS = torch.where(slot_1S < length_N1, slot_1S, image_NS)
        states_NSD = self._trunk(
            inputs_embeds=_take_slots(inputs_NSD, source_NS), use_cache=False
        ).last_hidden_state
        step_1T = torch.arange(num_tokens, device=tokens_NT.device)[None]
        return _take_slots(states_NSD, length_N1 - 1 + step_1T)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits over the codebook; the last axis goes from D to V."""
        head = self.module.model.generation_head
        return head(hidden.to(head.proj_out.weight.dtype))

    @torch.no_grad()
    def decoder_weights(self) -> DecoderWeights:
        """The weights the engine copies once per step."""
        text, head = self._text_config, self.module.model.generation_head
        positions = torch.arange(text.max_position_embeddings, device=self.device)[None]
        like = torch.empty(0, device=self.device)
        cos_1SR, sin_1SR = self._trunk.rotary_emb(like, position_ids=positions)
        return DecoderWeights(
            layers=LayersOnDemand(len(self.trunk_blocks), self._layer_weights),
            final_norm=self._trunk.norm.weight,
            norm_eps=text.rms_norm_eps,
            num_heads=text.num_attention_heads,
            num_kv_heads=text.num_key_value_heads,
            head_dim=self._trunk.layers[0].self_attn.head_dim,
            rotary_cos_SR=cos_1SR[0],
            rotary_sin_SR=sin_1SR[0],
            token_embeds_VD=self.embed(torch.arange(self.codebook.size, device=self.device)),
            head=[(layer.weight, layer.bias) for layer in (head.proj_out, head.vision_head)],
        )

    def reference(self, hold: Callable[[Tensor], Tensor] = torch.clone) -> Policy:
        """This policy as it is now, frozen: copies what trains, shares the rest.

        `hold` makes the copy of a parameter of a decoder layer. With an adapter nothing is copied:
        the reference is the base weights, and `hold` is not asked.
        """
        if has_adapter(self.module):
            return AdapterOff(self)
        made = {id(p): p for p in self.module.parameters() if not p.requires_grad}
        for parameter in (p for block in self.trunk_blocks for p in block.parameters()):
            if parameter.requires_grad:
                made[id(parameter)] = nn.Parameter(hold(parameter.detach()), requires_grad=False)
        module = copy.deepcopy(self.module, made).requires_grad_(False)
        for block in module.model.language_model.layers:
            # A compiled or checkpointed forward pass would still run the layer it was made for.
            vars(block).pop("forward", None)
        return JanusPolicy(module, self.processor, trainable=())

    def save(
        self,
        folder: str | Path,
        *,
        layout: Literal["transformers", "deepseek"] = "transformers",
        like: Path | None = None,
    ) -> None:
        """Writes weights, configurations, tokenizer and processor; an adapter is merged into them.

        `like` is the folder in DeepSeek's layout that the policy was loaded from, if it was; see
        `stage_rl.policies.deepseek.files.write_folder`.
        """
        state = merged_state(self.module) if has_adapter(self.module) else self.module.state_dict()
        if layout == "deepseek":
            pad = self._ids["pad"]
            parts = (self.module, self.processor, Path(folder))
            write_folder(*parts, state=state, pad_id=pad, like=like)
            return
        self.module.save_pretrained(folder, state_dict=state)
        self.processor.save_pretrained(folder)

    @torch.no_grad()
    def _layer_weights(self, index: int) -> LayerWeights:
        weights = _layer_weights(self._trunk.layers[index])
        # A streamed reference keeps its layers in host memory.
        moved: dict[str, Any] = {
            name: weight.to(self.device)
            for name, weight in vars(weights).items()
            if weight is not None
        }
        return LayerWeights(**moved)

    def _check_text(self, where: str, text: str) -> None:
        tokenizer = self.processor.tokenizer
        special = next((token for token in tokenizer.all_special_tokens if token in text), None)
        if special is not None:
            raise InputError(f"{where}: holds the special token '{special}'; write plain words")
        if tokenizer.unk_token is None:
            return
        unknown = [word for word in text.split() if tokenizer.unk_token in tokenizer.tokenize(word)]
        if unknown:
            words = ", ".join(f"'{word}'" for word in unknown)
            raise InputError(f"{where}: the model does not know {words}; write words it knows")


def _special_ids(
    module: JanusForConditionalGeneration, processor: JanusProcessor
) -> dict[str, int]:
    """Pad, BOS and begin-of-image as the checkpoint says, in its generation settings first."""
    tokenizer, settings = processor.tokenizer, module.generation_config
    image_settings = getattr(settings, "generation_kwargs", None) or {}
    boi = tokenizer.convert_tokens_to_ids(tokenizer.boi_token)
    ids: dict[str, int] = {
        "pad": _first(settings.pad_token_id, tokenizer.pad_token_id),
        "bos": _first(settings.bos_token_id, tokenizer.bos_token_id),
        "boi": _first(image_settings.get("boi_token_id"), boi),
    }
    for name, token in ids.items():
        if token is None:
            raise WeightsError(
                f"{module.name_or_path}: neither its generation_config nor its tokenizer names the "
                f"{name} token; write {name}_token_id into generation_config.json"
            )
    return ids


def _first(*values: int | None) -> Any:
    return next((value for value in values if value is not None), None)


def _take_slots(values_NSD: Tensor, slots_NT: Tensor) -> Tensor:
    """values_NTD: of each row the slots asked for."""
    return torch.take_along_dim(values_NSD, slots_NT[..., None], dim=1)


def _layer_weights(layer) -> LayerWeights:
    attn, mlp = layer.self_attn, layer.mlp
    return LayerWeights(
        attention_norm=layer.input_layernorm.weight,
        wq=merged_weight(attn.q_proj),
        wk=merged_weight(attn.k_proj),
        wv=merged_weight(attn.v_proj),
        wo=merged_weight(attn.o_proj),
        mlp_norm=layer.post_attention_layernorm.weight,
        w_gate=merged_weight(mlp.gate_proj),
        w_up=merged_weight(mlp.up_proj),
        w_down=merged_weight(mlp.down_proj),
    )
