"""Directories that are written and statistics that are collected, each in one call."""

from contextlib import contextmanager

from trimbit.artifact.writer import Writer, appearing
from trimbit.calibrate.stats import Stats, collect
from trimbit.calibrate.teacher import teacher_outputs


@contextmanager
def writing(out, layout, plan):
    """A writer whose directory appears at the end."""
    with appearing(out) as folder:
        writer = Writer(folder, layout, plan)
        yield writer
        writer.finish()


def taught(stream, rows, folder):
    """Held-out rows and the original's outputs for them, as `apply_plan` takes them."""
    return rows, None if rows is None else teacher_outputs(stream, rows, folder / "taught", lambda *_: None)


def collected(stream, tokens, folder):
    """The moments of every site, stored in a folder."""
    collect(stream, tokens, folder, lambda *_: None)
    return Stats(folder, tokens.numel())
