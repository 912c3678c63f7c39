"""Outliers."""

import pytest

from problems import LAYOUT
from toga_problems import ACTS, SMALL, high_of, made
from trimbit.model.resolved import resolve
from trimbit.search.methods import outliers as salient
from trimbit.search.two_formats.tiles import TileProblem


@pytest.mark.parametrize("by", ["second_moment", "random"])
def test_salient_channels(tmp_path, by):
    config = salient.Config(**SMALL, **ACTS, by=by)
    task = made(tmp_path, config)
    plan = salient.search(task, config).plan
    resolve(plan, LAYOUT)
    sites = TileProblem(task, config)
    high = high_of(plan, sites)
    top_channels = {site: set(sites.top_channels(site, len(own) // 16)) for site, own in high.items()}
    assert (high == top_channels) is (by == "second_moment")
    for site, own in plan.acts.items():
        assert [run.precision for run in own] == [config.low_acts, config.high_acts][: 2 if high[site] else 1]
    assert plan.found_by.nbytes == task.budget_nbytes
    assert plan.content == salient.search(task, config).plan.content
