"""The training of masks: the curve as a table, and a picture of the curve and the masks."""

import csv
import io
from collections.abc import Mapping, Sequence

from trimbit.model.layout import Layout
from trimbit.schema.plan import Plan
from trimbit.schema.precision import Precision

SMOOTH = 25  # steps of the moving average of the loss


def table(curve: Sequence[Mapping[str, float]]) -> str:
    """CSV, one line per step."""
    out = io.StringIO()
    lines = csv.writer(out, lineterminator="\n")
    lines.writerow(["step", *curve[0]])
    lines.writerows([at + 1, *(f"{value:.6g}" for value in step.values())] for at, step in enumerate(curve))
    return out.getvalue()


def shares(layout: Layout, plan: Plan, high: Precision) -> dict[str, list[float | None]]:
    """For each site of the family, by block, the share of channels in the format `high`; None if the site is gone."""
    found: dict[str, list[float | None]] = {}
    for weight in layout.weights.values():
        block, site = layout.units[weight.unit].block, weight.site.rsplit(".", 1)[-1]
        if block is None:
            continue
        own = found.setdefault(site, [None] * layout.blocks)
        runs = plan.weights.get(weight.name, ())
        if runs:
            own[block] = sum(run.count for run in runs if run.precision == high) / sum(run.count for run in runs)
    return found


def picture(layout: Layout, plan: Plan, high: Precision, curve: Sequence[Mapping[str, float]]) -> bytes:
    """A PNG: the share of high channels by block and site; the loss and the bits of each step's sample."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.8, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for site, own in shares(layout, plan, high).items():
        left.plot(range(len(own)), [float("nan") if x is None else 100 * x for x in own], marker=".", label=site)
    left.set(xlabel="block", ylabel="channels in the high format, %", ylim=(0, None))
    left.legend(frameon=False, ncols=4, fontsize="small")
    steps = range(1, len(curve) + 1)
    losses = [step["loss"] for step in curve]
    means = [sum(losses[max(0, at - SMOOTH) : at]) / min(at, SMOOTH) for at in steps]
    right.plot(steps, losses, color="0.8", lw=0.8)
    right.plot(steps, means, color="tab:blue", label=f"loss, mean of {SMOOTH} steps")
    right.set(xlabel="step", ylabel="loss, nats a token")
    bits = right.twinx()
    bits.plot(steps, [step["bits"] for step in curve], color="tab:orange", lw=1, label="bits a code, sampled")
    bits.set_ylabel("bits a code")
    handles = [*right.get_legend_handles_labels()[0], *bits.get_legend_handles_labels()[0]]
    right.legend(handles=handles, frameon=False)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=150)
    return out.getvalue()
