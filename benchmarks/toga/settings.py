"""How good are learnt masks in five settings, compared with channels by diag H or at random, and with other methods?

Cells: the original, then each method in each setting, from calibration to quality on two texts. 6 to 30 minutes per
cell; about an hour if masks are learnt, two if shares are measured.
Alone: `python benchmarks/run.py toga.settings --data DATA --only '*/W4A4/*'`
"""

from collections.abc import Iterator
from functools import partial

from harness.bench import Bench
from harness.cells import Cell, Found, seeded
from harness.quality import quality
from harness.records import held_out_kl
from harness.tables import Results, table
from toga.compressed import TEXTS, compressed, files, texts_table, with_kv4
from toga.methods import LEARNT, SETTINGS, WITH_KV4, methods
from trimbit.artifact.files import weight_nbytes

SEEDS = (0,)
SHARED_MINUTES = 10.0  # for moments, and the original's outputs
MINUTES = {"learnt": 65, "RTN, learnt": 15, "learnt, channel by channel": 90, "shares by measured KL": 120}
ABLATION = {  # at W4A4; each step adds to those before it
    "RTN W4A4": "RTN, low format alone",
    "+ 12.5 % INT8": "RTN, diag H, not sorted",
    "+ reorder": "RTN, diag H",
    "+ GPTQ": "diag H",
    "+ KV4": "diag H, KV4",
}
WEIGHTS = "0.41 (WikiText-2) and 0.15 (C4) at best"
CLAIMS = {  # of the paper's abstract, on larger models and against its own baselines
    "W3.2A3.2": "0.79 at best, WikiText-2",
    "W1.6A16": WEIGHTS,
    "W2A16": WEIGHTS,
    "W3A16": WEIGHTS,
    "W4A4": "",
}
# methods of the kinds that the paper claims to beat
RIVALS = ("diag H", "QuaRot", "QuaRot, W3A3", "PTQ1.61's layout", "SliM", "GPTQ, INT2", "GPTQ, INT3")


def cells(bench: Bench, seed: int) -> Iterator[Cell]:
    """One cell for the original, then one for each method in each setting."""
    texts = files(bench)
    yield Cell(
        key=seeded("original", seed), run=partial(original, bench), minutes=6, seed=seed, context=bench.context,
        texts=texts[1:],
    )  # fmt: skip
    for setting in SETTINGS:
        for name, (recipe, overrides) in methods(setting).items():
            kv4 = name in WITH_KV4
            yield Cell(
                key=seeded(f"settings/{setting}/{name}", seed),
                run=partial(compressed, bench, recipe, overrides, seed=seed, also_kv4=kv4),
                minutes=MINUTES.get(name, 25 if kv4 else 10), seed=seed, context=bench.context, texts=texts,
            )  # fmt: skip


def original(bench: Bench) -> Found:
    """Bytes and quality of the original model."""
    path = bench.original(0)
    texts = {text: quality(bench, path, path, TEXTS[text]) for text in TEXTS}
    return {"nbytes": weight_nbytes(path), "texts": texts}


def rows(results: Results) -> list[str]:
    """A table for each setting, and links to the pictures."""
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


def ablation_rows(results: Results) -> list[str]:
    """A table of Atom's steps at W4A4."""
    keys = {step: f"settings/W4A4/{method}" for step, method in ABLATION.items()}
    return texts_table(with_kv4(results), "step", keys)


def ratio_rows(results: Results) -> list[str]:
    """A table of ratios, learnt masks over each other method: of perplexity, and of bits per block weight."""
    found = []
    for setting, claim in CLAIMS.items():
        for method in methods(setting):
            kind = "RTN, learnt" if method.startswith("RTN") else "learnt"
            own, cell = (results.get(f"settings/{setting}/{name}") for name in (kind, method))
            if own and cell and method not in LEARNT:
                ratios = (own["texts"][text]["ppl@2048"] / cell["texts"][text]["ppl@2048"] for text in TEXTS)
                bits = own["block_bits"] / cell["block_bits"]
                said = claim if method in RIVALS else ""
                found.append([setting, method, kind, *(f"{ratio:.3g}" for ratio in ratios), f"{bits:.3f}", said])
    heads = ["setting", "against", "masks", *(f"ratio of ppl, {text}" for text in TEXTS), "ratio of bits", "the paper"]
    return table(heads, found or [["not run", *[""] * (len(heads) - 1)]])


def search_rows(results: Results) -> list[str]:
    """A table of KL on the rows by which plans are chosen: as the search saw it, and once packed."""
    found = []
    for setting in SETTINGS:
        drawn, rounded = results.get(f"noise/{setting}/diag H"), results.get(f"rounded/{setting}")
        for kind in ("diag H", "learnt"):
            packed, nearest = (results.get(f"settings/{setting}/{method}{kind}") for method in ("", "RTN, "))
            if packed and nearest:
                seen = packed.get("kl_in_search", drawn["own"] if drawn else None)
                own = (seen, held_out_kl(packed), rounded["kl"] if rounded and kind == "diag H" else None)
                figures = ("" if kl is None else f"{kl:.3f}" for kl in (*own, held_out_kl(nearest)))
                found.append([setting, kind, *figures])
    heads = ("seen, errors as expected", "packed, GPTQ", "seen, rounded to nearest", "packed, RTN")
    return table(["setting", "masks", *heads], found or [["not run", *[""] * (len(heads) + 1)]])
