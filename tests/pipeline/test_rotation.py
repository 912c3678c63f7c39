"""Whole jobs on a rotated model."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from jobs import RECIPES
from plans import make_plan
from rotations import rotated, sample, write
from sessions import compress, open_session
from tiny import save_tiny, tiny_config, tiny_model
from trimbit.artifact.files import weight_nbytes
from trimbit.errors import LayoutError, PlanError, RecipeError
from trimbit.model.build import build_layout
from trimbit.model.resolved import resolve
from trimbit.pipeline.applying import applied_stage
from trimbit.pipeline.prepare import moments_key
from trimbit.pipeline.recipes import load_recipe
from trimbit.schema.plan import Rotation
from trimbit.schema.precision import BF16
from trimbit.schema.recipe import Recipe, Step
from trimbit.schema.run import Run
from trimbit.search.two_formats.tiles import TileProblem


def recipe(**fields):
    common = {"description": "", "source": "", "compute": "float32", "quant": Step(name="rtn"), "repair": None}
    calibration = {"rows": 6, "length": 32, "held_out": 2, "training": 3}
    return Recipe(**{"rotation": Rotation(seed=1), "calibration": calibration} | common | fields)


def session(job, **fields):
    return open_session(job.model, recipe(**fields), calibration=str(job.text), seed=3)


def test_the_recipe(job, tmp_path):
    """As it comes along, but for the size of the calibration text and of groups."""
    small = ("calibration.rows=12", "calibration.length=32", "search.tile=16")
    small += tuple(f"search.{name}.group=32" for name in ("low_acts", "high_acts"))
    small += ("search.low=int4g32", "search.high=int8g32")
    plans = {}
    for name in ("quarot-w4a4", "gptq-w4a4"):
        made = open_session(job.model, load_recipe(name, small), calibration=str(job.text))
        plans[name] = compress(made, None, tmp_path / name)
        assert (
            weight_nbytes(tmp_path / name)
            == plans[name].found_by.nbytes
            == resolve(plans[name], made.layout).file_nbytes
        )
        assert plans[name].orders == {}
        assert plans[name].found_by.measured_damage > 0
    rotated, plain = plans.values()
    assert rotated.rotation == Rotation()
    assert plain.rotation is None
    assert (rotated.acts, rotated.weights) == (plain.acts, plain.weights)
    assert rotated.found_by.nbytes == plain.found_by.nbytes
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "quarot-w4a4")
    assert model.generate(sample(2, 0), max_new_tokens=4, do_sample=False).shape == (2, 36)
    fields = [load_recipe(name).model_dump(exclude={"description", "source", "rotation"}) for name in plans]
    assert fields[0] == fields[1]
    assert (RECIPES / "quarot-w4a4.yaml").exists()


def test_results_of_other_bases_are_not_taken_up(job):
    search = Step(name="outliers", params={"low": "int4g32", "high": "int8g32", "tile": 16})
    made = [session(job, search=search, rotation=r) for r in (None, Rotation(), Rotation(seed=1), Rotation(seed=1))]
    for keys in ([moments_key(one.job, one.text).digest for one in made], [one.candidates.folder for one in made]):
        assert len(set(keys)) == 3
        assert keys[2] == keys[3]
    unfitted = [session(job, search=Step(name="preset"), rotation=r) for r in (None, Rotation())]
    assert [one.prepared.stats for one in unfitted] == [None, None]
    assert unfitted[0].candidates.folder != unfitted[1].candidates.folder
    plans = [one.find_plan() for one in made]
    assert len({plan.content for plan in plans}) == 3
    keys = {applied_stage(one.job, one.prepared, plan, "").key.digest for one, plan in zip(made, plans, strict=True)}
    assert len(keys) == 3


@pytest.mark.parametrize("end", [0, 1])
def test_masks_choose_among_rotated_channels(job, tmp_path, end):
    """At both ends they are the plain plan."""
    acts = {"low_acts": {"bits": 4, "group": 32, "clip": 0.9}, "high_acts": {"bits": 8, "group": 32}}
    params = {"low": "int3g32", "high": "int8g32", "tile": 16, "steps": 6, "length": 16, "share": 0.25} | acts
    made = session(job, search=Step(name="toga", params=params), quant=Step(name="rtn", params={"scales": "mse"}))
    sites = TileProblem(made.problem(10**9), made.steps.search)
    written = made.write(sites.plan({s: range(end * n) for s, n in sites.channels.items()}, ""), tmp_path / "end")
    assert any(site.endswith("mid") for site in written.orders)
    found = made.masked(made.steps.search).damage({s: torch.full((n,), float(end)) for s, n in sites.channels.items()})
    chosen = Run.model_validate_json((tmp_path / "end" / "run.json").read_text()).chosen_kl
    assert found.kl == pytest.approx(chosen, rel=2e-2)
    assert weight_nbytes(tmp_path / "end") == resolve(written, made.layout).file_nbytes == written.found_by.nbytes
    tiles = dict.fromkeys(sites.channels, 1)
    assert sum(sites.site_nbytes(*each) for each in tiles.items()) == _site_nbytes(made.layout, sites, tiles)


def _site_nbytes(layout, sites, tiles):
    plan = sites.plan({site: sites.top_channels(site, count) for site, count in tiles.items()}, "")
    blocks = [unit for unit in resolve(plan, layout).units.values() if unit.origin.block is not None]
    return sum(spec.nbytes for unit in blocks for name, spec in unit.tensors().items() if name not in unit.vectors)


def test_candidates_are_rotated(job):
    made = session(job, search=Step(name="uniform"), measure=None)
    for weight in made.layout.weights.values():
        want = made.stream.checkpoint.tensor(f"{weight.name}.weight")
        assert torch.equal(made.candidates.compressed(weight, BF16).dense(torch.bfloat16), want.bfloat16())


def test_a_rotation_that_the_model_cannot_have_is_refused_before_anything_long(tmp_path):
    save_tiny(tiny_model("gemma2"), tmp_path / "original")
    made = open_session(tmp_path / "original", load_recipe("quarot-w4a4", ("calibration.length=64",)))
    with pytest.raises(LayoutError, match="gemma2 cannot be rotated"):
        made.budget_nbytes()
    with pytest.raises(LayoutError, match="gemma2 cannot be rotated"):
        _ = made.stream


def test_plans_and_recipes_that_do_not_go_with_a_rotation_are_refused(job, tmp_path):
    layout = build_layout(tiny_config("llama"))
    for keep in ((0, 1), tuple(range(79, -1, -1))):
        plan = make_plan(layout, cuts={"blocks.1.mlp.mid": keep})
        resolve(plan, layout)
        with pytest.raises(
            PlanError, match=rf"blocks\.1\.mlp\.mid: {len(keep)} of 80 channels are kept, but a rotated"
        ):
            resolve(rotated(plan), layout)
    resolve(rotated(make_plan(layout, cuts={"blocks.1.mlp.mid": (), "blocks.0.mlp.mid": tuple(range(80))})), layout)
    with pytest.raises(
        PlanError, match=r"the plan's rotation is kind='hadamard' seed=3, but the model is run with None"
    ):
        write(job.model, tmp_path / "out", rotated(make_plan(layout)), rotation=None)
    fixed = Step(name="preset", params={"blocks": "int4g32"})
    plan = session(job, search=fixed).problem(10**9).uniform(BF16, "by hand")
    with pytest.raises(
        PlanError, match=r"the plan's rotation is kind='hadamard' seed=1, the recipe's None: apply it with"
    ):
        session(job, search=fixed, rotation=None).write(plan, tmp_path / "out")
    with pytest.raises(RecipeError, match="`rotation` mixes the channels that a `criterion` would rank and cut"):
        session(job, search=fixed, criterion=Step(name="activation"))
    with pytest.raises(RecipeError, match="`tune` cannot train low-rank pairs on rotated inputs"):
        session(job, search=fixed, lowrank=Step(name="lowrank"), tune=Step(name="tune"))
