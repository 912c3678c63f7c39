"""What a unit may be cut to."""

import itertools

import pytest

from measured import SPACE
from sessions import session
from trimbit.errors import PlanError
from trimbit.measure.choices import allowed_widths, background_of


def test_widths_are_multiples_and_the_full_one_is_always_there(stream):
    unit = stream.layout.units["blocks.0.mlp"]
    for multiple, shares in itertools.product((16, 32, 128), ((0.5,), (1.0, 0.75, 0.25), (0.0,))):
        space = SPACE.model_copy(update={"channel_multiple": multiple, "widths": shares})
        widths = allowed_widths(stream.layout, unit, space)
        assert widths[0] == 80
        assert all(width % min(multiple, 80) == 0 for width in widths[1:])
        assert list(widths) == sorted(set(widths), reverse=True)
    assert allowed_widths(stream.layout, stream.layout.units["embed"], SPACE) == ()
    assert allowed_widths(stream.layout, stream.layout.units["blocks.0.attn"], SPACE) == (3, 2, 1, 0)


def test_a_plan_of_several_runs_is_no_background(job, compressed):
    _, plan = compressed
    name, own = next(iter(plan.weights.items()))
    halves = tuple(run.model_copy(update={"count": own[0].count // 2}) for run in own * 2)
    torn = plan.model_copy(update={"weights": {**plan.weights, name: halves}})
    with pytest.raises(PlanError, match=f"{name} has 2 runs"):
        background_of(torn, session(job).layout)
