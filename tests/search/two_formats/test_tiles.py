"""Tiles within a budget."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from problems import LAYOUT
from toga_problems import ACTS, CONFIG, SMALL, high_of, made
from trimbit.errors import BudgetError
from trimbit.model.build import build_layout
from trimbit.model.resolved import resolve
from trimbit.search.methods import outliers as salient
from trimbit.search.methods import shares, toga
from trimbit.search.two_formats.tiles import TileProblem


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), share=st.floats(0.0, 1.0), rounded=st.booleans(), sort=st.booleans())
def test_the_budget_is_filled_by_whole_tiles_and_never_exceeded(tmp_path_factory, seed, share, rounded, sort):
    config = CONFIG.model_copy(update={"share": share, "sort": sort, **(ACTS if rounded else {})})
    task = made(tmp_path_factory.mktemp("m"), config)
    sites = TileProblem(task, config)
    generator = torch.Generator().manual_seed(seed)
    logits = {site: torch.randn(count, generator=generator) - 2 for site, count in sites.channels.items()}
    plan = sites.fill_by_logits(logits, "")
    resolve(plan, LAYOUT)
    high = high_of(plan, sites)
    for site, own in high.items():
        assert len(own) % 16 == 0
        assert set(logits[site].topk(len(own)).indices.tolist()) == own
    left = task.budget_nbytes - plan.found_by.nbytes
    means = {site: own.sort(descending=True).values.view(-1, 16).mean(-1) for site, own in logits.items()}
    tiles = {site: len(own) // 16 for site, own in high.items()}
    last_in = min((float(means[site][count - 1]) for site, count in tiles.items() if count), default=0.0)
    for site, count in tiles.items():  # left out are tiles below the threshold, and those that do not fit
        if count < len(means[site]):
            fits = sites.site_nbytes(site, count + 1) - sites.site_nbytes(site, count) <= left
            assert float(means[site][count]) <= last_in or not fits
    dearest = max(sites.site_nbytes(site, 2) - sites.site_nbytes(site, 1) for site in sites.channels)
    assert task.budget_nbytes - dearest < plan.found_by.nbytes <= task.budget_nbytes


def test_a_channel_that_costs_more_is_not_left_behind(tmp_path):
    """A logit has the price of its channel in it: the threshold does not count it again."""
    sites = TileProblem(made(tmp_path), CONFIG)
    wide, narrow = "blocks.0.mlp.m_in", "blocks.0.mlp.mid"
    assert sites.rows[wide] > sites.rows[narrow]
    none = dict.fromkeys(sites.channels, 0)
    sites = TileProblem(
        made(tmp_path, limit=sites.plan_nbytes(none | {wide: sites.channels[wide] // 16})), CONFIG
    )  # holds no more
    logits = {site: torch.zeros(count) for site, count in sites.channels.items()}
    logits[wide] += 1.0
    logits[narrow] += 0.9
    high = high_of(sites.fill_by_logits(logits, ""), sites)
    assert {site: len(own) for site, own in high.items() if own} == {wide: sites.channels[wide]}


def test_filling_is_the_best_there_is(tmp_path):
    """Against all ways to give three sites tiles, the others none."""
    config = CONFIG.model_copy(update={"share": 0.05})
    task = made(tmp_path, config)
    sites = TileProblem(replace(task, budget_nbytes=10**8), config)
    names = list(sites.channels)[:3]
    generator = torch.Generator().manual_seed(0)
    gains = {site: torch.full((count // 16,), -50.0) for site, count in sites.channels.items()}
    gains |= {site: torch.rand(sites.channels[site] // 16, generator=generator) for site in names}
    losses = {site: dict(enumerate([0.0, *(-own.cumsum(0)).tolist()])) for site, own in gains.items()}
    ranked = {site: range(count) for site, count in sites.channels.items()}
    base = sum(sites.site_nbytes(site, 0) for site in sites.channels)
    sites.__dict__["room_nbytes"] = base + 3000

    def sums(tiles):
        return -sum(losses[site][n] for site, n in tiles.items())

    best = 0.0
    for counts in product(*(range(sites.channels[site] // 16 + 1) for site in names)):
        tiles = dict(zip(names, counts, strict=True))
        if sum(sites.site_nbytes(s, n) - sites.site_nbytes(s, 0) for s, n in tiles.items()) <= 3000:
            best = max(best, sums(tiles))
    found = high_of(sites.fill_by_knapsack(losses, ranked, ""), sites)
    assert sums({site: len(found[site]) // 16 for site in names}) == pytest.approx(best, rel=1e-6)


def test_where_there_is_no_choice_the_plan_says_so(tmp_path):
    config = CONFIG.model_copy(update={"share": 0.0})
    sites = TileProblem(made(tmp_path, config), config)
    sites.__dict__["room_nbytes"] = 100  # as if the header left no room
    logits = {site: torch.zeros(count) for site, count in sites.channels.items()}
    losses = {site: {n: -float(n) for n in range(count // 16 + 1)} for site, count in sites.channels.items()}
    ranked = {site: range(count) for site, count in sites.channels.items()}
    for plan in (sites.fill_by_knapsack(losses, ranked, ""), sites.fill_by_logits(logits, "")):
        assert "leaves no choice" in plan.found_by.notes[0]


@pytest.mark.parametrize("share", [0.02, 0.05, 0.125, 0.2, 0.6])
def test_the_same_share_everywhere_favours_no_end_of_the_model(tmp_path, share):
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    layout = build_layout(AutoConfig.for_model("llama", num_hidden_layers=30, vocab_size=100, **shape))
    sites = TileProblem(replace(made(tmp_path), layout=layout), CONFIG.model_copy(update={"tile": 32}))
    tiles = sites.uniform_tiles(share)
    assert share * sites.all_codes - 32 * max(sites.rows.values()) < sites.codes(tiles) <= share * sites.all_codes
    for kind in ("attn.a_in", "attn.o_in", "mlp.m_in", "mlp.mid"):
        counts = [tiles[f"blocks.{block}.{kind}"] for block in range(30)]
        assert max(counts) - min(counts) <= 1
        assert abs(sum(counts[:15]) - sum(counts[15:])) <= 2
        assert all(abs(sum(counts[at : at + 6]) - sum(counts) / 5) <= 2 for at in range(0, 30, 6))
    if share >= 0.05:
        assert min(tiles.values()) >= 1
    assert sites.uniform_tiles(1.0) == {site: count // 32 for site, count in sites.channels.items()}
    assert not any(sites.uniform_tiles(0.0).values())


def test_a_site_without_high_channels_may_get_some(tmp_path):
    """Of a share that is too small for a tile everywhere."""
    config = shares.Config(**(SMALL | {"share": 0.03}))
    task = made(tmp_path, config)
    sites = TileProblem(task, config)
    base = sites.uniform_within_budget
    none = [site for site, count in base.items() if not count]
    assert none
    found = shares.measure(task, config, sites)
    assert all(set(found[site]) >= {0, 1, min(2, sites.channels[site] // 16)} for site in none)


def test_all_of_one_format_is_a_plain_plan(tmp_path):
    for share, name in ((0.0, "binaryg32"), (1.0, "int4g32")):
        config = CONFIG.model_copy(update={"share": share, "sort": False})
        plan = salient.search(made(tmp_path, config), salient.Config(**(SMALL | {"share": share, "sort": False}))).plan
        assert not plan.orders
        assert {run.precision.name for n, runs in plan.weights.items() if "layers" in n for run in runs} == {name}
        told = "channels largest diag H in int4g32" if share else "binaryg32 in all channels"
        assert told in plan.found_by.method


def test_no_high_channels_whatever_the_budget(tmp_path):
    config = salient.Config(**(SMALL | {"share": 0.0}))
    plan = salient.search(made(tmp_path, config, limit=10**9), config).plan
    assert {run.precision.name for name, runs in plan.weights.items() if "layers" in name for run in runs} == {
        "binaryg32"
    }


def test_the_smallest_feasible_budget_is_feasible(tmp_path):
    with pytest.raises(BudgetError) as found:
        toga.search(made(tmp_path, limit=1000), CONFIG)
    least = int(str(found.value).split("--budget ")[1].rstrip("B)"))
    plan = toga.search(made(tmp_path, limit=least), CONFIG).plan
    assert plan.found_by.nbytes <= least
