"""The Triton kernels against torch: on a GPU as they are, on a CPU in Triton's interpreter.

The interpreter must be chosen before Triton is imported, so on a CPU one test runs the others in a
process of their own.
"""

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

from stage_rl.rollout.attention import (
    FP8,
    Backend,
    CacheShape,
    HeadNorms,
    Heads,
    KeyValueCache,
    SharedPrompts,
    apply_rotary,
    length_mask,
)
from stage_rl.rollout.attention import decode_attention as eager_attention
from stage_rl.rollout.engine import Engine
from stage_rl.rollout.sample import rollout
from stage_rl.rollout.sampling import Sampling
from stage_rl.types import Prompt

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RUNS_KERNELS = DEVICE.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
kernels = pytest.mark.skipif(not RUNS_KERNELS, reason="runs in a process with the interpreter")
NEAR = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
EPS = 1e-5


@pytest.mark.skipif(RUNS_KERNELS, reason="the kernels run in this process")
@pytest.mark.parametrize(
    ("which", "timeout_s"), [("not slow", 300), pytest.param("slow", 900, marks=pytest.mark.slow)]
)
def test_the_kernels_agree_with_torch_in_the_interpreter(which, timeout_s):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", which]
    done = subprocess.run(
        [*command, __file__],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert done.returncode == 0, done.stdout
    assert "1 skipped" in done.stdout, done.stdout


def filled_cache(shape: CacheShape, num_rows: int, num_slots: int) -> KeyValueCache:
    cache = KeyValueCache.empty(shape, num_rows, num_slots, DEVICE)
    for part in (*cache.keys, *cache.values):
        part.normal_()
    return cache


def own_prompts(num_rows: int) -> SharedPrompts:
    """Of rows that share nothing."""
    row_R = torch.arange(num_rows, device=DEVICE)
    return SharedPrompts(torch.ones_like(row_R), row_R)


# Row r of many has r + 1 live positions: within a tile of 64, across tiles and blocks of 32, to the
# end. Grouped queries have a head dimension that is no power of two.
ALL_LENGTHS = tuple(range(130))


@kernels
@pytest.mark.parametrize(
    ("heads", "queries", "width", "last", "dtype", "options"),
    [
        (1, 1, 16, ALL_LENGTHS, torch.float32, {"num_parts": 1}),
        (1, 1, 16, ALL_LENGTHS, torch.float32, {"num_parts": 3}),
        (1, 1, 16, ALL_LENGTHS, torch.bfloat16, {"num_parts": 1}),
        (1, 1, 16, ALL_LENGTHS, torch.float32, {"num_parts": 1, "form": "blocks"}),
        (1, 1, 16, ALL_LENGTHS, torch.bfloat16, {"num_parts": 3, "form": "blocks"}),
        (2, 4, 12, (2, 70, 99), torch.float32, {}),
        (2, 4, 12, (2, 70, 99), torch.float32, {"form": "blocks"}),
    ],
)
def test_attention_is_that_of_torch(heads, queries, width, last, dtype, options):
    from stage_rl.rollout.kernels import decode_attention

    torch.manual_seed(0)
    num_slots = last[-1] + 1
    cache = filled_cache(CacheShape(1, heads, width, dtype), len(last), num_slots)
    positions_R = torch.tensor(last, device=DEVICE)
    query = torch.randn(len(last), heads, queries, width, device=DEVICE)
    prompts = own_prompts(len(last))
    ours = decode_attention(query, cache.keys[0], cache.values[0], positions_R, prompts, **options)
    bias = length_mask(positions_R, num_slots)
    theirs = eager_attention(query, cache.keys[0], cache.values[0], bias)
    assert_close(ours, theirs, atol=NEAR[dtype], rtol=0)


@kernels
@pytest.mark.parametrize("options", [{"num_parts": 1}, {"num_parts": 3, "form": "blocks"}])
def test_attention_over_a_cache_in_fp8_is_that_over_its_numbers(options):
    from stage_rl.rollout.kernels import decode_attention

    torch.manual_seed(0)
    positions_R = torch.tensor([0, 31, 70, 99], device=DEVICE)
    cache = KeyValueCache.empty(CacheShape(1, 2, 16, FP8), 4, 100, DEVICE)
    cache.fill(0, *torch.randn(2, 4, 2, 100, 16, device=DEVICE), 1)
    query = torch.randn(4, 2, 3, 16, device=DEVICE)
    keys, values, *scales = (part[0] for part in cache.parts)
    ours = decode_attention(
        query, keys, values, positions_R, own_prompts(4), scales=scales, **options
    )
    theirs = eager_attention(query, *cache.read(0), length_mask(positions_R, 100))
    assert_close(ours, theirs, atol=1e-5, rtol=0)


@kernels
@pytest.mark.parametrize("num_parts", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, FP8])
def test_the_rows_of_a_group_read_one_copy_of_their_prompt(dtype, num_parts):
    from stage_rl.rollout.kernels import decode_attention

    torch.manual_seed(0)
    # Groups of 3: a prompt within a block of 32, and one across blocks and a tile.
    lengths, first = [5] * 3 + [70] * 3, [0] * 3 + [3] * 3
    whole, spoiled = (
        KeyValueCache.empty(CacheShape(1, 2, 16, dtype), 6, 100, DEVICE) for _ in range(2)
    )
    keys_values = torch.randn(2, 6, 2, 100, 16, device=DEVICE)
    for row in range(6):
        keys_values[:, row, :, : lengths[row]] = keys_values[:, first[row], :, : lengths[row]]
    whole.fill(0, *keys_values, 1)
    for row in {0, 1, 2, 3, 4, 5} - set(first):  # their copies must not be read
        keys_values[:, row, :, : lengths[row]] = torch.nan
    spoiled.fill(0, *keys_values, 1)
    prompts = SharedPrompts(*torch.tensor([lengths, first], device=DEVICE))
    positions_R = prompts.lengths_R + torch.tensor([0, 20, 29] * 2, device=DEVICE)
    query = torch.randn(6, 2, 3, 16, device=DEVICE)
    keys, values, *scales = (part[0] for part in spoiled.parts if part)
    ours = decode_attention(
        query, keys, values, positions_R, prompts, num_parts=num_parts, form="shared", scales=scales
    )
    theirs = eager_attention(query, *whole.read(0), length_mask(positions_R, 100))
    assert_close(ours, theirs, atol=1e-5, rtol=0)


@kernels
def test_a_sequence_is_split_where_rows_and_heads_are_few():
    from stage_rl.rollout.kernels import parts_of

    # 1024 programs keep a GPU busy; a sequence has at most 16 parts.
    parts = {4096: 1, 1024: 1, 512: 2, 500: 2, 128: 8, 32: 16, 1: 16}
    assert {num_heads: parts_of(num_heads) for num_heads in parts} == parts


@kernels
@pytest.mark.parametrize(
    ("normed", "axes", "dtype"),
    [
        ((), 1, torch.float32),
        (("q",), 1, torch.float32),
        (("q", "k"), 2, torch.float32),
        (("k",), 1, FP8),
    ],
)
def test_rotated_queries_and_the_cache_are_those_of_torch(normed, axes, dtype):
    from stage_rl.rollout.kernels import TritonBackend

    torch.manual_seed(0)
    # 4 query heads and 2 of keys and values, 12 wide; angles of no meaning.
    cos, sin = torch.randn(2, 64, 12, device=DEVICE)
    axis_E = torch.arange(12, device=DEVICE) % axes if axes > 1 else None
    heads = Heads(4, 2, 12, EPS, cos, sin, axis_E)
    coords_RA = torch.tensor([[0, 5], [31, 2], [63, 40]], device=DEVICE)[:, :axes].contiguous()
    weights = {name: torch.randn(12, device=DEVICE) for name in normed}
    norms = HeadNorms(weights.get("q"), weights.get("k"))
    caches = [KeyValueCache.empty(CacheShape(1, 2, 12, dtype), 3, 64, DEVICE)]
    caches[0].fill(0, *torch.randn(2, 3, 2, 41, 12, device=DEVICE), 1)
    caches.append(copy.deepcopy(caches[0]))
    positions_R = torch.tensor([0, 31, 40], device=DEVICE)
    qkv_RC = torch.randn(3, 8 * 12, device=DEVICE)
    prompts = own_prompts(3)
    ours, theirs = (
        backend.attention(heads, cache, positions_R, coords_RA, prompts, 41)(0, qkv_RC, norms)
        for backend, cache in zip((TritonBackend(), Backend()), caches, strict=True)
    )
    cos_R1E, sin_R1E = heads.rotation(coords_RA)
    query, *_ = apply_rotary(qkv_RC, heads, norms, cos=cos_R1E, sin=sin_R1E)
    mask = length_mask(positions_R, 41)
    expected = eager_attention(query.view(3, 2, 2, 12), *caches[0].read(0), mask).reshape(3, -1)
    assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    if dtype == torch.float32:
        assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    for part, mine, torchs in zip(caches[1].parts, *(c.read(0) for c in caches), strict=False):
        size = part[0].float().abs()
        # Triton's interpreter casts to fp8 wrongly where a number is rounded up to a power of two,
        # and below 2^-6; ties go either way.
        sound = (size.frexp().mantissa != 0.5) & (size > 2**-6) | (dtype == torch.float32)
        near = 1e-5 if dtype == torch.float32 else 1 / 7
        assert_close(mine[sound], torchs[sound], atol=1e-5, rtol=near)


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_and_the_gate_are_those_of_torch(dtype):
    from stage_rl.rollout.kernels import TritonBackend

    torch.manual_seed(0)
    ours, theirs = TritonBackend(), Backend()
    states_MD, delta_MD = torch.randn(2, 3, 20, device=DEVICE)
    delta_MD = delta_MD.to(dtype)
    weight_D = torch.randn(20, device=DEVICE)
    near = {"atol": NEAR[dtype], "rtol": NEAR[dtype]}
    for added in (
        {},
        {"delta_MD": delta_MD},
        {"delta_MD": delta_MD, "delta_norm_D": torch.randn(20, device=DEVICE)},
    ):
        copies = [states_MD.clone(), states_MD.clone()]
        normed = [
            b.norm(copy, weight_D, eps=EPS, dtype=dtype, **added)
            for b, copy in zip((ours, theirs), copies, strict=True)
        ]
        assert normed[0].dtype == dtype
        assert_close(*normed, **near)
        assert_close(*copies, atol=1e-6, rtol=1e-6)
        assert torch.equal(copies[0], states_MD) != bool(added)
    gate_up = torch.randn(2, 2 * 1500, device=DEVICE).to(dtype)
    assert_close(ours.swiglu(gate_up), theirs.swiglu(gate_up), **near)


@kernels
@pytest.mark.parametrize("width", [300, 2500])  # within one tile of the codebook, and across two
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(5.0),
        Sampling(0.0, temperature=0.5, guided_entropy=True),
        Sampling(temperature=2.0, guided_entropy=True),
        Sampling(3.0, top_k=20),  # by torch's operations
    ],
)
def test_a_column_is_drawn_as_by_torch(sampling, width):
    from stage_rl.rollout.kernels import TritonBackend

    torch.manual_seed(0)
    logits_RV = 3 * torch.randn(16 if sampling.guided else 8, width, device=DEVICE)
    uniforms_N = torch.rand(8, device=DEVICE)
    ours = TritonBackend().draw(logits_RV, uniforms_N, sampling)
    theirs = Backend().draw(logits_RV, uniforms_N, sampling)
    assert_close(vars(ours), vars(theirs), atol=1e-4, rtol=0)


@kernels
@pytest.mark.parametrize(
    ("uniform", "token"), [(0.0, 1), (0.4, 1), (0.6, 2100), (1 - 2**-24, 2100)]
)
def test_a_token_without_probability_is_never_drawn(uniform, token):
    from stage_rl.rollout.draw_kernel import draw_tokens

    logits_RV = torch.full((1, 2500), -1e4, device=DEVICE)
    logits_RV[0, [1, 2100]] = 0.0
    drawn = draw_tokens(logits_RV, torch.tensor([uniform], device=DEVICE), Sampling())
    assert drawn.tokens_N.tolist() == [token]
    assert drawn.logprobs_N.item() == pytest.approx(-0.6931472, abs=1e-6)
    assert drawn.entropy_N.item() == pytest.approx(0.6931472, abs=1e-6)


@kernels
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_what_is_drawn_from_logits_that_are_not_finite_says_so():
    from stage_rl.rollout.draw_kernel import draw_tokens

    for value in (float("nan"), float("inf")):
        logits_RV = torch.zeros(1, 300, device=DEVICE)
        logits_RV[0, 7] = value
        drawn = draw_tokens(logits_RV, torch.tensor([0.5], device=DEVICE), Sampling())
        assert 0 <= drawn.tokens_N.item() < 300
        assert not drawn.guided_logprobs_N.isfinite().item()


@kernels
@pytest.mark.parametrize(
    ("family", "guidance_scale", "form"),
    [
        ("tiny_janus", 1.0, "shared"),
        pytest.param("tiny_llamagen", 1.0, "masked", marks=pytest.mark.slow),
        pytest.param("tiny_llamagen", 3.0, "shared", marks=pytest.mark.slow),
        pytest.param("tiny_emu3", 3.0, "masked", marks=pytest.mark.slow),
    ],
)
def test_an_engine_of_kernels_draws_the_tokens_of_torch(
    request, monkeypatch, family, guidance_scale, form
):
    """With guidance of two lengths of prompts; emu3 has end-of-line tokens and heads in groups."""
    from stage_rl.rollout import kernels

    monkeypatch.setattr(kernels, "FORM", form)
    policy = request.getfixturevalue(family)
    policy.module.to(DEVICE)
    texts = ("a photo of two blue circle", "a star")[: 1 if guidance_scale == 1 else 2]

    def tokens(**options):
        return rollout(
            Engine(policy, **options),
            [Prompt(text, index) for index, text in enumerate(texts)],
            group_size=1 + (form == "shared"),
            sampling=Sampling(guidance_scale=guidance_scale),
            seed=0,
            step=0,
        )

    ours, theirs = tokens(backend="triton"), tokens(backend="eager", cuda_graph=False)
    assert torch.equal(ours.tokens_NT, theirs.tokens_NT)
    assert_close(ours.logprobs_NT, theirs.logprobs_NT, atol=1e-4, rtol=0)
