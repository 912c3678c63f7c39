"""Plans as strict JSON, and budgets as users write them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plans import make_plan, random_plan
from tiny import tiny_config
from trimbit.errors import PlanError
from trimbit.model.build import build_layout
from trimbit.schema.plan import Plan, load_plan

LAYOUT = build_layout(tiny_config("llama"))


@given(st.integers(0, 10**6))
def test_json_round_trip(seed):
    plan = random_plan(LAYOUT, seed)
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


def test_file_round_trip(tmp_path):
    plan = random_plan(LAYOUT, 1)
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert load_plan(tmp_path / "plan.json") == plan


def test_an_edited_plan_tells_nothing_of_the_one_that_it_was(tmp_path):
    plan = random_plan(LAYOUT, 1).with_provenance(predicted_damage=0.5, measured_damage=0.6, notes=("tried",))
    (tmp_path / "plan.json").write_text(plan.to_json())
    fields = json.loads((tmp_path / "plan.json").read_text())
    fields["kv_cache"] = {"bits": 4}
    (tmp_path / "edited.json").write_text(json.dumps(fields))
    edited = load_plan(tmp_path / "edited.json").found_by
    assert edited.method == f"edited, once: {plan.found_by.method}"
    assert (edited.predicted_damage, edited.measured_damage, edited.notes) == (None, None, ())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": 1}, "extra: unknown key"),
        ({"schema_version": 2}, "schema_version: "),
        ({"cuts": {"blocks.0.mlp.mid": ["1"]}}, r"cuts\.blocks\.0\.mlp\.mid\.0: "),
        ({"cuts": {"blocks.0.mlp.mid": [1.5]}}, r"cuts\.blocks\.0\.mlp\.mid\.0: "),
        ({"biases": 3}, "biases: "),
        ({"model": {"id": "x"}}, r"model\.config_hash: .* \(and 1 more problem"),
        (
            {"weights": {"w": [{"count": 1, "precision": "int1g64"}]}},
            r"weights\.w\.0\.precision.*unknown number format 'int1g64'",
        ),
        ({"weights": {"w": [{"count": 0, "precision": "bf16"}]}}, r"weights\.w\.0\.count: "),
    ],
)
def test_what_is_not_a_plan_is_refused_in_one_line(tmp_path, change, message):
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(json.loads(make_plan(LAYOUT).model_dump_json()) | change))
    with pytest.raises(PlanError, match=message) as error:
        load_plan(file)
    assert str(error.value).startswith(f"{file}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [None, "", "[]", "{", "null"])
def test_what_is_not_json_is_refused_in_one_line(tmp_path, content):
    file = tmp_path / "plan.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(PlanError, match=r"plan\.json: ") as error:
        load_plan(file)
    assert "\n" not in str(error.value)
