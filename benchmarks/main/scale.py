"""What would the job cost on a model that is not here? One block of its shape, random weights, the real job.

Cells: models from 135 million to 70 billion parameters. Each is a directory with one block and a vocabulary of bytes,
fitted to few rows of text; the job runs on it in a process of its own, twice: on short rows, and on rows four times as
long. From both come seconds a block and seconds a token in each stage, and from them those of the whole model, its
embedding and head aside. A minute for the smallest, 40 for the largest.
Alone: `python benchmarks/run.py main.scale --data DATA`
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from harness.bench import TRAIN, Bench
from harness.cells import Cell, Found, seeded
from harness.process import measured
from harness.records import run_fields
from harness.tables import Results, table
from trimbit.measure import variants
from trimbit.pipeline.recipes import load_recipe

SEEDS = (0,)
SHARED_MINUTES = 0.0
FIT_ROWS = 2
ROWS = (f"calibration.rows={FIT_ROWS}", "calibration.held_out=1", "calibration.report=1", "measure.rows=1")
LENGTHS = (128, 512)  # tokens of a row
BITS = 4.5  # the budget, a parameter
SPREAD = 0.02  # of random weights
STAGES = ("moments", "predicted", "corrected", "applied")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The shape of a model's blocks, and how many it has."""

    kind: str
    hidden: int
    mid: int
    heads: int
    kv_heads: int
    head_dim: int
    blocks: int
    minutes: float  # expected for its cell

    @property
    def parameters(self) -> int:
        """Parameters of one block's projections."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.mid


SHAPES = {
    "SmolLM2-135M": Shape(
        kind="llama", hidden=576, mid=1536, heads=9, kv_heads=3, head_dim=64, blocks=30, minutes=1
    ),
    "Llama-3.2-1B": Shape(
        kind="llama", hidden=2048, mid=8192, heads=32, kv_heads=8, head_dim=64, blocks=16, minutes=4
    ),
    "Llama-3-8B": Shape(
        kind="llama", hidden=4096, mid=14336, heads=32, kv_heads=8, head_dim=128, blocks=32, minutes=10
    ),
    "Qwen3-32B": Shape(
        kind="qwen3", hidden=5120, mid=25600, heads=64, kv_heads=8, head_dim=128, blocks=64, minutes=25
    ),
    "Llama-3-70B": Shape(
        kind="llama", hidden=8192, mid=28672, heads=64, kv_heads=8, head_dim=128, blocks=80, minutes=40
    ),
}  # fmt: skip


def cells(bench: Bench, seed: int) -> Iterator[Cell]:
    """One cell for each shape."""
    for name, shape in SHAPES.items():
        yield Cell(
            key=seeded(f"scale/{name}", seed), run=partial(one_block, bench, shape, seed), minutes=shape.minutes,
            seed=seed, texts=(bench.data / TRAIN,),
        )  # fmt: skip


def one_block(bench: Bench, shape: Shape, seed: int) -> Found:
    """Seconds and peak memory of each stage on one block, on short rows and on long ones."""
    found: Found = {"parameters": shape.parameters, "lengths": list(LENGTHS)}
    bench.work.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=bench.work) as folder:
        model = Path(folder) / "model"
        write_model(shape, model, seed)
        _, found["imports"] = measured(["-c", "import trimbit.cli.main, trimbit.pipeline.flow"])
        for length in LENGTHS:
            out, cache = Path(folder) / f"out-{length}", Path(folder) / f"cache-{length}"
            command = ["-m", "trimbit.cli.main", "compress", str(model), str(out), "--budget", f"{BITS}bpw"]
            command += ["--recipe", "knapsack", "--calibration", str(bench.data / TRAIN), "--seed", str(seed)]
            for one in (*ROWS, f"calibration.length={length}", f"measure.length={length}"):
                command += ["--set", one]
            seconds, peak = measured(command, cache)
            found[f"{length} tokens"] = {
                "seconds": round(seconds, 1), "peak_rss_nbytes": peak,
                "cache_nbytes": sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()),
                "stages": run_fields(out)["stages"],
            }  # fmt: skip
    return found


def write_model(shape: Shape, out: Path, seed: int) -> None:
    """Write a model of one block with random weights, in bf16; it reads bytes, so its embedding weighs very little."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    byte_level = Tokenizer(models.BPE({symbol: at for at, symbol in enumerate(alphabet)}, []))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    config = AutoConfig.for_model(
        shape.kind, hidden_size=shape.hidden, intermediate_size=shape.mid, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim, num_hidden_layers=1, vocab_size=len(alphabet),
        tie_word_embeddings=True, initializer_range=SPREAD, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(out)
    PreTrainedTokenizerFast(tokenizer_object=byte_level).save_pretrained(out)


def whole_job(cell: Found, shape: Shape) -> float:
    """Seconds of the whole job on the whole model: what each stage takes a block and a token, times their numbers."""
    recipe = load_recipe("knapsack")
    text, measure = recipe.calibration, recipe.measure
    assert measure is not None
    applied = text.length * (text.rows + text.held_out + text.report)
    tokens = {"moments": text.length * text.rows, "predicted": measure.length * measure.rows, "applied": applied}
    read = {"moments": FIT_ROWS, "predicted": 1, "applied": FIT_ROWS + 2}  # rows here
    total = 0.0
    for stage, (fixed, slope) in stage_seconds(cell).items():
        if stage == "corrected":  # every changed model runs from the change to the end
            total += shape.blocks * (1 + shape.blocks) / 3 * variants.ROWS * (fixed + slope * variants.LENGTH)
        else:
            total += shape.blocks * (fixed + slope * tokens.get(stage, 0) / read.get(stage, 1))
    return total


def stage_seconds(cell: Found) -> dict[str, tuple[float, float]]:
    """For each kind of stage, seconds a block whatever the text, and seconds for each token of a row."""
    sums: list[dict[str, float]] = []
    for length in cell["lengths"]:
        own: dict[str, float] = {}
        for stage in cell[f"{length} tokens"]["stages"]:
            own[stage["stage"]] = own.get(stage["stage"], 0.0) + stage["seconds"]
        sums.append(own)
    (short, long), (few, many) = sums, cell["lengths"]
    slopes = {name: max(0.0, (long[name] - short[name]) / (many - few)) for name in long}
    return {name: (max(0.0, short[name] - slope * few), slope) for name, slope in slopes.items()}


def rows(results: Results) -> list[str]:
    """A table of seconds and memory by model."""
    found = []
    for name, shape in SHAPES.items():
        cell = results.get(f"scale/{name}")
        if cell is None:
            found.append([name, f"{shape.parameters / 1e6:.0f} M", "not run", *[""] * (len(STAGES) + 2)])
            continue
        long = cell[f"{cell['lengths'][-1]} tokens"]
        took = {stage: sum(one["seconds"] for one in long["stages"] if one["stage"] == stage) for stage in STAGES}
        block, peak = 4 * shape.parameters / 2**30, (long["peak_rss_nbytes"] - cell["imports"]) / 2**30
        found.append(
            [
                name, f"{shape.parameters / 1e6:.0f} M", *(f"{seconds:.0f}" for seconds in took.values()),
                f"{peak:.1f}", f"{peak / block:.1f}", f"{whole_job(cell, shape) / 3600:.1f}",
            ]
        )  # fmt: skip
    heads = [*(f"{stage}, s" for stage in STAGES), "peak, GiB", "in blocks of fp32", "whole job, hours"]
    return table(["shape", "a block", *heads], found)
