"""Which text should a model be fitted to: its own, the one that comes with the package, or one like the test?

Cells: the demo's recipe at 55 MB, fitted to each text, and its quality on three texts that nothing is fitted to:
WikiText-2, C4, and instructions with their answers. About 12 minutes per cell, 5 more for the model's own text.
Alone: `python benchmarks/run.py main.texts --data DATA`
"""

from collections.abc import Iterator
from functools import partial

from harness.bench import TEST, TRAIN, Bench
from harness.cells import Cell, Found, seeded
from harness.quality import quality
from harness.records import run_fields
from harness.tables import Results, table
from trimbit.calibrate.text import read_rows
from trimbit.jobs.cache import save_atomically
from trimbit.pipeline.flow import compress
from trimbit.runtime.load import load_tokenizer
from trimbit.schema.budget import Budget

SEEDS = (0,)
SHARED_MINUTES = 3.0
RECIPE, BUDGET = "demo", "55MB"
FITTED = {"self": "self", "builtin": "builtin", "WikiText-2": TRAIN, "C4": "c4-train.txt"}
TESTED = {"WikiText-2": TEST, "C4": "c4-test.txt", "instructions": "instructions.txt"}
C4, C4_TRAIN = "text/c4_en_300.jsonl.gz", 180  # documents to fit to; the others are for the test
INSTRUCTIONS, INSTRUCTION_ROWS = "instruct/alpaca_2000.jsonl.gz", 400


def cells(bench: Bench, seed: int) -> Iterator[Cell]:
    """One cell for each text that is fitted to."""
    for name in FITTED:
        yield Cell(
            key=seeded(f"texts/{name}", seed), run=partial(fitted, bench, name, seed),
            minutes=17 if name == "self" else 12, seed=seed, context=bench.context,
            texts=(bench.data / TEST, bench.data / TRAIN, bench.data / C4, bench.data / INSTRUCTIONS),
        )  # fmt: skip


def fitted(bench: Bench, name: str, seed: int) -> Found:
    """Perplexity and KL on each test of the model that is fitted to a text."""
    job = bench.job(RECIPE, seed, text=_path(bench, FITTED[name]))
    with bench.scratch() as out:
        compress(job, Budget.parse(BUDGET), out)
        found = run_fields(out)
        for test, text in TESTED.items():
            read = quality(bench, out, bench.original(seed), _path(bench, text))
            found |= {f"{test}: {figure}": value for figure, value in read.items()}
    return found


def _path(bench: Bench, text: str) -> str:
    """A name, a file of the data, or one that is made of its parts."""
    if "/" in text or not text.endswith(".txt"):
        return text
    path = (bench.work / "texts" / text).resolve()
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        written = "\n\n".join(_documents(bench, text))
        save_atomically(path, lambda temporary: temporary.write_text(written, encoding="utf-8"))
    return str(path)


def _documents(bench: Bench, text: str) -> Iterator[str]:
    if text != TESTED["instructions"]:
        documents = [row["text"] for _, row in read_rows(bench.data / C4)]
        yield from documents[:C4_TRAIN] if text == FITTED["C4"] else documents[C4_TRAIN:]
        return
    tokenizer = load_tokenizer(bench.original(0))
    for _, row in list(read_rows(bench.data / INSTRUCTIONS))[-INSTRUCTION_ROWS:]:
        asked = "\n".join(part for part in (row["instruction"], row["input"]) if part)
        chat = [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]
        yield str(tokenizer.apply_chat_template(chat, tokenize=False))


def rows(results: Results) -> list[str]:
    """A table of KL and perplexity by text and test."""
    found = []
    for name in FITTED:
        cell = results.get(f"texts/{name}")
        figures = ["not run", *[""] * (2 * len(TESTED) - 1)]
        if cell is not None:
            figures = [
                f"{cell[f'{test}: {figure}']:.{digits}f}"
                for figure, digits in (("kl", 3), ("ppl@2048", 2))
                for test in TESTED
            ]
        found.append([name, *figures])
    return table(["fitted to", *(f"KL, {test}" for test in TESTED), *(f"ppl, {test}" for test in TESTED)], found)
