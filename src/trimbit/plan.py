"""The plan: what is cut and how many bits the rest gets. Plain data, no torch; and the budget it must meet."""

import hashlib
import json
import re
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

from pydantic import Field, ValidationError

from trimbit.errors import BudgetError, PlanError
from trimbit.precision import ActRun, Data, KVPrecision, Run

T = TypeVar("T", bound=Data)


class ModelRef(Data):
    """The original model that a plan belongs to."""

    id: str
    config_hash: str
    weights_hash: str


class Rotation(Data):
    """The basis of a model's channels: Hadamard matrices, as `rotate.py` says; nothing of it is stored."""

    kind: Literal["hadamard"] = "hadamard"
    seed: int = Field(default=0, ge=0)  # of the signs of the residual stream's


class Provenance(Data):
    """How a plan was found."""

    method: str
    recipe: dict[str, Any]  # resolved; the plan is applied by it, or was by this other one
    calibration: str  # the name of the text, or `self`
    measurement_hash: str | None
    seed: int
    predicted_damage: float | None  # nats of KL a token, by the additive model of the search
    measured_damage: float | None  # nats of KL a token, of the whole plan on held-out calibration tokens
    nbytes: int  # of the weight files, headers included
    notes: tuple[str, ...] = ()
    content: str = ""  # in a file: key of the plan that all this was found of


@runtime_checkable
class Sized(Protocol):
    """What can tell the bytes of a plan's tensors: a `Layout`."""

    def tensor_nbytes(self, plan: "Plan") -> int:
        """Bytes of all tensors that the plan writes."""


class Plan(Data):
    """What to do to one model; every search method returns one.

    `rotation` is the basis of all channels below; None: the model's own. `cuts` maps a dim to its kept original indices
    (an empty tuple drops the sub-block), in the order in which they are stored. `orders` maps a site to a permutation
    of its kept input channels: as its i-th channel it stores the kept one of number orders[site][i]. `weights` maps a
    weight to runs along its stored input channels, and `acts` a site to how its inputs are rounded, in runs of the same
    lengths; a site without is not rounded. `biases` names weights that gain a bias, `adapters` those that have a
    low-rank pair in bf16 beside them, with its rank. `kv_cache` is how keys and values are stored while the model
    generates; None: as they are.
    """

    schema_version: Literal[1] = 1
    model: ModelRef
    rotation: Rotation | None = None
    cuts: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    orders: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    weights: dict[str, tuple[Run, ...]]
    acts: dict[str, tuple[ActRun, ...]] = Field(default_factory=dict)
    biases: tuple[str, ...] = ()
    adapters: dict[str, int] = Field(default_factory=dict)
    kv_cache: KVPrecision | None = None
    found_by: Provenance

    @property
    def content(self) -> str:
        """Content key: of what is done to the model, however it was found."""
        return digest(self.model_dump(mode="json", exclude={"found_by"}))

    @property
    def widths(self) -> dict[str, int]:
        """Kept members of the dims that are cut."""
        return {dim: len(keep) for dim, keep in self.cuts.items()}

    def nbytes(self, layout: Sized) -> int:
        """Bytes of all tensors written; the file adds its header."""
        return layout.tensor_nbytes(self)

    def save(self, path: Path) -> None:
        """Write the plan as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = self.telling(content=self.content)
        path.write_text(whole.model_dump_json(indent=1) + "\n", encoding="utf-8")

    def telling(self, **told: object) -> "Plan":
        """The same plan with some of `found_by` said otherwise."""
        return self.model_copy(update={"found_by": self.found_by.model_copy(update=told)})


def load_plan(path: Path) -> Plan:
    """Read a plan; one that was edited tells nothing of what was found of the plan that it was.

    Raises:
        PlanError: if the file is missing, is not JSON, or has an unknown key, type or schema version.
    """
    plan = parse_json(Plan, path, PlanError)
    same, plan = plan.found_by.content == plan.content, plan.telling(content="")
    if same:
        return plan
    return plan.telling(
        method=f"edited, once: {plan.found_by.method}", predicted_damage=None, measured_damage=None, notes=()
    )


def parse_json(kind: type[T], path: Path, error: type[Exception]) -> T:
    """Read strict JSON of this kind, or raise `error` with the file, the key and the reason in one line."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError as err:
        raise error(f"{path}: {err.strerror}") from err
    except ValidationError as err:
        raise error(f"{path}: {first_problem(err)}") from err


def first_problem(err: ValidationError) -> str:
    """The first problem of a failed validation and how many follow, in one line."""
    first, *rest = err.errors(include_url=False, include_input=False)
    where = ".".join(str(part) for part in first["loc"]) or "document"
    what = "unknown key" if first["type"] == "extra_forbidden" else first["msg"].removeprefix("Value error, ")
    return f"{where}: {what}" + (
        f" (and {len(rest)} more {'problem' if len(rest) == 1 else 'problems'})" if rest else ""
    )


def digest(value: object) -> str:
    """Content key of a JSON-like value: 16 hex digits of the sha256 of its canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


class Budget(Data):
    """A limit on the weight files, headers included: `45MB`, `45MiB`, `2.5bpw` or `0.2x`."""

    value: float = Field(gt=0)
    unit: str

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Read a budget as the user writes it.

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
        value = Fraction(str(self.value))  # the decimal that was written: 1.001kB is 1001 bytes, not 1000.99...
        if self.unit == "bpw":
            return int(value * parameters / 8)
        if self.unit == "x":
            return int(value * parameters * 2)
        return int(value * _UNITS[self.unit])

    def __str__(self) -> str:
        return f"{self.value:.15g}{self.unit}"
