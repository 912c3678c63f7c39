"""Every test runs offline, on one thread, with a cache of its own."""

import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start

import pytest
import torch
from transformers.utils import logging

import shapes  # noqa: F401 # before what imports the package
from jobs import BUDGET, Job

logging.disable_progress_bar()
torch.set_num_threads(1)  # threads that wait for each other take far longer than what they do for tiny models


@pytest.fixture(scope="session", autouse=True)
def cache():
    """Keep what a test run caches out of the user's own cache."""
    with tempfile.TemporaryDirectory(prefix="trimbit-cache-") as path:
        previous = os.environ.get("TRIMBIT_CACHE")
        os.environ["TRIMBIT_CACHE"] = path
        yield path
        if previous is None:
            del os.environ["TRIMBIT_CACHE"]
        else:
            os.environ["TRIMBIT_CACHE"] = previous


@pytest.fixture(scope="session")
def job(tmp_path_factory):
    """A tiny model, a text and a recipe for whole runs; nothing may change them."""
    return Job(tmp_path_factory.mktemp("job"))


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def compressed(job, tmp_path_factory):
    """The job's model within its budget: the directory and its plan; nothing may change them."""
    from sessions import session
    from trimbit.schema.budget import Budget

    out = tmp_path_factory.mktemp("compressed") / "small"
    return out, session(job).compress(Budget.parse(BUDGET), out)
