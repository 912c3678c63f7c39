"""Jobs that learn masks on the tiny model."""

import torch

from sessions import open_session
from trimbit.schema.recipe import Recipe, Step

ACTS = {"low_acts": {"bits": 4, "group": 32, "clip": 0.9}, "high_acts": {"bits": 8, "group": 32}}


PARAMS = {"low": "int3g32", "high": "int8g32", "tile": 16, "steps": 6, "length": 16, "share": 0.25, "save_every": 2}


def recipe(**params):
    return Recipe(
        description="",
        source="",
        compute="float32",
        calibration={"rows": 6, "length": 32, "held_out": 2, "training": 3},
        search=Step(name="toga", params=PARAMS | params),
        quant=Step(name="rtn", params={"scales": "mse"}),
        repair=None,
    )


def session(job, **params):
    return open_session(job.model, recipe(**params), calibration=str(job.text), seed=3)


def gradients(model, masks, step):
    return model.gradients(masks, step, torch.Generator().manual_seed(step))
