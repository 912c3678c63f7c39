"""Lines and tables of `run.json`, against text by hand."""

import pytest

from results import make_plan, make_run
from trimbit.report.run_tables import cache_line, headline, size, stages_table, tried_table, units_table
from trimbit.schema.run import TriedPlan


def test_the_headline():
    want = "269.0 MB → 72.0 MB (3.7x), 4.28 bits a parameter, KL 0.155 nats a token"
    assert headline(134_515_008, 71_958_744, 0.15481) == want
    assert headline(8_030_261_248, 4_000_000_000, None) == (
        "16.1 GB → 4.0 GB (4.0x), 3.98 bits a parameter, KL not measured"
    )
    assert "KL 0.000123 nats" in headline(10, 20, 0.0001234)


@pytest.mark.parametrize(
    ("nbytes", "text"), [(0, "0 B"), (999, "999 B"), (30_000, "30.0 kB"), (2_000_000_000_000, "2,000.0 GB")]
)
def test_sizes(nbytes, text):
    assert size(nbytes) == text


def test_units():
    table = units_table(make_run(make_plan()))
    assert table.rows == (
        ("blocks.0.attn", "2/3", "q k: uint4g32  v: 2xbf16+2xuint2g32", "500,000", "93.5 %"),
        ("blocks.0.mlp", "0/64", "dropped", "0", "0.0 %"),
    )


def test_plans_that_were_tried():
    table = tried_table(make_run(make_plan()))
    assert table.columns == ("plan", "size", "predicted KL", "estimated KL", "applied KL", "chosen")
    assert table.rows == (
        ("no pruning", "534.0 kB", "0.2", "0.25", "0.2612", ""),
        ("pruning cost x1", "535.0 kB", "0.1", "0.14", "0.15", "yes"),
    )
    assert tried_table(make_run(make_plan(), tried=())) is None


def test_of_many_plans_the_best_and_the_chosen_one_are_shown():
    plan = make_plan()
    many = [TriedPlan(name=f"trial {at}", plan=f"{at}", nbytes=1, estimated_kl=1.0 - at / 100) for at in range(40)]
    chosen = TriedPlan(name="the chosen one", plan=plan.content, nbytes=1, estimated_kl=9.0)
    table = tried_table(make_run(plan, tried=(chosen, *many)))
    assert [row[0] for row in table.rows] == ["the chosen one", *(f"trial {at}" for at in range(29, 40))]
    assert "12 of 41" in table.title


def test_stages():
    assert stages_table(make_run(make_plan())).rows == (
        ("stats", "0.5", "1.0 GB", "yes"),
        ("damage", "1,234.0", "2.0 GB", ""),
        ("all", "1,234.5", "", ""),
    )


def test_the_cache_in_a_line():
    record = make_run(make_plan()).kv_cache
    packed = 2 * 2 * 100 * (4 + 2 * 2)  # keys and values, two heads: 8 codes of 4 bits, a scale and a minimum
    assert cache_line(record, 100).startswith(f"KV cache@100: {packed:,} bytes, {2 * 2 * 100 * 16:,} in bf16 (4 bits")
    exact = record.model_copy(update={"precision": None})
    assert cache_line(exact, 100) == f"KV cache@100: {2 * 2 * 100 * 16:,} bytes in bf16"
