"""Vision-language models as judges: a picture and a question in, the next token or a reply out.

Any image-text-to-text model of transformers with a chat template will do. The library's own
processors make the inputs. Those that also read videos (Qwen2-VL to Qwen3.5, LLaVA-OneVision) do
not load without torchvision, which nothing but their video part needs: that part is left out.

Shape suffixes: N images (one conversation each), H x W pixels, C colour channels, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    PROCESSOR_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
)

from stage_rl.errors import WeightsError
from stage_rl.policies.loading import quiet
from stage_rl.rewards.pretrained import load_model, load_part

Dtype = Literal["float32", "float16", "bfloat16"]

Conversation = list[dict[str, Any]]
"""Turns in transformers' form; the place of the picture is a part of type image."""


def question(text: str, *, image_first: bool = True, system: str | None = None) -> Conversation:
    """A conversation of one question about one picture, after a system turn where there is one."""
    parts = [{"type": "image"}, {"type": "text", "text": text}]
    user = {"role": "user", "content": parts if image_first else parts[::-1]}
    if system is None:
        return [user]
    return [{"role": "system", "content": [{"type": "text", "text": system}]}, user]


@dataclass(frozen=True)
class Reply:
    """What a model wrote."""

    text: str
    is_cut: bool = False
    """It reached the limit of tokens before it ended."""


@dataclass(frozen=True)
class ChatModel:
    """A vision-language model with its processor; rows of a batch do not depend on each other."""

    module: Any
    processor: Any

    @classmethod
    def load(cls, path: str, *, dtype: Dtype, device: torch.device | str) -> ChatModel:
        """The model of a folder or hub id; one that cannot chat is a `WeightsError`."""
        processor = load_processor(path)
        if not getattr(processor, "chat_template", None):
            raise WeightsError(f"{path}: its processor has no chat template; write a chat model")
        module = load_model(AutoModelForImageTextToText, path, dtype=dtype, device=device)
        return cls(module, processor)

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    def inputs(
        self, images_NHWC: Tensor, conversations: Sequence[Conversation], *, reply_start: str = ""
    ) -> Any:
        """What the model's forward takes, on its device: image n (uint8) in conversation n.

        Padded on the left, with the generation prompt at the end and what the reply begins with;
        thinking is off where the template can turn it off.
        """
        pictures = [Image.fromarray(image_HWC) for image_HWC in images_NHWC.cpu().numpy()]
        turns = [_with_picture(*pair) for pair in zip(conversations, pictures, strict=True)]
        thinks = "enable_thinking" in str(self.processor.chat_template)
        inputs = self.processor.apply_chat_template(
            turns,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            # On the left: what comes next follows the last place of every row.
            processor_kwargs={"padding": True, "padding_side": "left"},
            **({"enable_thinking": False} if thinks else {}),
        )
        if reply_start:
            self._append(inputs, reply_start)
        return inputs.to(self.module.device, dtype=self.module.dtype)

    def _append(self, inputs: Any, text: str) -> None:
        """Continues each row with the tokens of a text, in place."""
        ids_U = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
        new = {"input_ids": ids_U, "attention_mask": torch.ones_like(ids_U)}
        new["mm_token_type_ids"] = torch.zeros_like(ids_U)
        for name in new.keys() & inputs.keys():
            rows = inputs[name]
            inputs[name] = torch.cat([rows, new[name].expand(len(rows), -1)], dim=1)

    @torch.inference_mode()
    def next_logits_NV(
        self, images_NHWC: Tensor, conversations: Sequence[Conversation], *, reply_start: str = ""
    ) -> Tensor:
        """The fp32 logits of the first token of each reply, or of the one after its start."""
        takes_rows = "logits_to_keep" in inspect.signature(self.module.forward).parameters
        last_alone = {"logits_to_keep": 1} if takes_rows else {}
        inputs = self.inputs(images_NHWC, conversations, reply_start=reply_start)
        return self.module(**inputs, **last_alone).logits[:, -1].float()

    @torch.inference_mode()
    def replies(
        self, images_NHWC: Tensor, conversations: Sequence[Conversation], *, max_new_tokens: int
    ) -> list[Reply]:
        """The greedy reply to each conversation, without special tokens and outer white space."""
        inputs = self.inputs(images_NHWC, conversations)
        # Checkpoints bring settings for sampling, of which the penalty of repetition acts on greedy
        # decoding too. A judge says what is most probable.
        greedy = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            repetition_penalty=1.0,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        with quiet():
            tokens = self.module.generate(**inputs, generation_config=greedy)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return [
            Reply(text.strip(), is_cut=len(row) == max_new_tokens and row[-1] not in self._ends)
            for text, row in zip(texts, new.tolist(), strict=True)
        ]

    @property
    def _ends(self) -> set[int | None]:
        """The tokens that end a reply, or stand behind its end."""
        ends = self.module.generation_config.eos_token_id
        return {self.tokenizer.pad_token_id, *(ends if isinstance(ends, list) else [ends])}


def published_template(name: str, **fields: str) -> str:
    """The words in which a published judge is asked (`templates/NAME.txt`), its fields filled."""
    file = resources.files("stage_rl") / "rewards" / "vlm" / "templates" / f"{name}.txt"
    text = file.read_bytes().decode()
    for field, value in fields.items():
        text = text.replace(f"{{{field}}}", value)
    return text


def load_processor(path: str) -> Any:
    """The processor of a model of images and text, which needs no torchvision.

    Where torchvision is installed the pixels are Pillow's all the same, so that scores do not
    depend on it.
    """
    config = load_part(AutoConfig.from_pretrained, path, "the configuration")
    processor_class: Any = PROCESSOR_MAPPING.get(type(config), AutoProcessor)
    if processor_class is not AutoProcessor and _reads_videos(processor_class):
        processor_class = _for_images(processor_class)
    processor = load_part(processor_class.from_pretrained, path, "the processor")
    if hasattr(processor, "image_processor"):
        processor.image_processor = load_part(
            lambda source: AutoImageProcessor.from_pretrained(source, backend="pil"),
            path,
            "the image processor",
        )
    return processor


def _reads_videos(processor_class: Any) -> bool:
    return "video_processor" in processor_class.get_attributes()


def _for_images(processor_class: Any) -> Any:
    """The processor class without its part for videos."""

    class ForImages(processor_class):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [part for part in super().get_attributes() if part != "video_processor"]

    return ForImages


def _with_picture(conversation: Conversation, picture: Image.Image) -> Conversation:
    """The conversation with the picture in its place."""
    return [
        {
            **turn,
            "content": [
                {**part, "image": picture} if part["type"] == "image" else part
                for part in turn["content"]
            ],
        }
        for turn in conversation
    ]
