"""A pool of processes: results as they come, an error as it was."""

import pytest

from trimbit.errors import NumericsError
from trimbit.jobs.pool import Workers
from waiting import opened


@pytest.fixture
def workers(tmp_path):
    pool = Workers(2, opened, (tmp_path,))
    yield pool
    pool.close()


def test_what_is_done_first_comes_first(workers):
    """The first task is done after the second one."""
    assert list(workers.each(["waits", "sets"])) == [(1, "SETS"), (0, "WAITS")]


def test_an_error_comes_as_it_was(workers):
    with pytest.raises(NumericsError, match="not finite"):
        list(workers.each(["fails"]))
