"""The trials of a search: a table, and a picture of bytes against KL and accuracy."""

import csv
import io
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from trimbit.schema.found import Tried
from trimbit.schema.objective import Outcome
from trimbit.schema.plan import Plan
from trimbit.search.solvers.pareto import front


class Trial(NamedTuple):
    """One plan tried by a search over whole plans, and its outcome."""

    plan: Plan
    outcome: Outcome

    @property
    def nbytes(self) -> int:
        """Bytes of the plan's file."""
        return self.plan.found_by.nbytes


def trials_of(tried: Iterable[Tried]) -> list[Trial]:
    """The tried plans that have an outcome."""
    return [Trial(one.plan, one.outcome) for one in tried if one.outcome is not None]


def best(trials: Sequence[Trial]) -> list[int]:
    """Indices of the trials in the Pareto set of bytes and KL, the smallest first."""
    return front([trial.nbytes for trial in trials], [trial.outcome.kl for trial in trials])


def table(trials: Sequence[Trial]) -> str:
    """CSV, in the order of the trials, with the Pareto set of bytes and KL marked."""
    unbeaten = best(trials)
    out = io.StringIO()
    lines = csv.writer(out, lineterminator="\n")
    lines.writerow(["trial", "nbytes", "kl", "nll", "accuracy", "stderr", "pareto"])
    for at, trial in enumerate(trials):
        found = trial.outcome
        figures = ("" if x is None else f"{x:.6f}" for x in (found.kl, found.nll, found.accuracy, found.stderr))
        lines.writerow([at + 1, trial.nbytes, *figures, int(at in unbeaten)])
    return out.getvalue()


def picture(trials: Sequence[Trial], budget_nbytes: int) -> bytes:
    """A PNG: every trial, the Pareto set joined by a line, and the budget; a panel for KL, and one for accuracy."""
    from matplotlib.figure import Figure

    panels = [("KL to the original, nats a token", [trial.outcome.kl for trial in trials], 1, [0.0] * len(trials))]
    accuracies = [trial.outcome.accuracy for trial in trials]
    if None not in accuracies:
        errors = [100 * (trial.outcome.stderr or 0.0) for trial in trials]
        panels.append(("accuracy, %, with its standard error", [100 * (a or 0.0) for a in accuracies], -1, errors))
    figure = Figure(figsize=(6.4 * len(panels), 4), layout="constrained")
    nbytes = [trial.nbytes for trial in trials]
    sizes = [own / 1e6 for own in nbytes]
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (label, values, sign, errors) in zip(all_axes, panels, strict=True):
        joined = front(nbytes, [sign * value for value in values])
        axes.scatter(sizes, values, c=range(1, len(trials) + 1), s=26)
        if any(errors):
            axes.errorbar(sizes, values, errors, fmt="none", ecolor="0.8", elinewidth=1, zorder=0)
        axes.plot([sizes[at] for at in joined], [values[at] for at in joined], color="0.35", lw=1, label="Pareto set")
        axes.plot(sizes[0], values[0], "s", mfc="none", mec="tab:red", ms=11, label="first")
        axes.axvline(budget_nbytes / 1e6, color="tab:red", linestyle=":", linewidth=1, label="budget")
        axes.set(xlabel="weight file, MB", ylabel=label)
        axes.legend(frameon=False)
    figure.colorbar(all_axes[0].collections[0], ax=all_axes, label="trial")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=150)
    return out.getvalue()
