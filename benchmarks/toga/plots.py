"""The pictures of docs/results/toga-q.md."""

from pathlib import Path
from typing import Any

import torch

from harness.tables import Results
from toga.compressed import TEXTS
from toga.methods import SETTINGS, methods

MOST_PPL = 100_000  # the largest drawn: beyond it nothing is left of the model


def draw_bits(results: Results, path: Path) -> None:
    """Plot KL and perplexity on both texts against the true bits per block weight, one marker per method."""
    from matplotlib import pyplot

    figure, rows = pyplot.subplots(2, 2, figsize=(11, 9), layout="constrained", sharex=True, sharey="row")
    marks: dict[str, Any] = {}
    for panels, (what, label) in zip(
        rows, (("kl", "KL to the original, nats a token"), ("ppl@2048",) * 2), strict=True
    ):
        for axes, text in zip(panels, TEXTS, strict=True):
            _points(axes, results, text, what, marks)
            axes.set(title=text, yscale="log")
        panels[0].set_ylabel(label)
    for axes in rows[1]:
        axes.set_xlabel("bits of a weight of the blocks, scales and index lists included")
    rows[1][0].set_ylim(top=MOST_PPL)
    title = f"filled: weights alone; hollow: activations, too; perplexities above {MOST_PPL:,} are not drawn"
    figure.legend(
        marks.values(), marks, loc="outside lower center", ncols=5, fontsize="small", frameon=False, title=title
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _points(axes: Any, results: Results, text: str, what: str, marks: dict[str, Any]) -> None:  # noqa: ANN401
    """Draw a marker for each method and setting; `marks` collects those for the legend."""
    for at, method in enumerate(dict.fromkeys(method for setting in SETTINGS for method in methods(setting))):
        kind = {"marker": "osD^vP*X<>h"[at % 11], "color": f"C{at % 10}", "linestyle": ""}
        for setting in SETTINGS:
            if cell := results.get(f"settings/{setting}/{method}"):
                fill = "full" if setting.endswith("A16") else "none"
                point = axes.plot(cell["block_bits"], cell["texts"][text][what], fillstyle=fill, **kind)
                marks[method] = point[0] if fill == "full" else marks.get(method, point[0])


def draw_masks(results: Results, path: Path) -> None:
    """Plot the share of high channels by block and site, and the loss, of the learnt masks of each setting."""
    from matplotlib import pyplot

    cells = {s: results[k] for s in SETTINGS if (k := f"settings/{s}/learnt") in results}
    if not cells:
        return
    figure, rows = pyplot.subplots(len(cells), 2, figsize=(11, 2.8 * len(cells)), layout="constrained", squeeze=False)
    for (left, right), (setting, cell) in zip(rows, cells.items(), strict=True):
        for site, own in cell["shares"].items():
            left.plot(range(len(own)), [100 * share for share in own], marker=".", label=site)
        left.set(title=f"{setting}, {len(cell['losses'])} steps", xlabel="block", ylabel="high channels, %")
        left.set_ylim(0, 125 * max(max(own) for own in cell["shares"].values()))  # room for the legend
        left.legend(frameon=False, ncols=4, fontsize="small", loc="upper right")
        losses = torch.tensor(cell["losses"])
        right.plot(range(1, len(losses) + 1), losses, color="0.85", lw=0.8)
        means = losses.unfold(0, 25, 1).mean(-1)
        right.plot(range(25, len(losses) + 1), means, label="mean of 25 steps")
        right.set(xlabel="step", ylabel="loss, nats a token")
        right.legend(frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
