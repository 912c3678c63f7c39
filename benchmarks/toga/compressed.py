"""Compressed models: how jobs are opened, what is measured, and the table used in most parts of the page."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from harness.bench import Bench
from harness.cells import Found
from harness.quality import quality
from harness.records import run_fields
from harness.tables import Results, table
from toga.masks import seen_kl
from trimbit.model.resolved import resolve
from trimbit.pipeline.flow import compress, find_plan
from trimbit.pipeline.job import Job
from trimbit.report.training import shares
from trimbit.schema.kv_cache import KVPrecision
from trimbit.schema.plan import Plan

TEXTS = {"wikitext-2": "wikitext-2/wiki.test.raw", "c4": "text/c4_en_300.jsonl.gz"}
TRAIN = "wikitext-2/train_paragraphs_part.txt.gz"
FAST = ("search.checkpointing=false",)  # on a CPU: the same masks sooner, in more memory


def opened(bench: Bench, recipe: str, overrides: tuple[str, ...] = (), seed: int = 0) -> Job:
    """A job on the text of this benchmark."""
    return bench.job(recipe, seed, all_overrides(recipe, overrides), text=TRAIN, model_seed=0)


def all_overrides(recipe: str, overrides: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The overrides, with those that all cells share."""
    return ("calibration.training=150", *(FAST if recipe.startswith("toga") else ()), *overrides)


def files(bench: Bench, texts: Iterable[str] = TEXTS) -> tuple[Path, ...]:
    """The files that a cell reads."""
    return (bench.data / TRAIN, *(bench.data / TEXTS[text] for text in texts))


def compressed(
    bench: Bench, recipe: str, overrides: tuple[str, ...] = (), *, seed: int = 0, texts: Iterable[str] = TEXTS,
    also_kv4: bool = False,
) -> Found:  # fmt: skip
    """Compress, and measure quality on the texts; for learnt masks also their shares and loss curve."""
    job, original = opened(bench, recipe, overrides, seed), bench.original(0)
    with bench.scratch() as out:
        plan = compress(job, None, out)
        found = run_fields(out) | {"block_bits": _block_bits(job, plan)}
        found["texts"] = {text: quality(bench, out, original, TEXTS[text]) for text in texts}
        if also_kv4:
            found["texts, KV4"] = {text: quality(bench, out, original, TEXTS[text], KVPrecision()) for text in texts}
    if curve := find_plan(job, None).curve:  # from the cache: it was found above
        found |= {
            "kl_in_search": seen_kl(job, plan),
            "shares": shares(job.layout, plan, job.steps.search.high),
            "losses": [round(step["loss"], 4) for step in curve],
        }
    return found


def _block_bits(job: Job, plan: Plan) -> float:
    """Mean bits per block weight, including all that is stored for the blocks."""
    layout = job.layout
    blocks = [weight for weight in layout.weights.values() if layout.readers(weight.site)]
    held = sum(unit.nbytes for unit in resolve(plan, layout).units.values() if unit.origin.block is not None)
    return round(8 * held / sum(weight.rows * weight.cols for weight in blocks), 4)


def texts_table(results: Results, head: str, keys: dict[str, str], size: str = "nbytes") -> list[str]:
    """A table of bytes, perplexity and KL; if the bytes are those of weights, also bits, and the original first."""
    weights = size == "nbytes"
    held = ["weight file, MB", "bits of a weight"] if weights else ["keys and values of 2,048 tokens, MB"]
    heads = [head, *held, *(f"{what}, {text}" for text in TEXTS for what in ("ppl@2048", "KL"))]
    rows = []
    for name, key in (({"original": "original"} if weights else {}) | keys).items():
        cell = results.get(key)
        if cell is None:
            figures = ["not run", *[""] * (len(heads) - 2)]
        else:
            bits = [f"{cell.get('block_bits', 16):.2f}"] if weights else []
            figures = [f"{cell[size] / 1e6:.2f}", *bits, *_figures_of(cell)]
        rows.append([name, *figures])
    return table(heads, rows)


def _figures_of(cell: dict[str, Any]) -> list[str]:
    found = [cell["texts"][text] for text in TEXTS]
    return [figure for own in found for figure in (f"{own['ppl@2048']:.2f}", f"{own['kl']:.3f}")]


def with_kv4(results: Results) -> Results:
    """The results, in which the figures that a cell has with KV4 are a cell of their own."""
    kv4 = {f"{key}, KV4": cell | {"texts": own} for key, cell in results.items() if (own := cell.get("texts, KV4"))}
    return results | kv4
