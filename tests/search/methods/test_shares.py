"""Shares by site."""

import torch

from problems import LAYOUT
from toga_problems import SMALL, Invented, high_of, made, second_moments
from trimbit.model.resolved import resolve
from trimbit.search.methods import outliers as salient
from trimbit.search.methods import shares
from trimbit.search.two_formats.tiles import TileProblem, as_masks

SHARES = shares.Config(**SMALL, factors=(0.0, 0.5, 2.0, 4.0), rows=1)


def by_site(seed=2):
    """Sites differ; in each, channels of larger diag H are worth more."""
    generator = torch.Generator().manual_seed(seed)
    return {
        site: torch.tensor(own) * float(torch.rand(1, generator=generator) ** 3)
        for site, own in second_moments().items()
    }


def test_shares_follow_what_is_measured(tmp_path):
    masked = Invented(by_site())
    task = made(tmp_path, SHARES, masked=masked)
    plan = shares.search(task, SHARES).plan
    resolve(plan, LAYOUT)
    sites = TileProblem(task, SHARES)
    high = high_of(plan, sites)
    assert all(own == set(sites.top_channels(site, len(own) // 16)) for site, own in high.items())
    alike = salient.search(task, salient.Config(**SMALL)).plan
    kls = [masked.damage(as_masks(sites.high(one), sites)).kl for one in (plan, alike)]
    assert kls[0] < 0.9 * kls[1]
    assert plan.found_by.nbytes <= task.budget_nbytes
    assert len(masked.steps) < 12 * 5 + 3
