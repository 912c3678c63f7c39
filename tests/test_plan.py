"""Plans as strict JSON, and budgets as users write them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plans import make_plan, random_plan
from tiny import tiny_config
from trimbit.errors import BudgetError, PlanError
from trimbit.model.build import build_layout
from trimbit.schema.base import digest
from trimbit.schema.budget import Budget
from trimbit.schema.plan import Plan, load_plan

LAYOUT = build_layout(tiny_config("llama"))


@given(st.integers(0, 10**6))
def test_json_round_trip(seed):
    plan = random_plan(LAYOUT, seed)
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


def test_file_round_trip(tmp_path):
    plan = random_plan(LAYOUT, 1)
    plan.save(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan


def test_an_edited_plan_tells_nothing_of_the_one_that_it_was(tmp_path):
    plan = random_plan(LAYOUT, 1).with_provenance(predicted_damage=0.5, measured_damage=0.6, notes=("tried",))
    plan.save(tmp_path / "plan.json")
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


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("1000B", 1000),
        ("3kB", 3000),
        ("45MB", 45_000_000),
        ("1.5GB", 1_500_000_000),
        ("2KiB", 2048),
        ("45MiB", 45 * 2**20),
        (".5GiB", 2**29),
        (" 45 MB ", 45_000_000),
        ("2.5bpw", 312),  # 312.5
        ("8bpw", 1000),
        ("0.2x", 400),
        ("1.001kB", 1001),  # 1000.9999999999999 in floating point
        ("45000001B", 45_000_001),
    ],
)
def test_budgets(text, nbytes):
    budget = Budget.parse(text)
    assert budget.nbytes(1000) == nbytes
    assert Budget.parse(str(budget)) == budget


@pytest.mark.parametrize(
    "text",
    [
        "",
        "45",
        "MB",
        "0MB",
        "0.0x",
        "-1MB",
        "45mb",
        "45 M B",
        "1e3B",
        "1.MB",
        "infB",
        "nanx",
        "45MB 1",
        "45Mb",
        "4,5MB",
    ],
)
def test_unreadable_budgets(text):
    with pytest.raises(BudgetError, match="such as 45MB"):
        Budget.parse(text)


def test_digest_depends_on_content_alone():
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1}) != digest({"b": [2, 1], "a": 1})
