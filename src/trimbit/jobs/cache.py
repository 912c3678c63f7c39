"""Where finished stages are kept, and what their keys are made of."""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

from trimbit.schema.base import digest


def cache_root() -> Path:
    """`$TRIMBIT_CACHE`, or `~/.cache/trimbit`."""
    return Path(os.environ.get("TRIMBIT_CACHE") or Path.home() / ".cache" / "trimbit")


@cache
def source_digest(*parts: str) -> str:
    """Content key of the package's code, or of some of its files and folders: other code has other results."""
    root = Path(__file__).parent.parent
    files = [file for part in parts for file in (root / part).rglob("*.py")] if parts else root.rglob("*.py")
    files = [*files, *(root / part for part in parts if part.endswith(".py"))]
    return digest([path.read_text(encoding="utf-8") for path in sorted(set(files))])


def save_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that it appears whole or not at all; a write that fails leaves nothing beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        write(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
