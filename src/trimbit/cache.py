"""Where finished stages are kept, and what their keys are made of."""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

from trimbit.plan import digest


def cache_root() -> Path:
    """`$TRIMBIT_CACHE`, or `~/.cache/trimbit`."""
    return Path(os.environ.get("TRIMBIT_CACHE") or Path.home() / ".cache" / "trimbit")


@cache
def source_digest() -> str:
    """Content key of the package's code: a result of other code is not this code's result."""
    return digest([path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.rglob("*.py"))])


def save_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that it appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    write(beside)
    beside.replace(path)
