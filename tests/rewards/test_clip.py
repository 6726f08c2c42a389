"""CLIP's vectors and cosines, HPSv2's pixels, and weights in open_clip's layout."""

import pytest
import torch
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

from stage_rl.config import load_reward
from stage_rl.errors import RecipeError, WeightsError
from stage_rl.rewards.clip import fitted_pixels, load_clip, load_open_clip, open_clip_names
from stage_rl.rewards.pretrained import CLIP_MEAN, CLIP_STD
from stage_rl.rewards.tiny import tiny_clip, tiny_clip_tokenizer
from stage_rl.types import Prompt

CPU = torch.device("cpu")
TEXTS = ["a red square", "Two dogs, a cat!", "a red square"]


def noise(num=3, height=40, width=56):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (num, height, width, 3), generator=generator, dtype=torch.uint8)


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


def test_a_saved_clip_says_what_the_one_in_memory_says(tmp_path):
    tiny_clip().save_pretrained(tmp_path)
    tiny_clip_tokenizer().save_pretrained(tmp_path)
    saved, tiny = load_clip(str(tmp_path)), load_clip("tiny")
    assert torch.equal(saved.cosines_N(noise(), TEXTS), tiny.cosines_N(noise(), TEXTS))
    assert saved.scale == tiny.scale


def test_vectors_have_length_1_and_do_not_depend_on_the_batch():
    clip, singly = load_clip("tiny"), load_clip("tiny", batch_size=1)
    images_ND, texts_MD = clip.images_ND(noise()), clip.texts_MD(TEXTS)
    assert images_ND.norm(dim=-1).tolist() == pytest.approx([1.0] * 3)
    assert texts_MD.norm(dim=-1).tolist() == pytest.approx([1.0] * 3)
    assert torch.allclose(singly.images_ND(noise()), images_ND, atol=1e-6)
    assert torch.allclose(singly.texts_MD(TEXTS), texts_MD, atol=1e-6)


def test_each_image_meets_its_own_text():
    clip = load_clip("tiny")
    table_NM = clip.images_ND(noise()) @ clip.texts_MD(TEXTS).T
    assert torch.allclose(clip.cosines_N(noise(), TEXTS), table_NM.diagonal(), atol=1e-6)


def test_a_long_text_is_cut_and_still_ends():
    clip = load_clip("tiny")
    # one token per word: begin, 75 words, end
    long, cut = clip.texts_MD(["x " * 200, "x " * 75])
    assert torch.allclose(long, cut, atol=1e-6)
    assert not torch.allclose(clip.texts_MD(["x " * 74])[0], cut, atol=1e-3)


def test_an_old_configuration_reads_the_text_at_its_end_all_the_same(tmp_path):
    model = tiny_clip()
    model.config.text_config.eos_token_id = 2
    model.save_pretrained(tmp_path)
    tiny_clip_tokenizer().save_pretrained(tmp_path)
    old = load_clip(str(tmp_path)).texts_MD(TEXTS)
    assert torch.equal(old, load_clip("tiny").texts_MD(TEXTS))


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


def test_a_file_that_would_run_code_is_refused(base, tmp_path):
    torch.save({"state_dict": {"x": print}}, tmp_path / "evil.pt")
    with pytest.raises(WeightsError, match="holds no tensors that can be read"):
        load_open_clip(str(tmp_path), file="evil.pt", base=base)


def test_a_file_without_weights_says_so(base, tmp_path):
    torch.save({"model": {}}, tmp_path / "other.pt")
    with pytest.raises(WeightsError, match="has no 'state_dict'"):
        load_open_clip(str(tmp_path), file="other.pt", base=base)
    with pytest.raises(WeightsError, match=r"cannot load 'none\.pt'"):
        load_open_clip(str(tmp_path), file="none.pt", base=base)
    torch.save({"state_dict": {"epoch": 3}}, tmp_path / "number.pt")
    with pytest.raises(WeightsError, match="holds more than named tensors"):
        load_open_clip(str(tmp_path), file="number.pt", base=base)


def test_fitted_pixels_stand_in_the_middle_of_black():
    # 10 wide and 20 high at 40: 20 wide and 40 high, 10 columns of black on either side
    pixels = fitted_pixels(torch.full((1, 20, 10, 3), 255, dtype=torch.uint8), 40)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (CLIP_MEAN, CLIP_STD))
    plain = pixels[0] * std + mean
    assert plain.shape == (3, 40, 40)
    assert torch.allclose(plain[:, :, 10:30], torch.ones(3, 40, 20), atol=1e-5)
    assert torch.allclose(plain[:, :, :10], torch.zeros(3, 40, 10), atol=1e-6)
    assert torch.allclose(plain[:, :, 30:], torch.zeros(3, 40, 10), atol=1e-6)


def test_fitted_pixels_of_the_right_length_are_only_padded():
    images = noise(1, 40, 31)
    pixels = fitted_pixels(images, 40)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (CLIP_MEAN, CLIP_STD))
    # 9 columns are missing: 4 left, 5 right
    inner = (pixels[0] * std + mean)[:, :, 4:35]
    assert torch.allclose(inner, images[0].permute(2, 0, 1) / 255, atol=1e-5)


def test_the_kinds_differ_in_pixels_and_factor(base, checkpoint):
    folder = checkpoint(foreign_tensors())
    prompts = [Prompt(text, i) for i, text in enumerate(TEXTS)]

    def values(kind, *settings):
        reward = load_reward(kind, list(settings)).build(CPU)
        return [score.value for score in reward(noise(), prompts)]

    clip = load_clip(base)
    plain = clip.cosines_N(noise(), TEXTS).tolist()
    fitted = clip.cosines_N(noise(), TEXTS, fitted_pixels).tolist()
    assert values("clip_score", f"path={base}") == pytest.approx(plain, abs=1e-6)
    assert values("hps", f"path={folder}", f"base={base}") == pytest.approx(fitted, abs=1e-6)
    scaled = [clip.scale * cosine for cosine in plain]
    found = values("pickscore", f"path={base}", f"tokenizer={base}")
    assert found == pytest.approx(scaled, abs=1e-4)
    assert plain != pytest.approx(fitted, abs=1e-3)


def test_half_precision_is_float16_and_bfloat16_is_refused(base):
    prompts = [Prompt(text, i) for i, text in enumerate(TEXTS)]
    exact, half = (
        [
            score.value
            for score in load_reward("clip_score", [f"path={base}", f"dtype={dtype}"]).build(CPU)(
                noise(), prompts
            )
        ]
        for dtype in ("float32", "float16")
    )
    assert half == pytest.approx(exact, abs=5e-3)
    assert half != exact
    with pytest.raises(RecipeError, match="dtype: unknown value 'bfloat16'"):
        load_reward("hps", ["dtype=bfloat16"])


def test_published_weights_have_a_self_test_and_random_ones_none():
    for kind in ("hps", "pickscore", "clip_score", "image_reward"):
        cases = load_reward(kind).reference_cases()
        assert [case.prompt.text for case in cases] == [
            "a red square",
            "a blue square",
            "a green circle",
        ]
        assert load_reward(kind, ["path=tiny"]).reference_cases() == ()


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
