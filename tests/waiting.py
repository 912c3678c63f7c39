"""Work for processes of their own, which import it by name: one task waits for another."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from trimbit.errors import NumericsError


def opened(folder: Path) -> Callable[[str], str]:
    """What a process does with each task."""
    return partial(_done, folder)


def _done(folder: Path, task: str) -> str:
    if task == "waits":
        for _ in range(600):
            if (folder / "done").exists():
                break
            time.sleep(0.05)
    elif task == "fails":
        raise NumericsError("not finite")
    else:
        (folder / "done").touch()
    return task.upper()
