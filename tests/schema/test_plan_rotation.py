"""Plans of rotated models as JSON."""

import json

import pytest

from plans import make_plan
from rotations import rotated
from tiny import tiny_config
from trimbit.errors import PlanError
from trimbit.model.build import build_layout
from trimbit.model.resolved import resolve
from trimbit.schema.plan import Plan, Rotation, load_plan
from trimbit.schema.structure import Structure


def test_json_round_trip(tmp_path):
    layout = build_layout(tiny_config("llama"))
    plan = rotated(make_plan(layout))
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert load_plan(tmp_path / "plan.json") == plan
    assert len({one.content for one in (plan, make_plan(layout), rotated(plan, Rotation()))}) == 3
    structure = resolve(plan, layout).structure
    assert Structure.model_validate_json(structure.model_dump_json()) == structure
    for wrong, message in (({"kind": "random"}, r"rotation\.kind: "), ({"sed": 1}, r"rotation\.sed: unknown key")):
        (tmp_path / "plan.json").write_text(json.dumps(json.loads(plan.model_dump_json()) | {"rotation": wrong}))
        with pytest.raises(PlanError, match=message):
            load_plan(tmp_path / "plan.json")
    assert Plan.model_validate_json(make_plan(layout).model_dump_json(exclude={"rotation"})).rotation is None
