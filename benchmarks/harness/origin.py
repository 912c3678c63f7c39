"""The origin of a figure: the package's code, the machine, the libraries and the text."""

import ast
import hashlib
import platform
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from trimbit.jobs.hardware import hardware
from trimbit.schema.run import Hardware

PACKAGES = ("trimbit", "torch", "transformers", "lm_eval")
NOT_RECORDED = "not recorded"


def package() -> Path:
    """The folder of the package."""
    spec = find_spec("trimbit")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def code_digest(folder: Path) -> str:
    """Digest (16 hex digits) of the code and the recipes in a folder; docstrings, comments and layout do not count."""
    total = hashlib.sha256()
    for path in sorted(own for suffix in ("py", "yaml") for own in folder.rglob(f"*.{suffix}")):
        content = bare_code(path).encode() if path.suffix == ".py" else path.read_bytes()
        total.update(f"{path.relative_to(folder).as_posix()}\0{len(content)}\0".encode())
        total.update(content)
    return total.hexdigest()[:16]


def bare_code(path: Path) -> str:
    """The code of a file without docstrings, comments and layout."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            documented = ast.get_docstring(node, clean=False) is not None
            node.body = node.body[documented:] or [ast.Pass()]
    return ast.unparse(tree)


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def machine() -> dict[str, Any]:
    """The hardware as plain data; a GPU is left out unless this process has used it."""
    found = hardware()
    used = torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0
    return (found if used else found.model_copy(update={"gpu": None})).model_dump(mode="json")


def versions() -> dict[str, str]:
    """The versions of Python and of the libraries that results depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def hardware_of(cell: dict[str, Any]) -> Hardware:
    """The hardware of a stored cell; earlier code recorded only the name of the processor and the threads."""
    found = cell["hardware"]
    if isinstance(found, dict):
        return Hardware.model_validate(found | {"instruction_sets": tuple(found["instruction_sets"])})
    return Hardware(cpu=found, instruction_sets=(), threads=cell["threads"], gpu=cell.get("gpu"))


def origins(results: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    """Rows of (processor, instruction sets, threads, code, number of cells), the most cells first."""
    counted: Counter[tuple[str, ...]] = Counter()
    for cell in results.values():
        own = hardware_of(cell)
        recorded = isinstance(cell["hardware"], dict)
        sets = ", ".join(own.instruction_sets) or "none of those looked for" if recorded else NOT_RECORDED
        name = own.cpu if own.gpu is None else f"{own.cpu}, {own.gpu}"
        counted[name, sets, str(own.threads), cell.get("code", NOT_RECORDED)] += 1
    return [(*key, str(count)) for key, count in sorted(counted.items(), key=lambda one: (-one[1], one[0]))]
