"""The loss through a frozen head, in chunks with its gradient worked out ahead, against the plain cross-entropy."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import token_nll


def plain(hidden, targets, head, softcap, smoothing):
    logits = head(hidden).float()
    logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
    return F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)


def example(seed=0, rows=23, width=16, vocabulary=101, bias=False, dtype=torch.float32):
    torch.manual_seed(seed)
    head = nn.Linear(width, vocabulary, bias=bias, dtype=dtype).requires_grad_(False)
    with torch.no_grad():
        head.weight.mul_(8)
    hidden = torch.randn(rows, width, dtype=dtype, requires_grad=True)
    return hidden, torch.randint(0, vocabulary, (rows,)), head


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_loss_and_gradients_equal_the_plain_cross_entropy(monkeypatch, softcap, smoothing, bias, learns):
    monkeypatch.setattr(token_nll, "ROWS_PER_CHUNK", 7)
    hidden, targets, head = example(bias=bias)
    head.requires_grad_(learns)
    factors = torch.rand(len(targets)) + 0.5  # an upstream gradient that differs from token to token
    ours = token_nll.token_nll(hidden, targets, head, softcap=softcap, label_smoothing=smoothing)
    theirs = plain(hidden, targets, head, softcap, smoothing)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    learning = [hidden, *head.parameters()] if learns else [hidden]
    found = torch.autograd.grad((ours * factors).sum(), learning)
    wanted = torch.autograd.grad((theirs * factors).sum(), learning)
    for ours, theirs in zip(found, wanted, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradcheck(monkeypatch, softcap):
    monkeypatch.setattr(token_nll, "ROWS_PER_CHUNK", 2)
    hidden, targets, head = example(rows=5, width=4, vocabulary=9, dtype=torch.float64)

    def loss(values):
        return token_nll.token_nll(values, targets, head, softcap=softcap, label_smoothing=0.2)

    assert torch.autograd.gradcheck(loss, hidden)


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_stays_within_its_rounding(autocast):
    hidden, targets, head = example(dtype=torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        ours = token_nll.token_nll(hidden, targets, head, softcap=5.0)
    theirs = plain(hidden.detach().float(), targets, head.float(), 5.0, 0.0)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, atol=0.05, rtol=0.02)
    ours.sum().backward()
    assert hidden.grad.dtype == hidden.dtype and torch.isfinite(hidden.grad).all()


def test_no_more_than_two_chunks_of_logits_are_in_memory(monkeypatch):
    monkeypatch.setattr(token_nll, "ROWS_PER_CHUNK", 4)
    hidden, targets, head = example(rows=64, vocabulary=5000)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        token_nll.token_nll(hidden, targets, head, softcap=5.0).sum().backward()
    now, peak = 0, 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    chunk = 4 * 5000 * 4
    assert chunk < peak < 2.5 * chunk


def test_no_token_gives_no_loss_and_a_zero_gradient():
    hidden, targets, head = example(rows=0)
    loss = token_nll.token_nll(hidden, targets, head)
    assert loss.shape == (0,)
    loss.sum().backward()
    assert hidden.grad.shape == (0, 16)
