"""CLIP's vectors and cosines, weights in open_clip's layout, and the rewards on them."""

import os

import pytest
import torch
from tiny_models import noise, tiny_clip, tiny_clip_tokenizer
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

from stage_rl.config import load_reward
from stage_rl.errors import RecipeError, WeightsError
from stage_rl.rewards.clip import (
    AffineHead,
    fitted_pixels,
    load_clip,
    load_head,
    load_open_clip,
    open_clip_names,
)
from stage_rl.rewards.pretrained import CLIP_MEAN, CLIP_STD
from stage_rl.types import Prompt

CPU = torch.device("cpu")
TEXTS = ["a red square", "Two dogs, a cat!", "a red square"]


@pytest.fixture(scope="module")
def tiny(saved):
    return load_clip(saved("clip"))


def gelu_clip():
    """The tiny CLIP with the activation that HPSv2.1 has."""
    config = tiny_clip().config.to_dict()
    for tower in ("text_config", "vision_config"):
        config[tower]["hidden_act"] = "gelu"
    model = CLIPModel(CLIPConfig(**config))
    model.load_state_dict(tiny_clip().state_dict())
    return model.eval()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A CLIP folder as transformers saves it."""
    folder = tmp_path_factory.mktemp("clip")
    gelu_clip().save_pretrained(folder)
    tiny_clip_tokenizer().save_pretrained(folder)
    return str(folder)


def foreign_tensors():
    """The tiny CLIP in open_clip's layout."""
    model = gelu_clip()
    ours, tensors = model.state_dict(), {}
    for theirs, names in open_clip_names(model.config).items():
        parts = (names,) if isinstance(names, str) else names
        tensors[theirs] = torch.cat([ours[name] for name in parts]) if parts[1:] else ours[names]
    for name in ("text_projection", "visual.proj"):
        tensors[name] = tensors[name].T.contiguous()
    return tensors


def open_clip_blocks(x_NSD, tensors, prefix, *, mask=None):
    """open_clip's residual blocks, by torch's own attention on the joint projection."""
    for i in range(2):
        part = {
            k.split(f"resblocks.{i}.")[1]: v
            for k, v in tensors.items()
            if f"{prefix}transformer.resblocks.{i}." in k and k.startswith(f"{prefix}transformer")
        }
        width = x_NSD.shape[-1]
        attention = torch.nn.MultiheadAttention(width, 2, batch_first=True)
        attention.load_state_dict({k[5:]: v for k, v in part.items() if k.startswith("attn.")})
        y = F.layer_norm(x_NSD, (width,), part["ln_1.weight"], part["ln_1.bias"])
        x_NSD = x_NSD + attention(y, y, y, need_weights=False, attn_mask=mask)[0]
        y = F.layer_norm(x_NSD, (width,), part["ln_2.weight"], part["ln_2.bias"])
        y = F.gelu(F.linear(y, part["mlp.c_fc.weight"], part["mlp.c_fc.bias"]))
        x_NSD = x_NSD + F.linear(y, part["mlp.c_proj.weight"], part["mlp.c_proj.bias"])
    return x_NSD


@torch.no_grad()
def open_clip_cosines(tensors, pixels_NCXX, ids_NL):
    """The cosines by open_clip's architecture, written from its description."""
    t = tensors
    x = F.conv2d(pixels_NCXX, t["visual.conv1.weight"], stride=8).flatten(2).transpose(1, 2)
    x = torch.cat([t["visual.class_embedding"].expand(len(x), 1, -1), x], 1)
    x = x + t["visual.positional_embedding"]
    x = F.layer_norm(x, (32,), t["visual.ln_pre.weight"], t["visual.ln_pre.bias"])
    x = open_clip_blocks(x, t, "visual.")[:, 0]
    images = F.layer_norm(x, (32,), t["visual.ln_post.weight"], t["visual.ln_post.bias"])
    x = t["token_embedding.weight"][ids_NL] + t["positional_embedding"]
    causal = torch.full((77, 77), float("-inf")).triu(1)
    x = open_clip_blocks(x, t, "", mask=causal)
    x = F.layer_norm(x, (32,), t["ln_final.weight"], t["ln_final.bias"])
    texts = x[torch.arange(len(x)), ids_NL.argmax(-1)]
    return F.cosine_similarity(images @ t["visual.proj"], texts @ t["text_projection"])


@pytest.fixture
def checkpoint(tmp_path):
    """Writes tensors as the published HPS file holds them; returns the folder."""

    def write(tensors):
        torch.save({"epoch": 1, "state_dict": tensors}, tmp_path / "HPS_v2.1_compressed.pt")
        return str(tmp_path)

    return write


def test_vectors_have_length_1_and_do_not_depend_on_the_batch(tiny, saved):
    singly = load_clip(saved("clip"), batch_size=1)
    images_ND, texts_MD = tiny.images_ND(noise()), tiny.texts_MD(TEXTS)
    for vectors in (images_ND, texts_MD):
        assert vectors.norm(dim=-1).tolist() == pytest.approx([1.0] * 3)
    assert torch.allclose(singly.images_ND(noise()), images_ND, atol=1e-6)
    assert torch.allclose(singly.texts_MD(TEXTS), texts_MD, atol=1e-6)
    # Each image meets its own text.
    table_NM = images_ND @ texts_MD.T
    assert torch.allclose(tiny.cosines_N(noise(), TEXTS), table_NM.diagonal(), atol=1e-6)


def test_a_long_text_is_cut_and_still_ends(tiny):
    # one token per word: begin, 75 words, end
    long, cut = tiny.texts_MD(["x " * 200, "x " * 75])
    assert torch.allclose(long, cut, atol=1e-6)
    assert not torch.allclose(tiny.texts_MD(["x " * 74])[0], cut, atol=1e-3)


def test_an_old_configuration_reads_the_text_at_its_end_all_the_same(tiny, tmp_path):
    model = tiny_clip()
    model.config.text_config.eos_token_id = 2
    model.save_pretrained(tmp_path)
    tiny_clip_tokenizer().save_pretrained(tmp_path)
    old = load_clip(str(tmp_path)).texts_MD(TEXTS)
    assert torch.equal(old, tiny.texts_MD(TEXTS))


def test_open_clip_weights_give_what_open_clips_architecture_gives(base, checkpoint):
    clip = load_open_clip(checkpoint(foreign_tensors()), file="HPS_v2.1_compressed.pt", base=base)
    ids = tiny_clip_tokenizer()(
        TEXTS, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    )["input_ids"]
    wanted = open_clip_cosines(foreign_tensors(), fitted_pixels(noise(), 32), ids)
    assert torch.allclose(clip.cosines_N(noise(), TEXTS, fitted_pixels), wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("visual.proj"), "missing: visual.proj; write"),
        (
            lambda t: t.pop("transformer.resblocks.1.attn.in_proj_bias"),
            "missing: transformer.resblocks.1.attn.in_proj_bias; write",
        ),
        (lambda t: t.update({"score.weight": torch.zeros(1)}), "unexpected: score.weight; write"),
        (
            lambda t: t.update({"ln_final.bias": torch.zeros(5)}),
            r"of another shape: text_model.final_layer_norm.bias; write",
        ),
    ],
)
def test_open_clip_weights_that_do_not_fit_are_named(base, checkpoint, edit, message):
    tensors = foreign_tensors()
    edit(tensors)
    with pytest.raises(WeightsError, match=message):
        load_open_clip(checkpoint(tensors), file="HPS_v2.1_compressed.pt", base=base)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {"x": print}}, "holds no tensors that can be read"),  # would run code
        ({"model": {}}, "has no 'state_dict'"),
        ({"state_dict": {"epoch": 3}}, "holds more than named tensors"),
        (None, r"cannot load 'none\.pt'"),
    ],
)
def test_a_file_without_weights_says_so(base, tmp_path, content, message):
    if content:
        torch.save(content, tmp_path / "none.pt")
    with pytest.raises(WeightsError, match=message):
        load_open_clip(str(tmp_path), file="none.pt", base=base)


def test_fitted_pixels_stand_in_the_middle_of_black():
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (CLIP_MEAN, CLIP_STD))
    # 10 wide and 20 high at 40: 20 wide and 40 high, 10 columns of black on either side
    white = torch.full((1, 20, 10, 3), 255, dtype=torch.uint8)
    plain = fitted_pixels(white, 40)[0] * std + mean
    wanted = torch.zeros(3, 40, 40)
    wanted[:, :, 10:30] = 1
    assert torch.allclose(plain, wanted, atol=1e-5)
    # 9 columns are missing: 4 left, 5 right
    images = noise(1, 40, 31)
    inner = (fitted_pixels(images, 40)[0] * std + mean)[:, :, 4:35]
    assert torch.allclose(inner, images[0].permute(2, 0, 1) / 255, atol=1e-5)


def values(kind, *settings):
    reward = load_reward(kind, settings).build(CPU)
    prompts = [Prompt(text, i) for i, text in enumerate(TEXTS)]
    return [score.value for score in reward(noise(), prompts)]


def test_the_kinds_differ_in_pixels_and_factor(base, checkpoint):
    folder, clip = checkpoint(foreign_tensors()), load_clip(base)
    plain = clip.cosines_N(noise(), TEXTS).tolist()
    fitted = clip.cosines_N(noise(), TEXTS, fitted_pixels).tolist()
    assert values("clip_score", f"path={base}") == pytest.approx(plain, abs=1e-6)
    assert values("hps", f"path={folder}", f"base={base}") == pytest.approx(fitted, abs=1e-6)
    scaled = [clip.scale * cosine for cosine in plain]
    found = values("pickscore", f"path={base}", f"tokenizer={base}")
    assert found == pytest.approx(scaled, abs=1e-4)
    assert plain != pytest.approx(fitted, abs=1e-3)
    half = values("clip_score", f"path={base}", "dtype=float16")
    assert half == pytest.approx(plain, abs=5e-3)
    assert half != plain
    with pytest.raises(RecipeError, match="dtype: unknown value 'bfloat16'"):
        load_reward("hps", ["dtype=bfloat16"])


@pytest.mark.parametrize("kind", ["hps", "pickscore", "clip_score", "image_reward"])
def test_the_self_test_is_drawn_shapes(kind):
    texts = [case.prompt.text for case in load_reward(kind).reference_cases()]
    assert texts == ["a red square", "a blue square", "a green circle"]


def test_the_table_names_every_tensor_of_the_published_size():
    # ViT-H/14: 986 million parameters
    tower = {"hidden_act": "gelu", "num_attention_heads": 16, "projection_dim": 1024}
    text = {**tower, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    vision = {**tower, "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32}
    vision |= {"patch_size": 14, "image_size": 224}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=1024)
    with torch.device("meta"):
        model = CLIPModel(config)
    ours = [
        x for n in open_clip_names(config).values() for x in ((n,) if isinstance(n, str) else n)
    ]
    assert sorted(ours) == sorted(dict(model.named_parameters()))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == 986


def test_variety_is_the_mean_over_pairs_within_a_prompt(saved):
    reward = load_reward("variety", [f"path={saved('clip')}"]).build(CPU)
    images_NHWC = noise(4, 32, 32)
    images_NHWC[1] = images_NHWC[0]
    prompts = [Prompt("a", 0), Prompt("a", 0), Prompt("a", 0), Prompt("b", 1)]
    same, twin, other, alone = reward(images_NHWC, prompts)
    # Two equal images and one at distance d: d/2, d/2 and d.
    assert same.value == pytest.approx(twin.value, abs=1e-6)
    assert other.value == pytest.approx(2 * same.value, abs=1e-5)
    assert other.value > 0
    assert alone.value is None


PLACES, WIDTHS = (0, 2, 4, 6, 7), (1024, 128, 64, 16, 1)


def published_head(width=32):
    """Each layer takes the mean of its inputs and adds a tenth of its place."""
    tensors = {}
    for place, size, outputs in zip(PLACES, (width, *WIDTHS), WIDTHS, strict=False):
        tensors[f"layers.{place}.weight"] = torch.full((outputs, size), 1 / size)
        tensors[f"layers.{place}.bias"] = torch.full((outputs,), place / 10)
    return tensors


def test_the_head_is_the_composition_of_its_layers(tmp_path):
    torch.save(published_head(), tmp_path / "head.pth")
    head = load_head(str(tmp_path / "head.pth"), width=32)
    # f(0) = 0 + 0.2 + 0.4 + 0.6 + 0.7 = 1.9; an affine map of means: a vector adds its own mean
    vectors = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    vectors[0] = 0
    assert torch.allclose(head(vectors), 1.9 + vectors.mean(-1), atol=1e-5)
    # The published one: inputs and bias times outputs, layer by layer.
    published = AffineHead(768)
    assert set(published.state_dict()) == set(published_head())
    wanted = 769 * 1024 + 1025 * 128 + 129 * 64 + 65 * 16 + 17
    assert sum(p.numel() for p in published.parameters()) == wanted


def test_the_rating_is_the_heads_word_on_the_unit_vector_whatever_the_prompt(tiny, saved, tmp_path):
    torch.save(published_head(), tmp_path / "head.pth")
    config = load_reward("aesthetic", [f"path={saved('clip')}", f"head={tmp_path}/head.pth"])
    reward = config.build(CPU)
    scores = reward(noise(), [Prompt("a cat", i) for i in range(3)])
    assert scores == reward(noise(), [Prompt("a dog", i) for i in range(3)])
    wanted = (1.9 + tiny.images_ND(noise()).mean(-1)).tolist()
    assert [score.value for score in scores] == pytest.approx(wanted, abs=1e-5)
    assert scores[0].why == f"rated {wanted[0]:.2f} of 10"


def test_a_head_for_other_vectors_or_that_is_not_there_is_refused(tmp_path):
    file = tmp_path / "head.pth"
    with pytest.raises(WeightsError, match="no such file; write the path of sac"):
        load_head(str(file), width=32)
    with pytest.raises(RecipeError, match="aesthetic: head: is required"):
        load_reward("aesthetic")
    torch.save(published_head(width=16), file)
    with pytest.raises(WeightsError, match=r"of another shape: layers\.0\.weight"):
        load_head(str(file), width=32)
    tensors = published_head()
    del tensors["layers.6.bias"]
    torch.save(tensors, file)
    with pytest.raises(WeightsError, match=r"missing: layers\.6\.bias"):
        load_head(str(file), width=32)


@pytest.mark.skipif("STAGE_AESTHETIC_HEAD" not in os.environ, reason="names the published file")
def test_the_published_head_rates_three_vectors_as_its_authors_code_does():
    head = load_head(os.environ["STAGE_AESTHETIC_HEAD"], width=768)
    vectors_ND = torch.stack([torch.zeros(768), torch.eye(768)[0], torch.full((768,), 768**-0.5)])
    assert head(vectors_ND).tolist() == pytest.approx([5.2366458, 4.5450524, 4.8832849], abs=1e-5)


def test_the_aesthetic_self_test_is_a_photograph_against_noise():
    cases = load_reward("aesthetic", ["head=head.pth"]).reference_cases()
    whats = [f"a photograph of a {thing} against noise" for thing in ("cat", "cup")]
    assert [case.what for case in cases] == whats
    # neighbouring pixels of a photograph are alike, those of noise are not
    for case in cases:
        steps = case.images_NHWC().float().diff(dim=2).abs().mean((1, 2, 3))
        assert steps[0] < 20 < steps[1]
