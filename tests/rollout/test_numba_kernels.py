"""What Numba compiles for a CPU against torch's own operations."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("numba")
import numba
from numba import njit

from stage_rl.rollout import numba_backend, numba_kernels
from stage_rl.rollout.attention import (
    Backend,
    CacheShape,
    HeadNorms,
    Heads,
    KeyValueCache,
    SharedPrompts,
)
from stage_rl.rollout.numba_backend import NumbaBackend
from stage_rl.rollout.numba_kernels import narrowed, widened
from stage_rl.rollout.sampling import Sampling

CPU = torch.device("cpu")
NEAR = {torch.float32: 1e-5, torch.bfloat16: 0.02}


def attended(backend, dtype, cache, qkv_RC, heads, norms, positions_R):
    rows_R = torch.arange(len(positions_R))
    attend = backend.attention(
        heads,
        cache,
        positions_R,
        torch.stack([positions_R, positions_R // 2], 1)[:, : 1 if heads.axis_E is None else 2],
        SharedPrompts(torch.ones_like(rows_R), rows_R),
        int(positions_R.max()) + 1,
    )
    return attend(0, qkv_RC.to(dtype), norms).float()


def case(queries=2, width=16, normed=(), axes=1, dtype=torch.float32):
    """Rows at the edges of blocks of 32, and torch's cache beside the one of the kernels."""
    torch.manual_seed(0)
    positions_R = torch.tensor([0, 1, 30, 31, 32, 63, 64, 69])
    cos, sin = torch.randn(2, 80, width)
    axis_E = torch.arange(width) % axes if axes > 1 else None
    heads = Heads(2 * queries, 2, width, 1e-5, cos, sin, axis_E)
    weights = {name: torch.randn(width) for name in normed}
    shape = CacheShape(1, 2, width, dtype)
    keys_values = torch.randn(2, len(positions_R), 2, 70, width)
    caches = [
        KeyValueCache.empty(shape, len(positions_R), 70, CPU, layout=backend.layout)
        for backend in (Backend, NumbaBackend)
    ]
    for cache in caches:
        cache.fill(0, *keys_values, 1)
    qkv_RC = torch.randn(len(positions_R), (2 * queries + 4) * width)
    return caches, qkv_RC, heads, HeadNorms(weights.get("q"), weights.get("k")), positions_R


def use_threads(monkeypatch, threads):
    """So many, whatever else runs."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(numba_backend, "threads_beside_others", lambda threads: threads)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": torch.bfloat16},
        {"queries": 1, "width": 32, "dtype": torch.bfloat16},
        {"queries": 3, "width": 12, "normed": ("q",)},
        {"normed": ("q", "k"), "axes": 2},
        {"normed": ("k",), "dtype": torch.bfloat16},
    ],
)
def test_attention_and_the_cache_are_those_of_torch(options, threads, monkeypatch):
    use_threads(monkeypatch, threads)
    caches, *inputs, positions_R = case(**options)
    dtype = options.get("dtype", torch.float32)
    theirs, ours = (
        attended(backend, dtype, cache, *inputs, positions_R)
        for backend, cache in zip((Backend(), NumbaBackend()), caches, strict=True)
    )
    assert_close(ours, theirs, atol=NEAR[dtype], rtol=NEAR[dtype])
    for part, other in ((c.read(0)[i] for c in caches) for i in (0, 1)):
        mine = torch.cat(list(other), 2)[:, :, :70].float()
        assert_close(mine, part[0, :, :, :70].float(), atol=1e-5, rtol=2**-7)


def test_a_part_of_a_larger_cache_is_read_up_to_each_position_alone(monkeypatch):
    use_threads(monkeypatch, 2)
    # 3 rows of one head, which two threads do not divide, in a cache that is unknown behind them.
    torch.manual_seed(0)
    heads = Heads(2, 1, 8, 1e-5, *torch.randn(2, 80, 8))
    shape, positions_R = CacheShape(1, 1, 8), torch.tensor([0, 33, 63])
    large = KeyValueCache.empty(shape, 5, 70, CPU, layout="transposed")
    for part in (large.keys[0], large.values[0]):
        part.fill_(torch.nan)
    caches = [KeyValueCache.empty(shape, 3, 70, CPU, layout="rows"), large.rows(3)]
    for row, length in enumerate(positions_R.tolist()):
        new_2SE = torch.randn(2, length, 8)
        for cache in caches:
            for part_WRKUE, new_SE in zip((cache.keys[0], cache.values[0]), new_2SE, strict=True):
                for s in range(length):
                    block, place = divmod(s, part_WRKUE.shape[3])
                    part_WRKUE[block, row, 0, place] = new_SE[s]
    qkv_RC = torch.randn(3, 4 * 8)
    inputs = qkv_RC, heads, HeadNorms(None, None), positions_R
    theirs, ours = (
        attended(backend, torch.float32, cache, *inputs)
        for backend, cache in zip((Backend(), NumbaBackend()), caches, strict=True)
    )
    assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_where_no_folder_can_be_written_nothing_is_kept(monkeypatch):
    asked = []

    def njit(**options):
        asked.append(options.pop("cache", False))
        if asked[-1]:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: function

    monkeypatch.setattr(numba_kernels, "njit", njit)
    assert numba_kernels.parallel(len)("four") == 4
    assert asked == [True, False]


def test_its_threads_are_those_of_openmp():
    attended(NumbaBackend(), torch.float32, case()[0][1], *case()[1:])
    assert numba.threading_layer() == "omp"


def test_what_is_not_finite_stays_so_and_in_its_row():
    caches, qkv_RC, *inputs = case(dtype=torch.bfloat16)
    clean = attended(NumbaBackend(), torch.bfloat16, copy.deepcopy(caches[1]), qkv_RC, *inputs)
    qkv_RC[3, 5], qkv_RC[6, -1] = torch.nan, torch.inf
    spoiled = attended(NumbaBackend(), torch.bfloat16, caches[1], qkv_RC, *inputs)
    # A query of row 3: of its head all is unknown. A value of row 6: its width, for both queries.
    assert spoiled[3, :16].isnan().all()
    assert spoiled[6, [47, 63]].isinf().all()
    spoiled[3, :16], spoiled[6, [47, 63]] = clean[3, :16], clean[6, [47, 63]]
    assert torch.equal(spoiled, clean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["alone", "added", "delta_normed"])
def test_the_norm_of_the_stream_is_that_of_torch(dtype, form):
    torch.manual_seed(0)
    states_MD, weight_D = torch.randn(5, 48), torch.rand(48)
    options = {"eps": 1e-5, "dtype": dtype}
    options |= {} if form == "alone" else {"delta_MD": torch.randn(5, 48).to(dtype)}
    options |= {"delta_norm_D": torch.rand(48)} if form == "delta_normed" else {}
    mine, torchs = states_MD.clone(), states_MD.clone()
    ours = NumbaBackend().norm(mine, weight_D, **options)
    theirs = Backend().norm(torchs, weight_D, **options)
    assert ours.dtype == theirs.dtype == dtype
    assert_close(ours, theirs, atol=1e-6, rtol=1e-6 if dtype == torch.float32 else 2**-7)
    assert_close(mine, torchs, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_is_that_of_torch_rounding_for_rounding(dtype):
    torch.manual_seed(0)
    gate_up_MF = 10 * torch.randn(50, 2 * 48)
    gate_up_MF[0, :4] = torch.tensor([90.0, -90.0, 0.0, torch.nan])
    ours, theirs = (b.swiglu(gate_up_MF.to(dtype)) for b in (NumbaBackend(), Backend()))
    assert_close(
        ours, theirs, atol=1e-6, rtol=1e-6 if dtype == torch.float32 else 2**-7, equal_nan=True
    )
    if (
        dtype == torch.bfloat16
    ):  # where the exponentials differ, a number is seldom rounded otherwise
        assert (ours != theirs)[1:].float().mean() < 0.01


@pytest.mark.parametrize("width", [10, 64, 300])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(5.0),
        Sampling(0.0, temperature=0.5, guided_entropy=True),
        Sampling(temperature=2.0, guided_entropy=True),
        Sampling(3.0, top_k=5),  # by torch's operations
    ],
)
def test_a_column_is_drawn_as_by_torch(sampling, width):
    torch.manual_seed(0)
    logits_RV, uniforms_N = 3 * torch.randn(14 if sampling.guided else 7, width), torch.rand(7)
    ours = NumbaBackend().draw(logits_RV, uniforms_N, sampling)
    theirs = Backend().draw(logits_RV, uniforms_N, sampling)
    assert_close(vars(ours), vars(theirs), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("uniform", "token"), [(0.0, 1), (0.4, 1), (0.6, 210), (1 - 2**-24, 210), (1.0, 210)]
)
@pytest.mark.parametrize("low", [-100.0, -1e4])
def test_a_token_without_probability_is_never_drawn(uniform, token, low):
    logits_RV = torch.full((1, 300), low)
    logits_RV[0, [1, 210]] = 0.0
    drawn = NumbaBackend().draw(logits_RV, torch.tensor([uniform]), Sampling())
    assert drawn.tokens_N.tolist() == [token]
    assert drawn.logprobs_N.item() == pytest.approx(-0.6931472, abs=1e-6)
    assert drawn.entropy_N.item() == pytest.approx(0.6931472, abs=1e-6)


@pytest.mark.parametrize(("value", "place"), [(torch.nan, 7), (torch.nan, 0), (torch.inf, 7)])
def test_what_is_drawn_from_logits_that_are_not_finite_says_so(value, place):
    logits_RV = torch.zeros(2, 300)
    logits_RV[1, place] = value
    drawn = NumbaBackend().draw(logits_RV, torch.tensor([0.5, 0.5]), Sampling())
    assert 0 <= drawn.tokens_N[1].item() < 300
    assert drawn.guided_logprobs_N.isfinite().tolist() == [True, False]


def test_beside_others_fewer_threads_do_the_same(monkeypatch):
    backend = NumbaBackend()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    torch.manual_seed(0)
    logits_RV, uniforms_N, seen = torch.randn(14, 300), torch.rand(7), []
    for left in (2, 1):
        monkeypatch.setattr(numba_backend, "threads_beside_others", lambda _, left=left: left)
        drawn = vars(backend.draw(logits_RV, uniforms_N, Sampling(3.0)))
        attention = attended(backend, torch.float32, case()[0][1], *case()[1:])
        gate = backend.swiglu(logits_RV)
        seen.append((numba.get_num_threads(), drawn, attention, gate))
    assert [threads for threads, *_ in seen] == [min(2, numba_kernels.MOST_THREADS), 1]
    assert_close(*(numbers for _, *numbers in seen), atol=0, rtol=0)


def test_exp_is_that_of_numpy():
    @njit
    def all_of(x):
        return np.array([numba_kernels.exp(each) for each in x])

    x = np.linspace(-80, 0, 4001, dtype=np.float32)
    assert all_of(x) == pytest.approx(np.exp(x.astype(np.float64)), rel=1e-5)
    near = x[x > -1]
    assert all_of(near) == pytest.approx(np.exp(near.astype(np.float64)), rel=3e-7)
    ends = all_of(np.array([0, -1000, -np.inf, np.nan], dtype=np.float32))
    assert ends[0] == 1
    assert ends[1:3].tolist() == [0, 0]
    assert np.isnan(ends[3])


def test_bf16_is_rounded_as_torch_rounds_it():
    @njit
    def there_and_back(numbers, bits):
        back = np.empty_like(numbers)
        for i in range(len(numbers)):
            bits[i] = narrowed(numbers[i], bits)
            back[i] = widened(bits[i])
        return back

    torch.manual_seed(0)
    # Ties to even on both sides, the largest, and what is not a number.
    special = torch.tensor([257.0, 259.0, -257.0, 3.4e38, 1e-40, torch.inf, torch.nan, 0.0])
    numbers = torch.cat([torch.randn(1000) * 1e3, special])
    bits = torch.empty(len(numbers), dtype=torch.uint16)
    back = there_and_back(numbers.numpy(), bits.numpy())
    assert_close(torch.from_numpy(back), numbers.bfloat16().float(), atol=0, rtol=0, equal_nan=True)
    assert torch.equal(bits.view(torch.bfloat16)[:-2], numbers.bfloat16()[:-2])


DIGEST = """
import hashlib, sys
sys.path.insert(0, sys.argv[1])
import test_numba_decoder as layers
import test_numba_kernels as tests
from stage_rl.rollout.numba_backend import NumbaBackend
dtype, seen = tests.torch.float32, hashlib.sha256()
caches, *inputs = tests.case(width=32, normed=("q",))
for _ in range(2):
    seen.update(tests.attended(NumbaBackend(), dtype, caches[1], *inputs).numpy().tobytes())
states = tests.torch.randn(64, 192)
normed = NumbaBackend().norm(states, states[0].abs(), eps=1e-5, dtype=dtype, delta_MD=states)
drawn = NumbaBackend().draw(states, tests.torch.rand(32), tests.Sampling(3.0, temperature=0.9))
for part in (normed, NumbaBackend().swiglu(normed), drawn.tokens_N, drawn.logprobs_N):
    seen.update(part.numpy().tobytes())
states = layers.steps(layers.loaded(layers.PackedDecoder, layers.weights()), 9)
packed = hashlib.sha256(states.numpy().tobytes() * tests.numba_kernels.multiplies_bf16())
print(seen.hexdigest(), tests.torch.get_num_threads(), packed.hexdigest())
"""


def digest(cache, **environment):
    """Of what the kernels give in a process that keeps their code in a folder, how many threads
    torch has after them, and of what packed layers give.
    """
    done = subprocess.run(
        [sys.executable, "-c", DIGEST, str(Path(__file__).parent)],
        env=os.environ | {"NUMBA_CACHE_DIR": str(cache), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


def test_code_that_is_loaded_from_the_disk_rounds_as_compiled(tmp_path):
    compiled, _, packed = digest(tmp_path)
    assert list(tmp_path.rglob("*.nbc"))
    # Nor do Numba's threads, of which there is one for each core, make torch's more.
    assert digest(tmp_path, OMP_NUM_THREADS="1") == [compiled, "1", packed]


@pytest.mark.slow
def test_code_for_a_processor_without_vectors_of_its_own_rounds_alike(tmp_path):
    other, own = digest(tmp_path / "other", NUMBA_CPU_NAME="generic"), digest(tmp_path / "own")
    assert other[:2] == own[:2]
