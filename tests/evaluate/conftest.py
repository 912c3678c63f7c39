"""Files of every task."""

import pytest

from task_files import DOCUMENTS, write


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Every task's file, compressed or not by turns."""
    path = tmp_path_factory.mktemp("tasks")
    for at, (name, rows) in enumerate(DOCUMENTS.items()):
        write(path, name, rows, (".jsonl", ".jsonl.gz")[at % 2])
    return path
