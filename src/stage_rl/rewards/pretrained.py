"""Loading of the models behind rewards: transformers folders and hub ids, whole or not at all."""

from __future__ import annotations

import functools
import pickle
import re
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from pydantic import Field
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from stage_rl.errors import WeightsError
from stage_rl.rewards.base import ReferenceCase, Reward, RewardConfig

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

LOADING_ERRORS = (
    *(OSError, ValueError, RuntimeError, ImportError, KeyError, TypeError),
    *(SafetensorError, StrictDataclassError),
)

COMPUTED = r"(^|\.)(position_ids|relative_position_index|inv_freq)$"
"""Tables that old checkpoints keep and newer models compute from their configuration."""

SWIN_UNREAD = r"\.swin\.layernorm\."
"""The last norm of a Swin that serves as a backbone; published detectors come without it."""

Loaded = TypeVar("Loaded")


def load_model(
    model_class: Any,
    path: str,
    *,
    dtype: str = "float32",
    device: torch.device | str = "cpu",
    unread: str | None = None,
) -> Any:
    """A frozen transformers model in eval mode, from a folder or hub id; remote code is never run.

    A model with tensors missing, over or of another shape, or of another kind, is a `WeightsError`;
    `unread` matches the names of those that no forward pass reads, which may be missing or over.
    """
    source = locate(path)
    options = {
        "dtype": DTYPES[dtype],
        "ignore_mismatched_sizes": True,  # to be named below, together with the missing
        "output_loading_info": True,
    }
    load = functools.partial(model_class.from_pretrained, source, **options)
    module, info = quietly(load, source, "the weights")
    idle = re.compile(COMPUTED if unread is None else f"{COMPUTED}|{unread}")
    refuse(
        f"{source}: the weights do not fill a {type(module).__name__}",
        {
            "missing": {name for name in info["missing_keys"] if not idle.search(name)},
            "unexpected": {name for name in info["unexpected_keys"] if not idle.search(name)},
            "of another shape": {entry[0] for entry in info["mismatched_keys"]},
        },
        "write a checkpoint of this model, complete and with nothing else",
    )
    nn.Module.to(module, device)
    return module.requires_grad_(False).eval()


def load_part(loader: Callable[..., Loaded], path: str, what: str, **options: Any) -> Loaded:
    """A processor or config, by its `from_pretrained`; failure is a `WeightsError`."""
    source = locate(path)
    return quietly(lambda: loader(source, **options), source, what)


def load_tokenizer(path: str) -> Any:
    """The tokenizer beside the weights; one without a vocabulary is a `WeightsError`."""
    tokenizer = load_part(AutoTokenizer.from_pretrained, path, "the tokenizer")
    # Without its files, transformers builds a tokenizer that knows no word and says nothing.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise WeightsError(f"{path}: no tokenizer there; write a folder that has its files too")
    return tokenizer


def locate(path: str) -> str:
    """The folder or hub id behind a path; a path that names no folder is a `WeightsError`."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return str(folder)
    if folder.exists():
        raise WeightsError(f"{path}: is a file; write the folder of the weights")
    if path.count("/") != 1 or path[0] in "./~":
        raise WeightsError(f"{path}: no such folder; write a folder with weights or a hub id")
    return path


def quietly(load: Callable[[], Loaded], source: str, what: str) -> Loaded:
    """What `load` returns, nothing on the console; its failure is a `WeightsError` of one line."""
    try:
        with _quiet():
            return load()
    except LOADING_ERRORS as error:
        text = " ".join(str(error).split())
        text = text if len(text) <= 300 else text[:297] + "..."
        raise WeightsError(f"{source}: cannot load {what}: {text}") from error


def refuse(what: str, faults: Mapping[str, Iterable[str]], advice: str) -> None:
    """Raises a WeightsError that names three tensors of each kind of fault, where there is one."""
    told = []
    for kind, names in faults.items():
        found = sorted(names)
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        told += [f"{kind}: {', '.join(found[:3])}{more}"] if found else []
    if told:
        raise WeightsError(f"{what}: {'; '.join(told)}; {advice}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers' bars and reports off the console; what matters becomes an error."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


# From images as rewards get them to the pixel tensors that models were trained on.
#
# The models' own image processors differ between versions and backends, so nothing here asks
# them;
# the tests compare with them.
#
# Shape suffixes: N images, C colour channels, H x W pixels, X x Y pixels after resizing.


CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)

CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

IMAGENET_MEAN = (0.485, 0.456, 0.406)

IMAGENET_STD = (0.229, 0.224, 0.225)

Filter = Literal["bilinear", "bicubic"]


def shortest_side_size(
    height: int, width: int, *, shortest: int, longest: int | None = None
) -> tuple[int, int]:
    """Height and width after scaling so that the shorter side is `shortest`, rounded down.

    Where the longer side would exceed `longest`, the image is scaled to that instead.
    """
    small, large = min(height, width), max(height, width)
    target: float = shortest
    if longest is not None and large / small * shortest > longest:
        target = longest * small / large
    along = int(target * large / small)
    return (round(target), along) if height <= width else (along, round(target))


def resize(images_NHWC: Tensor, size: tuple[int, int], filter_: Filter) -> Tensor:
    """images_NCXY of uint8 images, uint8 and on the CPU, filtered as Pillow does it.

    On the CPU, whose 8-bit kernel rounds and clips between the two directions as Pillow does: the
    pixels, and so the scores, are the same wherever the model runs.
    """
    assert images_NHWC.dtype == torch.uint8, images_NHWC.dtype
    images_NCHW = images_NHWC.cpu().movedim(-1, 1)
    if tuple(images_NCHW.shape[-2:]) == size:
        return images_NCHW
    return F.interpolate(images_NCHW, size=size, mode=filter_, align_corners=False, antialias=True)


def center_crop(images_NCHW: Tensor, side: int) -> Tensor:
    """The middle side x side pixels, of images at least that large."""
    height, width = images_NCHW.shape[-2:]
    assert min(height, width) >= side, (height, width, side)
    top, left = (height - side) // 2, (width - side) // 2
    return images_NCHW[..., top : top + side, left : left + side]


def normalize(
    images_NCHW: Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> Tensor:
    """(x / 255 - mean) / std per channel."""
    shape = (1, 3, 1, 1)
    mean_C = torch.tensor(mean, device=images_NCHW.device).view(shape)
    std_C = torch.tensor(std, device=images_NCHW.device).view(shape)
    return (images_NCHW / 255 - mean_C) / std_C


def clip_pixels(images_NHWC: Tensor, side: int, *, device: torch.device | str) -> Tensor:
    """pixels_NCXX for CLIP-like models: shortest side by bicubic, middle square, CLIP's scale."""
    height, width = images_NHWC.shape[1:3]
    size = shortest_side_size(height, width, shortest=side)
    cropped = center_crop(resize(images_NHWC, size, "bicubic"), side)
    return normalize(cropped.to(device), CLIP_MEAN, CLIP_STD)


def detr_pixels(
    images_NHWC: Tensor, *, shortest: int, longest: int, device: torch.device | str
) -> Tensor:
    """pixels_NCXY for DETR-like models: scaled to fit, bilinear, ImageNet's scale, not padded."""
    height, width = images_NHWC.shape[1:3]
    size = shortest_side_size(height, width, shortest=shortest, longest=longest)
    resized = resize(images_NHWC, size, "bilinear")
    return normalize(resized.to(device), IMAGENET_MEAN, IMAGENET_STD)


# Weights published in other layouts than transformers', renamed tensor by tensor.
#
# A table lists every tensor of the foreign layout; one that is missing or over is a
# `WeightsError`
# with its foreign name, one of another shape with ours. Files are read without running anything
# in
# them.


Names = Mapping[str, str | tuple[str, ...]]
"""From a foreign name to ours; to several where the tensor is split along its first axis."""


def find_file(path: str, name: str) -> Path:
    """A file of a folder or of a hub repository, which is downloaded once."""
    return Path(load_part(lambda source: str(cached_file(source, name)), path, f"'{name}'"))


def read_tensors(file: Path, *, entry: str | None = None) -> dict[str, Tensor]:
    """The tensors of a torch file, or of the entry of that name in it."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (*LOADING_ERRORS, EOFError, pickle.UnpicklingError) as error:
        text = " ".join(str(error).split())[:300]
        raise WeightsError(f"{file}: holds no tensors that can be read: {text}") from error
    if entry is not None:
        if not isinstance(content, dict) or entry not in content:
            raise WeightsError(f"{file}: has no '{entry}'; write the file as published")
        content = content[entry]
    if not isinstance(content, dict) or not all(isinstance(t, Tensor) for t in content.values()):
        raise WeightsError(f"{file}: holds more than named tensors; write the file as published")
    return content


def rename(tensors: Mapping[str, Tensor], names: Names, *, source: str) -> dict[str, Tensor]:
    """The tensors under our names."""
    _refuse(source, {"missing": names.keys() - tensors, "unexpected": tensors.keys() - names})
    renamed = {}
    for name, new in names.items():
        if isinstance(new, str):
            renamed[new] = tensors[name]
        else:
            parts = tensors[name].chunk(len(new))
            renamed |= {ours: part.clone() for ours, part in zip(new, parts, strict=True)}
    return renamed


def fill(
    model_class: Any,
    config: Any,
    tensors: Mapping[str, Tensor],
    *,
    source: str,
    dtype: str = "float32",
    device: torch.device | str = "cpu",
    **options: Any,
) -> Any:
    """A frozen transformers model in eval mode with these tensors, by its checkpoint names."""
    load = functools.partial(
        model_class.from_pretrained,
        None,
        config=config,
        state_dict=dict(tensors),
        dtype=DTYPES[dtype],
        ignore_mismatched_sizes=True,  # to be named below, together with the missing
        output_loading_info=True,
        **options,
    )
    module, info = quietly(load, source, "the weights")
    shapes = {entry[0] for entry in info["mismatched_keys"]}
    named = {"missing": info["missing_keys"], "unexpected": info["unexpected_keys"]}
    _refuse(source, {**named, "of another shape": shapes})
    nn.Module.to(module, device)
    return module.requires_grad_(False).eval()


def fill_part(module: nn.Module, tensors: Mapping[str, Tensor], *, source: str) -> None:
    """Copies tensors into a small module of ours (in place), which is frozen."""
    own = module.state_dict()
    shapes = {name for name in own.keys() & tensors if own[name].shape != tensors[name].shape}
    _refuse(
        source,
        {
            "missing": own.keys() - tensors,
            "unexpected": tensors.keys() - own,
            "of another shape": shapes,
        },
    )
    module.load_state_dict(dict(tensors))
    module.requires_grad_(False).eval()


def _refuse(source: str, faults: Mapping[str, Iterable[str]]) -> None:
    refuse(f"{source}: the tensors do not fit the model", faults, "write the file as published")


# The head that two published scorers share: five linear layers with nothing between them.
#
# Trained with dropout between the layers, it is one affine function of its input when used.
#
# Shape suffixes: N images, D width of the input.


WIDTHS = (1024, 128, 64, 16, 1)

PLACES = (0, 2, 4, 6, 7)
"""Where the linear layers stand among the dropouts; their names in the published files."""


class AffineHead(nn.Module):
    """From vectors to one number each; its tensors are called layers.0.weight and so on."""

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = (width, *WIDTHS)
        self.layers = nn.ModuleDict(
            {str(place): nn.Linear(widths[i], widths[i + 1]) for i, place in enumerate(PLACES)}
        )

    def forward(self, vectors_ND: Tensor) -> Tensor:
        """scores_N."""
        x = vectors_ND
        for layer in self.layers.values():
            x = layer(x)
        return x[:, 0]


TINY = "tiny"
"""The path of random weights, for smoke runs; their scores mean nothing."""


class ScorerConfig(RewardConfig):
    """Base of the rewards that are one model."""

    path: str
    """Folder or hub id of the weights; tiny: random ones, whose scores mean nothing."""
    batch_size: int = Field(default=32, ge=1)
    """Images that go through the model at once."""
    jpeg_quality: int | None = Field(default=None, ge=1, le=100)
    """Score the images as JPEG of this quality, as some published figures do; null: as drawn."""

    def build(self, device: torch.device) -> Reward:
        """The reward; wrong weights are a `WeightsError`."""
        from stage_rl.rewards.selftest import OnJpeg

        reward = self.build_scorer(device)
        return reward if self.jpeg_quality is None else OnJpeg(reward, self.jpeg_quality)

    @abstractmethod
    def build_scorer(self, device: torch.device) -> Reward:
        """The reward on images as they are."""

    def reference_cases(self) -> tuple[ReferenceCase, ...]:
        """Drawn shapes of the prompt's colour and form against others; none for random weights."""
        from stage_rl.rewards.selftest import shape_cases

        return () if self.path == TINY else shape_cases()
