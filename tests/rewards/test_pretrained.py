"""Models behind rewards: what is loaded and what refused, and pixels as the library makes them."""

import io
import re

import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import noise
from transformers import BertConfig, BertModel, BertTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.grounding_dino.image_processing_pil_grounding_dino import (
    GroundingDinoImageProcessorPil,
)

from stage_rl.errors import WeightsError
from stage_rl.rewards.base import DetectorConfig, RewardConfig, Score
from stage_rl.rewards.compbench import DepthConfig
from stage_rl.rewards.pretrained import (
    as_jpeg,
    clip_pixels,
    detr_pixels,
    load_model,
    load_tokenizer,
    read_tensors,
    shortest_side_size,
)
from stage_rl.types import Prompt

CPU = torch.device("cpu")
SMALL = BertConfig(
    vocab_size=20,
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=1,
    intermediate_size=8,
    max_position_embeddings=8,
)


def change(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def bert(tmp_path):
    torch.manual_seed(0)
    BertModel(SMALL).save_pretrained(tmp_path)
    return tmp_path


def test_a_model_is_loaded_whole_frozen_and_in_eval_mode(bert):
    # Tables that old checkpoints keep are no fault.
    change(bert, lambda tensors: tensors.update({"rotary.inv_freq": torch.zeros(2)}))
    module = load_model(BertModel, str(bert))
    wanted = load_file(bert / "model.safetensors")
    assert all(torch.equal(p, wanted[name]) for name, p in module.named_parameters())
    assert not any(p.requires_grad for p in module.parameters())
    assert not module.training


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("encoder.layer.0.output.dense.bias"), "missing: encoder.layer.0.out"),
        (lambda t: t.update({"pooler.dense.bias": torch.zeros(9)}), "of another shape: pooler"),
        (lambda t: t.update({"more.weight": torch.zeros(2)}), r"unexpected: more\.weight; write"),
        (
            lambda t: t.update({"pooler.more": t.pop("pooler.dense.bias")}),
            r"missing: pooler.dense.bias; unexpected: pooler.more",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named_unless_it_is_said_to_be_unread(bert, edit, message):
    change(bert, edit)
    with pytest.raises(WeightsError, match=message):
        load_model(BertModel, str(bert), ignore_keys=r"^cls\.")
    if "another shape" not in message:
        load_model(BertModel, str(bert), ignore_keys=r"^(pooler|more|encoder)\.")


def test_a_path_without_a_model_is_one_line(tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"")
    for path in ("no/such/folder", "./nothing"):
        with pytest.raises(WeightsError, match="no such folder; write a folder with weights"):
            load_model(BertModel, path)
    with pytest.raises(WeightsError, match="is a file"):
        load_model(BertModel, str(tmp_path / "weights.pt"))


def test_a_tokenizer_is_loaded_with_its_words_or_refused(bert):
    with pytest.raises(WeightsError, match="no tokenizer there"):
        load_tokenizer(str(bert))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat"]
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(bert)
    assert load_tokenizer(str(bert))("Cat")["input_ids"] == [2, 5, 3]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {"x": print}}, "cannot load the tensors"),  # would run code
        ({"model": {}}, "not a file of named tensors below 'state_dict'"),
        ({"state_dict": {"epoch": 3}}, "not a file of named tensors below 'state_dict'"),
    ],
)
def test_a_file_without_tensors_says_so(tmp_path, content, message):
    torch.save(content, tmp_path / "none.pt")
    with pytest.raises(WeightsError, match=message):
        read_tensors(tmp_path / "none.pt", entry="state_dict")


# Every model on a tiny scale, as a recipe builds it.

LEFT = {"obj1": "dog", "obj2": "cat", "locality": "on the left of"}
SCENE = {"spatial_info": LEFT, "numeracy_info": [{"obj_name": "dog", "num": 2}]}
PROMPTS = [
    Prompt("a dog", 0, {**SCENE, "task_type": "object", "nouns": nouns, "attr_nouns": phrases})
    for nouns, phrases in (
        (["dog", "cat"], ["a red dog", "a cat"]),
        (["cat"], ["a cat"]),
        (["dog", "cat"], ["a very long blue bird", "dogs"]),
        ([], []),
        (["cat"], ["a dog"]),
    )
]
SIDES = {"shortest_side": 128, "longest_side": 192, "min_score": 0.005}


@pytest.fixture
def build(saved):
    """Builds a detector or a reward of tiny models."""

    def build(kind, device=CPU, **settings):
        dino = {"kind": "grounding_dino", "path": saved("grounding_dino"), **SIDES}
        paths = {
            "mask2former": {"path": saved("mask2former"), "clip": saved("clip"), **SIDES},
            "grounding_dino": dino,
            "clip_score": {"path": saved("clip")},
            "git": {"path": saved("git")},
            "yes_no": {"path": saved("vlm"), "dtype": "float32"},
            "compbench_attributes": {"path": saved("blip"), "side": 32},
            "compbench_spatial": {"detector": dino, "confidences": True},
            "compbench_depth": {"detector": dino, "depth": saved("depth"), "depth_side": 32},
            "compbench_numeracy": {"detector": dino, "threshold": 0.2},
        }
        family = DetectorConfig if kind in ("mask2former", "grounding_dino") else RewardConfig
        config = {"kind": kind, **paths[kind], **settings}
        return family.model_validate(config).build(torch.device(device))

    return build


def figures(said):
    """The numbers of a score or of detections."""
    if isinstance(said, Score):
        return [said.value, *said.extras.values()]
    return [number for one in said for number in (one.score, *one.box)]


def names(said):
    """The words of detections; a score has none."""
    return [] if isinstance(said, Score) else [(one.label, one.color) for one in said]


@pytest.mark.parametrize(
    "kind", ["mask2former", "grounding_dino", "clip_score", "git", "yes_no", "compbench_attributes"]
)
def test_a_batch_gives_what_each_image_gives_alone(kind, build):
    images = noise(5, 48, 48)
    together = build(kind, batch_size=2)(images, PROMPTS)
    single = build(kind)
    for i, prompt in enumerate(PROMPTS):
        (alone,) = single(images[i : i + 1], [prompt])
        assert figures(together[i]) == pytest.approx(figures(alone), abs=1e-3)
    # Images and prompts differ, so that a mix-up would show; one prompt asks for nothing.
    assert len({repr(said) for said in together}) == 5


@pytest.mark.gpu
@pytest.mark.parametrize(
    "kind", ["clip_score", "git", "yes_no", "compbench_attributes", "compbench_spatial"]
)
def test_a_gpu_gives_what_the_cpu_gives(kind, build):
    images = noise(5, 48, 48)
    there, here = (build(kind, device)(images, PROMPTS) for device in ("cuda", CPU))
    for one, other in zip(there, here, strict=True):
        assert figures(one) == pytest.approx(figures(other), abs=1e-2)


@pytest.mark.parametrize("kind", ["spatial", "depth", "numeracy"])
def test_a_scene_is_judged_by_what_its_detector_finds(kind, build):
    scores = build(f"compbench_{kind}")(noise(5, 48, 48), PROMPTS)
    assert all(0 <= score.value <= 1 for score in scores)
    config = RewardConfig.model_validate({"kind": f"compbench_{kind}"})
    assert config.unsupported_reason(PROMPTS[0]) is None
    assert "needs '" in (config.unsupported_reason(Prompt("x")) or "")


# Checkpoints as they were published: without tensors that only newer models have, with old tables.
# transformers saved them when a Swin backbone had no last norm (2022), when tables such as position
# ids were stored, and from a DPT whose deepest fusion layer has one residual unit only.

WINDOW = "layers.0.blocks.0.attention.self.relative_position_index"

# what the published file lacks, what it holds besides
LAYOUTS = {
    "mask2former": (
        r"swin\.layernorm|^criterion",
        [f"model.pixel_level_module.encoder.encoder.{WINDOW}"],
    ),
    "grounding_dino": (
        r"swin\.layernorm",
        [
            f"model.backbone.conv_encoder.model.encoder.{WINDOW}",
            "model.text_backbone.embeddings.position_ids",
        ],
    ),
    "depth": (r"fusion_stage\.layers\.0\.residual_layer1", []),
    "git": (
        r"^$",
        [
            "git.embeddings.position_ids",
            "git.image_encoder.vision_model.embeddings.position_ids",
        ],
    ),
    "blip": (
        r"^$",
        ["text_encoder.embeddings.position_ids", "text_decoder.bert.embeddings.position_ids"],
    ),
    "clip": (
        r"^$",
        ["text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"],
    ),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_published_layout_says_what_the_whole_model_says(kind, tmp_path, build):
    lacks, holds = LAYOUTS[kind]
    module, *processors = tiny_models.MODELS[kind]()
    # What the file lacks is not what the library would draw, and still plays no part.
    ignored = [t for name, t in module.state_dict().items() if re.search(lacks, name)]
    assert bool(ignored) is (lacks != r"^$")
    with torch.no_grad():
        for tensor in ignored:
            tensor.add_(1.5)
    for part in (module, *processors):
        part.save_pretrained(tmp_path)

    def read():
        images = noise(2, 64, 64)
        if kind == "depth":
            settings = DepthConfig(depth=str(tmp_path), depth_side=32)
            return settings.load_depth(CPU)(images).reshape(2, -1).tolist(), []
        scorer = {"blip": "compbench_attributes", "clip": "clip_score"}.get(kind, kind)
        said = build(scorer, path=str(tmp_path))(images, PROMPTS[:2])
        return list(map(figures, said)), list(map(names, said))

    whole, words = read()
    assert whole[0] != whole[1]

    def publish(tensors):
        for name in [name for name in tensors if re.search(lacks, name)]:
            del tensors[name]
        tensors.update({name: torch.zeros(1, 4, dtype=torch.long) for name in holds})

    change(tmp_path, publish)
    # Where a tensor lies in the file decides its alignment, and that the last digit.
    assert read() == ([pytest.approx(one, rel=1e-5) for one in whole], words)
    change(tmp_path, lambda tensors: tensors.update({"more.weight": torch.zeros(1)}))
    with pytest.raises(WeightsError, match=r"unexpected: more\.weight; write a complete"):
        read()


# Pixels against the library's own processors.

LEVEL = 1 / 255 / 0.224
"""One step of 8 bits on the smallest standard deviation of ImageNet."""


@pytest.mark.parametrize(("height", "width"), [(48, 48), (60, 80), (40, 160), (90, 70)])
def test_pixels_are_those_of_the_library_within_two_levels(height, width):
    images = noise(2, height, width)

    def library(processor):
        return processor(images=[i.numpy() for i in images], return_tensors="pt")["pixel_values"]

    square = {"height": 56, "width": 56}
    wanted = library(CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size=square))
    got = clip_pixels(images, 56)
    assert got.shape == (2, 3, 56, 56)
    assert (got - wanted).abs().max() <= 2 * LEVEL
    assert (got - wanted).abs().mean() <= 0.05 * LEVEL
    sides = {"shortest_edge": 96, "longest_edge": 160}
    wanted = library(GroundingDinoImageProcessorPil(size=sides))
    got = detr_pixels(images, shortest=96, longest=160, device="cpu")
    assert got.shape == wanted.shape
    assert (got - wanted).abs().max() <= 2.1 * LEVEL


def test_an_image_that_would_grow_too_long_is_scaled_to_the_longest_side():
    assert shortest_side_size(384, 384, shortest=800, longest=1333) == (800, 800)
    # 64 x 200 at 800 would be 2500 long: 1333 x 64 / 200 = 426.56 on the short side
    assert shortest_side_size(64, 200, shortest=800, longest=1333) == (427, 1333)
    # 300 x 400: 800 x 4 / 3 = 1066.67, rounded down
    assert shortest_side_size(300, 400, shortest=800, longest=1333) == (800, 1066)
    # One of the wanted size is only normalized: (1 - 0.485) / 0.229 = 2.2489
    white = torch.full((1, 32, 32, 3), 255, dtype=torch.uint8)
    pixels = detr_pixels(white, shortest=32, longest=64, device="cpu")
    assert pixels[0, 0].unique().tolist() == pytest.approx([2.2489], abs=1e-4)


def test_jpeg_images_are_what_a_file_of_that_quality_holds():
    file = io.BytesIO()
    Image.fromarray(noise()[1].numpy()).save(file, "JPEG", quality=75)
    wanted = torch.from_numpy(np.array(Image.open(file)))
    assert torch.equal(as_jpeg(noise(), 75)[1], wanted)
    assert not torch.equal(wanted, noise()[1])


@pytest.mark.parametrize("kind", ["clip_score", "mask2former"])
def test_a_model_looks_at_the_compressed_images(kind, build):
    images, prompts = noise(2), PROMPTS[:2]
    compressed = build(kind, jpeg_quality=20)(images, prompts)
    assert compressed == build(kind)(as_jpeg(images, 20), prompts)
