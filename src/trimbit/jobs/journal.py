"""Results as they come, one a line, so that what was broken off goes on where it stopped."""

import json
from pathlib import Path
from typing import Any

from trimbit.errors import ArtifactError, PlanError
from trimbit.jobs.cache import save_atomically


class Journal:
    """JSON objects, one a line, after a line that says what they belong to; without a path nothing is kept."""

    def __init__(self, path: Path | None, belongs: str) -> None:
        self.path = path
        self.header = json.dumps({"belongs": belongs})

    def read(self) -> list[dict[str, Any]]:
        """All entries, in their order; a last line that was not finished is removed.

        Raises:
            PlanError: if they belong to something else.
            ArtifactError: if the file is damaged.
        """
        if self.path is None or not self.path.exists():
            return []
        text = self.path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            save_atomically(self.path, lambda beside: beside.write_text(whole, encoding="utf-8"))
        if not whole:
            return []
        header, *lines = whole.splitlines()
        if header != self.header:
            raise PlanError(f"{self.path} holds the results of another model, space or budget; remove it")
        try:
            return [json.loads(line) for line in lines if line != self.header]  # two runs at once may have begun it
        except ValueError as err:
            raise ArtifactError(f"{self.path}: a file of the cache is damaged; remove it and run again") from err

    def append(self, entry: dict[str, Any]) -> None:
        """Add one entry."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        first = not self.path.exists() or self.path.stat().st_size == 0
        with self.path.open("a", encoding="utf-8") as file:
            lines = [self.header] if first else []
            file.write("\n".join([*lines, json.dumps(entry)]) + "\n")
