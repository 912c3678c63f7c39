"""The budget: a limit on the size of the weight files."""

import re
from fractions import Fraction

from pydantic import Field

from trimbit.errors import BudgetError
from trimbit.schema.base import Schema

_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


class Budget(Schema):
    """A limit on the size of the weight files, headers included: `45MB`, `45MiB`, `2.5bpw` or `0.2x`.

    `bpw` is bits per parameter of the original, `x` a share of the original's size in 16 bits.
    """

    value: float = Field(gt=0)
    unit: str

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Parse a budget as the user writes it.

        Raises:
            BudgetError: if it is not a positive number with a known unit.
        """
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([A-Za-z]+)\s*", text)
        if match is None or match[2] not in (*_UNITS, "bpw", "x") or float(match[1]) == 0:
            units = ", ".join((*_UNITS, "bpw", "x"))
            raise BudgetError(
                f"cannot read the budget {text!r}: give a positive number and one of {units}, such as 45MB"
            )
        return cls(value=float(match[1]), unit=match[2])

    def nbytes(self, parameters: int) -> int:
        """The limit in bytes for an original model with this many parameters."""
        value = Fraction(str(self.value))  # the decimal as written: 1.001kB is 1001 bytes, not 1000.99...
        if self.unit == "bpw":
            return int(value * parameters / 8)
        if self.unit == "x":
            return int(value * parameters * 2)
        return int(value * _UNITS[self.unit])

    def __str__(self) -> str:
        return f"{self.value:.15g}{self.unit}"
