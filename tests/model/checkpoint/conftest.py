"""A tiny checkpoint."""

from pathlib import Path

import pytest

from checkpoints import write


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write(tmp_path / "tiny")
    return tmp_path / "tiny"
