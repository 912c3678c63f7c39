"""A pool of processes: results as they come, an error as it was."""

import time
from functools import partial

import pytest

from trimbit.errors import NumericsError
from trimbit.workers import Workers


def opened(folder):
    return partial(work, folder)


def work(folder, task):
    """The first task is done after the second one."""
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


@pytest.fixture
def workers(tmp_path):
    pool = Workers(2, opened, (tmp_path,))
    yield pool
    pool.close()


def test_what_is_done_first_comes_first(workers):
    assert list(workers.each(["waits", "sets"])) == [(1, "SETS"), (0, "WAITS")]


def test_an_error_comes_as_it_was(workers):
    with pytest.raises(NumericsError, match="not finite"):
        list(workers.each(["fails"]))
