"""Rounding of activations against a loop over single values in plain Python."""

import math

import pytest
import torch

from trimbit.kernels.acts import round_activations, round_among
from trimbit.schema.activations import ActInt, ActRun


def act_runs(*pairs):
    return tuple(ActRun(count=count, precision=precision) for count, precision in pairs)


RUNS = [
    act_runs((70, ActInt(bits=4, group=32, clip=0.9)), (33, None), (5, ActInt(bits=8, group=None))),
    act_runs((1, ActInt(bits=3, group=128)), (130, ActInt(bits=3, group=64, clip=0.75))),
    act_runs((64, ActInt(bits=2, group=None))),
]


def half_even(value):
    low = math.floor(value)
    return low + (value - low > 0.5 or (value - low == 0.5 and low % 2 == 1))


def naive(token, runs):
    out = []
    for run in runs:
        own, token = token[: run.count], token[run.count :]
        if run.precision is None:
            out += own
            continue
        size, top = run.precision.group or run.count, 2 ** (run.precision.bits - 1) - 1
        for start in range(0, run.count, size):
            group = own[start : start + size]
            scale = max(abs(x) for x in group) * run.precision.clip / top
            out += [min(max(half_even(x / scale), -top - 1), top) * scale if scale else 0.0 for x in group]
    return out


@pytest.mark.parametrize("runs", RUNS)
def test_it_is_the_naive_loop(runs, generator):
    x = torch.randn(2, 3, sum(run.count for run in runs), generator=generator) * torch.tensor([1.0, 1e-3, 1e4])[:, None]
    found = round_activations(x, runs)
    want = torch.tensor([naive(token, runs) for token in x.flatten(0, 1).double().tolist()]).view_as(x)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=0)
    assert (found != x).any()


def test_zeros_stay_and_bf16_is_rounded_once(generator):
    x = torch.randn(4, 108, generator=generator).to(torch.bfloat16)
    x[1] = 0
    found = round_activations(x, RUNS[0])
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, round_activations(x.float(), RUNS[0]).to(torch.bfloat16), rtol=0, atol=0)
    assert not found[1].any()


def test_gradients_pass_straight_through(generator):
    x = torch.randn(4, 108, generator=generator, requires_grad=True)
    weight = torch.randn(4, 108, generator=generator)
    found = round_activations(x, RUNS[0])
    torch.testing.assert_close(found, round_activations(x.detach(), RUNS[0]))
    (found * weight).sum().backward()
    assert torch.equal(x.grad, weight)


@pytest.mark.parametrize("group", [32, 128, None])
@pytest.mark.parametrize("counted", [torch.arange(70) % 5 > 0, torch.arange(70) > 60, torch.arange(70) < 3])
def test_counted_channels_are_rounded_as_they_are_stored(generator, group, counted):
    """Theirs are the groups of a run of their own; another channel is rounded in the one that it would come to."""
    acts, x = ActInt(bits=4, group=group, clip=0.9), torch.randn(3, 70, generator=generator)
    x[:, ::5] *= 20
    found, count = round_among(x, acts, counted), int(counted.sum())
    assert torch.equal(found[:, counted], round_activations(x[:, counted], act_runs((count, acts))))
    stored = counted.nonzero()[:, 0].tolist()
    size = group or count
    for channel in (~counted).nonzero()[:, 0].tolist():
        place = min(sum(other < channel for other in stored), count - 1)
        members = stored[place // size * size : place // size * size + size]
        scale = x[:, members].abs().amax(-1) * 0.9 / 7
        want = (x[:, channel] / scale).round().clamp(-8, 7) * scale
        torch.testing.assert_close(found[:, channel], want)


def test_where_none_or_all_are_counted_groups_are_those_of_the_site(generator):
    acts, x = ActInt(bits=4, group=32, clip=0.9), torch.randn(3, 70, generator=generator)
    plain = round_activations(x, act_runs((70, acts)))
    assert torch.equal(round_among(x, acts, torch.ones(70, dtype=torch.bool)), plain)
    assert torch.equal(round_among(x, acts, torch.zeros(70, dtype=torch.bool)), plain)
