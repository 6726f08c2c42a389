"""A key-value cache in fp8: what it keeps, what it costs, and when a recipe may have it."""

import pytest
import torch
from torch.testing import assert_close

from stage_rl.config import load_recipe
from stage_rl.errors import InputError, RecipeError
from stage_rl.rollout.attention import FP8, CacheShape, KeyValueCache, quantize
from stage_rl.rollout.engine import Engine
from stage_rl.rollout.sample import rollout
from stage_rl.rollout.sampling import Sampling
from stage_rl.training.memory import Work, _cache
from stage_rl.types import Prompt

CPU = torch.device("cpu")
PROMPTS = [Prompt("a red square", 0), Prompt("a photo of two blue circle", 1)]
IN_FP8 = "rollout.cache_dtype=fp8"
WEIGHTED = "algorithm.importance_sampling=token_truncate"


def test_numbers_are_those_of_e4m3_by_hand():
    # The largest of a vector becomes 448; between 256 and 512 e4m3 has steps of 32, below 2^-6 of
    # 2^-9, and 224 / 448 is half.
    numbers, scale = quantize(torch.tensor([[4.48, -2.24, 3.1, 0.0]]))
    assert_close(scale, torch.tensor([[0.01]]))
    assert numbers.float().tolist() == [[448.0, -224.0, 320.0, 0.0]]  # 310 lies nearest to 320
    numbers, scale = quantize(torch.zeros(1, 4))
    assert numbers.float().abs().sum() == 0
    assert scale > 0


def test_what_is_filled_and_appended_is_read_back_by_row_and_position():
    torch.manual_seed(0)
    cache = KeyValueCache.empty(CacheShape(1, 2, 16, FP8), 5, 70, CPU).rows(4)
    keys, values = torch.randn(2, 2, 2, 40, 16)
    cache.fill(0, keys, values, 2)
    more = torch.randn(2, 4, 2, 16)
    positions_R = torch.tensor([40, 40, 41, 69])
    cache.append(0, *more, cache.flat_index(positions_R))
    for read, filled, added in zip(cache.read(0), (keys, values), more, strict=True):
        found = read.permute(1, 2, 0, 3, 4).flatten(2, 3)  # RKSE
        # 4 significant bits: half a step of 1/8 is 1/16 of a number.
        assert_close(found[:, :, :40], filled.repeat_interleave(2, 0), atol=0.01, rtol=1 / 16)
        appended = found[torch.arange(4), :, positions_R]
        assert_close(appended, added, atol=0.01, rtol=1 / 16)


def test_it_takes_half_of_bf16_and_a_scale_for_each_head():
    bf16, fp8 = (CacheShape(30, 32, 128, dtype) for dtype in (torch.bfloat16, FP8))
    assert fp8.row_bytes(606) / bf16.row_bytes(606) == (128 + 4) / 256
    cache = KeyValueCache.empty(CacheShape(2, 2, 16, FP8), 3, 40, CPU)
    assert cache.num_bytes == 3 * CacheShape(2, 2, 16, FP8).row_bytes(40)


def test_the_plan_counts_what_the_cache_takes():
    settings = ["policy.path=deepseek-community/Janus-Pro-7B", "rollout.guidance_scale=5"]
    recipe = load_recipe("shapes_geneval", [*settings, IN_FP8, WEIGHTED])
    work = Work(recipe, recipe.policy.size())
    rows = 2 * 64
    shape = CacheShape(30, 32, 128, FP8)
    assert _cache(work, 64) == rows * shape.row_bytes(work.decode_positions)


def test_an_engine_draws_close_to_the_plain_one(tiny_janus):
    def drawn(**options):
        return rollout(
            Engine(tiny_janus, **options),
            PROMPTS,
            group_size=2,
            sampling=Sampling(guidance_scale=2.0, temperature=0.0),
            seed=0,
            step=0,
        )

    plain, found = drawn(), drawn(cache_dtype="fp8")
    # The first token comes out of the prefill, which reads no cache.
    assert torch.equal(plain.tokens_NT[:, 0], found.tokens_NT[:, 0])
    gap_NT = (plain.logprobs_NT - found.logprobs_NT).abs()
    same_NT = (plain.tokens_NT == found.tokens_NT).cumprod(1).bool()
    assert same_NT.float().mean() > 0.1
    assert 1e-4 < gap_NT[same_NT].mean() < 0.2
    assert torch.equal(found.tokens_NT, drawn(cache_dtype="fp8", max_images=2).tokens_NT)


def test_it_needs_importance_weights_and_a_known_name(tiny_janus):
    with pytest.raises(RecipeError, match=r"cache_dtype: .*importance_sampling=token_truncate"):
        load_recipe("shapes_geneval", [IN_FP8])
    assert load_recipe("shapes_geneval", [IN_FP8, WEIGHTED]).rollout.cache_dtype == "fp8"
    with pytest.raises(InputError, match="cache_dtype: unknown 'int8'; write one of: auto, fp8"):
        Engine(tiny_janus, cache_dtype="int8")
