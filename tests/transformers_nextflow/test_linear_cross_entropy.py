"""The chunked head and loss against the plain one."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from transformers_nextflow import linear_cross_entropy
from transformers_nextflow.linear_cross_entropy import head_cross_entropy, is_plain_linear

ROWS, HIDDEN, VOCAB = 50, 16, 300


class Wrapped(nn.Module):
    """A head that is more than its weight, as LoRA's is."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, hidden_states):
        return self.head(hidden_states)


def make(dtype=torch.float32):
    torch.manual_seed(0)
    head = nn.Linear(HIDDEN, VOCAB, bias=False)
    nn.init.normal_(head.weight)
    hidden = torch.randn(ROWS, HIDDEN)
    targets, weights = torch.randint(VOCAB, (ROWS,)), torch.rand(ROWS) + 0.5
    return head.to(dtype), hidden.to(dtype).requires_grad_(), targets, weights


def plain(head, hidden, targets, weights):
    losses = F.cross_entropy(head(hidden).float(), targets, reduction="none")
    return losses.sum() if weights is None else (losses * weights).sum()


def gradients(loss, head, hidden):
    return torch.autograd.grad(loss * 0.3, [hidden, head.weight])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("num_rows", [7, 50, 1000])
def test_loss_and_gradients_are_the_plain_ones(monkeypatch, num_rows, wrap, weighted):
    monkeypatch.setattr(linear_cross_entropy, "chunk_rows", lambda vocab_size: num_rows)
    head, hidden, targets, weights = make()
    weights = weights if weighted else None
    loss, losses = head_cross_entropy(Wrapped(head) if wrap else head, hidden, targets, VOCAB, weights)
    torch.testing.assert_close(losses, F.cross_entropy(head(hidden), targets, reduction="none"))
    assert not losses.requires_grad
    expected = plain(head, hidden, targets, weights)
    torch.testing.assert_close(loss, expected)
    for got, wanted in zip(gradients(loss, head, hidden), gradients(expected, head, hidden), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_is_as_near_to_the_truth_as_the_plain_loss(autocast):
    head, hidden, targets, weights = make(torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, _ = head_cross_entropy(head, hidden, targets, VOCAB, weights)
        expected = plain(head, hidden, targets, weights)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, atol=0, rtol=1e-3)
    for got, wanted in zip(gradients(loss, head, hidden), gradients(expected, head, hidden), strict=True):
        assert got.dtype == wanted.dtype
        assert F.cosine_similarity(got.float().flatten(), wanted.float().flatten(), dim=0) > 0.999


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_stay_finite(dtype):
    head, hidden, _, _ = make(dtype)
    with torch.no_grad():
        head.weight.mul_(100)
    likely, _ = head_cross_entropy(head, hidden, head(hidden).argmax(-1), VOCAB)
    assert likely / ROWS < 0.1
    unlikely, _ = head_cross_entropy(head, hidden, head(hidden).argmin(-1), VOCAB)  # probabilities of 0 in any float
    assert unlikely.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients(unlikely, head, hidden))


@pytest.mark.parametrize("frozen", ["head", "hidden"])
def test_only_wanted_gradients_are_made(frozen):
    head, hidden, targets, weights = make()
    (head.weight if frozen == "head" else hidden).requires_grad_(False)
    loss, _ = head_cross_entropy(head, hidden, targets, VOCAB, weights)
    loss.backward()
    kept = hidden if frozen == "head" else head.weight
    (wanted,) = torch.autograd.grad(plain(head, hidden, targets, weights), [kept])
    torch.testing.assert_close(kept.grad, wanted, atol=1e-5, rtol=1e-5)


def test_no_rows_give_zero():
    head, hidden, targets, _ = make()
    for module in (head, Wrapped(head)):
        assert head_cross_entropy(module, hidden[:0], targets[:0], VOCAB)[0].item() == 0


def test_a_second_backward_pass_is_refused():
    """The gradients were scaled in place by the first."""
    head, hidden, targets, weights = make()
    loss, _ = head_cross_entropy(head, hidden, targets, VOCAB, weights)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_head_with_more_than_a_weight_is_called():
    head = make()[0]
    assert is_plain_linear(head)
    assert not is_plain_linear(Wrapped(head))
    assert not is_plain_linear(nn.Linear(2, 2))
    handle = head.register_forward_hook(lambda *_: None)
    assert not is_plain_linear(head)
    handle.remove()
    assert is_plain_linear(head)
