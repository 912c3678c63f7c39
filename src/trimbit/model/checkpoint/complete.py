"""A check that the files of a checkpoint hold exactly the model that its config describes."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from trimbit.model.checkpoint.checkpoint import Entry, bad

_TOGETHER = "config and weights must come from the same model"
_BLOCK = re.compile(r".*\.(?:layers|h|blocks)\.(\d+)\.")


def require_complete(where: Path, entries: Mapping[str, Entry], needed: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse files that lack a parameter of the model, or hold a tensor that the model does not have.

    Args:
        where: the path that the error names.
        entries: the tensors in the files.
        needed: the shape of each parameter of the model.

    Raises:
        CheckpointError: naming the first tensor that is missing, unknown or of another shape; or if there are too many
            blocks.
    """
    have, want = _blocks(entries), _blocks(needed)
    if have > want:
        raise bad(where, f"the files have {have} blocks, but the config says {want}", _TOGETHER)
    if missing := [name for name in needed if name not in entries]:
        more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise bad(where, f"tensor {missing[0]!r} is missing{more}", "download the model again")
    if unknown := sorted(entries.keys() - needed.keys()):
        raise bad(where, f"tensor {unknown[0]!r} is not part of the model that the config describes", _TOGETHER)
    for name, shape in needed.items():
        if entries[name].shape != shape:
            problem = f"tensor {name!r} has shape {entries[name].shape}, but the model needs {shape}"
            raise bad(where, problem, _TOGETHER)


def _blocks(names: Collection[str]) -> int:
    found = (_BLOCK.match(name) for name in names)
    return max((int(match[1]) + 1 for match in found if match), default=0)
