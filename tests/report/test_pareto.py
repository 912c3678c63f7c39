"""The table and the picture of what was tried."""

import csv
import io

from plans import FOUND, REF
from trimbit.report.pareto import Trial, picture, table
from trimbit.schema.objective import Outcome
from trimbit.schema.plan import Plan


def plan_nbytes(nbytes):
    return Plan(model=REF, weights={}, found_by=FOUND.model_copy(update={"nbytes": nbytes}))


def test_a_table_and_a_picture_with_accuracy():
    tried = [
        Trial(plan_nbytes(nbytes), Outcome(kl=kl, nll=3.0, accuracy=accuracy, stderr=0.02))
        for nbytes, kl, accuracy in [(10_000, 0.5, 0.4), (20_000, 0.3, 0.6), (30_000, 0.4, 0.5), (20_008, 0.31, 0.5)]
    ]
    rows = list(csv.DictReader(io.StringIO(table(tried))))
    assert [row["pareto"] for row in rows] == ["1", "1", "0", "0"]
    assert float(rows[1]["accuracy"]) == 0.6
    with_accuracy = picture(tried, 31_000)
    without = picture([Trial(t.plan, Outcome(kl=t.outcome.kl, nll=3.0)) for t in tried], 31_000)
    assert width(with_accuracy) == 2 * width(without)


def width(png):
    return int.from_bytes(png[16:20], "big")
