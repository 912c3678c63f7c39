"""Runs of the command line inside this process."""

import json
import signal
import sys

import pytest

from trimbit.cli import main as cli


@pytest.fixture
def run(monkeypatch, capfd):
    """Run `main`; gives the exit code, stdout and stderr."""

    def go(*arguments):
        monkeypatch.setattr(sys, "argv", ["trimbit", *map(str, arguments)])
        before = signal.getsignal(signal.SIGTERM)
        capfd.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code
        finally:
            signal.signal(signal.SIGTERM, before)
        out, err = capfd.readouterr()
        return code, out, err

    return go


@pytest.fixture(scope="session")
def compressed(compressed):
    """The directory alone."""
    return compressed[0]


@pytest.fixture
def options(job):
    return ["--recipe", job.recipe, "--calibration", job.text]


@pytest.fixture
def task_data(tmp_path):
    """A folder with the files of two tasks."""
    pytest.importorskip("lm_eval")
    piqa = {"goal": "w3 w4", "sol1": "w5", "sol2": "w6 w7 w8", "label": 1}
    winogrande = {"sentence": "w3 _ w4", "option1": "w5", "option2": "w6", "answer": "1"}
    for name, row in (("piqa_validation", piqa), ("winogrande_xl_validation", winogrande)):
        (tmp_path / f"{name}.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    return tmp_path


@pytest.fixture
def refused(run, tmp_path):
    """Run a command that must fail; stderr is one line with these words, and no output or half of one is left."""

    def go(*arguments, words, code=1, out="out"):
        before = {path.name for path in tmp_path.iterdir()}
        got, stdout, err = run(*arguments)
        error = [line for line in err.splitlines() if line.startswith("trimbit: ")]
        assert (got, len(error)) == (code, 1), err
        assert err.splitlines()[-1] == error[0]
        assert "Traceback" not in err
        assert stdout == ""
        for word in words:
            assert word in error[0], error[0]
        assert {path.name for path in tmp_path.iterdir()} == before
        assert not list(tmp_path.glob(".*partial*"))
        return error[0]

    return go
