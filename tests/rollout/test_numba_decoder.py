"""Layers that are one kernel each, against the same layers by torch's matmuls."""

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("numba")

from stage_rl.policies.base import DecoderWeights, LayerWeights
from stage_rl.rollout import numba_backend, numba_decoder, numba_kernels
from stage_rl.rollout.attention import SharedPrompts
from stage_rl.rollout.decoder import Decoder
from stage_rl.rollout.numba_backend import NumbaBackend
from stage_rl.rollout.numba_decoder import PackedDecoder

pytestmark = pytest.mark.skipif(
    not numba_kernels.multiplies_bf16(), reason="the processor has no AVX512-BF16"
)
WIDTH, INNER, HEAD, POSITIONS = 64, 96, 32, 70


def weights(
    *, heads=2, kv_heads=2, inner=INNER, bias=False, norms=(), codes=96, seed=0
) -> DecoderWeights:
    """Two layers and a head of random weights; `norms` are names of optional ones."""
    torch.manual_seed(seed)
    parts = {"q": heads * HEAD, "k": kv_heads * HEAD, "v": kv_heads * HEAD}
    widths = {"q_norm": HEAD, "k_norm": HEAD, "attention_out_norm": WIDTH, "mlp_out_norm": WIDTH}

    def matrix(rows, columns):
        return torch.randn(rows, columns) / columns**0.5

    def layer():
        return LayerWeights(
            attention_norm=torch.rand(WIDTH) + 0.5,
            wo=matrix(WIDTH, heads * HEAD),
            mlp_norm=torch.rand(WIDTH) + 0.5,
            w_gate=matrix(inner, WIDTH),
            w_up=matrix(inner, WIDTH),
            w_down=matrix(WIDTH, inner),
            **{f"w{name}": matrix(rows, WIDTH) for name, rows in parts.items()},
            **{f"b{name}": torch.randn(rows) for name, rows in parts.items() if bias},
            **{name: torch.rand(widths[name]) + 0.5 for name in norms},
        )

    angle = torch.arange(POSITIONS)[:, None] * torch.linspace(0.01, 1, HEAD // 2).repeat(2)
    return DecoderWeights(
        layers=[layer(), layer()],
        final_norm=torch.rand(WIDTH) + 0.5,
        norm_eps=1e-5,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=HEAD,
        rotary_cos_SR=angle.cos(),
        rotary_sin_SR=angle.sin(),
        input_embeds=torch.randn(8, WIDTH),
        head=[(matrix(64, WIDTH), torch.randn(64)), (matrix(codes, 64), None)],
    )


def loaded(kind, given, dtype="mixed"):
    decoder = kind(given, dtype=dtype, backend=NumbaBackend())
    decoder.load(given)
    return decoder


def steps(decoder, num_rows, number=3, spoiled=None):
    """The states of a few steps, from a position of its own in each row."""
    torch.manual_seed(1)
    cache = decoder.new_cache(num_rows, POSITIONS)
    rows_R, states = torch.arange(num_rows), []
    positions_R = rows_R * 7 % (POSITIONS - number)
    lengths = int(positions_R.max()) + number
    filled = torch.randn(4, num_rows, decoder.heads.num_kv_heads, lengths, HEAD)
    for layer in range(2):
        cache.fill(layer, *filled[2 * layer : 2 * layer + 2], 1)
    for step in range(number):
        embeds_RD = torch.randn(num_rows, WIDTH)
        if spoiled is not None:
            embeds_RD[spoiled, 3] = torch.nan
        where = positions_R + step
        prompts = SharedPrompts(torch.ones_like(rows_R), rows_R)
        states.append(
            decoder.step(
                embeds_RD, where, where[:, None], cache, prompts=prompts, num_live=POSITIONS
            )
        )
    return torch.stack(states)


@pytest.mark.parametrize("num_rows", [1, 13, 130])
@pytest.mark.parametrize(
    "options",
    [{}, {"heads": 4, "kv_heads": 2, "bias": True, "norms": ("q_norm", "k_norm"), "inner": 160}],
)
def test_packed_layers_give_the_states_of_torchs_matmuls(options, num_rows):
    ours, theirs = (loaded(kind, weights(**options)) for kind in (PackedDecoder, Decoder))
    assert len(ours._packed) == 2
    mine, others = (steps(decoder, num_rows) for decoder in (ours, theirs))
    # The order in which oneDNN adds is its own; what it rounds to in bf16 may then be the next one.
    assert_close(mine, others, atol=0.05, rtol=0.02)
    assert (mine - others).abs().mean() < 1e-3


@pytest.mark.parametrize(
    ("options", "dtype"),
    [({"norms": ("mlp_out_norm",)}, "mixed"), ({"inner": 72}, "mixed"), ({}, "float32")],
)
def test_what_it_does_not_know_runs_as_in_any_decoder(options, dtype):
    ours, theirs = (loaded(kind, weights(**options), dtype) for kind in (PackedDecoder, Decoder))
    assert ours._packed == []
    assert torch.equal(steps(ours, 5), steps(theirs, 5))


def test_nothing_is_packed_without_the_instructions_or_of_a_large_model(monkeypatch):
    monkeypatch.setattr(numba_decoder, "MOST_BYTES", 1000)
    assert loaded(PackedDecoder, weights())._packed == []
    monkeypatch.undo()
    monkeypatch.setattr(numba_kernels, "multiplies_bf16", lambda: False)
    assert loaded(PackedDecoder, weights())._packed == []


@pytest.mark.parametrize(("num_rows", "codes"), [(16, 96), (13, 96), (16, 100)])
def test_the_head_gives_the_logits_of_torch(num_rows, codes):
    ours, theirs = (loaded(kind, weights(codes=codes)) for kind in (PackedDecoder, Decoder))
    assert len(ours._packed_head) == (2 if codes == 96 else 0)
    states_RD = torch.randn(num_rows, WIDTH)
    expected = theirs.logits(states_RD)
    out_RV = torch.full((num_rows, codes), torch.nan)
    assert ours.logits(states_RD, out_RV) is out_RV
    assert_close(out_RV, expected, atol=1e-5, rtol=1e-5)
    assert_close(ours.logits(states_RD), expected, atol=1e-5, rtol=1e-5)


def test_weights_that_are_loaded_again_are_packed_again():
    decoder = loaded(PackedDecoder, weights())
    before = steps(decoder, 5)
    decoder.load(weights(seed=2))
    assert torch.equal(steps(decoder, 5), steps(loaded(PackedDecoder, weights(seed=2)), 5))
    assert not torch.equal(steps(decoder, 5), before)


def test_threads_change_no_number(monkeypatch):
    decoder, seen = loaded(PackedDecoder, weights()), []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for threads in (2, 1):
        monkeypatch.setattr(numba_backend, "threads_beside_others", lambda _, n=threads: n)
        seen.append(steps(decoder, 77))
    assert torch.equal(*seen)


def test_a_row_that_is_not_finite_spoils_no_other():
    decoder = loaded(PackedDecoder, weights())
    clean, spoiled = steps(decoder, 13), steps(decoder, 13, spoiled=4)
    others = torch.arange(13) != 4
    assert spoiled[:, 4].isnan().all()
    assert torch.equal(spoiled[:, others], clean[:, others])
