"""Checkpointing and compiling change memory and time, not the numbers."""

import copy

import pytest
import torch
from run_files import a_batch

from stage_rl.bench.base import peak_bytes
from stage_rl.training.measure import Precision, measure
from stage_rl.training.parallelize import prepare_blocks

# Both are torch's own, where it compiles.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning"),
]


def gradients(policy, *, mixed=False):
    measured = measure(policy, a_batch(), Precision(mixed=mixed), entropy_grad=True)
    (measured.logprobs_NT.mean() + measured.entropy_NT.mean()).backward()
    return {n: p.grad for n, p in policy.module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_gradients_are_those_without_checkpointing(tiny_janus, checkpointing, mixed):
    plain = copy.deepcopy(tiny_janus)
    prepare_blocks(tiny_janus.trunk_blocks, checkpointing=checkpointing)
    expected, found = gradients(plain, mixed=mixed), gradients(tiny_janus, mixed=mixed)
    assert expected.keys() == found.keys()
    assert len(found) > 10
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("checkpointing", ["none", "selective"])
def test_gradients_of_compiled_layers_are_those_of_plain_ones(
    tiny_janus, checkpointing, mixed, monkeypatch
):
    # The backend that generates no code: what dynamo traces is what is tested.
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: compiler(f, backend="aot_eager"))
    plain = copy.deepcopy(tiny_janus)
    prepare_blocks(tiny_janus.trunk_blocks, checkpointing=checkpointing, compiled=True)
    # In bf16 as close only by the same attention, which a compiled layer calls as it is.
    expected, found = gradients(plain, mixed=mixed), gradients(tiny_janus, mixed=mixed)
    assert expected.keys() == found.keys()
    for name, gradient in found.items():
        assert torch.allclose(gradient, expected[name], atol=1e-6, rtol=1e-4), name


def test_more_checkpointing_takes_less_memory(tiny_janus):
    peaks = []
    for checkpointing in ("none", "selective", "full"):
        policy = copy.deepcopy(tiny_janus)
        prepare_blocks(policy.trunk_blocks, checkpointing=checkpointing)
        gradients(policy)  # what is made once
        policy.module.zero_grad()
        peaks.append(peak_bytes(lambda policy=policy: gradients(policy)))
    none, selective, full = peaks
    assert full < 0.9 * selective < 0.8 * none


def test_parameters_keep_their_names(tiny_janus):
    before = list(tiny_janus.module.state_dict())
    prepare_blocks(tiny_janus.trunk_blocks, checkpointing="full", compiled=True)
    assert list(tiny_janus.module.state_dict()) == before


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_a_reference_made_later_runs_its_own_layers(tiny_janus, checkpointing, monkeypatch):
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: compiler(f, backend="eager"))
    prepare_blocks(tiny_janus.trunk_blocks, checkpointing=checkpointing, compiled=True)
    reference = tiny_janus.reference()
    before = measure(reference, a_batch(), Precision()).logprobs_NT
    with torch.no_grad():
        for parameter in tiny_janus.trunk_blocks[0].parameters():
            parameter.mul_(1.5)
    assert torch.equal(measure(reference, a_batch(), Precision()).logprobs_NT, before)
