"""Budgets: what they may be written as, and what is refused."""

import pytest

from trimbit.errors import BudgetError
from trimbit.schema.budget import Budget


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
