"""Number formats, and the bytes of a weight in them. No torch: these are plain data.

A format has a short name, used in recipes, plans and tables: `int4g64` is symmetric, 4 bits, one fp16 scale per 64
input channels; `uint4g64` also has a zero point, stored in 4 bits; `int4row` has one group per row; `nf4g64` is
NormalFloat; `ternaryg64` is -1, 0 or 1 times the scale, five codes a byte; `binaryg64` is a sign times the scale, and
`mbinaryg64` adds an fp16 mean; `bf16` is not quantised.
"""

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, PlainSerializer

from trimbit.errors import PlanError
from trimbit.schema.base import Schema

SCALE_NBYTES = 2  # fp16


class Grouped(Schema):
    """Base of the formats with one fp16 scale for each group of input channels of a row."""

    group: Literal[32, 64, 128] | None  # None: one group a row

    @property
    def suffix(self) -> str:
        """The part of the short name that gives the group."""
        return "row" if self.group is None else f"g{self.group}"

    def n_groups(self, count: int) -> int:
        """Number of groups in `count` consecutive channels; the last may be short."""
        return -(-count // (self.group or count)) if count else 0


class Int(Grouped):
    """Integers of 2 to 8 bits in groups along the input channels of each row.

    Symmetric: w ~ s * c with c in [-2^(b-1), 2^(b-1) - 1]; the sign of s chooses the side that has the extra level.
    With a zero point: w ~ s * (c - z) with c and z in [0, 2^b - 1].
    """

    bits: int = Field(ge=2, le=8)
    symmetric: bool

    @property
    def name(self) -> str:
        """The short name, such as `int4g64`."""
        return f"{'int' if self.symmetric else 'uint'}{self.bits}{self.suffix}"

    def code_nbytes(self, count: int) -> int:
        """Bytes of the codes of `count` channels of one row."""
        return -(-count * self.bits // 8)

    def zero_nbytes(self, count: int) -> int:
        """Bytes of the zero points of `count` channels of one row."""
        return 0 if self.symmetric else -(-self.n_groups(count) * self.bits // 8)


NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip # code (bitsandbytes); quantiles of a normal distribution, with an exact zero


class Codebook(Grouped):
    """A fixed list of levels: w ~ s * levels[c]; a code c is stored as a digit in base len(levels).

    A byte holds as many digits as fit, the least significant first; no digit is split between bytes.
    """

    stem: ClassVar[str]
    levels: ClassVar[tuple[float, ...]]
    per_byte: ClassVar[int]  # codes; the most with len(levels)^per_byte <= 256

    @property
    def bits(self) -> float:
        """Bits per code."""
        return 8 / self.per_byte

    @property
    def name(self) -> str:
        """The short name, such as `nf4g64`."""
        return self.stem + self.suffix

    def code_nbytes(self, count: int) -> int:
        """Bytes of the codes of `count` channels of one row."""
        return -(-count // self.per_byte)

    def zero_nbytes(self, count: int) -> int:
        """There are no zero points."""
        return 0


class NormalFloat(Codebook):
    """NF4 (QLoRA, arXiv:2305.14314): w ~ s * NF4_LEVELS[c], with 16 levels, dense where a normal distribution is.

    Ours: s is fp16, not fp32, and its sign chooses the side of the coarser levels.
    """

    stem: ClassVar[str] = "nf4"
    levels: ClassVar[tuple[float, ...]] = NF4_LEVELS
    per_byte: ClassVar[int] = 2


class Ternary(Codebook):
    """-s, 0 or s. A byte holds five codes (3^5 = 243), so a code takes 1.6 bits; the least would be log2(3) = 1.585."""

    stem: ClassVar[str] = "ternary"
    levels: ClassVar[tuple[float, ...]] = (-1.0, 0.0, 1.0)
    per_byte: ClassVar[int] = 5


class Binary(Codebook):
    """m - s or m + s, one bit a weight; with `mean`, each group has an fp16 m, otherwise m = 0."""

    mean: bool
    stem: ClassVar[str] = "binary"
    levels: ClassVar[tuple[float, ...]] = (-1.0, 1.0)
    per_byte: ClassVar[int] = 8

    @property
    def name(self) -> str:
        """The short name, such as `binaryg64`, or `mbinaryg64` with a mean."""
        return f"{'m' if self.mean else ''}{self.stem}{self.suffix}"

    def zero_nbytes(self, count: int) -> int:
        """Bytes of the means of `count` channels of one row, stored in place of zero points."""
        return SCALE_NBYTES * self.n_groups(count) if self.mean else 0


class BFloat16(Schema):
    """Unquantised bfloat16."""

    bits: Literal[16] = 16
    name: Literal["bf16"] = "bf16"

    def n_groups(self, count: int) -> int:
        """There are no scales."""
        return 0

    def code_nbytes(self, count: int) -> int:
        """Bytes of the values of `count` channels of one row."""
        return 2 * count

    def zero_nbytes(self, count: int) -> int:
        """There are no zero points."""
        return 0


BF16 = BFloat16()
_NAME = re.compile(r"(u?int[2-8]|nf4|ternary|m?binary)(?:g(32|64|128)|row)")


def parse_precision(name: str) -> "Int | NormalFloat | Ternary | Binary | BFloat16":
    """The format with this short name.

    Raises:
        PlanError: if there is no such format.
    """
    if name == "bf16":
        return BF16
    match = _NAME.fullmatch(name)
    if match is None:
        known = "(int[2-8]|uint[2-8]|nf4|ternary|binary|mbinary)(g32|g64|g128|row)"
        raise PlanError(f"unknown number format {name!r}; known formats are bf16 and {known}, such as int4g64")
    kind = match[1]
    group: Any = int(match[2]) if match[2] else None
    if kind == "nf4":
        return NormalFloat(group=group)
    if kind == "ternary":
        return Ternary(group=group)
    if kind.endswith("binary"):
        return Binary(group=group, mean=kind.startswith("m"))
    return Int(bits=int(kind[-1]), group=group, symmetric=not kind.startswith("u"))


def _from_name(value: Any) -> Any:  # noqa: ANN401
    if not isinstance(value, str):
        return value
    try:
        return parse_precision(value)
    except PlanError as err:
        raise ValueError(str(err)) from err  # pydantic turns it into a ValidationError that says where


Precision = Annotated[
    Int | NormalFloat | Ternary | Binary | BFloat16,
    BeforeValidator(_from_name),
    PlainSerializer(lambda p: p.name, return_type=str),
]


class Run(Schema):
    """One format for `count` consecutive input channels of a weight; groups restart at each run."""

    count: int = Field(ge=1)
    precision: Precision


def row_nbytes(runs: tuple[Run, ...]) -> int:
    """Bytes of one row of a weight with these runs: codes, scales, zero points and means."""
    return code_row_nbytes(runs) + SCALE_NBYTES * group_count(runs) + zero_row_nbytes(runs)


def code_row_nbytes(runs: tuple[Run, ...]) -> int:
    """Bytes of one row's codes; each run is padded to whole bytes."""
    return sum(run.precision.code_nbytes(run.count) for run in runs)


def zero_row_nbytes(runs: tuple[Run, ...]) -> int:
    """Bytes of one row's zero points and means; each run is padded to whole bytes."""
    return sum(run.precision.zero_nbytes(run.count) for run in runs)


def group_count(runs: tuple[Run, ...]) -> int:
    """Number of scales in one row."""
    return sum(run.precision.n_groups(run.count) for run in runs)
