"""Tensors that a sweep over the blocks passes from one to the next, saved so that an interrupted sweep resumes."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from trimbit.jobs.checked import load_tensors, save_tensors

SECONDS = 10.0  # ours: least time between two saves


class Carried:
    """Lists of tensors by name, and the number of finished blocks."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "carried.safetensors"
        self._saved = time.monotonic()

    def load(self) -> tuple[int, dict[str, list[Tensor]]] | None:
        """The number of finished blocks, and the inputs of the next; None: start from the first."""
        found = load_tensors(self.path)
        if found is None:
            return None
        tensors, metadata = found
        lists: dict[str, list[Tensor]] = {name: [] for name in metadata["names"].split()}
        for key in sorted(tensors):
            lists[key.partition(".")[0]].append(tensors[key])
        return int(metadata["done"]), lists

    def save(self, done: int, lists: Mapping[str, Sequence[Tensor]]) -> None:
        """Save the inputs of block `done`, unless the last save was less than `SECONDS` ago."""
        if time.monotonic() - self._saved < SECONDS:
            return
        tensors = {f"{name}.{at:06d}": own for name, parts in lists.items() for at, own in enumerate(parts)}
        save_tensors(self.path, tensors, {"done": str(done), "names": " ".join(lists)})
        self._saved = time.monotonic()

    def finish(self) -> None:
        """Remove the file once the sweep is done."""
        self.path.unlink(missing_ok=True)
