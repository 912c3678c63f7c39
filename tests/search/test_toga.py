"""Learnt masks on an invented loss: they find what matters, fill the budget, go on where they stopped."""

import importlib
from dataclasses import dataclass, field, replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from problems import LAYOUT, Figures, measurements, problem
from trimbit.errors import ArtifactError, BudgetError, NumericsError, RecipeError
from trimbit.model.build import build_layout
from trimbit.model.forward.logits import Divergence
from trimbit.schema.activations import ActInt
from trimbit.schema.precision import parse_precision
from trimbit.schema.space import Space
from trimbit.search.methods import outliers as salient
from trimbit.search.methods import shares, toga
from trimbit.search.two_formats import training
from trimbit.search.two_formats.tiles import TileProblem, as_masks

SPACE = Space(formats=(), embedding_formats=())
SMALL = {"low": parse_precision("binaryg32"), "high": parse_precision("int4g32"), "tile": 16, "share": 0.25}
CONFIG = toga.Config(
    **SMALL, steps=60, batch=1, length=16, learning_rate=0.05, weight_decay=0.0, network="logits", save_every=7
)
ACTS = {"low_acts": ActInt(bits=3, group=32, clip=0.9), "high_acts": ActInt(bits=8, group=32)}


def second_moments():
    generator = torch.Generator().manual_seed(5)
    sites = dict.fromkeys(w.site for w in LAYOUT.weights.values() if LAYOUT.readers(w.site))
    return {site: torch.rand(LAYOUT.readers(site)[0].cols, generator=generator).tolist() for site in sites}


@dataclass
class Invented:
    """Loss: the sum of what each low channel is worth, all the same but for some that matter."""

    worth: dict[str, torch.Tensor]
    fails_at: int | None = None
    steps: list[int] = field(default_factory=list)
    device = torch.device("cpu")

    def gradients(self, masks, step, generator):
        self.steps.append(step)
        torch.rand(3, generator=generator)  # as if for noise
        loss = sum(float((self.worth[site] * (1 - mask)).sum()) for site, mask in masks.items())
        return loss, {site: -self.worth[site] for site in masks}

    def damage(self, masks, rows=None):
        return Divergence(kl=self.gradients(masks, -1, torch.Generator())[0], nll=1.0)


def worths(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {
        site: torch.where(torch.rand(len(own), generator=generator) < 0.2, 0.5, 0.001) * len(LAYOUT.readers(site))
        for site, own in second_moments().items()
    }


def made(tmp_path, config=CONFIG, limit=None, **fields):
    masked = fields.pop("masked", None) or Invented(worths())
    found = problem(
        limit or 10**9, space=SPACE, measurements=measurements(), channels=Figures(second_moments=second_moments),
        masked=lambda _: masked, journal=tmp_path / "masks.jsonl", key="k", **fields,
    )  # fmt: skip
    module = toga if type(config) is toga.Config else importlib.import_module(type(config).__module__)
    return found if limit else replace(found, limit=module.default_limit(found, config))


def high_of(plan, sites):
    """The high channels that a plan stores, by site."""
    return {site: set(own) for site, own in sites.high(plan).items()}


def kept(plan, task, config):
    """What the high channels of a plan are worth."""
    worth, high = worths(), high_of(plan, TileProblem(task, config))
    return sum(float(worth[site][sorted(own)].sum()) for site, own in high.items())


@pytest.mark.parametrize("network", ["logits", "hypernetwork"])
@pytest.mark.parametrize(("estimator", "temperature"), [("reinmax", 1.0), ("gumbel", 0.4)])
@pytest.mark.parametrize("budget", ["penalty", "projection"])
def test_what_matters_is_found(tmp_path, network, estimator, temperature, budget):
    rate = {"learning_rate": 0.05 if network == "logits" else 2e-3, "steps": 150}
    kind = {"network": network, "estimator": estimator, "temperature": temperature, "budget": budget}
    config = CONFIG.model_copy(update=kind | rate)
    task = made(tmp_path, config)
    plan = toga.search(task, config)
    LAYOUT.check(plan)
    by_energy = salient.search(task, salient.Config(**SMALL))
    assert kept(plan, task, config) > 1.5 * kept(by_energy, task, config)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), share=st.floats(0.0, 1.0), rounded=st.booleans(), sort=st.booleans())
def test_the_budget_is_filled_by_whole_tiles_and_never_exceeded(tmp_path_factory, seed, share, rounded, sort):
    config = CONFIG.model_copy(update={"share": share, "sort": sort, **(ACTS if rounded else {})})
    task = made(tmp_path_factory.mktemp("m"), config)
    sites = TileProblem(task, config)
    generator = torch.Generator().manual_seed(seed)
    logits = {site: torch.randn(count, generator=generator) - 2 for site, count in sites.channels.items()}
    plan = sites.fill_by_logits(logits, "")
    LAYOUT.check(plan)
    high = high_of(plan, sites)
    for site, own in high.items():
        assert len(own) % 16 == 0
        assert set(logits[site].topk(len(own)).indices.tolist()) == own
    left = task.limit - plan.found_by.nbytes
    means = {site: own.sort(descending=True).values.view(-1, 16).mean(-1) for site, own in logits.items()}
    tiles = {site: len(own) // 16 for site, own in high.items()}
    last_in = min((float(means[site][count - 1]) for site, count in tiles.items() if count), default=0.0)
    for site, count in tiles.items():  # left out are tiles below the threshold, and those that do not fit
        if count < len(means[site]):
            fits = sites.site_nbytes(site, count + 1) - sites.site_nbytes(site, count) <= left
            assert float(means[site][count]) <= last_in or not fits
    dearest = max(sites.site_nbytes(site, 2) - sites.site_nbytes(site, 1) for site in sites.channels)
    assert task.limit - dearest < plan.found_by.nbytes <= task.limit


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
    sites = TileProblem(replace(task, limit=10**8), config)
    names = list(sites.channels)[:3]
    generator = torch.Generator().manual_seed(0)
    gains = {site: torch.full((count // 16,), -50.0) for site, count in sites.channels.items()}
    gains |= {site: torch.rand(sites.channels[site] // 16, generator=generator) for site in names}
    losses = {site: dict(enumerate([0.0, *(-own.cumsum(0)).tolist()])) for site, own in gains.items()}
    ranked = {site: range(count) for site, count in sites.channels.items()}
    base = sum(sites.site_nbytes(site, 0) for site in sites.channels)
    sites.__dict__["limit"] = base + 3000

    def sums(tiles):
        return -sum(losses[site][n] for site, n in tiles.items())

    best = 0.0
    for counts in product(*(range(sites.channels[site] // 16 + 1) for site in names)):
        tiles = dict(zip(names, counts, strict=True))
        if sum(sites.site_nbytes(s, n) - sites.site_nbytes(s, 0) for s, n in tiles.items()) <= 3000:
            best = max(best, sums(tiles))
    found = high_of(sites.fill_by_knapsack(losses, ranked, ""), sites)
    assert sums({site: len(found[site]) // 16 for site in names}) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("least", [True, False])
def test_a_solver_that_finds_nothing_is_an_error_but_where_there_is_no_choice(tmp_path, monkeypatch, least):
    config = CONFIG.model_copy(update={"share": 0.0 if least else 0.25})
    task = made(tmp_path, config)
    sites = TileProblem(task, config)
    monkeypatch.setattr("trimbit.search.solvers.knapsack.knapsack", lambda *_: None)
    if least:
        sites.__dict__["limit"] = 100  # as if the header left no room
    logits = {site: torch.zeros(count) for site, count in sites.channels.items()}
    losses = {site: {n: -float(n) for n in range(count // 16 + 1)} for site, count in sites.channels.items()}
    ranked = {site: range(count) for site, count in sites.channels.items()}
    if least:
        for plan in (sites.fill_by_knapsack(losses, ranked, ""), sites.fill_by_logits(logits, "")):
            assert "leaves no choice" in plan.found_by.notes[0]
    else:
        with pytest.raises(NumericsError, match="was not solved"):
            sites.fill_by_knapsack(losses, ranked, "")


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
        plan = salient.search(made(tmp_path, config), salient.Config(**(SMALL | {"share": share, "sort": False})))
        assert not plan.orders
        assert {run.precision.name for n, runs in plan.weights.items() if "layers" in n for run in runs} == {name}
        told = "channels largest diag H in int4g32" if share else "binaryg32 in all channels"
        assert told in plan.found_by.method


def test_no_high_channels_whatever_the_budget(tmp_path):
    config = salient.Config(**(SMALL | {"share": 0.0}))
    plan = salient.search(made(tmp_path, config, limit=10**9), config)
    assert {run.precision.name for name, runs in plan.weights.items() if "layers" in name for run in runs} == {
        "binaryg32"
    }


@pytest.mark.parametrize(
    ("stop", "optimizer"), [(1, "adamw"), (7, "adamw"), (8, "adamw"), (30, "adamw"), (59, "adamw"), (30, "sgd")]
)
def test_a_run_that_was_broken_off_goes_on(tmp_path, stop, optimizer):
    budget = {"adamw": "penalty", "sgd": "projection"}[optimizer]  # sgd goes with no penalty
    config = CONFIG.model_copy(update={"optimizer": optimizer, "budget": budget})
    whole = toga.search(made(tmp_path / "whole"), config)

    class Broken(Invented):
        def gradients(self, masks, step, generator):
            if step == stop and not self.steps.count(stop):
                self.steps.append(step)
                raise KeyboardInterrupt
            return super().gradients(masks, step, generator)

    masked = Broken(worths())
    task = made(tmp_path / "parts", masked=masked)
    with pytest.raises(KeyboardInterrupt):
        toga.search(task, config)
    again = toga.search(task, config)
    assert masked.steps[stop + 1] == stop // 7 * 7  # from the last stored state
    assert again.content == whole.content
    assert toga.curve(task, config) == toga.curve(made(tmp_path / "whole"), config)
    assert len(toga.curve(task, config)) == 60


@pytest.mark.parametrize("network", ["logits", "hypernetwork"])
def test_steps_along_the_gradient_find_what_matters(tmp_path, network):
    rate = {"learning_rate": 20.0 if network == "logits" else 1.0, "steps": 150}
    config = CONFIG.model_copy(update={"optimizer": "sgd", "budget": "projection", "network": network} | rate)
    task = made(tmp_path, config)
    by_energy = salient.search(task, salient.Config(**SMALL))
    assert kept(toga.search(task, config), task, config) > 1.5 * kept(by_energy, task, config)


def test_a_step_along_the_gradient_is_as_long_as_the_rate_whatever_the_loss(tmp_path):
    config = CONFIG.model_copy(update={"optimizer": "sgd", "budget": "projection", "learning_rate": 3.0, "steps": 1})
    moved = {}
    for scale in (1.0, 1e-4, 0.0):
        worth = {site: scale * own for site, own in worths().items()}
        task = made(tmp_path / str(scale), config, masked=Invented(worth))
        sites = TileProblem(task, config)
        start = training._start(config, sites, sites.codes(sites.uniform_within_budget))
        learnt = toga.learn(task, config, sites)
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


def test_a_finished_run_is_taken_up(tmp_path):
    first = toga.search(made(tmp_path), CONFIG)
    masked = Invented(worths())
    assert toga.search(made(tmp_path, masked=masked), CONFIG).content == first.content
    assert masked.steps == [-1]  # judged alone


def test_the_state_of_another_search_is_refused(tmp_path):
    task = made(tmp_path)
    toga.search(task, CONFIG)
    with pytest.raises(ArtifactError, match="stored state of another search"):
        toga.search(replace(task, key="other"), CONFIG)
    with pytest.raises(ArtifactError, match="stored state of another search"):
        toga.search(task, CONFIG.model_copy(update={"network": "hypernetwork"}))


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("estimator", ["reinmax", "gumbel"])
def test_what_is_not_finite_stops_and_the_last_state_stays(tmp_path, what, estimator):
    class Failing(Invented):
        """At one step the loss, or the gradients of a site, are not finite; the loss of the others is."""

        def gradients(self, masks, step, generator):
            loss, found = super().gradients(masks, step, generator)
            if step != self.fails_at:
                return loss, found
            if what == "loss":
                return float("nan"), found
            return loss, found | {"blocks.1.mlp.mid": torch.full((80,), float("nan"))}

    config = CONFIG.model_copy(update={"estimator": estimator})
    masked = Failing(worths(), fails_at=17)
    with pytest.raises(NumericsError, match=f"a {what} of step 18 of the masks is not finite; the state after step 14"):
        toga.search(made(tmp_path, config, masked=masked), config)
    assert len(toga.curve(made(tmp_path, config), config)) == 14
    masked.fails_at = None
    again = toga.search(made(tmp_path, config, masked=masked), config)
    assert again.content == toga.search(made(tmp_path / "whole", config), config).content


def test_parameters_that_overflow_are_seen(tmp_path):
    config = CONFIG.model_copy(update={"network": "hypernetwork", "weight_decay": 1e45})
    with pytest.raises(NumericsError, match=r"a parameter of step 1 of the masks is not finite; no state was kept yet"):
        toga.search(made(tmp_path, config), config)


def test_logits_that_overflow_are_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(training.Training, "logits", lambda self: {s: o * torch.nan for s, o in self.network().items()})
    with pytest.raises(NumericsError, match=r"a sample of step 1 of the masks is not finite; no state was kept yet"):
        toga.search(made(tmp_path, CONFIG), CONFIG)


@pytest.mark.parametrize(("estimator", "temperature"), [("reinmax", 0.5), ("gumbel", 2.0)])
def test_a_temperature_on_the_wrong_side_is_refused(estimator, temperature):
    with pytest.raises(ValueError, match=f"but {estimator} wants at"):
        toga.Config(estimator=estimator, temperature=temperature)
    assert (toga.Config().resolved_temperature, toga.Config(estimator="gumbel").resolved_temperature) == (1.0, 0.4)


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


@dataclass
class Recorded(Invented):
    """An invented loss that keeps the masks of each step."""

    masks: list[dict[str, torch.Tensor]] = field(default_factory=list)

    def gradients(self, masks, step, generator):
        if step >= 0:
            self.masks.append(masks)
        return super().gradients(masks, step, generator)


@pytest.mark.parametrize("network", ["logits", "hypernetwork"])
def test_whole_tiles_learn_where_one_channel_is_worth_a_tile(tmp_path, network):
    """Half of the sites have one channel that matters, more than a tile of the others together."""
    shape = TileProblem(made(tmp_path), CONFIG)
    few = list(shape.channels)[::2]
    each = {
        site: torch.eye(count)[count // 2] * 24 if site in few else torch.full((count,), 0.4)
        for site, count in shape.channels.items()
    }
    worth = {site: own * shape.rows[site] / 100 for site, own in each.items()}
    rate = {"learning_rate": 0.05 if network == "logits" else 2e-3, "steps": 150}
    taken = {}
    for whole in (False, True):
        masked = Recorded(worth)
        config = CONFIG.model_copy(update={"budget": "projection", "network": network, "whole_tiles": whole, **rate})
        task = made(tmp_path / str(whole), config, masked=masked)
        high = high_of(toga.search(task, config), shape)
        taken[whole] = sum(shape.channels[site] // 2 in high[site] for site in few)
        sizes = [int(mask.sum()) for masks in masked.masks for mask in masks.values()]
        assert whole == all(size % config.tile == 0 for size in sizes)
        bits = [step["bits"] for step in toga.curve(task, config)]
        assert abs(sum(bits) / len(bits) - shape.bits(shape.codes(shape.uniform_within_budget))) < 0.1
    assert taken == {False: 0, True: len(few)}


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
    toga.search(task, config)
    bits = [step["bits"] for step in toga.curve(task, config)]
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


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"budget": "projection", "offset": 3.0}, "offset goes with budget=penalty alone"),
        ({"budget": "projection", "budget_weight": 6.0}, "budget_weight goes with budget=penalty alone"),
        ({"optimizer": "sgd", "budget": "projection", "weight_decay": 0.1}, "goes with optimizer=adamw alone"),
        ({"optimizer": "sgd"}, "goes with budget=projection alone"),
        ({"error_model": "expected", "dense": True}, "error_model=expected rounds no weight"),
        ({"residual_rank": 4}, "residual_rank is of errors as expected"),
    ],
)
def test_what_would_be_ignored_is_refused(fields, says):
    with pytest.raises(ValueError, match=says):
        toga.Config(**fields)
    assert (toga.Config().penalty_weight, toga.Config().resolved_weight_decay, toga.Config().rank) == (6.0, 0.05, 16)
    assert (toga.Config(budget_weight=0.0).penalty_weight, toga.Config(weight_decay=0.0).resolved_weight_decay) == (
        0.0,
        0.0,
    )


@pytest.mark.parametrize("module", [toga, salient, shares])
def test_bad_input(tmp_path, module):
    config = module.Config(**SMALL)
    for limit, side in ((1000, "below"), (10**9, "above")):
        task = made(tmp_path, config, limit=limit)
        with pytest.raises(BudgetError, match=rf"{side} what binaryg32 and int4g32 reach: [\d,]+ to [\d,]+ bytes"):
            module.search(task, config)
    pruned = replace(made(tmp_path, config, limit=50_000), space=Space(formats=(), embedding_formats=(), kept={"x": 1}))
    with pytest.raises(RecipeError, match="leave `prune` out"):
        module.require_feasible(pruned, config)
    for change, message in (
        ({"tile": 32}, "a tile of 32 channels does not divide the 48 channels of blocks.0.attn.a_in"),
        ({"low": SMALL["high"], "high": SMALL["low"]}, "must have more bits than the low one"),
    ):
        with pytest.raises(RecipeError, match=message):
            module.require_feasible(made(tmp_path, config, limit=50_000), config.model_copy(update=change))


def test_the_smallest_feasible_budget_is_feasible(tmp_path):
    with pytest.raises(BudgetError) as found:
        toga.search(made(tmp_path, limit=1000), CONFIG)
    least = int(str(found.value).split("--budget ")[1].rstrip("B)"))
    plan = toga.search(made(tmp_path, limit=least), CONFIG)
    assert plan.found_by.nbytes <= least


@pytest.mark.parametrize("by", ["second_moment", "random"])
def test_salient_channels(tmp_path, by):
    config = salient.Config(**SMALL, **ACTS, by=by)
    task = made(tmp_path, config)
    plan = salient.search(task, config)
    LAYOUT.check(plan)
    sites = TileProblem(task, config)
    high = high_of(plan, sites)
    top_channels = {site: set(sites.top_channels(site, len(own) // 16)) for site, own in high.items()}
    assert (high == top_channels) is (by == "second_moment")
    for site, own in plan.acts.items():
        assert [run.precision for run in own] == [config.low_acts, config.high_acts][: 2 if high[site] else 1]
    assert plan.found_by.nbytes == task.limit
    assert plan.content == salient.search(task, config).content


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
    plan = shares.search(task, SHARES)
    LAYOUT.check(plan)
    sites = TileProblem(task, SHARES)
    high = high_of(plan, sites)
    assert all(own == set(sites.top_channels(site, len(own) // 16)) for site, own in high.items())
    alike = salient.search(task, salient.Config(**SMALL))
    kls = [masked.damage(as_masks(sites.high(one), sites)).kl for one in (plan, alike)]
    assert kls[0] < 0.9 * kls[1]
    assert plan.found_by.nbytes <= task.limit
    assert len(masked.steps) < 12 * 5 + 3


@pytest.mark.parametrize("stop", [0, 1, 20])
def test_a_measurement_that_was_broken_off_goes_on(tmp_path, stop):
    class Broken(Invented):
        def damage(self, masks, rows=None):
            if len(self.steps) == stop:
                self.steps.append(0)
                raise KeyboardInterrupt
            return super().damage(masks, rows)

    masked = Broken(by_site())
    task = made(tmp_path, SHARES, masked=masked)
    with pytest.raises(KeyboardInterrupt):
        shares.search(task, SHARES)
    again = shares.search(task, SHARES)
    whole = Invented(by_site())
    assert again.content == shares.search(made(tmp_path / "whole", SHARES, masked=whole), SHARES).content
    assert len(masked.steps) == len(whole.steps) + 1
