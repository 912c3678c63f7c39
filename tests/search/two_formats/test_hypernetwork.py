"""The hypernetwork is DISP-LLM's: frozen random inputs, a GRU both ways, LayerNorm, GELU, a linear head a mask."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from trimbit.search.two_formats.hypernetwork import Hypernetwork

CHANNELS = {"first": 5, "second": 3, "third": 7}


def test_it_is_the_formula():
    network = Hypernetwork(CHANNELS, seed=1)
    cells = {way: nn.GRUCell(32, 64) for way in ("", "_reverse")}
    for way, cell in cells.items():
        cell.load_state_dict(
            {
                f"{kind}_{part}": getattr(network.gru, f"{kind}_{part}_l0{way}")
                for kind in ("weight", "bias")
                for part in ("ih", "hh")
            }
        )
    states = {}
    for way, cell in cells.items():
        order, state = (range(3) if not way else range(2, -1, -1)), torch.zeros(64)
        for at in order:
            state = cell(network.inputs[at], state)
            states[way, at] = state
    for at, (site, logits) in enumerate(network().items()):
        both = torch.cat([states["", at], states["_reverse", at]])
        scaled = (both - both.mean()) / (both.var(unbiased=False) + 1e-5).sqrt()
        want = functional.gelu(scaled) @ network.heads[at].weight.T
        torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-5, msg=site)
        assert logits.shape == (CHANNELS[site],)


def test_inputs_are_frozen_and_the_seed_says_all():
    one, same, other = (Hypernetwork(CHANNELS, seed=seed) for seed in (1, 1, 2))
    assert "inputs" not in dict(one.named_parameters())
    assert one.inputs.std() == pytest.approx(1, abs=0.3)
    assert all(torch.equal(own, same()[site]) for site, own in one().items())
    assert not any(torch.equal(own, other()[site]) for site, own in one().items())


def test_what_is_learnt_for_one_mask_moves_the_others():
    network = Hypernetwork(CHANNELS, seed=1)
    network()["first"].sum().backward()
    assert network.inputs.grad is None
    before = {site: own.detach() for site, own in network().items()}
    with torch.no_grad():
        for name, p in network.gru.named_parameters():
            assert p.grad is not None, name
            p -= 0.1 * p.grad
    assert not any(torch.equal(own, before[site]) for site, own in network().items())
