"""The base class of all stored data, reading it from JSON, and content keys."""

import hashlib
import json
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError


class Schema(BaseModel):
    """Base class of all data that is stored in files: frozen and strict; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


T = TypeVar("T", bound=Schema)


def parse_json(kind: type[T], path: Path, error: type[Exception]) -> T:
    """Read JSON as a `kind`; on failure raise `error` with the file, the key and the reason in one line."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError as err:
        raise error(f"{path}: {err.strerror}") from err
    except ValidationError as err:
        raise error(f"{path}: {first_problem(err)}") from err


def first_problem(err: ValidationError) -> str:
    """The first problem of a failed validation and the number of further ones, in one line."""
    first, *rest = err.errors(include_url=False, include_input=False)
    where = ".".join(str(part) for part in first["loc"]) or "document"
    what = "unknown key" if first["type"] == "extra_forbidden" else first["msg"].removeprefix("Value error, ")
    return f"{where}: {what}" + (
        f" (and {len(rest)} more {'problem' if len(rest) == 1 else 'problems'})" if rest else ""
    )


def digest(value: object) -> str:
    """Content key of a JSON-like value: the first 16 hex digits of the SHA-256 of its canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
