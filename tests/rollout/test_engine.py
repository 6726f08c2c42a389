import gc
import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from stage_rl.errors import InputError
from stage_rl.policies.base import Prefix
from stage_rl.rollout import attention, engine
from stage_rl.rollout.engine import CUDAGraph, Engine
from stage_rl.rollout.sample import _even, rollout
from stage_rl.rollout.sampling import Sampling
from stage_rl.types import Prompt

PROMPTS = [
    Prompt("a red square", 0),
    Prompt("a photo of two blue circle and three green star", 1),
    Prompt("the star above a square", 2),
]


def tokens(engine, prompts=PROMPTS, *, group_size=2, **sampling):
    drawn = rollout(
        engine, prompts, group_size=group_size, sampling=Sampling(**sampling), seed=0, step=0
    )
    return drawn.tokens_NT


@pytest.mark.parametrize("backend", ["eager", "numba"])
def test_greedy_tokens_are_those_of_transformers_generate(tiny_janus, backend):
    engine = Engine(tiny_janus, backend=backend)
    ours = tokens(engine, group_size=1, guidance_scale=5.0, temperature=0.0)
    for row, prompt in enumerate(PROMPTS):
        ids = torch.tensor([tiny_janus.prompt_ids(prompt)])
        theirs = tiny_janus.module.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_mode="image",
            do_sample=False,
            guidance_scale=5,
        )
        assert torch.equal(ours[row], theirs[0])
    assert len(ours.unique()) > 10


@torch.no_grad()
def test_guidance_1_runs_no_unconditional_rows_and_more_needs_them(tiny_janus):
    engine = Engine(tiny_janus)
    ours = tokens(engine, group_size=1, guidance_scale=1.0, temperature=0.0)
    prefix = tiny_janus.encode(PROMPTS)
    # Greedy tokens are the likeliest under teacher forcing.
    assert torch.equal(ours, tiny_janus.head(tiny_janus.hidden(prefix, ours)).argmax(-1))
    assert engine._cache.num_rows == 3
    tokens(engine, group_size=1, guidance_scale=1.1)
    assert engine._cache.num_rows == 6
    alone = Prefix(prefix.embeds_PLD, prefix.lengths_P, None)
    with pytest.raises(InputError, match="no unconditional rows"):
        engine.generate(alone, group_size=1, sampling=Sampling(5.0), uniforms_NT=torch.zeros(3, 16))


def test_an_image_does_not_depend_on_how_passes_are_cut(tiny_janus):
    whole = tokens(Engine(tiny_janus), group_size=3)
    # Passes of 64, 6 (two groups), 3 (one group) and 2 images (a group in two pieces).
    for max_images in (6, 3, 2):
        assert torch.equal(tokens(Engine(tiny_janus, max_images=max_images), group_size=3), whole)
    assert torch.equal(tokens(Engine(tiny_janus), PROMPTS[2:], group_size=3), whole[6:])
    assert len(whole.unique(dim=0)) == 9
    # 8 prompts, at most 6 in a pass: two passes of 4, not 6 and 2; 7 need passes of 4 and 3.
    assert [_even(8, 6), _even(7, 6), _even(6, 6), _even(1, 64)] == [4, 4, 6, 1]


def test_the_cache_of_a_gpu_decides_how_many_images_fit():
    # Of a 7B policy: 2 (keys and values) x 30 layers x 32 heads x 128 x 2 bytes, 480 KiB a token.
    shape = attention.CacheShape(30, 32, 128, torch.bfloat16)
    assert shape.row_bytes(32) == 32 * 480 * 1024
    assert shape.row_bytes(33) == 64 * 480 * 1024  # in blocks of 32
    # 0.9 x 100 bytes hold 4 images of 22 bytes.
    assert engine.images_that_fit(100, 22) == 4
    with pytest.raises(InputError, match=r"one image needs 2\.0 GiB, and 1\.0 GiB"):
        engine.images_that_fit(2**30, 2**31)


def test_an_engine_that_was_released_or_used_for_other_prompts_draws_the_same(tiny_janus):
    engine = Engine(tiny_janus)
    first = tokens(engine, PROMPTS[:1])
    for between in (lambda: tokens(engine, PROMPTS[1:2]), engine.release):
        between()
        assert torch.equal(tokens(engine, PROMPTS[:1]), first)
    engine.release()
    assert engine._cache is None


def test_a_released_pass_is_gone_without_a_collection(tiny_janus, monkeypatch):
    class Called:
        def __init__(self, function):
            self._function = function

        def __call__(self):
            self._function()

    monkeypatch.setattr(engine, "CUDAGraph", Called)
    static = Engine(tiny_janus, cuda_graph=True)
    tokens(static, PROMPTS[:1])
    (state,) = static.states
    alive = weakref.ref(state)
    gc.disable()
    try:
        del state
        assert alive() is not None
        static.release()
        assert alive() is None
    finally:
        gc.enable()


def test_one_trace_of_a_step_draws_all_tokens(tiny_janus, monkeypatch):
    """What a CUDA graph needs: the second step, traced, does the work of all that follow."""

    class Traced:
        def __init__(self, function):
            self._function, self._calls = function, 0

        def __call__(self):
            self._calls += 1
            if self._calls == 2:
                step = self._function
                self._function = make_fx(lambda: step())()
            else:
                self._function()

    monkeypatch.setattr(engine, "CUDAGraph", Traced)
    for sampling in ({}, {"guidance_scale": 1.0}, {"top_k": 9, "top_p": 0.8}, {"temperature": 0.0}):
        static = Engine(tiny_janus, backend="eager", cuda_graph=True)
        # The second pass replays a trace of the first.
        drawn = [tokens(static, PROMPTS[:1], **sampling) for _ in range(2)]
        plain = Engine(tiny_janus, backend="eager")
        assert torch.equal(drawn[0], tokens(plain, PROMPTS[:1], **sampling))
        assert torch.equal(drawn[0], drawn[1])


def test_a_graph_is_captured_after_its_first_calls_and_then_replayed(monkeypatch):
    happened = []
    graph = SimpleNamespace(replay=lambda: happened.append("replay"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)

    @contextmanager
    def capture(captured, capture_error_mode):
        assert captured is graph
        happened.append("capture")
        yield

    monkeypatch.setattr(torch.cuda, "graph", capture)
    step = CUDAGraph(lambda: happened.append("call"))
    for _ in range(4):
        step()
    # Inside a capture the call is recorded, not done, so a replay follows.
    assert happened == ["call", "call", "capture", "call", "replay", "replay"]


def test_a_sequence_of_many_blocks_gives_the_same_tokens(tiny_janus, monkeypatch):
    whole = tokens(Engine(tiny_janus))
    # 12 prompt positions and 15 image positions in 7 blocks instead of one.
    monkeypatch.setattr(attention, "BLOCK", 4)
    assert torch.equal(tokens(Engine(tiny_janus)), whole)


def test_a_reload_takes_the_new_weights_into_the_same_memory(tiny_janus):
    engine = Engine(tiny_janus)
    before = tokens(engine)
    address = engine.decoder.layers[0].wqkv.data_ptr()
    with torch.no_grad():
        for parameter in tiny_janus.module.model.language_model.layers.parameters():
            parameter.mul_(-0.5)
    assert torch.equal(tokens(engine), before)
    engine.reload()
    assert engine.decoder.layers[0].wqkv.data_ptr() == address
    assert torch.equal(tokens(engine), tokens(Engine(tiny_janus)))
    assert not torch.equal(tokens(engine), before)


@pytest.mark.parametrize("backend", ["eager", "numba"])
def test_mixed_precision_stays_close_to_the_training_module(tiny_janus, backend):
    drawn = rollout(
        Engine(tiny_janus, dtype="mixed", backend=backend),
        PROMPTS,
        group_size=4,
        sampling=Sampling(guidance_scale=3.0),
        seed=0,
        step=0,
    )
    with torch.no_grad():
        hidden_NTD = tiny_janus.hidden(tiny_janus.encode(PROMPTS).repeat(4), drawn.tokens_NT)
        logprobs_NTV = tiny_janus.head(hidden_NTD).log_softmax(-1)
    exact_NT = logprobs_NTV.gather(-1, drawn.tokens_NT[..., None])[..., 0]
    gap = (drawn.logprobs_NT - exact_NT).abs().mean()
    # This model is far sharper than a trained one; exactly equal would mean bf16 was not used.
    assert 1e-5 < gap < 0.1


@pytest.mark.parametrize(
    ("capabilities", "num_warnings"),
    [({"avx2": True}, 1), ({"avx2": True, "amx_bf16": True}, 0), ({"bf16": True}, 0), ({}, 0)],
)
def test_mixed_precision_on_a_cpu_without_bf16_is_warned_of_once(
    tiny_janus, monkeypatch, caplog, capabilities, num_warnings
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    engine._warn_of_slow_bf16.cache_clear()
    Engine(tiny_janus)
    assert not caplog.messages
    for _ in range(2):
        Engine(tiny_janus, dtype="mixed")
    assert len(caplog.messages) == num_warnings
    assert all("rollout.dtype=float32 training.dtype=float32" in m for m in caplog.messages)


def test_an_unknown_backend_is_an_error(tiny_janus):
    with pytest.raises(InputError, match="unknown 'cuda'; write one of: eager, numba, triton"):
        Engine(tiny_janus, backend="cuda")


@pytest.mark.parametrize(
    ("capabilities", "layer", "cache_dtype", "backend"),
    [
        ({"avx2": True}, "json", "auto", "NumbaBackend"),
        ({"avx2": True}, "json", "fp8", "Backend"),
        ({"avx2": True, "amx_bf16": True}, "json", "auto", "Backend"),
        ({"avx2": True}, "no.such.module", "auto", "Backend"),
        ({}, "json", "auto", "Backend"),
    ],
)
def test_a_cpu_takes_numba_where_it_is_there_and_faster(
    monkeypatch, caplog, capabilities, layer, cache_dtype, backend
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(engine, "OPENMP_OF_NUMBA", layer)
    caplog.set_level("INFO")
    picked = engine._pick_backend(None, torch.device("cpu"), cache_dtype)
    assert type(picked).__name__ == backend
    assert [m for m in caplog.messages if "stage-rl[cpu]" in m] == caplog.messages
    assert bool(caplog.messages) is (layer != "json")


@pytest.mark.parametrize("sampling", [{}, {"guidance_scale": 5.0, "temperature": 0.9}])
def test_an_engine_of_numba_draws_the_tokens_of_torch(tiny_janus, sampling):
    pytest.importorskip("numba")
    ours, theirs = (
        tokens(Engine(tiny_janus, backend=backend), **sampling) for backend in ("numba", "eager")
    )
    assert torch.equal(ours, theirs)


def test_numba_where_it_cannot_be_is_an_error(tiny_janus, monkeypatch):
    with pytest.raises(InputError, match="numba is for a CPU and has no fp8; write eager"):
        Engine(tiny_janus, backend="numba", cache_dtype="fp8")
    with pytest.raises(InputError, match="numba is for a CPU"):
        engine._pick_backend("numba", torch.device("meta"), "auto")
    monkeypatch.setattr(engine, "OPENMP_OF_NUMBA", "no.such.module")
    with pytest.raises(InputError, match=r"pip install 'stage-rl\[cpu\]'.*or write eager"):
        Engine(tiny_janus, backend="numba")
