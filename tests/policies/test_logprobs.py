"""The chunked image head against plain autograd over all logits, in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from stage_rl.bench.base import peak_bytes
from stage_rl.bench.logprobs import naive_logprobs
from stage_rl.policies.logprobs import head_logprobs

ROWS, WIDTH, CODES = 11, 5, 7


def make_head(*, trainable: bool) -> nn.Sequential:
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(WIDTH, 6), nn.GELU(), nn.Linear(6, CODES)).double()
    return head.requires_grad_(trainable)


def make_rows() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden_ND = torch.randn(ROWS, WIDTH, dtype=torch.float64, generator=generator) * 3
    tokens_N = torch.randint(CODES, (ROWS,), generator=generator)
    return hidden_ND.requires_grad_(), tokens_N


def weighted(outputs: tuple[Tensor, Tensor], which: str) -> Tensor:
    weight_N = torch.linspace(-1, 2, ROWS, dtype=torch.float64)
    terms = {"logprobs": (weight_N * outputs[0]).sum(), "entropy": (weight_N * outputs[1]).sum()}
    return terms["logprobs"] + terms["entropy"] if which == "both" else terms[which]


@pytest.mark.parametrize("chunk_rows", [1, 4, 11, 100])
@pytest.mark.parametrize("learns", ["hidden", "head", "both"])
@pytest.mark.parametrize("which", ["logprobs", "entropy", "both"])
def test_values_and_gradients_equal_the_naive_form(
    chunk_rows: int, learns: str, which: str
) -> None:
    head = make_head(trainable=learns != "hidden")
    hidden_ND, tokens_N = make_rows()
    wanted = [*head.parameters()] if learns != "hidden" else []
    if learns == "head":
        hidden_ND = hidden_ND.detach()
    else:
        wanted.append(hidden_ND)
    naive = naive_logprobs(head, hidden_ND, tokens_N)
    chunked = head_logprobs(head, hidden_ND, tokens_N, chunk_rows=chunk_rows)
    for ours, theirs in zip(chunked, naive, strict=True):
        assert (ours - theirs).abs().max() <= 1e-12
    ours = torch.autograd.grad(weighted(chunked, which), wanted)
    theirs = torch.autograd.grad(weighted(naive, which), wanted)
    for mine, other in zip(ours, theirs, strict=True):
        assert other.abs().max() > 1e-3
        assert (mine - other).abs().max() <= 1e-12


@pytest.mark.parametrize("trainable", [False, True])
def test_gradcheck_holds_for_hidden_states_and_parameters(trainable: bool) -> None:
    head = make_head(trainable=trainable)
    hidden_ND, tokens_N = make_rows()
    parameters = list(head.parameters()) if trainable else []

    def both(hidden_ND: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        return head_logprobs(head, hidden_ND, tokens_N, chunk_rows=4)

    assert torch.autograd.gradcheck(both, (hidden_ND, *parameters))


def test_two_codes_give_the_binary_entropy() -> None:
    # Logits (ln 3, 0): p = (3/4, 1/4); H = 3/4 ln 4/3 + 1/4 ln 4.
    logits_NV = torch.tensor([[math.log(3), 0.0]])
    logprobs_N, entropy_N = head_logprobs(nn.Identity(), logits_NV, torch.tensor([1]), chunk_rows=1)
    assert logprobs_N.item() == pytest.approx(math.log(1 / 4))
    assert entropy_N.item() == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4))


@pytest.mark.parametrize("trainable", [False, True])
def test_entropy_without_gradient_is_a_constant(trainable: bool) -> None:
    head = make_head(trainable=trainable)
    hidden_ND, tokens_N = make_rows()
    outputs = head_logprobs(head, hidden_ND, tokens_N, chunk_rows=4, entropy_grad=False)
    assert outputs[0].requires_grad
    assert not outputs[1].requires_grad
    (ours,) = torch.autograd.grad(weighted(outputs, "logprobs"), hidden_ND)
    naive = naive_logprobs(head, hidden_ND, tokens_N)
    (theirs,) = torch.autograd.grad(weighted(naive, "logprobs"), hidden_ND)
    assert (ours - theirs).abs().max() <= 1e-12


@pytest.mark.parametrize("trainable", [False, True])
def test_nothing_is_kept_where_nothing_takes_a_gradient(trainable: bool) -> None:
    head = make_head(trainable=trainable)
    hidden_ND, tokens_N = make_rows()
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(saved.append, lambda packed: packed)
    with torch.no_grad(), hooks:
        outputs = head_logprobs(head, hidden_ND, tokens_N, chunk_rows=4)
    assert not saved
    if not trainable:
        outputs += head_logprobs(head, hidden_ND.detach(), tokens_N, chunk_rows=4)
    assert not any(output.requires_grad for output in outputs)


@pytest.mark.parametrize("trainable", [False, True])
def test_bfloat16_hidden_states_give_fp32_outputs_and_bfloat16_gradients(trainable: bool) -> None:
    head = make_head(trainable=trainable).bfloat16()
    hidden_ND, tokens_N = make_rows()
    hidden_ND = hidden_ND.detach().bfloat16().requires_grad_()
    outputs = head_logprobs(head, hidden_ND, tokens_N, chunk_rows=4)
    assert {output.dtype for output in outputs} == {torch.float32}
    (grad_ND,) = torch.autograd.grad(outputs[0].sum(), hidden_ND)
    assert grad_ND.dtype == torch.bfloat16


def test_a_second_derivative_is_refused() -> None:
    hidden_ND, tokens_N = make_rows()
    logprobs_N, _ = head_logprobs(make_head(trainable=False), hidden_ND, tokens_N, chunk_rows=4)
    weight_N = torch.ones_like(logprobs_N).requires_grad_()
    (grad_ND,) = torch.autograd.grad(logprobs_N, hidden_ND, weight_N, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad_ND.sum().backward()


@pytest.mark.parametrize("trainable", [False, True])
def test_memory_does_not_grow_with_the_logits(trainable: bool) -> None:
    # 512 rows x 512 codes in fp32 are 1 MiB of logits; the naive form holds at least three such.
    head = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 512))
    head.requires_grad_(trainable)
    hidden_ND = torch.randn(512, 16, requires_grad=True)
    tokens_N = torch.randint(512, (512,))

    def chunked() -> None:
        head_logprobs(head, hidden_ND, tokens_N, chunk_rows=32)[0].sum().backward()

    def naive() -> None:
        naive_logprobs(head, hidden_ND, tokens_N)[0].sum().backward()

    assert peak_bytes(naive) >= 3 * 2**20
    assert peak_bytes(chunked) <= 0.40 * peak_bytes(naive)
