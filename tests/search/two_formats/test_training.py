"""How masks are trained."""

import pytest
import torch

from toga_problems import CONFIG, SMALL, Invented, kept, made, second_moments, worths
from trimbit.errors import NumericsError
from trimbit.search.methods import outliers as salient
from trimbit.search.methods import toga
from trimbit.search.two_formats import training
from trimbit.search.two_formats.tiles import TileProblem


@pytest.mark.parametrize("network", ["logits", "hypernetwork"])
def test_steps_along_the_gradient_find_what_matters(tmp_path, network):
    rate = {"learning_rate": 20.0 if network == "logits" else 1.0, "steps": 150}
    config = CONFIG.model_copy(update={"optimizer": "sgd", "budget": "projection", "network": network} | rate)
    task = made(tmp_path, config)
    by_energy = salient.search(task, salient.Config(**SMALL)).plan
    assert kept(toga.search(task, config).plan, task, config) > 1.5 * kept(by_energy, task, config)


def test_a_step_along_the_gradient_is_as_long_as_the_rate_whatever_the_loss(tmp_path):
    config = CONFIG.model_copy(update={"optimizer": "sgd", "budget": "projection", "learning_rate": 3.0, "steps": 1})
    moved = {}
    for scale in (1.0, 1e-4, 0.0):
        worth = {site: scale * own for site, own in worths().items()}
        task = made(tmp_path / str(scale), config, masked=Invented(worth))
        sites = TileProblem(task, config)
        start = training._start(config, sites, sites.codes(sites.uniform_within_budget))
        learnt, _ = toga.learn(task, config, sites)
        moved[scale] = torch.cat([own - start[site] for site, own in learnt.items()])
    assert moved[1.0].norm() == pytest.approx(3.0, rel=1e-4)
    torch.testing.assert_close(moved[1e-4], moved[1.0], rtol=1e-3, atol=1e-5)
    assert not moved[0.0].any()


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_the_rate_stays_or_falls_to_zero(tmp_path, monkeypatch, schedule):
    rates, step = [], torch.optim.AdamW.step

    def noted(self, *args):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    config = CONFIG.model_copy(update={"schedule": schedule, "steps": 4})
    toga.search(made(tmp_path, config), config)
    assert rates == pytest.approx([0.05] * 4 if schedule == "constant" else [0.05, 0.0375, 0.025, 0.0125])


def test_parameters_that_overflow_are_seen(tmp_path):
    config = CONFIG.model_copy(update={"network": "hypernetwork", "weight_decay": 1e45})
    with pytest.raises(NumericsError, match=r"a parameter of step 1 of the masks is not finite; no state was kept yet"):
        toga.search(made(tmp_path, config), config)


def test_logits_that_overflow_are_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(training.Training, "logits", lambda self: {s: o * torch.nan for s, o in self.network().items()})
    with pytest.raises(NumericsError, match=r"a sample of step 1 of the masks is not finite; no state was kept yet"):
        toga.search(made(tmp_path, CONFIG), CONFIG)


@pytest.mark.parametrize(("offset", "prior"), [(None, 0.0), (None, 2.0), (3.0, 1.0)])
def test_training_starts_at_the_budget_or_where_it_is_told(tmp_path, offset, prior):
    config = CONFIG.model_copy(update={"offset": offset, "prior": prior})
    task = made(tmp_path, config)
    sites = TileProblem(task, config)
    target = sites.codes(sites.uniform_within_budget)
    start = training._start(config, sites, target)
    codes = sum(sites.rows[site] * float(torch.sigmoid(own).sum()) for site, own in start.items())
    if offset is None:
        assert codes == pytest.approx(target, rel=1e-4)
    for site, own in start.items():
        if offset is not None:
            assert float(own.mean()) == pytest.approx(offset, abs=1e-4)
        assert float(own.std()) == pytest.approx(prior, abs=1e-4)
        assert not prior or own.argsort().tolist() == torch.tensor(second_moments()[site]).argsort().tolist()


def test_the_tiles_of_a_site_share_their_mean_and_channels_keep_their_gradients(generator):
    logits = torch.randn(96, generator=generator).requires_grad_()
    first = training._tiles(logits, 32)
    shared = training._shared(logits, first)
    for tile in logits.detach().argsort(descending=True).view(3, 32):
        assert {int(own) for own in first[tile]} == {int(tile[0])}
        torch.testing.assert_close(shared[tile].detach(), logits[tile].mean().detach().expand(32))
    weights = torch.randn(96, generator=generator)
    found = torch.autograd.grad((weights * shared).sum(), logits)[0]
    of_tile = torch.stack([weights[first == tile].mean() for tile in first])
    torch.testing.assert_close(found, weights + of_tile)
    assert training._tiles(logits, 1).tolist() == list(range(96))


def test_the_penalty_holds_the_share_that_is_high(tmp_path):
    """Where every channel is worth more than the penalty by all bits would take, and less than that by the share."""
    config = CONFIG.model_copy(update={"steps": 100})
    sites = TileProblem(made(tmp_path, config), config)
    target = sites.codes(sites.uniform_within_budget)
    by_share, by_bits = 6 / target, 6 / target * (1 - sites.mixed.low.bits / sites.bits(target))
    worth = {
        site: torch.full((count,), sites.rows[site] * (by_share + by_bits) / 2)
        for site, count in sites.channels.items()
    }
    task = made(tmp_path, config, masked=Invented(worth))
    bits = [step["bits"] for step in toga.search(task, config).curve]
    assert abs(sum(bits[-50:]) / 50 - sites.bits(target)) < 0.1


def test_projection_holds_the_budget_and_gradients_know_of_it(tmp_path):
    sites = TileProblem(made(tmp_path), CONFIG)
    target, generator = sites.codes(sites.uniform_within_budget), torch.Generator().manual_seed(4)
    logits = {s: (3 * torch.randn(n, generator=generator)).requires_grad_() for s, n in sites.channels.items()}
    worth = {site: torch.rand(count, generator=generator) for site, count in sites.channels.items()}

    def of(values):
        """Codes that are high in the mean, and what they are worth."""
        ps = {site: torch.sigmoid(own.double()) for site, own in training._projected(values, sites, target).items()}
        return (sum((each[site] * p).sum() for site, p in ps.items()) for each in (sites.rows, worth))

    codes, value = of(logits)
    assert float(codes.detach()) == pytest.approx(target, rel=1e-5)
    of_codes = torch.autograd.grad(codes, list(logits.values()), retain_graph=True)
    assert max(float(own.abs().max()) for own in of_codes) < 1e-3  # no move changes them
    found = dict(zip(logits, torch.autograd.grad(value, list(logits.values())), strict=True))
    with torch.no_grad():
        for site in ("blocks.0.mlp.m_in", "blocks.1.mlp.mid"):
            at = int(found[site].abs().argmax())
            up, down = (
                {**logits, site: logits[site].index_add(0, torch.tensor([at]), torch.tensor([by]))}
                for by in (0.05, -0.05)
            )
            slope = [float(list(of(one))[1]) for one in (up, down)]
            assert (slope[0] - slope[1]) / 0.1 == pytest.approx(float(found[site][at]), rel=0.02)
