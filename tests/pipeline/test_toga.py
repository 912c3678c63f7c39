"""Whole jobs that learn masks."""

from functools import partialmethod

import pytest
import torch

from masked_jobs import ACTS, recipe, session
from sessions import compress, open_session
from trimbit.artifact.files import weight_nbytes
from trimbit.errors import NumericsError, RecipeError
from trimbit.pipeline.recipes import load_recipe
from trimbit.pipeline.search import _key
from trimbit.schema.plan import load_plan
from trimbit.schema.recipe import Step
from trimbit.schema.run import Run
from trimbit.search.two_formats.tiles import TileProblem, as_masks
from trimbit.trial.masked.model import MaskedModel


@pytest.mark.parametrize("acts", [{}, ACTS], ids=["weights", "activations, too"])
@pytest.mark.parametrize("kind", [pytest.param("rtn", marks=pytest.mark.slow), "expected"])
def test_the_whole_job(job, tmp_path, acts, kind):
    """Within its budget; the file is what the plan says; the packed model is near what the search saw."""
    own = recipe(error_model=kind, **acts)
    if kind == "expected":  # of GPTQ, on text enough for its H
        rows = own.calibration.model_copy(update={"rows": 24})
        own = own.model_copy(update={"quant": Step(name="gptq"), "calibration": rows})
    made = open_session(job.model, own, calibration=str(job.text), seed=3)
    written = made.compress(None, tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").stat().st_size == written.found_by.nbytes <= made.budget_nbytes()
    assert load_plan(tmp_path / "out/plan.json") == written
    sites = TileProblem(made.problem(), made.steps.search)
    kl = made.masked().damage(as_masks(sites.high(written), sites)).kl
    # groups restart at the high channels, or GPTQ rounds for real
    chosen = Run.model_validate_json((tmp_path / "out/run.json").read_text()).chosen_kl
    assert chosen == pytest.approx(kl, rel=0.3)
    lines = (tmp_path / "out/training.csv").read_text().splitlines()
    assert lines[0] == "step,loss,bits,temperature"
    assert len(lines) == 7
    assert (tmp_path / "out/training.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_job_that_was_broken_off_goes_on(job, tmp_path, monkeypatch):
    """As the recipes learn: a hypernetwork, expected errors, bf16, whole tiles."""
    kind = {"error_model": "expected", "network": "hypernetwork", "budget": "projection", "loss": "kl"}
    learnt = recipe(**kind, whole_tiles=True).model_copy(update={"compute": "bfloat16"})
    steps, gradients = [], MaskedModel.gradients

    def found():
        steps.clear()
        return open_session(job.model, learnt, calibration=str(job.text), seed=3).found()

    def counted(self, masks, step, generator, stop=None):
        steps.append(step)
        if step == stop:
            raise KeyboardInterrupt
        return gradients(self, masks, step, generator)

    monkeypatch.setenv("TRIMBIT_CACHE", str(tmp_path / "at once"))
    monkeypatch.setattr(MaskedModel, "gradients", counted)
    at_once = found()
    assert steps == list(range(6))
    monkeypatch.setenv("TRIMBIT_CACHE", str(tmp_path / "broken off"))
    monkeypatch.setattr(MaskedModel, "gradients", partialmethod(counted, stop=3))
    with pytest.raises(KeyboardInterrupt):
        found()
    monkeypatch.setattr(MaskedModel, "gradients", counted)
    assert found() == at_once
    assert steps == [2, 3, 4, 5]


def test_more_text_than_there_is_is_refused_at_once(job):
    with pytest.raises(RecipeError, match=r"search\.length is 64 tokens, but a row has 32"):
        session(job, length=64)
    search = Step(name="shares", params={"low": "int3g32", "high": "int8g32", "tile": 16, "length": 16, "rows": 7})
    with pytest.raises(RecipeError, match=r"search\.rows: 7 of 6 rows asked"):
        open_session(job.model, recipe().model_copy(update={"search": search}), calibration=str(job.text), seed=3)


@pytest.mark.slow
def test_damage_that_is_not_finite_stops_the_search(job, tmp_path):
    search = Step(name="shares", params={"low": "int3g32", "high": "int8g32", "tile": 16, "length": 16, "rows": 2})
    made = open_session(
        job.model, recipe().model_copy(update={"search": search}), calibration=str(job.text), seed=3, cache=tmp_path
    )
    made.masked().layers["blocks.1.mlp.mid"][0].weight[0] = torch.nan
    problem = made.problem()
    with pytest.raises(NumericsError, match="the model under masks is not finite: KL nan"):
        made.steps.method.search(problem, made.steps.search)
    made.find_plan()  # what was not finite was not kept


# As they come along, but for the size of the text and of groups, and the number of steps.
TINY = ("calibration.rows=24", "calibration.length=32", "calibration.held_out=2", "search.tile=16", "compute=float32")


LEARNT = ("calibration.training=3", "search.length=16", "search.steps=4")


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("toga-q-w3.2a3.2", "int3g32", "int8g32"),
        ("toga-q-faithful", "binaryg32", "int4g32"),
        ("atom-w3.2a3.2", "int3g32", "int8g32"),
        ("ptq161-w1.6a16", "mbinaryrow", "int4g32"),
    ],
)
def test_the_recipes(job, tmp_path, name, low, high):
    masked, acts = name.startswith("toga"), "a3.2" in name
    own = (f"search.low={low}", f"search.high={high}", *TINY, *(LEARNT if masked else ()))
    own += ("search.low_acts.group=32", "search.high_acts.group=32") if acts else ()
    made = open_session(job.model, load_recipe(name, own), calibration=str(job.text), seed=3)
    plan = compress(made, None, tmp_path / "out")
    assert weight_nbytes(tmp_path / "out") == plan.found_by.nbytes <= made.budget_nbytes()
    formats = {run.precision.name for runs in plan.weights.values() for run in runs}
    assert formats >= {low, high}
    assert bool(plan.acts) == acts
    assert plan.found_by.measured_damage > 0
    assert (tmp_path / "out/training.csv").exists() == masked


def test_what_decides_the_masks_is_in_their_key(job):
    """Pairs take bytes, and so decide how many channels are learnt to be high."""
    base = recipe()
    calibration = base.calibration.model_copy(update={"training": 2})
    others = {
        "base": base,
        "rank": base.model_copy(update={"lowrank": Step(name="lowrank", params={"rank": 2})}),
        "training": base.model_copy(update={"calibration": calibration}),
        "steps": recipe(steps=7),
        "saved": recipe(save_every=3, checkpointing=False),
    }
    made = {name: open_session(job.model, own, calibration=str(job.text), seed=3) for name, own in others.items()}
    keys = {name: _key(one.job, one.prepared, 40_000).digest for name, one in made.items()}
    assert keys["saved"] == keys["base"]
    assert len(set(keys.values())) == 4
