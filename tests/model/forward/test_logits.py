"""Losses of some tokens at a time."""

import pytest
import torch

from tiny import VOCAB, tiny_model
from trimbit.model.forward import compute
from trimbit.model.forward.logits import head_of, logit_slices, loss_gradient


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("distil", [False, True])
def test_the_loss_and_its_gradient_are_those_of_whole_logits(cap, distil, monkeypatch):
    """Some tokens at a time, with a soft cap and without, against plain torch on all logits at once."""
    monkeypatch.setattr("trimbit.model.forward.logits.LOGIT_TOKENS", 3)
    model = tiny_model("llama")
    model.config.final_logit_softcapping = cap
    generator = torch.Generator().manual_seed(0)
    hidden, taught = (torch.randn(8, 48, generator=generator) for _ in range(2))
    labels = torch.randint(3, VOCAB, (8,), generator=generator)
    head = torch.nn.Linear(48, VOCAB, bias=False).requires_grad_(requires_grad=False)
    slices = logit_slices(head, model.config, taught) if distil else None
    sliced, whole = (hidden.clone().requires_grad_() for _ in range(2))
    found = loss_gradient(model.get_output_embeddings(), model.config, sliced * 1, labels, slices, 8)

    def log_probabilities(logits):
        return torch.log_softmax(cap * torch.tanh(logits / cap) if cap else logits, -1)

    log_q = log_probabilities(model.get_output_embeddings()(whole))
    log_p = log_probabilities(head(taught))
    want = (log_p.exp() * (log_p - log_q)).sum() / 8 if distil else -log_q[range(8), labels].mean()
    want.backward()
    assert found == pytest.approx(float(want.detach()), rel=1e-5)
    torch.testing.assert_close(sliced.grad, whole.grad, rtol=1e-4, atol=1e-6)


def test_a_bf16_head_held_in_fp32_gives_the_same_logits_and_gradients(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(VOCAB, 48, generator=generator).bfloat16()
    x, back = torch.randn(8, 48, generator=generator), torch.randn(8, VOCAB, generator=generator)
    found = []
    for without in (False, True):
        monkeypatch.setattr(compute, "_without_bf16", lambda without=without: without)
        head, leaf = head_of(weight), x.clone().requires_grad_()
        assert head.keywords["weight"].dtype is (torch.float32 if without else torch.bfloat16)
        with compute.products_in(torch.bfloat16):
            logits = head(leaf)
            logits.backward(back.to(logits.dtype))
        found.append((logits.detach(), leaf.grad))
    for held, plain in zip(*found, strict=True):
        assert held.dtype is plain.dtype
        torch.testing.assert_close(held, plain, rtol=0.01, atol=0.05)
