"""What cells run on: the model, the data, and the folder of work in progress."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from harness.models import write_off_grid
from trimbit.jobs.progress import Reporter
from trimbit.pipeline.job import Job
from trimbit.pipeline.preflight import open_job
from trimbit.pipeline.recipes import load_recipe
from trimbit.pipeline.text import NAMED

BENCHMARKS = Path(__file__).parent.parent
DOCS = BENCHMARKS.parent / "docs"
WORK = BENCHMARKS / ".work"
TEST, TRAIN = "wikitext-2/wiki.test.raw", "wikitext-2/wiki.train.prefix.raw"


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The model, the data, and the size and number of the windows on which quality is measured."""

    source: Path  # a model directory or a .gguf file
    data: Path  # a folder with `wikitext-2`, `text`, `tasks` and `instruct`
    work: Path = WORK
    context: int = 2048
    windows: int = 16
    overrides: tuple[str, ...] = ()  # applied to every recipe; for tests, whose models and texts are small

    def dump(self) -> str:
        """The bench as text, to hand to another process; see `load`."""
        paths = {name: str(getattr(self, name)) for name in ("source", "data", "work")}
        return json.dumps(paths | {"context": self.context, "windows": self.windows, "overrides": self.overrides})

    @classmethod
    def load(cls, text: str) -> "Bench":
        """The bench that another process dumped."""
        fields = json.loads(text)
        paths = {name: Path(fields[name]) for name in ("source", "data", "work")}
        return cls(**fields | paths | {"overrides": tuple(fields["overrides"])})

    @property
    def cache(self) -> Path:
        """The folder of the stages that cells share."""
        return Path(os.environ.get("TRIMBIT_CACHE") or self.work / "cache")

    def original(self, seed: int) -> Path:
        """The off-grid model, made once per seed."""
        path = self.work / f"offgrid-{seed}"
        if not path.exists():
            partial = path.with_suffix(f".partial-{os.getpid()}")
            shutil.rmtree(partial, ignore_errors=True)
            write_off_grid(self.source, partial, seed)
            partial.rename(path)
        return path

    def job(
        self, recipe: str, seed: int = 0, overrides: tuple[str, ...] = (), *, text: str = TRAIN,
        model_seed: int | None = None, reporter: Reporter | None = None,
    ) -> Job:  # fmt: skip
        """A job on the off-grid model; `model_seed` seeds that model's scales, by default `seed` does.

        `text` is a file of the data, a path, or the name of a text that is no file.
        """
        loaded = load_recipe(recipe, (*overrides, *self.overrides))
        calibration = text if text in NAMED else str(self.data / text)
        return open_job(
            self.original(seed if model_seed is None else model_seed), loaded, calibration=calibration,
            seed=seed, cache=self.cache, reporter=reporter,
        )  # fmt: skip

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """Yield a temporary path for a compressed directory that is not kept."""
        self.work.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=self.work) as folder:
            yield Path(folder) / "out"
