"""Append-only JSON lines, from which an interrupted job resumes.

Each line has a checksum: a line that is damaged, or cut off by a crash, is reported and skipped.
"""

import json
import logging
import zlib
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


class Journal:
    """JSON objects, one a line; the name of the file says what they belong to."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """All intact entries, in order."""
        if not self.path.exists():
            return []
        found = []
        for number, line in enumerate(self.path.read_bytes().split(b"\n"), start=1):
            checksum, _, text = line.partition(b" ")
            if not line:
                continue
            if checksum != _checksum(text):
                log.warning("%s, line %d is damaged; skipping and recomputing it", self.path, number)
                continue
            found.append(json.loads(text))
        return found

    def append(self, entry: dict[str, Any]) -> None:
        """Add one entry; several processes may add to one journal."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(entry).encode()
        with self.path.open("ab") as file:
            file.write(b"\n" + _checksum(text) + b" " + text + b"\n")  # starts a new line even after a cut-off one


def _checksum(text: bytes) -> bytes:
    return f"{zlib.crc32(text):08x}".encode()
