"""What `shapes` puts in the place of jaxtyping finds wrong types and wrong shapes, of arguments and of results."""

from dataclasses import dataclass

import jaxtyping
import pytest
import torch
from beartype import beartype
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import Float, TypeCheckError
from torch import Tensor

from trimbit.kernels.hadamard import factors, transform

check = jaxtyping.jaxtyped(typechecker=beartype)


@check
def doubled(count: int) -> int:
    return count * 2 if count else None


@check
def product(x: Float[Tensor, "n m"], y: Float[Tensor, "m k"]) -> Float[Tensor, "n k"]:
    return x @ y if len(x) else y


@check
@dataclass
class Named:
    name: str


@check
@dataclass
class Square:
    side: Float[Tensor, "n n"]


def test_types_are_checked():
    assert doubled(2) == 4
    for wrong in (lambda: doubled("2"), lambda: doubled(0), lambda: Named(1)):
        with pytest.raises(BeartypeCallHintViolation):
            wrong()


def test_shapes_are_checked():
    assert product(torch.ones(2, 3), torch.ones(3, 1)).shape == (2, 1)
    for wrong in (
        lambda: product(torch.ones(2, 3), torch.ones(2, 3)),
        lambda: product(torch.ones(0, 3), torch.ones(3, 1)),
        lambda: Square(torch.ones(2, 3)),
    ):
        with pytest.raises(TypeCheckError):
            wrong()


def test_the_package_is_checked(pytestconfig):
    if not pytestconfig.getoption("--jaxtyping-packages"):
        pytest.skip("`make test`, and the slow tests, run without these checks")
    with pytest.raises(BeartypeCallHintViolation):
        factors("8")
    with pytest.raises(TypeCheckError):
        transform(torch.ones(2, 8, dtype=torch.int64))
