"""A job that is killed at any moment, and run again, ends with the same bytes."""

import os
import random
import signal
import time

import pytest

from jobs import BUDGET
from sessions import session
from trimbit.jobs import carried
from trimbit.schema.budget import Budget

KILLS = 12
KINDS = [("text", signal.SIGKILL), ("self", signal.SIGKILL), ("text", signal.SIGINT)]


def run(job, cache, out, calibration):
    return session(job, calibration=calibration, cache=cache).compress(Budget.parse(BUDGET), out)


def forked(work):
    """A process of its own that does some work; its exit code says whether it got to the end."""
    pid = os.fork()
    if pid:
        return pid
    signal.signal(signal.SIGINT, signal.default_int_handler)  # processes of a test run may ignore it
    code = 1
    try:
        work()
        code = 0
    finally:
        os._exit(code)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("calibration", "how"), [("text", signal.SIGKILL), ("self", signal.SIGKILL), ("text", signal.SIGINT)]
)
def test_killed_at_random_moments(job, compressed, tmp_path, monkeypatch, calibration, how):
    """Nothing of what was killed is left in the output's folder; what was done is not lost."""
    monkeypatch.setattr(carried, "SECONDS", 0.0)
    text = str(job.text) if calibration == "text" else "self"
    whole = tmp_path / "whole" / "out"
    started = time.monotonic()
    run(job, tmp_path / "cache of the whole", whole, text)
    longest = time.monotonic() - started
    rng, cache, out = random.Random(calibration), tmp_path / "cache", tmp_path / "parts" / "out"
    killed = 0
    for number in range(KILLS):
        pid = forked(lambda: run(job, cache, out, text))
        time.sleep(rng.uniform(0, 0.4 * longest) if number else 0.05 * longest)
        os.kill(pid, how)
        _, status = os.waitpid(pid, 0)
        killed += status != 0
        if out.exists():  # it came to its end
            break
    assert killed
    if not out.exists():
        run(job, cache, out, text)
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    for file in whole.iterdir():
        if file.name != "run.json":  # which says how long it took
            assert (out / file.name).read_bytes() == file.read_bytes(), file.name
    if calibration == "text":
        assert (out / "model.safetensors").read_bytes() == (compressed[0] / "model.safetensors").read_bytes()
