"""TOGA: what it finds, how it goes on, what it refuses."""

from dataclasses import dataclass, field, replace

import pytest
import torch

from problems import LAYOUT
from toga_problems import CONFIG, SMALL, Invented, high_of, kept, made, worths
from trimbit.errors import BudgetError, NumericsError, RecipeError
from trimbit.model.resolved import resolve
from trimbit.schema.space import Space
from trimbit.search.methods import outliers as salient
from trimbit.search.methods import shares, toga
from trimbit.search.two_formats.tiles import TileProblem


@pytest.mark.parametrize("network", ["logits", pytest.param("hypernetwork", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("estimator", "temperature"), [("reinmax", 1.0), ("gumbel", 0.4)])
@pytest.mark.parametrize("budget", ["penalty", "projection"])
def test_what_matters_is_found(tmp_path, network, estimator, temperature, budget):
    rate = {"learning_rate": 0.05 if network == "logits" else 2e-3, "steps": 150}
    kind = {"network": network, "estimator": estimator, "temperature": temperature, "budget": budget}
    config = CONFIG.model_copy(update=kind | rate)
    task = made(tmp_path, config)
    plan = toga.search(task, config).plan
    resolve(plan, LAYOUT)
    by_energy = salient.search(task, salient.Config(**SMALL)).plan
    assert kept(plan, task, config) > 1.5 * kept(by_energy, task, config)


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
    assert again == whole
    assert len(again.curve) == 60


def test_a_finished_run_is_taken_up(tmp_path):
    first = toga.search(made(tmp_path), CONFIG).plan
    masked = Invented(worths())
    assert toga.search(made(tmp_path, masked=masked), CONFIG).plan.content == first.content
    assert masked.steps == []


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
    masked.fails_at = None
    masked.steps.clear()
    again = toga.search(made(tmp_path, config, masked=masked), config)
    assert masked.steps[0] == 14
    assert again == toga.search(made(tmp_path / "whole", config), config)


@pytest.mark.parametrize(("estimator", "temperature"), [("reinmax", 0.5), ("gumbel", 2.0)])
def test_a_temperature_on_the_wrong_side_is_refused(estimator, temperature):
    with pytest.raises(ValueError, match=f"but {estimator} wants at"):
        toga.Config(estimator=estimator, temperature=temperature)
    assert (toga.Config().resolved_temperature, toga.Config(estimator="gumbel").resolved_temperature) == (1.0, 0.4)


@dataclass
class Recorded(Invented):
    """An invented loss that keeps the masks of each step."""

    masks: list[dict[str, torch.Tensor]] = field(default_factory=list)

    def gradients(self, masks, step, generator):
        if step >= 0:
            self.masks.append(masks)
        return super().gradients(masks, step, generator)


@pytest.mark.parametrize("network", ["logits", pytest.param("hypernetwork", marks=pytest.mark.slow)])
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
        found = toga.search(task, config)
        high = high_of(found.plan, shape)
        taken[whole] = sum(shape.channels[site] // 2 in high[site] for site in few)
        sizes = [int(mask.sum()) for masks in masked.masks for mask in masks.values()]
        assert whole == all(size % config.tile == 0 for size in sizes)
        bits = [step["bits"] for step in found.curve]
        assert abs(sum(bits) / len(bits) - shape.bits(shape.codes(shape.uniform_within_budget))) < 0.1
    assert taken == {False: 0, True: len(few)}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"budget": "projection", "offset": 3.0}, "`offset` needs budget=penalty"),
        ({"budget": "projection", "budget_weight": 6.0}, "`budget_weight` needs budget=penalty"),
        ({"optimizer": "sgd", "budget": "projection", "weight_decay": 0.1}, "needs optimizer=adamw"),
        ({"optimizer": "sgd"}, "needs budget=projection"),
        ({"error_model": "expected", "dense": True}, "error_model=expected rounds none"),
        ({"residual_rank": 4}, "`residual_rank` needs error_model=expected"),
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
