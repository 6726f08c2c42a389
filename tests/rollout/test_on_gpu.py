"""The engine on a GPU: kernels and graph against torch, precision, what stays on the device."""

import pytest
import torch
from torch.testing import assert_close

from stage_rl.policies.janus import JanusConfig
from stage_rl.rollout.engine import Engine
from stage_rl.rollout.sample import rollout
from stage_rl.rollout.sampling import Sampling
from stage_rl.types import Prompt

pytestmark = pytest.mark.gpu
PROMPTS = [
    Prompt("a red square", 0),
    Prompt("a photo of two blue circle and three green star", 1),
    Prompt("the star above a square", 2),
]


@pytest.fixture
def policy(tiny_janus_folder):
    return JanusConfig(path=str(tiny_janus_folder), trainable=()).build(torch.device("cuda"))


def drawn(engine, *, group_size=4, **sampling):
    settings = Sampling(**{"guidance_scale": 5.0} | sampling)
    return rollout(engine, PROMPTS, group_size=group_size, sampling=settings, seed=0, step=0)


@pytest.mark.parametrize(
    "sampling", [{}, {"guidance_scale": 1.0}, {"temperature": 0.0}, {"top_k": 9, "top_p": 0.8}]
)
def test_a_replayed_graph_draws_the_tokens_of_single_steps(policy, sampling):
    single = drawn(Engine(policy, cuda_graph=False), **sampling)
    engine = Engine(policy)
    for _ in range(2):
        replayed = drawn(engine, **sampling)
        assert torch.equal(replayed.tokens_NT, single.tokens_NT)
        assert_close(replayed.logprobs_NT, single.logprobs_NT, atol=1e-5, rtol=0)
    if sampling == {"temperature": 0.0}:  # the kernels agree with torch in fp32
        plain = drawn(Engine(policy, backend="eager", cuda_graph=False), **sampling)
        assert torch.equal(replayed.tokens_NT, plain.tokens_NT)
        assert_close(replayed.entropy_NT, plain.entropy_NT, atol=1e-4, rtol=0)


def test_a_cache_in_bf16_stays_close_to_the_training_module(policy):
    engine = Engine(policy, dtype="mixed")
    assert engine.decoder.cache_shape.dtype == torch.bfloat16
    found = drawn(engine, guidance_scale=3.0)
    with torch.no_grad():
        hidden_NTD = policy.hidden(policy.encode(PROMPTS).repeat(4), found.tokens_NT)
        logprobs_NTV = policy.head(hidden_NTD).log_softmax(-1)
    exact_NT = logprobs_NTV.gather(-1, found.tokens_NT[..., None])[..., 0]
    assert 1e-5 < (found.logprobs_NT - exact_NT).abs().mean() < 0.1


def test_weights_that_are_reloaded_reach_a_captured_graph(policy):
    engine = Engine(policy)
    before = drawn(engine).tokens_NT
    with torch.no_grad():
        for parameter in policy.module.model.language_model.layers.parameters():
            parameter.mul_(-0.5)
    engine.reload()
    after = drawn(engine).tokens_NT
    assert torch.equal(after, drawn(Engine(policy)).tokens_NT)
    assert not torch.equal(after, before)


def test_passes_of_any_size_draw_the_same(policy):
    whole = drawn(Engine(policy), group_size=3).tokens_NT
    for max_images in (6, 2):
        assert torch.equal(
            drawn(Engine(policy, max_images=max_images), group_size=3).tokens_NT, whole
        )


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_no_token_waits_for_the_gpu(policy):
    engine = Engine(policy, cuda_graph=False)
    drawn(engine)
    prefix = policy.encode(PROMPTS)
    uniforms_NT = torch.rand(12, 16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.generate(prefix, group_size=4, sampling=Sampling(5.0), uniforms_NT=uniforms_NT)
    finally:
        torch.cuda.set_sync_debug_mode("default")
