"""Measures the time and memory of processes, and the time of a job's stages."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from harness.bench import BENCHMARKS
from trimbit.jobs.progress import Progress

# On Linux the peak memory of a child includes its parent's at the fork, so a small process stands in between.
BETWEEN = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=sys.stderr)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
"""


def measured(arguments: Sequence[str], cache: Path | None = None) -> tuple[float, int]:
    """Seconds and peak resident bytes of running `python ARGUMENTS`, which can import the benchmarks.

    Raises:
        CalledProcessError: if the process fails.
    """
    path = os.pathsep.join([str(BENCHMARKS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path} | ({"TRIMBIT_CACHE": str(cache)} if cache else {})
    command = [sys.executable, "-c", BETWEEN, sys.executable, *arguments]
    started = time.perf_counter()
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
    return time.perf_counter() - started, int(done.stdout)


class Timed:
    """A reporter that keeps the seconds of each stage by its title; a nested stage counts in both."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[Progress]:
        """Time a stage."""
        started = time.perf_counter()
        yield lambda _done, _total: None
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - started, 1)
