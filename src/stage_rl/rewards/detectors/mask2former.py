"""GenEval's detector: Mask2Former finds the objects, CLIP tells their colours.

From the outputs of a Mask2Former to instances goes as in MMDetection, whose weights and code the
published GenEval figures come from (Cheng et al. 2022, arXiv 2112.01527). The library's own
post-processing differs: it up-samples by nearest neighbour to a fixed size, and drops queries by a
threshold before it scores masks.

Shape suffixes: N images, H x W pixels, C colour channels, Q queries, K classes (K + 1: with "no
object") or colours, I pairs of query and class, Y x X of the mask logits, B objects, S sentences,
D joint width of CLIP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import ImageOps
from pydantic import Field, PositiveInt
from torch import Tensor
from torch.nn.functional import interpolate, normalize, pad
from transformers import Mask2FormerForUniversalSegmentation

from stage_rl.errors import WeightsError
from stage_rl.prompts.geneval import CLASSES, COLORS, make_record
from stage_rl.rewards.base import Detection, Detector, DetectorConfig, ReferenceCase, photograph
from stage_rl.rewards.clip import CLIP_L14, Clip
from stage_rl.rewards.detectors.openmmlab import (
    STRIDE,
    is_openmmlab,
    load_openmmlab,
    openmmlab_pixels,
)
from stage_rl.rewards.pretrained import (
    SWIN_IGNORED_KEYS,
    batches,
    clip_pixels,
    detr_pixels,
    load_model,
    on_jpeg,
)
from stage_rl.types import Prompt

IGNORED_KEYS = rf"{SWIN_IGNORED_KEYS}|^criterion\."
"""Tensors beside those of a forward pass: the backbone's last norm and the weights of the loss."""

MAX_INSTANCES = 100
"""Most probable (query, class) pairs of an image that are looked at."""

BACKGROUND = 153
"""Grey level of the pixels that do not belong to the object (#999)."""

UNKNOWN = "unknown"
"""The colour of an object without pixels."""

Size = tuple[int, int]
"""Height and width."""


class Mask2FormerConfig(DetectorConfig):
    """GenEval's detector: Mask2Former for objects, CLIP for their colours."""

    path: str = "facebook/mask2former-swin-small-coco-instance"
    """Folder or hub id of the Mask2Former; or a file, the weights of OpenMMLab that GenEval's
    evaluation uses (.pth), with the preprocessing that belongs to them."""
    clip: str = CLIP_L14
    """Folder or hub id of the CLIP that tells colours."""
    shortest_side: int = Field(default=800, ge=32)
    """Pixels that the shorter side of an image is scaled to."""
    longest_side: int = Field(default=1333, ge=32)
    """Most pixels of the longer side."""
    batch_size: PositiveInt = 8
    """Images that go through the detector at once."""
    min_score: float = Field(default=0.05, ge=0, lt=1)
    """Detections at or below are not listed; keep it below the thresholds of the rules."""
    swap_rb: bool = False
    """Show the detector red as blue, as the released training rewards do by mistake."""
    jpeg_quality: int | None = Field(default=None, ge=1, le=100)
    """Look at the images as JPEG of this quality, as Flow-GRPO does (75); null: as drawn."""

    def build(self, device: torch.device) -> Detector:
        """The detector; wrong weights, or those for other classes, are a `WeightsError`."""
        options: dict[str, Any] = {"device": device, "ignore_keys": IGNORED_KEYS}
        if is_openmmlab(self.path):
            module = load_openmmlab(self.path, **options)
        else:
            module = load_model(Mask2FormerForUniversalSegmentation, self.path, **options)
        if module.config.num_labels != len(CLASSES):
            raise WeightsError(
                f"{self.path}: knows {module.config.num_labels} classes; GenEval needs the "
                f"{len(CLASSES)} of COCO, as in facebook/mask2former-swin-small-coco-instance"
            )
        colors = ColorClassifier(Clip.load(self.clip, device=device))
        return on_jpeg(MaskDetector(module, colors, self), self.jpeg_quality)

    def unsupported_reason(self, prompt: Prompt) -> str | None:
        """That a clause asks for something that is never found."""
        clauses = prompt.metadata.get("include") or ()
        unknown = [clause["class"] for clause in clauses if clause["class"] not in CLASSES]
        if not unknown:
            return None
        return f"finds the {len(CLASSES)} classes of GenEval, not '{unknown[0]}'"

    def reference_cases(self) -> tuple[ReferenceCase, ...]:
        """Photographs of a cat and a cup, and the cat tinted in two colours."""
        cat, cup = photograph("cat"), photograph("cup")
        green, red = (
            ImageOps.colorize(cat.convert("L"), black="black", mid=color, white="white")
            for color in ("green", "red")
        )
        cat_in = {color: make_record("colors", "cat", color) for color in ("green", "red")}
        rows = (
            (make_record("single_object", "cat"), cat, cup, "a cat against a cup"),
            (make_record("single_object", "cup"), cup, cat, "a cup against a cat"),
            (cat_in["green"], green, red, "a cat in green against one in red"),
            (cat_in["red"], red, green, "a cat in red against one in green"),
        )
        return tuple(
            ReferenceCase(Prompt(record["prompt"], index, record), better, worse, what)
            for index, (record, better, worse, what) in enumerate(rows)
        )


@dataclass(frozen=True)
class MaskDetector:
    """Finds GenEval's 80 classes by the outputs' order, not by the model's own names for them.

    Only what a prompt gives a colour to is looked at for its colour.
    """

    module: Mask2FormerForUniversalSegmentation
    colors: ColorClassifier
    settings: Mask2FormerConfig

    def __call__(self, images_NHWC: Tensor, prompts: Sequence[Prompt]) -> list[list[Detection]]:
        """The detections of each image, most confident first, down to the lowest score kept."""
        return [
            self._detections(image_HWC, objects, prompt.metadata)
            for images, asked in batches(images_NHWC, prompts, self.settings.batch_size)
            for image_HWC, objects, prompt in zip(
                images, self.instances(images), asked, strict=True
            )
        ]

    @torch.inference_mode()
    def instances(self, images_NHWC: Tensor) -> list[list[Instance]]:
        """The instances of each image, in one batch."""
        images = images_NHWC.flip(-1) if self.settings.swap_rb else images_NHWC
        sides = {"shortest": self.settings.shortest_side, "longest": self.settings.longest_side}
        to_pixels = openmmlab_pixels if is_openmmlab(self.settings.path) else padded_pixels
        padded, resized = to_pixels(images, **sides, device=self.module.device)
        output = self.module(pixel_values=padded)
        return [
            find_instances(
                class_logits_QK,
                mask_logits_QYX,
                padded=(padded.shape[-2], padded.shape[-1]),
                resized=resized,
                image=(images.shape[1], images.shape[2]),
                min_score=self.settings.min_score,
            )
            for class_logits_QK, mask_logits_QYX in zip(
                output.class_queries_logits, output.masks_queries_logits, strict=True
            )
        ]

    def _detections(
        self, image_HWC: Tensor, instances: Sequence[Instance], metadata: Mapping[str, Any]
    ) -> list[Detection]:
        """The instances by name, with the colours that the metadata's clauses ask about."""
        clauses = metadata.get("include") or ()
        colors: dict[int, str] = {}
        for name in {clause["class"] for clause in clauses if clause.get("color") is not None}:
            places = [i for i, one in enumerate(instances) if CLASSES[one.label] == name]
            names = self.colors(image_HWC, [instances[i] for i in places], name)
            colors |= dict(zip(places, names, strict=True))
        return [
            Detection(CLASSES[one.label], one.score, one.box, colors.get(place))
            for place, one in enumerate(instances)
        ]


@dataclass(frozen=True)
class Instance:
    """One object in one image."""

    label: int
    """Index of its class."""
    score: float
    """Probability of the class times the mean probability inside the mask."""
    box: tuple[float, float, float, float]
    """x0, y0, x1, y1 in pixels, tight around the mask, with the last pixel inside."""
    mask_HW: Tensor
    """bool, at the size of the image."""


def padded_pixels(
    images_NHWC: Tensor, *, shortest: int, longest: int, device: torch.device | str
) -> tuple[Tensor, Size]:
    """pixels_NCXY padded with 0 on the right and below, and the size of the image in them."""
    pixels = detr_pixels(images_NHWC, shortest=shortest, longest=longest, device=device)
    height, width = pixels.shape[-2:]
    return pad(pixels, (0, -width % STRIDE, 0, -height % STRIDE)), (height, width)


def find_instances(
    class_logits_QK: Tensor,
    mask_logits_QYX: Tensor,
    *,
    padded: Size,
    resized: Size,
    image: Size,
    min_score: float = 0.0,
) -> list[Instance]:
    """The instances of one image with a score above `min_score`, most confident first.

    The model saw the image at `resized`, in the upper left corner of `padded`. A query may stand
    for several classes. Nothing is left out for the sake of speed: a score is at most the
    probability of its class, by which pairs are dropped first.
    """
    probability_QK = class_logits_QK.float().softmax(-1)[:, :-1]
    num_labels = probability_QK.shape[1]
    best = probability_QK.flatten().topk(min(MAX_INSTANCES, probability_QK.numel()))
    kept = best.values > min_score
    probability_I, pair_I = best.values[kept], best.indices[kept]
    queries, query_I = (pair_I // num_labels).unique(return_inverse=True)
    if not len(queries):
        return []
    logits_QHW = upsample(mask_logits_QYX[queries], padded=padded, resized=resized, image=image)
    inside_QHW = logits_QHW > 0
    # Means over the few pixels of a mask, as the published code takes them.
    sure_Q = (logits_QHW.sigmoid() * inside_QHW).flatten(1).sum(1)
    score_I = probability_I * (sure_Q / (inside_QHW.flatten(1).sum(1) + 1e-6))[query_I]
    boxes = [tight_box(mask_HW) for mask_HW in inside_QHW]
    found = [
        Instance(label, score, boxes[query], inside_QHW[query])
        for label, score, query in zip(
            (pair_I % num_labels).tolist(), score_I.tolist(), query_I.tolist(), strict=True
        )
        if score > min_score
    ]
    return sorted(found, key=lambda one: -one.score)


def upsample(logits_QYX: Tensor, *, padded: Size, resized: Size, image: Size) -> Tensor:
    """Mask logits at the size of the image: to the padded input, without its padding, and back."""
    height, width = resized
    options = {"mode": "bilinear", "align_corners": False}
    logits = interpolate(logits_QYX[None].float(), size=padded, **options)
    return interpolate(logits[..., :height, :width], size=image, **options)[0]


def tight_box(mask_HW: Tensor) -> tuple[float, float, float, float]:
    """The box of a mask in pixels, all 0 for an empty one."""
    rows, columns = mask_HW.any(1).nonzero(), mask_HW.any(0).nonzero()
    if not len(rows):
        return (0.0, 0.0, 0.0, 0.0)
    edges = torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).flatten().tolist()
    return (float(edges[0]), float(edges[1]), float(edges[2]), float(edges[3]))


class ColorClassifier:
    """Names the colour of objects. Keeps the text vectors of the classes it has met."""

    def __init__(self, clip: Clip) -> None:
        self._clip = clip
        self._texts_KD: dict[str, Tensor] = {}

    def __call__(
        self, image_HWC: Tensor, instances: Sequence[Instance], class_name: str
    ) -> list[str]:
        """The colour of each object of one class in an image (uint8, on the CPU).

        The nearest one, the first in the order of GenEval where two are.
        """
        crops = [cut_out(image_HWC, instance) for instance in instances]
        # The crops differ in size, so each is brought to CLIP's own before they share a batch.
        pixels = [clip_pixels(crop[None], self._clip.side) for crop in crops if crop is not None]
        if not pixels:
            return [UNKNOWN] * len(crops)
        vectors_BD = self._clip.pixels_ND(torch.cat(pixels))
        nearest = iter((vectors_BD @ self._color_vectors(class_name).T).argmax(-1).tolist())
        return [UNKNOWN if crop is None else COLORS[next(nearest)] for crop in crops]

    def _color_vectors(self, class_name: str) -> Tensor:
        """One vector per colour: the mean of three sentences."""
        if class_name not in self._texts_KD:
            sentences = [text for color in COLORS for text in sentences_of(color, class_name)]
            vectors_KSD = self._clip.texts_MD(sentences).unflatten(0, (len(COLORS), -1))
            self._texts_KD[class_name] = normalize(vectors_KSD.mean(1), dim=-1)
        return self._texts_KD[class_name]


def sentences_of(color: str, class_name: str) -> tuple[str, str, str]:
    """The sentences that stand for a colour."""
    return (
        f"a photo of a {color} {class_name}",
        f"a photo of a {color}-colored {class_name}",
        f"a photo of a {color} object",
    )


def cut_out(image_HWC: Tensor, instance: Instance) -> Tensor | None:
    """The object's box of an image with grey around the mask; None for a box without area."""
    left, top, right, bottom = (round(side) for side in instance.box)
    if right <= left or bottom <= top:
        return None
    mask_HW1 = instance.mask_HW.cpu()[..., None]
    masked_HWC = torch.where(mask_HW1, image_HWC, image_HWC.new_tensor(BACKGROUND))
    return masked_HWC[top:bottom, left:right]
