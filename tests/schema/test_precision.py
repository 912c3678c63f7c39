"""Names of number formats, and their cost by hand."""

import pytest
from pydantic import ValidationError

from plans import FORMATS, runs
from trimbit.errors import PlanError
from trimbit.schema.precision import Run, group_count, parse_precision, row_nbytes


@pytest.mark.parametrize("name", [*FORMATS, "int4g128", "uint4g128"])
def test_names_parse_and_print(name):
    precision = parse_precision(name)
    assert precision.name == name
    run = Run(count=3, precision=precision)
    assert f'"{name}"' in run.model_dump_json()
    assert Run.model_validate_json(run.model_dump_json()) == run


@pytest.mark.parametrize(
    "name",
    [
        "",
        "int4",
        "int1g64",
        "int9g64",
        "int4g16",
        "INT4g64",
        "int4g64 ",
        "uint4g64x",
        "nf3g64",
        "nf4",
        "unf4g64",
        "ternary",
        "uternaryg64",
        "mternaryg64",
        "binaryg16",
        "ubinaryg64",
        "fp16",
        "sint4row",
    ],
)
def test_unknown_names_are_refused(name):
    with pytest.raises(PlanError, match=r"unknown number format .*int4g64"):
        parse_precision(name)
    with pytest.raises(ValidationError, match="unknown number format"):
        Run.model_validate_json(f'{{"count": 1, "precision": "{name}"}}')


@pytest.mark.parametrize(
    ("pairs", "nbytes", "groups"),
    [
        ([(100, "bf16")], 200, 0),
        ([(64, "int4g64")], 32 + 2, 1),
        ([(65, "int4g64")], 33 + 4, 2),
        ([(100, "int3g32")], 38 + 8, 4),
        ([(100, "uint3g32")], 38 + 8 + 2, 4),  # 4 zero points of 3 bits
        ([(100, "uint3row")], 38 + 2 + 1, 1),
        ([(99, "nf4g64")], 50 + 4, 2),
        ([(65, "ternaryg64")], 13 + 4, 2),  # five a byte
        ([(66, "ternaryrow")], 14 + 2, 1),
        ([(1, "ternaryg32"), (4, "ternaryg32")], (1 + 2) + (1 + 2), 2),
        ([(65, "binaryg32")], 9 + 6, 3),
        ([(65, "mbinaryg32")], 9 + 6 + 6, 3),  # a mean is as large as a scale
        ([(9, "mbinaryrow"), (7, "int4row")], (2 + 2 + 2) + (4 + 2), 2),
        ([(3, "int3row"), (3, "int3row")], 2 * (2 + 2), 2),  # each run starts at a whole byte and a new group
        ([(1, "uint2g128"), (2, "bf16"), (33, "uint5g32")], (1 + 2 + 1) + 4 + (21 + 4 + 2), 3),
    ],
)
def test_bytes_of_a_row(pairs, nbytes, groups):
    assert row_nbytes(runs(*pairs)) == nbytes
    assert group_count(runs(*pairs)) == groups


@pytest.mark.parametrize("name", FORMATS)
def test_bits_are_what_a_code_takes(name):
    precision = parse_precision(name)
    assert precision.bits == precision.code_nbytes(1000) * 8 / 1000


@pytest.mark.parametrize("name", ["nf4row", "ternaryrow", "binaryrow", "mbinaryrow"])
def test_a_byte_holds_as_many_codes_as_fit(name):
    precision = parse_precision(name)
    assert len(precision.levels) ** precision.per_byte <= 256 < len(precision.levels) ** (precision.per_byte + 1)


@pytest.mark.parametrize("count", [0, -1, 1.5, "3"])
def test_a_run_has_a_positive_count(count):
    with pytest.raises(ValidationError):
        Run(count=count, precision=parse_precision("bf16"))
