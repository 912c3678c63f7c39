"""What a search tried, beside its result: a table, and a picture of bytes against KL."""

import csv
import importlib.util
import io
from collections.abc import Sequence
from typing import NamedTuple

from trimbit.errors import RecipeError
from trimbit.search.optimise import pareto


class Trial(NamedTuple):
    """One plan: the bytes of its file, and KL(original || model) as it was judged, in nats a token."""

    nbytes: int
    kl: float


def table(trials: Sequence[Trial]) -> str:
    """CSV, in the order of trial, with what no other trial beats in both marked."""
    front = set(pareto([(float(trial.nbytes), trial.kl) for trial in trials]))
    out = io.StringIO()
    lines = csv.writer(out, lineterminator="\n")
    lines.writerow(["trial", "nbytes", "kl", "pareto"])
    lines.writerows([at + 1, trial.nbytes, f"{trial.kl:.6f}", int(at in front)] for at, trial in enumerate(trials))
    return out.getvalue()


def require_plot() -> None:
    """Fail before anything long where the picture cannot be drawn.

    Raises:
        RecipeError: if matplotlib is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise RecipeError("a search by trials draws a picture: pip install 'trimbit[bo]'")


def picture(trials: Sequence[Trial], limit: int) -> bytes:
    """A PNG: every trial, the Pareto set joined by a line, and the budget."""
    from matplotlib.figure import Figure

    front = sorted(trials[at] for at in pareto([(float(trial.nbytes), trial.kl) for trial in trials]))
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    shown = axes.scatter([t.nbytes / 1e6 for t in trials], [t.kl for t in trials], c=range(1, len(trials) + 1), s=26)
    axes.plot([t.nbytes / 1e6 for t in front], [t.kl for t in front], color="0.35", linewidth=1, label="Pareto set")
    axes.plot(trials[0].nbytes / 1e6, trials[0].kl, "s", mfc="none", mec="tab:red", ms=11, label="first: by importance")
    axes.axvline(limit / 1e6, color="tab:red", linestyle=":", linewidth=1, label="budget")
    axes.set(xlabel="weight file, MB", ylabel="KL to the original, nats a token")
    figure.colorbar(shown, label="trial")
    axes.legend(frameon=False)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=150)
    return out.getvalue()
