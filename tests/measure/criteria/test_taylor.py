"""Taylor scores against finite differences of a loss, and the members' sums against a naive loop."""

import pytest
import torch

from trimbit.calibrate.gradients import Coupled, Gradient
from trimbit.measure.criteria.taylor import Config, score

KINDS = ("vector", "element_first", "element_second", "element_mixed")


@pytest.fixture
def layers():
    """y = B tanh(A x), so that a member of the middle is a row of A and a column of B; and its per-sample losses."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((6, 5), (4, 6)))
    x, y = (torch.randn(n, 30, generator=generator, dtype=torch.float64) for n in (5, 4))

    def losses(a, b):
        return (b @ torch.tanh(a @ x) - y).square().sum(0)

    return a, b, losses


def parts(a, b, losses, member=None):
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    each = [torch.autograd.grad(loss, [a, b], retain_graph=True) for loss in losses(a, b)]
    member = torch.arange(6) if member is None else member
    found = []
    for at, (w, axis) in enumerate(((a, 0), (b, 1))):
        grads = torch.stack([sample[at] for sample in each]).float()
        gradient = Gradient(w=w.detach().float(), g=grads.mean(0), fisher=grads.square().mean(0))
        found.append(Coupled(gradient=gradient, axis=axis, member=member))
    return found


def test_vector_is_the_derivative_of_shrinking_a_channel(layers):
    """|sum W g| of one weight's channel is |dL/de| of scaling that channel by 1 - e."""
    a, b, losses = layers
    for at, part in enumerate(parts(a, b, losses)):
        found = score([part], 6, Config(kind="vector"))
        for j in range(6):
            change = []
            for e in (1e-5, -1e-5):
                w = [a.clone(), b.clone()]
                w[at].select(part.axis, j).mul_(1 - e)
                change.append(losses(*w).mean())
            assert float(found[j]) == pytest.approx(abs(float(change[0] - change[1])) / 2e-5, rel=1e-3)


def test_the_three_expansions_of_one_weight():
    """L = mean of (z w)^2 / 2 at w = 1: the gradient of a sample is z^2, its square z^4."""
    z = torch.tensor([0.5, 1.0, 2.0]).double()
    w = torch.ones(1, 1)
    gradient = Gradient(w=w, g=z.square().mean().view(1, 1).float(), fisher=z.pow(4).mean().view(1, 1).float())
    part = Coupled(gradient=gradient, axis=0, member=torch.tensor([0]))
    first, second, mixed = (float(score([part], 1, Config(kind=kind))) for kind in KINDS[1:])
    assert first == pytest.approx(float(z.square().mean()))
    assert second == pytest.approx(float(z.pow(4).mean()))
    assert mixed == pytest.approx(abs(first - second / 2))


@pytest.mark.parametrize("kind", KINDS)
def test_members_sum_their_channels(layers, kind):
    a, b, losses = layers
    member = torch.tensor([1, 0, -1, 1, 2, 0])
    found = parts(a, b, losses, member)
    want = [0.0, 0.0, 0.0]
    for part in found:
        g = part.gradient
        s = {
            "vector": g.w * g.g,
            "element_first": g.w * g.g,
            "element_second": g.w * g.fisher * g.w,
            "element_mixed": g.w * g.g - 0.5 * g.w * g.fisher * g.w,
        }[kind]
        for j, to in enumerate(member.tolist()):
            if to >= 0:
                channel = s.select(part.axis, j).double()
                want[to] += float(channel.sum().abs() if kind == "vector" else channel.abs().sum())
    torch.testing.assert_close(score(found, 3, Config(kind=kind)), torch.tensor(want), rtol=1e-5, atol=1e-6)
