"""TOGA-q's figures: learnt masks of precision beside channels chosen otherwise, and beside other methods.

    python benchmarks/bench_toga.py .models/SmolLM2-135M-Instruct.Q4_1.gguf --data DATA [--only PART ...]

Each cell is stored in benchmarks/results/toga.json as soon as it is done, and a cell that is there is not run again;
docs/toga.md is drawn from it at the end. The model is taken off its 4-bit grid first (benchmarks/offgrid.py), seed 0.
All methods see the same text of WikiText-2 train: 16 rows of 2,048 tokens for second moments and GPTQ, 150 further rows
for masks. Perplexity and KL are at context 2048, on the first 16 windows of WikiText-2 test and of C4. Masks are learnt
in 600 steps of 512 tokens.
"""

import math
import shutil
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from bench_main import CONTEXT, HERE, WINDOWS, WORK, Bench, command_line, write_tables
from bench_qpruner import table
from trimbit import data
from trimbit.artifact import weight_nbytes
from trimbit.evaluate import final_hidden, load_model, load_tokenizer, read_hidden, score
from trimbit.kv_cache import pack_cache
from trimbit.learning import shares
from trimbit.pipeline import Session, open_session
from trimbit.precision import KVPrecision
from trimbit.recipe import load_recipe

RESULTS = HERE / "results" / "toga.json"
PAGE = HERE.parent / "docs" / "toga.md"
TEXTS = {"wikitext-2": "wikitext-2/wiki.test.raw", "c4": "text/c4_en_300.jsonl.gz"}
TRAIN = "wikitext-2/train_paragraphs_part.txt.gz"
NEAREST = "quant={name: rtn, params: {scales: mse}}"
ALONE = ("search.share=0.0", "search.sort=false")
SETTINGS = {  # channels by diag H, learnt masks, and what else there is at about the same bits
    "W3.2A3.2": ("atom-w3.2a3.2", "toga-q-w3.2a3.2", {}),
    "W1.6A16": (
        "salient-w1.6a16",
        "toga-q-w1.6a16",
        {"PTQ1.61's layout": ("salient-w1.6a16", ("search.low=mbinaryrow",))},
    ),
    "W2A16": (
        "salient-w2a16",
        "toga-q-w2a16",
        {"SliM": ("slim-w2a16", ()), "GPTQ, INT2": ("salient-w2a16", (*ALONE, "search.low=int2g128"))},
    ),
    "W3A16": (
        "salient-w3a16",
        "toga-q-w3a16",
        {"SliM": ("slim-w3a16", ()), "GPTQ, INT3": ("salient-w3a16", (*ALONE, "search.low=int3g128"))},
    ),
    "W4A4": (
        "atom-w4a4",
        "toga-q-w4a4",
        {"RTN, diag H, not sorted": ("atom-w4a4", (NEAREST, "search.sort=false")), "QuaRot": ("quarot-w4a4", ())},
    ),
}
ABLATION = {  # at W4A4, each step adds to those before it
    "RTN W4A4": "RTN, low format alone",
    "+ 12.5 % INT8": "RTN, diag H, not sorted",
    "+ reorder": "RTN, diag H",
    "+ GPTQ": "diag H",
    "+ KV4": "diag H, KV4",
}
CACHES = {"exact": "null", "4 bits, a head": "{bits: 4}", "4 bits, group 32": "{bits: 4, group: 32}",
          "3 bits, a head": "{bits: 3}", "8 bits, a head": "{bits: 8}"}  # fmt: skip
UNQUANTISED = "search={name: fixed, params: {blocks: bf16, table: bf16}}"
OPTIONS = {  # at W1.6A16: what of the masks' training differs from the recipe
    "as in the recipe": (),
    "no prior": ("search.prior=0.0",),
    "Gumbel": ("search.estimator=gumbel", "search.temperature=0.4"),
    "KL": ("search.loss=kl",),
    "GPTQ's versions": ("search.versions=quant",),
    "no hypernetwork": ("search.network=logits", "search.learning_rate=0.05"),
    "from nearly all high": ("search.offset=3.0",),
}
WITH_KV4 = ("diag H", "learnt")  # the methods that are tried with keys and values in 4 bits, too
PARTS = ("settings", "kv", "options", "cost")


def methods(setting: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Recipe and overrides of each method of a setting."""
    salient, learnt, more = SETTINGS[setting]
    return {
        "low format alone": (salient, ALONE),
        "RTN, low format alone": (salient, (NEAREST, *ALONE)),
        "RTN, diag H": (salient, (NEAREST,)),
        "random": (salient, ("search.by=random",)),
        "diag H": (salient, ()),
        "shares by measured KL": (salient, ("search.name=shares",)),
        "RTN, learnt": (learnt, (NEAREST,)),
        "learnt": (learnt, ()),
        **more,
    }


class Toga(Bench):
    """Whole recipes on two texts."""

    def opened(self, recipe: str, overrides: tuple[str, ...] = ()) -> Session:
        kept = ("search.checkpointing=false",) if recipe.startswith("toga") else ()  # faster, and the same masks
        loaded = load_recipe(recipe, (*overrides, *kept, "calibration.training=150"))
        return open_session(self.off_grid(0), loaded, calibration=str(self.folder / TRAIN), seed=0)

    def run(self, recipe: str, overrides: tuple[str, ...] = (), *, also_kv4: bool = False) -> dict:
        """Compress, and what is left on both texts; where masks are learnt, their shares and curve, too."""
        out = WORK / "toga"
        shutil.rmtree(out, ignore_errors=True)
        session = self.opened(recipe, overrides)
        started = time.perf_counter()
        plan = session.find_plan(None)
        searched = time.perf_counter()
        written = session.write(plan, out)
        found = {
            "nbytes": weight_nbytes(out), "search_seconds": round(searched - started, 1),
            "method": plan.found_by.method,
            "apply_seconds": round(time.perf_counter() - searched, 1), "notes": list(plan.found_by.notes),
            "held_out_kl": written.found_by.measured_damage, "texts": {text: self.on(out, text) for text in TEXTS},
        }  # fmt: skip
        layout = session.layout
        blocks = [weight for weight in layout.weights.values() if layout.readers(weight.site)]
        held = sum(s.nbytes for unit, own in layout.units_tensors(plan).items() if "." in unit for s in own.values())
        found["block_bits"] = round(8 * held / sum(weight.rows * weight.cols for weight in blocks), 4)
        if also_kv4:
            found["texts, KV4"] = {text: self.on(out, text, KVPrecision()) for text in TEXTS}
        if plan.content in session.curves:
            curve = session.curves[plan.content]
            found |= {
                "shares": shares(session.layout, plan, session.search[1].high),
                "losses": [round(step["loss"], 4) for step in curve],
            }
        return found

    def on(self, path: Path, text: str, kv_cache: KVPrecision | None = None) -> dict:
        """ppl@2048 and KL on a text, keys and values as the model caches them, or as is said here."""
        original = self.off_grid(0)
        windows = data.evaluation_windows(
            self.folder / TEXTS[text], load_tokenizer(original), context=CONTEXT, limit=WINDOWS
        )
        dense, cached = load_model(original, torch.bfloat16), WORK / f"dense-{original.name}-{text}.safetensors"
        if not cached.exists():
            save_file({str(at): final_hidden(dense, window).clone() for at, window in enumerate(windows)}, cached)
        reference, model = load_file(cached), load_model(path, torch.bfloat16)
        if kv_cache is not None:
            pack_cache(model, kv_cache)
        totals = torch.zeros(3, dtype=torch.float64)
        for at, window in enumerate(windows):
            totals += score(model, read_hidden(model, window), window, (dense, reference[str(at)]))
        nll, kl, _ = (totals / (len(windows) * (CONTEXT - 1))).tolist()
        return {"ppl@2048": math.exp(nll), "kl": kl}

    def original(self) -> dict:
        return {
            "nbytes": weight_nbytes(self.off_grid(0)),
            "texts": {text: self.on(self.off_grid(0), text) for text in TEXTS},
        }

    def cost(self) -> dict:
        """Seconds a step of 512 tokens, with each block run twice and without, in turns."""
        session = self.opened("toga-q-w3.2a3.2")
        masked = session.masked(session.search[1])
        generator = torch.Generator().manual_seed(0)
        masks = {
            site: (torch.rand(len(layers[0].inputs.order), generator=generator) < 0.04).float()
            for site, layers in masked.layers.items()
        }
        seconds: dict[str, list[float]] = {"checkpointed": [], "kept": []}
        for step in range(10):
            for kind, own in seconds.items():
                masked.checkpointing = kind == "checkpointed"
                started = time.perf_counter()
                masked.gradients(masks, step)
                own.append(round(time.perf_counter() - started, 3))
        return {"step_seconds": seconds}


def write_page(results: dict) -> None:
    """Draw all tables and pictures of docs/toga.md."""
    parts = {
        "ablation": lambda r: texts_table(
            with_kv4(r), "step", {step: f"settings/W4A4/{method}" for step, method in ABLATION.items()}
        ),
        "settings": settings_table,
        "caches": lambda r: texts_table(r, "cache", {kind: f"kv/{kind}" for kind in CACHES}),
        "options": lambda r: texts_table(r, "masks", {option: f"options/{option}" for option in OPTIONS}),
        "cost": cost_table,
    }
    for part, rows in parts.items():
        write_tables(PAGE, "\n" + "\n".join(rows(results)) + "\n\n", part)
    if any(key.startswith("settings/") for key in results):
        draw_bits(results)
    draw_masks(results)


def texts_table(results: dict, head: str, keys: dict[str, str]) -> list[str]:
    """Bytes, perplexity and KL of some cells, the original first."""
    heads = [head, "weight file, MB", *(f"{what}, {text}" for text in TEXTS for what in ("ppl@2048", "KL"))]
    rows = []
    for name, key in {"original": "original", **keys}.items():
        cell = results.get(key)
        figures = [] if cell is None else [f"{cell['nbytes'] / 1e6:.2f}", *figures_of(cell)]
        rows.append([name, *(figures or ["not run", *[""] * (len(heads) - 2)])])
    return table(heads, rows)


def figures_of(cell: dict) -> list[str]:
    found = [cell["texts"][text] for text in TEXTS]
    return [figure for own in found for figure in (f"{own['ppl@2048']:.2f}", f"{own['kl']:.3f}")]


def with_kv4(results: dict) -> dict:
    """The results, with the figures that a cell has under KV4 as a cell of their own."""
    kv4 = {f"{key}, KV4": cell | {"texts": own} for key, cell in results.items() if (own := cell.get("texts, KV4"))}
    return results | kv4


def settings_table(results: dict) -> list[str]:
    lines: list[str] = []
    for setting in SETTINGS:
        names = [*methods(setting), *(f"{method}, KV4" for method in WITH_KV4)]
        keys = {method: f"settings/{setting}/{method}" for method in names}
        lines += [f"### {setting}", "", *texts_table(with_kv4(results), "method", keys), ""]
    if any(key.startswith("settings/") for key in results):
        lines += ["![KL and perplexity against bits](toga-bits.png)", ""]
    if any(key.endswith("/learnt") for key in results):
        lines += ["![Learnt masks](toga-masks.png)"]
    return lines


def cost_table(results: dict) -> list[str]:
    cell = results.get("cost")
    if cell is None:
        return ["not run"]
    each = {kind: sorted(own) for kind, own in cell["step_seconds"].items()}
    rows = [[kind, f"{own[len(own) // 2]:.2f}", f"{own[0]:.2f} to {own[-1]:.2f}"] for kind, own in each.items()]
    return table(["activations of a block", "seconds a step, median", "range"], rows)


def draw_bits(results: dict) -> None:
    """KL and perplexity on both texts against the true bits of a weight of the blocks, a mark a method."""
    from matplotlib import pyplot

    figure, rows = pyplot.subplots(2, 2, figsize=(11, 8), layout="constrained", sharex=True, sharey="row")
    names = list(dict.fromkeys(method for setting in SETTINGS for method in methods(setting)))
    for panels, (what, label) in zip(
        rows, (("kl", "KL to the original, nats a token"), ("ppl@2048",) * 2), strict=True
    ):
        for axes, text in zip(panels, TEXTS, strict=True):
            for at, method in enumerate(names):
                keys = [f"settings/{setting}/{method}" for setting in SETTINGS]
                cells = [results[key] for key in keys if key in results]
                if cells:
                    points = [(c["block_bits"], c["texts"][text][what]) for c in cells]
                    axes.plot(*zip(*points, strict=True), "osD^vP*X<>"[at % 10], color=f"C{at % 10}", label=method)
            axes.set(title=text, yscale="log")
        panels[0].set_ylabel(label)
    for axes in rows[1]:
        axes.set_xlabel("bits of a weight of the blocks, scales and index lists included")
    rows[0][1].legend(frameon=False, fontsize="small")
    figure.savefig(PAGE.with_name("toga-bits.png"), dpi=110)
    pyplot.close(figure)


def draw_masks(results: dict) -> None:
    """The share of high channels by block and site, and the loss, of each setting's learnt masks."""
    from matplotlib import pyplot

    cells = {s: results[k] for s in SETTINGS if (k := f"settings/{s}/learnt") in results}
    if not cells:
        return
    figure, rows = pyplot.subplots(len(cells), 2, figsize=(11, 2.8 * len(cells)), layout="constrained", squeeze=False)
    for (left, right), (setting, cell) in zip(rows, cells.items(), strict=True):
        for site, own in cell["shares"].items():
            left.plot(range(len(own)), [100 * share for share in own], marker=".", label=site)
        left.set(title=setting, xlabel="block", ylabel="high channels, %", ylim=(0, None))
        left.legend(frameon=False, ncols=4, fontsize="small")
        losses = torch.tensor(cell["losses"])
        right.plot(range(1, len(losses) + 1), losses, color="0.85", lw=0.8)
        means = losses.unfold(0, 25, 1).mean(-1)
        right.plot(range(25, len(losses) + 1), means, label="mean of 25 steps")
        right.set(xlabel="step", ylabel="loss, nats a token")
        right.legend(frameon=False)
    figure.savefig(PAGE.with_name("toga-masks.png"), dpi=110)
    pyplot.close(figure)


def main() -> None:
    options = command_line(__doc__, PARTS)
    bench = Toga(options.source, options.data, RESULTS)
    bench.cell("original", bench.original)
    if "settings" in options.only:
        for setting in SETTINGS:
            for method, (recipe, own) in methods(setting).items():
                kv4 = method in WITH_KV4
                bench.cell(f"settings/{setting}/{method}", lambda r=recipe, o=own, k=kv4: bench.run(r, o, also_kv4=k))
    if "kv" in options.only:
        for kind, precision in CACHES.items():
            own = (UNQUANTISED, f"kv_cache={precision}", "quant={name: rtn}")
            bench.cell(f"kv/{kind}", lambda o=own: bench.run("rtn-w4a4", o))
    if "options" in options.only:
        for option, own in OPTIONS.items():
            bench.cell(f"options/{option}", lambda o=own: bench.run("toga-q-w1.6a16", o))
    if "cost" in options.only:
        bench.cell("cost", bench.cost)
    write_page(bench.results)


if __name__ == "__main__":
    main()
